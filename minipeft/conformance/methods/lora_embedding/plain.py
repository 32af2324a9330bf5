"""LoRA on an embedding table in plain NumPy, written as anybody would a plug-in; the mutants are planted in it."""
from __future__ import annotations

import math

import numpy
import safetensors.numpy

from minipeft.conformance.emulated import Emulated

Array = numpy.ndarray


class LoraEmbedding:
    """A table E [V, d] with an adapter of A [r, V], B [d, r].

    `--list --method lora_embedding` describes the calls of the kit. Every part that a mutant changes is a method of its
    own. Raises ValueError for arrays that do not fit, and for an alpha that is no finite number."""

    def __init__(self, E: Array, A: Array, B: Array, alpha: float, dtype: str):
        self.e = Emulated(dtype)
        self.E = E.copy()
        self.kept: Array | None = None                 # E before the merge, while it is merged
        self.take(A, B, alpha)

    def take(self, A: Array, B: Array, alpha: float) -> None:
        """Checks the adapter, and puts it in the place of the old one."""
        (V, d), r = self.E.shape, len(A)
        if r < 1 or A.shape != (r, V) or B.shape != (d, r):
            raise ValueError(f"A {A.shape} and B {B.shape} do not fit a table {self.E.shape}")
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha}; expected a finite number")
        self.A, self.B, self.alpha = A.copy(), B.copy(), self.read(alpha)

    def read(self, alpha: float) -> float:
        """alpha as it is kept."""
        return float(alpha)

    def scale(self) -> float:
        """The scale s."""
        return self.alpha / len(self.A)

    def checked(self, ids: Array) -> Array:
        """The ids. Raises IndexError for one that the table lacks."""
        if ids.size and (ids.min() < 0 or ids.max() >= len(self.E)):
            raise IndexError(f"ids from {ids.min()} to {ids.max()} in a table of {len(self.E)} rows")
        return ids

    def delta(self) -> Array:
        """s (B A)^T [V, d]."""
        return self.e.r(self.scale() * self.e.mm(self.B, self.A)).T

    def codes(self, ids: Array) -> Array:
        """A^T[ids] [b, t, r]."""
        return self.A.T[ids]

    def low_rank(self, ids: Array) -> Array:
        """s A^T[ids] B^T [b, t, d]."""
        return self.e.r(self.scale() * self.e.mm(self.codes(ids), self.B.T))

    def low_rank_head(self, h: Array) -> Array:
        """s (h B) A [N, V]."""
        return self.e.r(self.scale() * self.e.mm(self.e.mm(h, self.B), self.A))

    def forward(self, ids: Array) -> Array:
        """ids [b, t] -> y [b, t, d]. Raises IndexError for an id that the table lacks."""
        ids = self.checked(ids)
        rows = self.E[ids]
        return rows if self.kept is not None else self.e.r(rows + self.low_rank(ids))

    def forward_decoder(self, ids: Array) -> Array:
        """The second use of a table, by the decoder."""
        return self.forward(ids)

    def head(self, h: Array) -> Array:
        """The third use, as the output layer."""
        logits = self.e.mm(h, self.E.T)
        return logits if self.kept is not None else self.e.r(logits + self.low_rank_head(h))

    def vjp(self, ids: Array, g: Array) -> dict:
        """{name: gradient} of sum(g * y), for g [b, t, d]; None for the frozen table."""
        flat = self.checked(ids).reshape(-1)
        gs = g.reshape(len(flat), -1)
        s, mm, r = self.scale(), self.e.mm, self.e.r
        return {"A": r(s * self.scattered(flat, mm(gs, self.B))).T,
                "B": r(s * mm(gs.T, self.codes(flat))), "E": None}

    def scattered(self, ids: Array, rows: Array) -> Array:
        """ids [n], rows [n, r] -> [V, r]: the sum of the rows of each id."""
        out = numpy.zeros((len(self.E), rows.shape[1]), self.e.wide)
        numpy.add.at(out, ids, rows.astype(self.e.wide))
        return self.e.r(out)

    def vjp_head(self, h: Array, q: Array) -> dict:
        """{name: gradient} of sum(q * head(h))."""
        s, mm, r = self.scale(), self.e.mm, self.e.r
        return {"A": r(s * mm(mm(h, self.B).T, q)), "B": r(s * mm(h.T, mm(q, self.A.T)))}

    def vjp_tied(self, ids: Array, g: Array, h: Array, q: Array) -> dict:
        """{name: gradient} of sum(g * forward(ids)) + sum(q * head(h))."""
        lookup, head = self.vjp(ids, g), self.vjp_head(h, q)
        return {**{k: self.e.r(lookup[k] + head[k]) for k in ("A", "B")}, "E": None}

    def weight(self) -> Array:
        """E [V, d], with the update while it is merged."""
        return self.E

    def merge(self) -> None:
        """Puts the update into E. Raises ValueError if it is there already."""
        if self.kept is not None:
            raise ValueError("it is merged already")
        self.kept, self.E = self.E, self.merged()

    def merged(self) -> Array:
        """E with the update."""
        return self.e.r(self.E + self.delta())

    def unmerge(self) -> None:
        """Takes the update out of E again, by restoring E."""
        assert self.kept is not None, "it is not merged"
        self.E, self.kept = self.kept, None

    def is_merged(self) -> bool:
        """Whether the update is in the weight."""
        return self.kept is not None

    def step(self, ids: Array, g: Array, lr: float) -> None:
        """One step of gradient descent on A and B."""
        grads = self.vjp(ids, g)
        self.A, self.B = self.e.r(self.A - lr * grads["A"]), self.e.r(self.B - lr * grads["B"])

    def trainable(self) -> set[str]:
        """The names of the trained arrays."""
        return {"A", "B"}

    def save(self) -> bytes:
        """The adapter as the bytes of a file."""
        return safetensors.numpy.save({"A": numpy.ascontiguousarray(self.A), "B": numpy.ascontiguousarray(self.B),
                                       "alpha": numpy.array(self.alpha)})

    def load(self, blob: bytes) -> None:
        """Replaces the adapter by that of a file. Raises ValueError for one that does not fit."""
        found = safetensors.numpy.load(blob)
        self.take(found["A"], found["B"], float(found["alpha"]))

    def state_keys(self) -> set[str]:
        """The names of the arrays in a file."""
        return {"A", "B", "alpha"}
