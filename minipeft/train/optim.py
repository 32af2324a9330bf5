"""AdamW: Adam with decoupled weight decay.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    p = p - lr decay p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Loshchilov & Hutter, 2019, arXiv:1711.05101, Algorithm 2; Kingma & Ba, 2015, arXiv:1412.6980 (m, v, bias correction).
Departure from the paper: the decay is multiplied by the learning rate, as torch and everybody after it does.
"""
from __future__ import annotations

import math
from typing import Any, Iterable, Mapping

from minipeft.autograd.tensor import Leaf
from minipeft.backend import Array, resolve, to_device, xp
from minipeft.nn.where import Where, matching


class AdamW:
    """lr: learning rate; betas b1, b2; eps; weight_decay, applied to the parameters that `decay` selects by name (all
    by default). m, v, steps: {name: moments, t}, for the parameters that were stepped and for no others."""

    def __init__(self, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.01, decay: Where = ""):
        if not eps > 0:
            raise ValueError(f"AdamW: eps is {eps!r}; expected a number > 0 (an unseen row's gradients are all 0)")
        for what, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"AdamW: {what} is {value!r}; expected a finite number >= 0")
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"AdamW: betas are {betas!r}; expected two numbers in [0, 1)")
        self.lr, self.betas, self.eps, self.weight_decay, self.decay = lr, tuple(betas), eps, weight_decay, decay
        self.m: dict[str, Array] = {}
        self.v: dict[str, Array] = {}
        self.steps: dict[str, int] = {}

    def step(self, params: Mapping[str, Leaf], grads: Mapping[str, Array], lr: float | None = None,
             scale: float = 1.0) -> None:
        """Update in place: the arrays of `params`, and this optimizer's moments. lr overrides the one it was made
        with. scale: a factor on the gradients, applied to one array at a time, so that clipping makes no second copy
        of them all; the arrays of `grads` are not written into.

        Raises ValueError, before anything changes, unless params, grads and existing moments have the same names and
        shapes, and for an lr that is negative or not finite; TypeError if moments live on another backend."""
        rate = self.lr if lr is None else lr
        self._check(params, grads, rate)
        decayed = set(self.decayed(params))
        for name, p in params.items():
            g = grads[name] if scale == 1 else grads[name] * scale
            self._update(name, p.data, g, rate, self.weight_decay if name in decayed else 0.0)

    def _check(self, params: Mapping[str, Leaf], grads: Mapping[str, Array], lr: float) -> None:
        if not math.isfinite(lr) or lr < 0:
            raise ValueError(f"lr is {lr!r}; expected a finite number >= 0")
        if set(params) != set(grads):
            odd = sorted(set(params) ^ set(grads))
            raise ValueError(f"params and grads differ in {len(odd)} names; first: {odd[0]!r}")
        for name, p in params.items():
            if grads[name].shape != p.shape:
                raise ValueError(f"the gradient of {name} has shape {list(grads[name].shape)}; "
                                 f"expected {list(p.shape)}")
            m = self.m.get(name)
            if m is not None and (m.shape != p.shape or m.dtype != p.dtype):
                raise ValueError(f"the moments of {name} are {m.dtype} {list(m.shape)}, from an earlier parameter of "
                                 f"this name; it is {p.dtype} {list(p.shape)} now: make a new optimizer")
            if m is not None and type(m) is not type(p.data):
                raise TypeError(f"the moments of {name} live on another backend than it: optimizer.to(backend)")

    def _update(self, name: str, p: Array, g: Array, lr: float, decay: float) -> None:
        if name not in self.m:
            self.m[name], self.v[name], self.steps[name] = xp.zeros_like(p), xp.zeros_like(p), 0
        b1, b2 = self.betas
        m, v = self.m[name], self.v[name]
        self.steps[name] = t = self.steps[name] + 1
        work = xp.asarray(g * (1 - b1))  # asarray: NumPy makes a scalar of a 0-d product
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

    def decayed(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that weight decay acts on."""
        return matching(names, self.decay) if self.weight_decay else []

    def describe(self) -> dict[str, Any]:
        """The hyper-parameters, as JSON can hold them; what `decay` selects is for the caller to add."""
        return {"lr": self.lr, "betas": list(self.betas), "eps": self.eps, "weight_decay": self.weight_decay}

    def to(self, backend: Any) -> "AdamW":
        """Moves the moments in place to a namespace or back to the host; returns the optimizer."""
        target = resolve(backend)
        for moments in (self.m, self.v):
            for name in moments:
                moments[name] = to_device(moments[name], target)
        return self
