"""LoRA on a linear layer in plain NumPy, written as anybody would write a plug-in; the mutants are planted in it."""
from __future__ import annotations

import math
from typing import Sequence

import numpy
import safetensors.numpy

from minipeft.conformance.emulated import Emulated

Array = numpy.ndarray


class LoraLinear:
    """A linear layer W [out, in], b [out] with the adapter "default" of A [r, in], B [out, r]; others can be added.

    `--list --method lora_linear` describes the calls of the kit. Every part that a mutant changes is a method of its
    own. Raises ValueError for arrays that do not fit, and for an alpha that is no finite number."""

    def __init__(self, W: Array, b: Array, A: Array, B: Array, alpha: float, dtype: str, *, dropout: float = 0.0):
        self.e = Emulated(dtype)
        self.W, self.b, self.dropout = W.copy(), b.copy(), dropout
        self.kept: Array | None = None                 # W before the merge, while it is merged
        self.adapters: dict[str, tuple[Array, Array, float]] = {}
        self.add("default", A, B, alpha)
        self.active = ["default"]

    def add(self, name: str, A: Array, B: Array, alpha: float) -> None:
        """Adds an adapter on the same W, which is not active yet. Raises ValueError for one that does not fit."""
        (d_out, d_in), r = self.W.shape, len(A)
        if r < 1 or A.shape != (r, d_in) or B.shape != (d_out, r):
            raise ValueError(f"A {A.shape} and B {B.shape} do not fit W {self.W.shape}")
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha}; expected a finite number")
        self.adapters[name] = A.copy(), B.copy(), self.read(alpha)

    def read(self, alpha: float) -> float:
        """alpha as it is kept."""
        return float(alpha)

    def scale(self, A: Array, alpha: float) -> float:
        """The scale s."""
        return alpha / len(A)

    def delta(self, name: str) -> Array:
        """s B A [out, in]."""
        A, B, alpha = self.adapters[name]
        return self.e.r(self.scale(A, alpha) * self.e.mm(B, A))

    def low_rank(self, x: Array, name: str) -> Array:
        """s (x A^T) B^T [N, out]."""
        A, B, alpha = self.adapters[name]
        return self.e.r(self.scale(A, alpha) * self.e.mm(self.e.mm(x, A.T), B.T))

    def base(self, x: Array) -> Array:
        """x W^T + b [N, out]."""
        return self.e.r(self.e.mm(x, self.W.T) + self.b)

    def forward(self, x: Array) -> Array:
        """x [N, in] -> y [N, out], without dropout."""
        y = self.base(x)
        for name in self.active if self.kept is None else []:
            y = self.e.r(y + self.low_rank(x, name))
        return y

    def forward_train(self, x: Array, keep: Array) -> Array:
        """y [N, out] with dropout; keep [N, in]: 1 for the inputs that are kept, 0 for others."""
        dropped = self.e.r(self.e.r(x * keep) / (1 - self.dropout))
        return self.e.r(self.base(x) + self.low_rank(dropped, self.active[0]))

    def forward_rows(self, x: Array, rows: Sequence[str | None]) -> Array:
        """y [N, out]; row i with the adapter rows[i], or with none where that is None."""
        y = self.base(x)
        for i, name in enumerate(self.adapter_of(rows)):
            if name is not None:
                y[i] = self.e.r(y[i] + self.low_rank(x[i:i + 1], name)[0])
        return y

    def adapter_of(self, rows: Sequence[str | None]) -> Sequence[str | None]:
        """The adapter of every row."""
        return rows

    def vjp(self, x: Array, g: Array) -> dict:
        """{name: gradient} of sum(g * y), for g [N, out]; None for frozen arrays."""
        A, B, alpha = self.adapters[self.active[0]]
        s, mm, r = self.scale(A, alpha), self.e.mm, self.e.r
        gB = mm(g, B)
        return {"A": r(s * mm(gB.T, x)), "B": r(s * mm(g.T, mm(x, A.T))),
                "x": r(mm(g, self.W) + r(s * mm(gB, A))), "W": None, "b": None}

    def weight(self) -> Array:
        """W [out, in], with the update while it is merged."""
        return self.W

    def merge(self) -> None:
        """Puts the update of the active adapter into W. Raises ValueError if it is there already."""
        if self.kept is not None:
            raise ValueError("it is merged already")
        self.kept, self.W = self.W, self.merged()

    def merged(self) -> Array:
        """W with the update of the active adapter."""
        return self.e.r(self.W + self.delta(self.active[0]))

    def merge_safe(self) -> None:
        """As `merge`: there is only one way of merging here."""
        self.merge()

    def unmerge(self) -> None:
        """Takes the update out of W again, by restoring W."""
        assert self.kept is not None, "it is not merged"
        self.W, self.kept = self.kept, None

    def is_merged(self) -> bool:
        """Whether the update is in the weight."""
        return self.kept is not None

    def activate(self, names: Sequence[str]) -> None:
        """Makes these adapters the active ones. Raises ValueError for an unknown name."""
        unknown = [name for name in names if name not in self.adapters]
        if unknown:
            raise ValueError(f"no adapter {unknown[0]!r}; there are {', '.join(self.adapters)}")
        if self.kept is not None:
            self.unmerge()
        self.active = list(names)

    def remove(self, name: str) -> None:
        """Removes an adapter, unmerged if it was merged."""
        if self.kept is not None and name in self.active:
            self.unmerge()
        del self.adapters[name]
        self.active = [n for n in self.active if n != name]

    def step(self, x: Array, g: Array, lr: float) -> None:
        """One step of gradient descent on A and B of the active adapter."""
        A, B, alpha = self.adapters[self.active[0]]
        grads = self.vjp(x, g)
        self.adapters[self.active[0]] = (self.e.r(A - lr * grads["A"]), self.e.r(B - lr * grads["B"]), alpha)

    def trainable(self) -> set[str]:
        """The names of the trained arrays."""
        return {"A", "B"}

    def save(self) -> bytes:
        """The adapter as the bytes of a file."""
        A, B, alpha = self.adapters[self.active[0]]
        return safetensors.numpy.save({"A": A, "B": B, "alpha": numpy.array(alpha)})

    def load(self, blob: bytes) -> None:
        """Replaces the adapter "default" by that of a file. Raises ValueError for one that does not fit."""
        found = safetensors.numpy.load(blob)
        self.add("default", found["A"], found["B"], float(found["alpha"]))

    def state_keys(self) -> set[str]:
        """The names of the arrays in a file."""
        return {"A", "B", "alpha"}
