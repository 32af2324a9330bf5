"""One run of a whole model, tensor by tensor: what a port to another framework is held against.

    trace(model, batch, "ref.safetensors")                     float64: every activation and gradient, by name
    python -m minipeft.conformance compare mine.safetensors ref.safetensors

The file holds, for a loss L = model.loss(**batch):

    X            the output of the part of the model that is called X; what the batch holds, under its keys
    grad/X       dL/dX, of every activation and of every parameter X that leads to the loss
    noise/X      how far X moves per unit of roundoff, one number for each row (X without its last axis)

Names are dotted paths, so X is what a forward hook on the module of that path sees. `i` a layer, S a stack:

    name                                of the T5, the Transformer          in PyTorch, say
    embedding, embedding#2              rows of the table for input_ids,    hook on the embedding, first and second
                                        for the decoder's input             call (#2, #3: an n-th use of one part)
    encoder.input                       what enters the encoder (scaled)    input of the stack
    S.position                          [time, d_model] added to it, or     the table or bias before it is added
                                        T5's [1, heads, query, key] bias
    S.i.attn.q, .k, .v, .o              x W^T + b, heads not yet split      nn.Linear (of a packed one, its thirds)
    S.i.cross.q ...                     decoder: attention to the encoder   the same
    S.i.ff.wi, .wi_0, .wi_1, .wo        x W^T + b, before any activation    nn.Linear
    S.i.attn_norm, .cross_norm, .ff_norm, S.norm                            nn.LayerNorm
    S.i.attn.out, .cross.out, .ff.out   F of the block, with what is        output of the sublayer, before the
                                        plugged there                       residual is added
    S.i                                 the residual stream after block i   output of the block (pre-LN; in post-LN
                                                                            it is that of S.i.ff_norm)
    S.i.attn.memory.k, .v               keys and values where something     past keys and values
                                        is plugged there (prefixes)
    head, logits, loss                  [batch, target, vocab] twice, []    lm_head, logits, loss
    grad/S.i.attn.q.weight              a parameter, [d_out, d_in]          weight.grad
    grad/S.i.attn.q.weight@lora.A       one of an attachment                lora_A.weight.grad

A layer's slots (weight, bias) have no entry of their own: its output is theirs. A module that hands on what a part of
it returned has none either. safetensors keeps no order, so the metadata does: "order", a JSON list of all names but
noise/*, inputs first, then as they were evaluated, then gradients as they became known, backwards.

The noise is measured, no number is typed: the same run in float32, `samples` times, its parameters (and the positions
of sinusoids) times 1 + u xi with u = 2^-24 and xi uniform in [-1, 1], each held against the run in float64:

    noise = max over samples and over a row of |float32 - float64| / u

so that the rounding of every weight and of every operation, forward and backward, is really there. This is
Monte-Carlo arithmetic: D. S. Parker, 1997, UCLA CSD-970002. What is ill-conditioned (a difference of large terms, a
relu at 0) moves far and is allowed to. `compare.py` makes the bound of it.
"""
from __future__ import annotations

import copy
import json
import os
from collections import Counter
from typing import Any, Callable, Iterator, Mapping

import numpy

from minipeft.autograd.tensor import Node, Tensor, Vjp, _observer, array_of, value_and_grad
from minipeft.backend import Array, to_device, to_host
from minipeft.conformance.arithmetic import UNIT
from minipeft.files import write_tensors
from minipeft.nn.module import Module, attachments_of
from minipeft.nn.positions import Sinusoidal
from minipeft.nn.site import Site
from minipeft.nn.weight import Parameter, arrays_of

FORMAT = "minipeft-trace-1"
GRAD, NOISE = "grad/", "noise/"
_U = UNIT["float32"]


def trace(model: Module, batch: Mapping[str, Any], path: str | os.PathLike, *,
          params: Mapping[str, Parameter] | None = None, samples: int = 8) -> None:
    """Write what one `model.loss(**batch)` and its gradients are, tensor by tensor, to a safetensors file.

    A reference is best traced in float64. params: of which parameters gradients are written; None means of all that
    the loss depends on, those of plugged attachments included. samples: runs from which the noise is measured; 0
    leaves it out (the file can then be held against a reference and not be one). The runs are those of copies: no bit
    of the model changes. The samples come from a fixed seed, so a trace is a function of its arguments.

    Raises TypeError for keys that `loss` does not know and for a part of a model; ValueError for a random generator
    in the batch (dropout is not traced), for numbers that are not finite, and whatever `loss` and `value_and_grad`
    raise; nothing is written then."""
    attachments = attachments_of(model)
    if batch.get("rng") is not None:
        raise ValueError("the batch holds an rng: a trace is one of evaluation, where nothing is drawn; leave it out")
    if samples < 0:
        raise ValueError(f"samples is {samples}; expected 0 or more")
    run = _run(model, batch, params)
    tensors = {name: to_host(array) for name, array in run.values.items()}
    for name, array in tensors.items():
        if not numpy.isfinite(array).all():
            raise ValueError(f"{name} holds numbers that are not finite: such a run is no reference")
    if samples:
        exact = run if _dtype(model) == "float64" else _run(model, batch, params, "float64")
        tensors.update(_noise(model, batch, params, samples, exact))
    inputs = {key: to_host(value) for key, value in batch.items()
              if key not in ("adapter", "rng") and value is not None}
    said = {"format": FORMAT, "order": [*inputs, *run.values], "dtype": _dtype(model), "samples": samples,
            "model": type(model).__name__, "config": _plain(model), "adapter": batch.get("adapter"),
            "attachments": {name: attachment.state for name, attachment in attachments.items()}}
    write_tensors(path, {**inputs, **tensors}, {key: value if isinstance(value, str) else json.dumps(value)
                                                for key, value in said.items()})


def _plain(model: Any) -> Any:
    config = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else None


def _dtype(model: Module) -> str:
    """What the model computes in."""
    return str(next(iter(model.base_parameters.values())).dtype)


def _run(model: Any, batch: Mapping[str, Any], params: Mapping[str, Parameter] | None, dtype: str | None = None,
         rng: numpy.random.Generator | None = None) -> "_Run":
    """A copy of the model on the batch, in its own dtype or another, its parameters shaken if there is an rng."""
    chosen = params
    if params is None:
        chosen = dict(model.base_parameters)
        for attachment in model.attachments.values():
            if attachment.state == "plugged":
                chosen.update(attachment.parameters)
    model, chosen = copy.deepcopy((model, dict(chosen or {})))  # together: the copied parameters are the copy's
    if dtype is not None:
        _convert(model, dtype, rng)
    run = _Run()
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


class _Run:
    """values: {name: array}, in the order of evaluation. gradients: as they become known; None marks a parameter's,
    which is the engine's to sum. It stands where its last term arrives."""

    def __init__(self) -> None:
        self.values: dict[str, Array] = {}
        self.gradients: dict[str, Array | None] = {}
        self.known: dict[int, Any] = {}
        self.uses: Counter[str] = Counter()

    def watch(self, model: Any) -> None:
        """Every part of the copy tells what it returned: it gets a class of its own, in which it does."""
        for name, part in list(_parts(model)):
            if isinstance(part, Site):
                _tell(part, "__call__", self._site_of(name, part.kind))
            elif hasattr(part, "__call__"):
                _tell(part, "__call__", self._module_of(name))
            for method in ("embed", "bias"):  # of positions, which are not called
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
            if kind != "memory":
                self.note(name, out if kind == "sublayer" else out[0], backward=True)
            for leaf, after, before in zip("kv", out, stream) if kind == "memory" else ():
                if after is not before:
                    self.note(f"{name}.{leaf}", after, backward=True)
        return tell

    def note(self, name: str, out: Any, backward: bool = False) -> Any:
        self.uses[name] += 1
        name = name if self.uses[name] == 1 else f"{name}#{self.uses[name]}"
        self.values[name] = array_of(out)
        self.known[id(out)] = out
        node = out.node if backward and isinstance(out, Tensor) else None
        if node is not None and node.edges:
            (parent, vjp), *others = node.edges  # each VJP is given the whole gradient: one that tells is enough
            node.edges = [(parent, self._telling(GRAD + name, vjp)), *others]
        return out

    def _telling(self, name: str, vjp: Vjp) -> Vjp:
        def run(g: Array) -> Array:
            self.gradients[name] = g
            return vjp(g)
        return run

    def observe(self, forward: Callable, inputs: tuple, out: Array, vjps: tuple, node: Node | None) -> None:
        """Called by every op: the edges that lead to a parameter (a node without edges) tell of it."""
        if node is not None:
            node.edges = [(parent, vjp if parent.edges else self._arriving(GRAD + parent.op, vjp))
                          for parent, vjp in node.edges]

    def _arriving(self, name: str, vjp: Vjp) -> Vjp:
        def run(g: Array) -> Array:
            self.gradients.pop(name, None)
            self.gradients[name] = None
            return vjp(g)
        return run


def _parts(module: Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every module and site below `module`, with its dotted name (a list adds its index alone)."""
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
    """Positions that a port computed in float32: an angle is known to one unit of roundoff."""

    rng: numpy.random.Generator

    def embed(self, positions: numpy.ndarray) -> Array:
        return super().embed(positions * (1 + _U * self.rng.uniform(-1, 1, positions.shape)))


def _convert(model: Any, dtype: str, rng: numpy.random.Generator | None) -> None:
    """Changes a copy in place: its arrays, and what else it keeps a dtype for, become `dtype`."""
    done: set[int] = set()
    for _, place in model.named_places():
        pieces = [getattr(place, "base", None), *place.attached.values(), *(e.merged for e in place.plugged)]
        for piece in pieces:
            for p in [piece] if isinstance(piece, Parameter) else arrays_of(piece).values() if piece else ():
                if p.data.dtype.kind == "f" and id(p) not in done:
                    done.add(id(p))
                    array = to_host(p.data).astype("float64")
                    if rng is not None:
                        array *= 1 + _U * rng.uniform(-1, 1, array.shape)
                    p.data = to_device(array.astype(dtype))
    for _, part in list(_parts(model)):
        for attribute, value in vars(part).items():
            if isinstance(value, numpy.dtype):
                setattr(part, attribute, numpy.dtype(dtype))
        if isinstance(part, Sinusoidal) and rng is not None:
            part.__class__, part.rng = _Shaken, rng  # type: ignore[attr-defined]


def _noise(model: Any, batch: Mapping[str, Any], params: Mapping[str, Parameter] | None, samples: int,
           exact: _Run) -> dict[str, numpy.ndarray]:
    """{noise/X: [...]}: the furthest that a row of X moved in any sample, per unit of roundoff."""
    noise = {name: numpy.zeros(value.shape[:-1], numpy.float32) for name, value in exact.values.items()}
    rng = numpy.random.default_rng(0)
    for _ in range(samples):
        run = _run(model, batch, params, "float32", rng)
        for name, most in noise.items():
            moved = abs(to_host(run.values[name]) - to_host(exact.values[name])) / _U
            if not numpy.isfinite(moved).all():
                raise ValueError(f"{name} overflows in float32: no noise can be measured")
            numpy.maximum(most, moved.max(axis=-1) if moved.ndim else moved, out=noise[name])
    return {NOISE + name: most for name, most in noise.items()}
