"""minipeft itself as a plug-in: `attach(LoRA(...))`, and one call of its training loop for every step.

The loop refuses a step without tokens. minipeft's only optimizer is AdamW, so plain SGD is written here, for the same
loop. The saved state is a checkpoint of the loop.
"""
from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy

from minipeft.engine.tensor import Tensor
from minipeft.nn.layers import Linear
from minipeft.nn.module import Model
from minipeft.nn.weight import Parameter
from minipeft.engine.ops import mul, sub
from minipeft.engine.ops import sum as total
from minipeft.attaching.attach import attach, put
from minipeft.attaching.attachment import Attachment
from minipeft.methods.lora import LoRA, LowRank
from minipeft.train import checkpoint as checkpoints
from minipeft.train.data import IGNORE, Batches
from minipeft.train.loop import fit
from minipeft.train.optim import AdamW
from minipeft.train.schedule import Schedule, constant, cosine_decay, linear_decay
from minipeft.train.saved import checked
from minipeft.train.state import State

Array = numpy.ndarray
capabilities = {"name": "minipeft", "dtypes": ["float64", "float32"]}
PLACE = "layer.weight"


class Regression(Model):
    """A whole model: a linear layer. Its loss is half the squared error, averaged over the rows whose label counts."""

    def __init__(self, W: Array, b: Array):
        self.layer = Linear(W, b)

    def loss(self, x: Array, t: Array, labels: Array, rng: Any = None) -> Tensor:
        """x [n, in], t [n, out], labels [n]: 0, or IGNORE for padding."""
        counted = (labels != IGNORE).astype(x.dtype)
        error = sub(self.layer(x, rng), t)
        return total(mul(mul(error, error), (counted / (2 * counted.sum()))[:, None]))


class Given(Batches):
    """The micro-batches of one step, in the order given."""

    batches_before = None  # type: ignore[assignment]

    def __init__(self, batches: Sequence[dict[str, Array]]):
        self.batches, self.position = list(batches), 0

    def next(self) -> dict[str, Array]:
        self.position += 1
        return self.batches[self.position - 1]

    def state(self) -> dict[str, int]:
        return {"epoch": 0, "position": self.position}

    def load_state(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]


class Sgd(AdamW):
    """p = p - lr decay p - lr g."""

    def step(self, params: Mapping[str, Any], grads: Mapping[str, Array], lr: float | None = None,
             scale: float = 1.0) -> None:
        rate, decayed = self.lr if lr is None else lr, set(self.decayed(params))
        for name, p in params.items():
            p.data *= 1 - rate * (self.weight_decay if name in decayed else 0)
            p.data -= (grads[name] if scale == 1 else grads[name] * scale) * rate


class Training:
    """The handle. `--list --method lora_training` describes its calls."""

    def __init__(self, W: Array, b: Array, A: Array, B: Array, alpha: float, dtype: str, optimizer: Mapping[str, Any]):
        if A.shape != (len(A), W.shape[1]) or B.shape != (W.shape[0], len(A)):
            raise ValueError(f"A {A.shape} and B {B.shape} do not fit W {W.shape}")
        self.dtype, self.settings, self.t = dtype, dict(optimizer), 0
        self.model = Regression(W.astype(dtype), b.astype(dtype))
        self.params = self._attach(alpha, len(A)).parameters
        for leaf, array in (("A", A), ("B", B)):
            self.params[f"{PLACE}@lora.{leaf}"].data = array.astype(dtype)
        self.optimizer, self.schedule = _optimizer(optimizer), _schedule(optimizer["schedule"])
        self.line = {"grad_norm": math.nan, "lr": math.nan}  # of the loop's log

    def _attach(self, alpha: float, r: int) -> Attachment:
        slot, method = self.model.layer.weight, LoRA(rank=r, alpha=alpha, where=f"^{PLACE}$")
        if r <= min(slot.base.shape):
            return attach(self.model, method, numpy.random.default_rng(0), "lora")
        A, B = (Parameter(numpy.zeros(shape, self.dtype)) for shape in ((r, slot.shape[1]), (slot.shape[0], r)))
        piece = LowRank(A=A, B=B, scale=Fraction(alpha) / r, p=0.0)  # LoRA refuses what cannot pay; the equations hold
        own = {f"{PLACE}.A": A, f"{PLACE}.B": B}
        put(self.model, [forced := Attachment(self.model, "lora", method, {PLACE: slot}, {PLACE: piece}, own)])
        return forced

    def step(self, micro_batches: Sequence[tuple[Array, Array, Array]]) -> float:
        given = Given([self._batch(*micro) for micro in micro_batches])
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log.jsonl"
            fit(self.model, self.params, given, steps=1, optimizer=self.optimizer, clip=self.settings["clip"],
                schedule=lambda _: self.schedule(self.t + 1), accumulate=len(micro_batches), dropout=False, log=log,
                progress=False)
            self.line = json.loads(log.read_text())
        self.t += 1
        return float(self.line["loss"])

    def _batch(self, x: Array, t: Array, w: Array) -> dict[str, Array]:
        d_out, d_in = self.model.layer.weight.base.shape
        if x.shape != (len(w), d_in) or t.shape != (len(w), d_out):
            raise ValueError(f"x {x.shape}, t {t.shape} and w {w.shape} do not fit W {(d_out, d_in)}")
        return {"x": x.astype(self.dtype), "t": t.astype(self.dtype), "labels": numpy.where(w == 0, IGNORE, 0)}

    def weights(self) -> dict[str, Array]:
        base = self.model.state()
        named = {"W": base["layer.weight"], "b": base["layer.bias"], **self._leaves(
            {name: p.data for name, p in self.params.items()})}
        return {name: array.astype(numpy.float64) for name, array in named.items()}

    def moments(self) -> dict[str, Array]:
        return {f"{kind}.{leaf}": a.astype(numpy.float64) for kind in ("m", "v")
                for leaf, a in self._leaves(getattr(self.optimizer, kind)).items()}

    def _leaves(self, named: Mapping[str, Array]) -> dict[str, Array]:
        return {name.rpartition(".")[2]: array for name, array in named.items()}

    def grad_norm(self) -> float:
        return self.line["grad_norm"]

    def lr(self) -> float:
        return self.line["lr"]

    def _state(self) -> State:
        state = State(self.params, self.optimizer, Given([]), None)
        state.record = dataclasses.replace(state.record, step=self.t, micro=self.t)
        return state

    def state(self) -> bytes:
        state = self._state()
        with tempfile.TemporaryDirectory() as folder:
            checkpoints.write(Path(folder) / "run", state.arrays(), state.counters(), {})
            return (Path(folder) / "run").read_bytes()

    def load_state(self, blob: bytes) -> None:
        state = self._state()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "run").write_bytes(blob)
            saved = checkpoints.read(Path(folder) / "run")
        start = {"parameters": "", "batches": {}, "steps": {}}
        state.restore(checked(saved, start, self.params, self.optimizer, state.batches, None))
        self.t = state.record.step


def _optimizer(o: Mapping[str, Any]) -> AdamW:
    if o["name"] == "adamw":
        return AdamW(o["lr"], tuple(o["betas"]), o["eps"], o["weight_decay"])
    if o["name"] == "sgd":
        return Sgd(o["lr"], weight_decay=o["weight_decay"])
    raise ValueError(f"optimizer {o['name']!r}; expected 'adamw' or 'sgd'")


def _schedule(s: Mapping[str, Any]) -> Schedule:
    kinds = {"linear": linear_decay, "cosine": cosine_decay}
    if s["kind"] == "constant":
        return constant()
    if s["kind"] not in kinds:
        raise ValueError(f"schedule {s['kind']!r}; expected 'constant', 'linear' or 'cosine'")
    return kinds[s["kind"]](s["steps"], s["warmup"])


def lora_training(W: Array, b: Array, A: Array, B: Array, alpha: float, dtype: str, *,
                  optimizer: Mapping[str, Any]) -> Training:
    """The factory: a layer W [out, in], b [out] with LoRA of A [r, in], B [out, r], trained by this optimizer (see
    `batches.settings`). Raises ValueError for arrays that do not fit, and for an unknown optimizer or schedule."""
    return Training(W, b, A, B, alpha, dtype, optimizer)
