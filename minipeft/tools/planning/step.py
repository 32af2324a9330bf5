"""One training step on hollow arrays: the library's own forward and backward pass, and the memory of both.

    load        the weights, and the file that they are read from
    quantize    the float weights, and the codes that take their place one matrix after the other
    forward     weights + adapter + optimizer + what the forward has made so far
    backward    the same + gradients
    optimizer   weights + adapter + optimizer + gradients + its blocks of scratch

The step is the one of `value_and_grad`. Formulas estimate only the parts that lie outside of it: loading, quantizing,
the optimizer's states, and checkpointing.
"""
from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy

from minipeft.attaching.attach import put
from minipeft.attaching.attachment import Attachment
from minipeft.attaching.build import wanted
from minipeft.attaching.method import Method
from minipeft.backend import use, xp
from minipeft.engine.ops import cross_entropy
from minipeft.engine.tensor import Tensor, _observer, array_of, op, value_and_grad
from minipeft.models.t5 import T5
from minipeft.tools.hollow.array import HollowArray
from minipeft.tools.hollow.ledger import TEMPORARY, Ledger
from minipeft.tools.hollow.namespace import Hollow
from minipeft.tools.planning.configs import Config, built
from minipeft.tools.planning.loading import cast_rest, loaded, quantize, streamed
from minipeft.tools.planning.purposes import (
    ACTIVATIONS, ADAPTER, CASTS, GRADIENTS, LOGITS, MASTER, PURPOSES, SCORES, STATE, WEIGHTS)
from minipeft.tools.planning.settings import STATES, Settings
from minipeft.train.update import BLOCK

SCRATCH = 5  # blocks of the optimizer's update (train/update.py)


@dataclasses.dataclass(frozen=True)
class Step:
    """The memory of a step. trained: how many numbers are trained. base: how many the model has. file: bytes of the
    adapter's file, or of the whole model's. phases: {phase: {purpose: bytes}}, each at its own peak, in order."""

    trained: int
    base: int
    file: int
    phases: dict[str, dict[str, int]]

    @property
    def totals(self) -> dict[str, int]:
        """{phase: bytes}."""
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak(self) -> int:
        """The most bytes, over all phases."""
        return max(self.totals.values())

    @property
    def at(self) -> str:
        """The phase of the peak."""
        return max(self.totals, key=lambda phase: self.totals[phase])

    @property
    def training(self) -> str:
        """The phase of the step itself, after loading and quantizing, that takes most."""
        return max(("forward", "backward", "optimizer"), key=lambda phase: self.totals[phase])

    @property
    def beside(self) -> int:
        """The bytes of that phase beside the weights and the adapter."""
        return sum(n for purpose, n in self.phases[self.training].items() if purpose not in (WEIGHTS, ADAPTER))


def planned(config: Config, method: Method | None, s: Settings) -> Step:
    """The memory of a step of training `config` by `method` (None: in full) under the settings s. Raises ValueError
    where the method, or a pattern, does not fit the model."""
    ledger = Ledger()
    if s.dropout is not None:
        config = dataclasses.replace(config, dropout_rate=float(s.dropout))
    with use(Hollow(ledger)):
        ready = _Ready(config, method, s)
        trained = sum(p.data.size for p in ready.params.values())
        master = 4 * trained if s.master and s.array_dtype != "float32" else 0
        fixed = {WEIGHTS: sum(p.data.nbytes for p in ready.model.base_arrays.values()) - ready.casts,
                 ADAPTER: sum(a.nbytes for a in ready.own.values()), MASTER: master,
                 STATE: round(STATES[s.optimizer] * trained), CASTS: ready.casts}
        gradients = sum(p.data.nbytes for p in ready.params.values())
        if s.checkpointing:
            forward, backward = _checkpointed(config, method, s, ledger, gradients)
        else:
            forward, backward = _run(config, ready, ledger, s)
        largest = max(p.data.size for p in ready.params.values())
        optimizer = {GRADIENTS: gradients, TEMPORARY: SCRATCH * 4 * min(BLOCK, largest)}
        phases = dict(ready.loading)
        for phase, found in (("forward", forward), ("backward", backward), ("optimizer", optimizer)):
            total = {purpose: fixed.get(purpose, 0) + found.get(purpose, 0) for purpose in PURPOSES}
            phases[phase] = {purpose: n for purpose, n in total.items() if n}
        return Step(trained, ready.numbers, _file(ready.own or ready.base), phases)


class _Ready:
    """A hollow model, quantized and with its adapter, ready for a step. base: {name: array} before it was quantized;
    own: of the adapter; params: what is trained; numbers: of the base; loading: {phase: {purpose: bytes}}; casts: the
    bytes that casts to float32 add."""

    def __init__(self, config: Config, method: Method | None, s: Settings):
        self.model = model = built(config, s.array_dtype)
        self.base = {name: p.data for name, p in model.base_parameters.items()}
        self.numbers = sum(a.size for a in self.base.values())
        self.loading = loaded(self.base, s)
        self.casts, self.own, self.params = 0, {}, model.base_parameters
        if method is None:
            return
        if s.quantize is not None:
            self.loading |= quantize(model, s)
            if s.streaming:
                self.loading = streamed(model, self.base)
            self.casts = cast_rest(model, s)
        attachment = attached(model, method)
        self.own = {name: a.data for name, a in attachment.arrays.items()}
        self.params = attachment.parameters


def _checkpointed(config: Config, method: Method | None, s: Settings, ledger: Ledger, gradients: int
                  ) -> tuple[dict[str, int], dict[str, int]]:
    """With checkpointing, one block of each stack is alive at a time, and of the others only the input. So this is the
    step of a model with one block in each stack, with the inputs of the others and all gradients. For a T5
    this is a little too much, because only one of its two blocks is alive at a time."""
    depths = {name: getattr(config, name) for name in ("num_layers", "num_decoder_layers") if hasattr(config, name)}
    changes: dict[str, Any] = dict.fromkeys(depths, 1)
    shallow: Config = dataclasses.replace(config, **changes)
    forward, backward = _run(shallow, _Ready(shallow, method, s), ledger, s)
    prompt = getattr(method, "length", 0) if method is not None and "input" in method.kinds else 0
    times = [s.source + prompt, s.target] if len(depths) == 2 else [s.source + s.target + prompt]
    width = 4 if s.array_dtype == "float32" or s.cast_rest else 2
    inputs = sum((n - 1) * s.batch * time * config.d_model * width for n, time in zip(depths.values(), times))
    for part in (forward, backward):
        part[ACTIVATIONS] = part.get(ACTIVATIONS, 0) + inputs
    return forward, {**backward, GRADIENTS: gradients}


def attached(model: Any, method: Method) -> Attachment:
    """The method attached to a hollow model: as `attach` does it, but nothing is drawn. Raises ValueError where it does
    not fit."""
    plan = wanted(model, method)
    pieces, arrays = plan.built(lambda key, declared, dtype: xp.empty(declared.shape, dtype))
    attachment = Attachment(model, "planned", method, plan.places, pieces, arrays)
    put(model, [attachment])
    return attachment


def _file(arrays: dict[str, Any]) -> int:
    """The bytes of a safetensors file of these arrays, without its metadata."""
    header, end = {}, 0
    for name, a in arrays.items():
        header[name] = {"dtype": "F32", "shape": list(a.shape), "data_offsets": [end, end + a.nbytes]}
        end += a.nbytes
    return 8 + len(json.dumps(header, separators=(",", ":"))) + end


def _run(config: Config, ready: _Ready, ledger: Ledger, s: Settings) -> tuple[dict[str, int], dict[str, int]]:
    """{purpose: bytes} at the peak of the forward, and at that of the backward, beyond what was there before."""
    before, start = set(ledger.alive), len(ledger.events)
    ends: list[int] = []
    seen = _Seen(ledger, config)

    def step() -> Tensor:
        loss = _loss(ready.model, s)
        ends.append(len(ledger.events))
        return loss

    token = _observer.set(seen.observe)
    try:
        _, gradients = value_and_grad(step, ready.params, unused="zeros", training=False)
    finally:
        _observer.reset(token)
    end = len(ledger.events)
    ledger.purpose |= {g.memory.number: GRADIENTS for g in gradients.values()}
    return ledger.peak(start, ends[0], before), ledger.peak(ends[0], end, before)


def _loss(model: Any, s: Settings) -> Tensor:
    """The loss of a batch, with dropout wherever model or method have a rate: of `target` labels for each row of a T5,
    and of source + target tokens for a decoder."""
    rng = NoNumbers()
    if isinstance(model, T5):
        logits = model(_ids(s.batch, s.source), _ids(s.batch, s.target), rng=rng)
    else:
        logits = model(xp.asarray(_ids(s.batch, s.source + s.target)), rng=rng)
    labels = xp.empty(logits.shape[:2], "int64")
    return cross_entropy(as_float32(logits) if logits.dtype.itemsize == 2 else logits, labels)


def _ids(batch: int, time: int) -> Any:
    return numpy.broadcast_to(numpy.zeros((), "int64"), (batch, time))  # takes no memory, however many there are


@op
def as_float32(x):
    """x in float32, of the same shape;   dx = g in the dtype of x."""
    return x.astype("float32"), (lambda g: g.astype(x.dtype),)


class NoNumbers(numpy.random.Generator):
    """A generator that draws hollow arrays: dropout's masks take their memory, and no numbers are made."""

    def __init__(self) -> None:
        super().__init__(numpy.random.default_rng(0).bit_generator)

    def random(self, size: Any = None, dtype: Any = numpy.float64, out: Any = None) -> HollowArray:  # type: ignore
        """[*size] in this dtype; `out` is not used."""
        return xp.empty(size, dtype)


class _Seen:
    """Notes the purpose of the memory that an op leaves behind."""

    def __init__(self, ledger: Ledger, config: Config):
        self.ledger, self.vocab, self.heads, self.next = ledger, config.vocab_size, config.num_heads, len(ledger.sizes)

    def observe(self, forward: Any, inputs: tuple, out: Any, vjps: tuple, node: Any) -> None:
        """Called by every op at its end. Memory that it made and that is still alive is its output, or kept for its
        VJPs."""
        scores, logits = math.inf, forward.__name__ == "cross_entropy" or out.shape[-1:] == (self.vocab,)
        if forward.__name__ == "attention":
            q, k = (array_of(x) for x in inputs[:2])
            scores = q.shape[0] * self.heads * q.shape[1] * k.shape[1] * q.itemsize
        for number in range(self.next, len(self.ledger.sizes)):
            if number in self.ledger.alive:
                size = self.ledger.sizes[number]
                self.ledger.purpose[number] = (SCORES if size >= scores else ACTIVATIONS if size < self.vocab else
                                               CASTS if forward.__name__ == "as_float32" else
                                               LOGITS if logits else ACTIVATIONS)
        self.next = len(self.ledger.sizes)
