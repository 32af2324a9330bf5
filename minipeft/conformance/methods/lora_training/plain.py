"""LoRA trained in plain NumPy, written as anybody would write a plug-in; the mutants are planted in it."""
from __future__ import annotations

import math
from typing import Any, Mapping, Sequence

import numpy
import safetensors.numpy

from minipeft.conformance.emulated import Emulated

Array = numpy.ndarray
Micro = tuple[Array, Array, Array]


class LoraTraining:
    """A layer W [out, in], b [out] with LoRA of A [r, in], B [out, r], which `step` trains. optimizer: see
    `batches.settings`.

    `--list --method lora_training` describes the calls of the kit. Every part that a mutant changes is a method of its
    own. Raises ValueError as `check` does."""

    def __init__(self, W: Array, b: Array, A: Array, B: Array, alpha: float, dtype: str, *,
                 optimizer: Mapping[str, Any]):
        check(W, b, A, B, alpha, optimizer)
        self.e, self.W, self.b = Emulated(dtype), W.copy(), b.copy()
        self.p = {"A": A.copy(), "B": B.copy()}
        self.o, self.scale, self.t = dict(optimizer), alpha / len(A), 0
        self.m = {name: numpy.zeros_like(p) for name, p in self.p.items()} if self.o["name"] == "adamw" else {}
        self.v = {name: numpy.zeros_like(p) for name, p in self.m.items()}
        self.norm = self.rate = math.nan

    def step(self, micro_batches: Sequence[Micro]) -> float:
        """One step over micro-batches (x [n, in], t [n, out], w [n]). Returns the loss before it. Raises ValueError for
        arrays that do not fit, and where no token counts."""
        for x, t, w in micro_batches:
            if x.shape != (len(w), self.W.shape[1]) or t.shape != (len(w), self.W.shape[0]):
                raise ValueError(f"x {x.shape}, t {t.shape} and w {w.shape} do not fit W {self.W.shape}")
        if self.tokens(micro_batches) == 0:
            raise ValueError("no token of this step counts: there is no mean")
        loss, grads = self.accumulated(micro_batches)
        self.t += self.ticks(micro_batches)
        self.norm, self.rate = self.norm_of(grads), self.o["lr"] * self.factor(self.t)
        self.update(self.clipped(grads))
        return loss

    def tokens(self, micro_batches: Sequence[Micro]) -> float:
        """How many tokens count."""
        return sum(float(w.sum()) for _, _, w in micro_batches)

    def ticks(self, micro_batches: Sequence[Micro]) -> int:
        """By how much t grows at a step."""
        return 1

    def accumulated(self, micro_batches: Sequence[Micro]) -> tuple[float, dict[str, Array]]:
        """The mean loss over all tokens, and its gradients."""
        total, loss = self.tokens(micro_batches), 0.0
        grads = {name: numpy.zeros_like(p) for name, p in self.p.items()}
        for x, t, w in micro_batches:
            one, found = self.sums(x, t, w)
            loss += one
            grads = {name: self.e.r(grads[name] + found[name]) for name in grads}
        return loss / total, {name: self.e.r(g / total) for name, g in grads.items()}

    def sums(self, x: Array, t: Array, w: Array) -> tuple[float, dict[str, Array]]:
        """The loss and its gradients, summed over the tokens of a micro-batch."""
        A, B, r, mm = self.p["A"], self.p["B"], self.e.r, self.e.mm
        low = mm(x, A.T)                                                               # [n, r]
        y = r(r(mm(x, self.W.T) + self.b) + r(self.scale * mm(low, B.T)))
        g = r(w[:, None] * r(y - t))                                                   # [n, out]
        return float(0.5 * (g * g).sum()), {"A": r(self.scale * mm(mm(g, B).T, x)), "B": r(self.scale * mm(g.T, low))}

    def norm_of(self, grads: Mapping[str, Array]) -> float:
        """The norm over all gradients together."""
        return math.sqrt(sum(float((g * g).sum()) for g in grads.values()))

    def clipped(self, grads: dict[str, Array]) -> dict[str, Array]:
        """The gradients, scaled down if `self.norm` exceeds the limit."""
        clip = self.o["clip"]
        if clip is None or self.norm <= clip:
            return grads
        return {name: self.e.r(g * (clip / self.norm)) for name, g in grads.items()}

    def factor(self, t: int) -> float:
        """The schedule's factor of the learning rate at step t = 1, 2, ..."""
        kind, warmup, steps = (self.o["schedule"][name] for name in ("kind", "warmup", "steps"))
        if kind == "constant":
            return 1.0
        gone = min(max(t - 1 - warmup, 0) / (steps - warmup), 1.0)
        return self.warm(t, warmup) * (1 - gone if kind == "linear" else (1 + math.cos(math.pi * gone)) / 2)

    def warm(self, t: int, warmup: int) -> float:
        """The factor of the warm-up."""
        return min(t / warmup, 1.0) if warmup else 1.0

    def update(self, grads: dict[str, Array]) -> None:
        """The optimizer's step on the clipped gradients."""
        for name, g in grads.items():
            self.p[name] = self.e.r(self.decayed(name, self.p[name]) - self.rate * self.direction(name, g))

    def decayed(self, name: str, p: Array) -> Array:
        """p after the weight decay."""
        return self.e.r(p * (1 - self.rate * self.o["weight_decay"]))

    def direction(self, name: str, g: Array) -> Array:
        """The direction of a step, which the rate multiplies; it updates the moments of the array `name`."""
        if self.o["name"] == "sgd":
            return g
        (b1, b2), r = self.betas(), self.e.r
        self.m[name] = r(b1 * self.m[name] + (1 - b1) * g)
        self.v[name] = r(b2 * self.v[name] + (1 - b2) * (g * g))
        return r(self.ratio(*self.corrected(self.m[name], self.v[name], self.t)))

    def betas(self) -> tuple[float, float]:
        """(beta1, beta2)."""
        return tuple(self.o["betas"])

    def corrected(self, m: Array, v: Array, t: int) -> tuple[Array, Array]:
        """m and v without their bias."""
        b1, b2 = self.betas()
        return m / (1 - b1 ** t), v / (1 - b2 ** t)

    def ratio(self, m: Array, v: Array) -> Array:
        """m / (sqrt(v) + eps)."""
        return m / (numpy.sqrt(v) + self.o["eps"])

    def weights(self) -> dict[str, Array]:
        """{"A", "B", "W", "b": array}."""
        return {**self.p, "W": self.W, "b": self.b}

    def moments(self) -> dict[str, Array]:
        """{"m.A", "m.B", "v.A", "v.B": array}; {} under SGD."""
        return {f"{kind}.{name}": a for kind, of in (("m", self.m), ("v", self.v)) for name, a in of.items()}

    def grad_norm(self) -> float:
        """The norm of the last step's gradient, before clipping."""
        return self.norm

    def lr(self) -> float:
        """The learning rate of the last step."""
        return self.rate

    def state(self) -> bytes:
        """Weights, moments and step as the bytes of a file."""
        kept = {f"p.{name}": p for name, p in self.p.items()} | self.moments() | {"t": numpy.array(self.t)}
        return safetensors.numpy.save(kept)

    def load_state(self, blob: bytes) -> None:
        """Continues from a file that `state` gave."""
        found = safetensors.numpy.load(blob)
        self.t = int(found["t"])
        for prefix, of in (("p", self.p), ("m", self.m), ("v", self.v)):
            for name in of:
                of[name] = found[f"{prefix}.{name}"]


def check(W: Array, b: Array, A: Array, B: Array, alpha: float, o: Mapping[str, Any]) -> None:
    """Raises ValueError for arrays that do not fit, and for settings of another kind or out of their range. o: the
    optimizer."""
    (d_out, d_in), r = W.shape, len(A)
    if r < 1 or A.shape != (r, d_in) or B.shape != (d_out, r) or b.shape != (d_out,):
        raise ValueError(f"A {A.shape}, B {B.shape} and b {b.shape} do not fit W {W.shape}")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}; expected a finite number")
    if o["name"] not in ("sgd", "adamw"):
        raise ValueError(f"the optimizer is {o['name']!r}; expected 'sgd' or 'adamw'")
    for what in ("lr", "weight_decay"):
        if not 0 <= o[what] < math.inf:
            raise ValueError(f"{what} is {o[what]}; expected a finite number >= 0")
    if o["clip"] is not None and not 0 < o["clip"] < math.inf:
        raise ValueError(f"clip is {o['clip']}; expected a finite number > 0, or None")
    if o["name"] == "adamw" and not (o["eps"] > 0 and len(o["betas"]) == 2 and all(0 <= x < 1 for x in o["betas"])):
        raise ValueError(f"betas are {o['betas']} and eps is {o['eps']}; expected betas in [0, 1), eps > 0")
    kind, warmup, steps = (o["schedule"][name] for name in ("kind", "warmup", "steps"))
    if kind not in ("constant", "linear", "cosine") or (kind != "constant" and not 0 <= warmup < steps):
        raise ValueError(f"the schedule is {kind!r} with warmup {warmup} of {steps} steps; expected 'constant', "
                         f"'linear' or 'cosine' with 0 <= warmup < steps")
