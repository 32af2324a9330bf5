"""Records one run of a copy of a model: every named tensor, in order, and the gradients as they become known.

It is a copy so that the model itself cannot change. Each module and site of the copy gets a class of its own, whose
calls report their results; an observer sees every op; the edges of nodes report the gradients that pass. A copy may
compute in another dtype, and may be shaken: parameters and results times 1 + u xi, xi uniform in [-1, 1].
"""
from __future__ import annotations

import copy
from collections import Counter
from typing import Any, Callable, Iterator, Mapping

import numpy

from minipeft.engine.tensor import Node, Tensor, Vjp, _observer, array_of, value_and_grad
from minipeft.backend import Array, to_device, to_host, xp
from minipeft.conformance.arithmetic import UNIT
from minipeft.nn.module import Module
from minipeft.nn.positions import Sinusoidal
from minipeft.nn.site import Site
from minipeft.nn.weight import Parameter

GRAD = "grad/"
_U = UNIT["float32"]


def record(model: Any, batch: Mapping[str, Any], params: Mapping[str, Parameter] | None, dtype: str | None = None,
           shake: "Shake | None" = None, moved: Mapping[str, Array] | None = None) -> "Run":
    """Run a copy of the model on the batch, forward and backward.

    params: those whose gradients are recorded; None takes all that the loss depends on, those of plugged attachments
    included. dtype: to which the copy is converted; None keeps its own. shake: multiplies parameters and results by
    random factors; None leaves them. moved: {X: array}; it is added to the input X of a relu for the decision whether
    its derivative is 0 or 1."""
    chosen = params
    if params is None:
        chosen = dict(model.base_parameters)
        for attachment in model.attachments.values():
            if attachment.state == "plugged":
                chosen.update(attachment.parameters)
    model, chosen = copy.deepcopy((model, dict(chosen or {})))  # together, so that `chosen` belongs to the copy
    if dtype is not None:
        convert(model, dtype, shake)
    run = Run(shake, moved or {})
    run.watch(model)
    token = _observer.set(run.observe)
    try:
        grads = value_and_grad(lambda: run.note("loss", model.loss(**batch)), chosen,
                               "zeros" if params is None else "raise")[1]
    finally:
        _observer.reset(token)
    run.values.update({name: value if value is not None else grads[name.removeprefix(GRAD)]
                       for name, value in run.gradients.items()})
    return run


class Shake:
    """x -> x (1 + u xi), xi uniform in [-1, 1] and drawn from `rng`."""

    def __init__(self, u: float, rng: numpy.random.Generator):
        self.u, self.rng = u, rng

    def __call__(self, x: Array, u: float = 0.0) -> Array:
        """x, of any shape, shaken by `u`, or by the Shake's own u if `u` is 0. The largest number of the dtype, which
        stands for masked scores, does not overflow."""
        factor = to_device(1 + (u or self.u) * self.rng.uniform(-1, 1, x.shape))
        most = float(xp.finfo(x.dtype).max)
        return xp.clip(x * factor, -most, most).astype(x.dtype)


class Run:
    """The record of one run. shake, moved: as in `record`.

    values: {name: array}, in the order of evaluation. gradients: {name: array} in the order in which they become known;
    a parameter's is None, since the engine sums it, and stands where its last term arrives. decided: the names of the
    inputs of relus."""

    def __init__(self, shake: Shake | None, moved: Mapping[str, Array]) -> None:
        self.moved = moved
        self.decided: set[str] = set()
        self.shake = shake if shake is not None and shake.u > _U else None  # in float32 the run itself rounds
        self.values: dict[str, Array] = {}
        self.gradients: dict[str, Array | None] = {}
        self.known: dict[int, tuple[str, Any]] = {}  # by id(), valid as long as the object is kept
        self.uses: Counter[str] = Counter()

    def watch(self, model: Any) -> None:
        """Makes every part of the copy `model` report its results, by giving it a class of its own that does."""
        for name, part in list(_parts(model)):
            if isinstance(part, Site):
                _tell(part, "__call__", self._site_of(name, part.kind))
            elif hasattr(part, "__call__"):
                _tell(part, "__call__", self._module_of(name))
            for method in ("embed", "bias"):  # positions have these instead of __call__
                if callable(getattr(part, method, None)):
                    _tell(part, method, self._module_of(name))
        _tell(model, "__call__", lambda out, _: self.note("logits", out, backward=True))

    def _module_of(self, name: str) -> Callable:
        def tell(out: Any, _: tuple) -> None:
            if hasattr(array_of(out), "dtype") and id(out) not in self.known:
                self.note(name, out, backward=True)
        return tell

    def _site_of(self, name: str, kind: str) -> Callable:
        def tell(out: Any, stream: tuple) -> None:
            if kind != "keys_values":
                self.note(name, out if kind == "sublayer" else out[0], backward=True)
            for leaf, after, before in zip("kv", out, stream) if kind == "keys_values" else ():
                if after is not before:
                    self.note(f"{name}.{leaf}", after, backward=True)
        return tell

    def note(self, name: str, out: Any, backward: bool = False) -> Any:
        """Records `out`, of any shape, under `name`, with #2, #3, ... for a later use of one part. backward: whether to
        record its gradient too. Returns `out`."""
        self.uses[name] += 1
        name = name if self.uses[name] == 1 else f"{name}#{self.uses[name]}"
        self.values[name] = array_of(out)
        self.known[id(out)] = name, out
        node = out.node if backward and isinstance(out, Tensor) else None
        if node is not None and node.edges:
            (parent, vjp), *others = node.edges  # every VJP gets the whole gradient, so one suffices
            node.edges = [(parent, self._telling(GRAD + name, vjp)), *others]
        return out

    def _telling(self, name: str, vjp: Vjp) -> Vjp:
        def run(g: Array) -> Array:
            self.gradients[name] = g
            return vjp(g)
        return run

    def observe(self, forward: Callable, inputs: tuple, out: Array, vjps: tuple, node: Node | None) -> None:
        """Called by every op `forward` with its inputs, its result `out`, the VJPs and the node of the result.

        The edges to a parameter (a node without edges) report its gradient. A result that is not a view of an input is
        shaken in place: nobody has used it yet."""
        given = [array for array in map(array_of, inputs) if isinstance(array, type(out))]
        if self.shake is not None and not any(xp.may_share_memory(out, array) for array in given):
            out[...] = self.shake(out)
        if node is not None:
            if forward.__name__ == "relu" and id(inputs[0]) in self.known:
                self._decide(inputs[0].data, self.known[id(inputs[0])][0], node)
            node.edges = [(parent, self._arriving(parent, vjp)) for parent, vjp in node.edges]

    def _decide(self, x: Array, name: str, node: Node) -> None:
        self.decided.add(name)
        if name in self.moved:
            positive = x + self.moved[name] > 0
            node.edges = [(parent, lambda g: g * positive) for parent, _ in node.edges]

    def _arriving(self, parent: Node, vjp: Vjp) -> Vjp:
        name = None if parent.edges else GRAD + parent.op

        def run(g: Array) -> Array:
            if name is not None:
                self.gradients.pop(name, None)
                self.gradients[name] = None
            term = vjp(g)
            return term if self.shake is None or term is g else self.shake(xp.asarray(term))
        return run


def _parts(module: Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every module and site below `module`, with its dotted name (for a list, the index)."""
    for attribute, value in vars(module).items():
        for name, part in enumerate(value) if isinstance(value, list) else [(attribute, value)]:
            if isinstance(part, (Module, Site)):
                yield f"{prefix}{name}", part
            if isinstance(part, Module):
                yield from _parts(part, f"{prefix}{name}.")


def _tell(part: Any, method: str, tell: Callable[[Any, tuple], Any]) -> None:
    kind = type(part)

    def told(self: Any, *inputs: Any, **options: Any) -> Any:
        out = getattr(kind, method)(self, *inputs, **options)
        tell(out, inputs)
        return out

    part.__class__ = type(kind.__name__, (kind,), {method: told})


class _Shaken(Sinusoidal):
    """A table of sinusoids as a port may compute it: its angles are off by float32's roundoff, its entries by u."""

    shake: Shake

    def embed(self, positions: numpy.ndarray) -> Array:
        return self.shake(super().embed(self.shake(positions.astype("float64"), _U)))


def convert(model: Any, dtype: str, shake: Shake | None) -> None:
    """Converts a copy in place: its arrays, and every dtype that its parts store, become `dtype`. shake: applied to the
    arrays before; None leaves them."""
    done: set[int] = set()
    for _, place in model.named_places():
        for piece in place.pieces():
            for p in getattr(piece, "arrays", {}).values():
                if p.data.dtype.kind == "f" and id(p) not in done:
                    done.add(id(p))
                    array = to_host(p.data).astype("float64")
                    p.data = to_device((array if shake is None else shake(array)).astype(dtype))
    for _, part in list(_parts(model)):
        for attribute, value in vars(part).items():
            if isinstance(value, numpy.dtype):
                setattr(part, attribute, numpy.dtype(dtype))
        if isinstance(part, Sinusoidal) and shake is not None:
            part.__class__, part.shake = _Shaken, shake  # type: ignore[attr-defined]
