"""AdamW: Adam with decoupled weight decay.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    p = p - lr decay p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Loshchilov & Hutter, 2019, arXiv:1711.05101, Algorithm 2; Kingma & Ba, 2015, arXiv:1412.6980 (m, v, bias correction).
Departure from the paper: the decay is multiplied by the learning rate, as torch and everybody after it does.
"""
from __future__ import annotations

import math
from typing import Any, Mapping

from minipeft.autograd.tensor import Leaf
from minipeft.backend import Array, resolve, to_device, xp
from minipeft.nn.where import Where, matching


class AdamW:
    """lr: learning rate; betas b1, b2; eps; weight_decay, applied to the parameters that `decay` selects by name (all
    by default). State exists for the parameters that were stepped, and for no others."""

    def __init__(self, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.01, decay: Where = ""):
        for what, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"AdamW: {what} is {value!r}; expected a finite number >= 0")
        if not all(0 <= b < 1 for b in betas):
            raise ValueError(f"AdamW: betas are {betas!r}; expected numbers in [0, 1)")
        self.lr, self.betas, self.eps, self.weight_decay, self.decay = lr, tuple(betas), eps, weight_decay, decay
        self.m: dict[str, Array] = {}
        self.v: dict[str, Array] = {}
        self.steps: dict[str, int] = {}

    def step(self, params: Mapping[str, Leaf], grads: Mapping[str, Array], lr: float | None = None) -> None:
        """Update in place: the arrays of `params`, and this optimizer's moments. lr overrides the one it was made with.

        Raises ValueError, before anything changes, unless both have the same names and shapes."""
        if set(params) != set(grads):
            odd = sorted(set(params) ^ set(grads))
            raise ValueError(f"params and grads differ in {len(odd)} names; first: {odd[0]!r}")
        for name, p in params.items():
            if grads[name].shape != p.shape:
                raise ValueError(f"the gradient of {name} has shape {list(grads[name].shape)}; "
                                 f"expected {list(p.shape)}")
        decayed = set(matching(params, self.decay)) if self.weight_decay else set()
        rate = self.lr if lr is None else lr
        for name, p in params.items():
            self._step(name, p.data, grads[name], rate, self.weight_decay if name in decayed else 0.0)

    def _step(self, name: str, p: Array, g: Array, lr: float, decay: float) -> None:
        if name not in self.m:
            self.m[name], self.v[name], self.steps[name] = xp.zeros_like(p), xp.zeros_like(p), 0
        b1, b2 = self.betas
        m, v = self.m[name], self.v[name]
        self.steps[name] = t = self.steps[name] + 1
        work = g * (1 - b1)
        m *= b1
        m += work
        xp.multiply(g, g, out=work)
        work *= 1 - b2
        v *= b2
        v += work
        xp.sqrt(v, out=work)
        work /= math.sqrt(1 - b2 ** t)
        work += self.eps
        xp.divide(m, work, out=work)
        work *= lr / (1 - b1 ** t)
        if decay:
            p *= 1 - lr * decay
        p -= work

    def describe(self) -> dict[str, Any]:
        """The hyper-parameters, as JSON can hold them."""
        return {"lr": self.lr, "betas": list(self.betas), "eps": self.eps, "weight_decay": self.weight_decay}

    def to(self, backend: Any) -> "AdamW":
        """Moves the moments in place to a namespace or back to the host; returns the optimizer."""
        target = resolve(backend)
        for moments in (self.m, self.v):
            for name in moments:
                moments[name] = to_device(moments[name], target)
        return self
