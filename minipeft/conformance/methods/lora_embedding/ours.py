"""minipeft's own LoRA on a table, as a plug-in: the real slot, attachment, file and backward pass."""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.engine.tensor import Tensor, value_and_grad
from minipeft.conformance.saved import bytes_of, loaded
from minipeft.nn.inputs import check_ids
from minipeft.nn.layers import Embedding
from minipeft.nn.module import Model
from minipeft.engine.ops import add, mul
from minipeft.engine.ops import sum as total
from minipeft.attaching.attach import attach
from minipeft.methods.lora import LoRA
from minipeft.attaching.select import select

Array = numpy.ndarray


class Tied(Model):
    """A model with nothing but a table, which is also its head."""

    def __init__(self, table: Array):
        self.embedding = Embedding(table)


class Ours:
    """The handle. minipeft adapts a table [V, d] like any matrix: its A [r, d] is B^T here, and its B [V, r] is A^T."""

    def __init__(self, E: Array, A: Array, B: Array, alpha: Any, dtype: str):
        self.model, self.dtype = Tied(E.astype(dtype)), dtype
        method = LoRA(rank=len(A), alpha=alpha, where="embedding.weight")
        self.attachment = attach(self.model, method, numpy.random.default_rng(0), "default")
        self.piece = self._piece()
        if self.piece.A.shape != B.T.shape or self.piece.B.shape != A.T.shape:
            raise ValueError(f"A {A.shape} and B {B.shape} do not fit a table {E.shape}")
        # row-major, as when loaded from a file: for column-major ones BLAS gives other bits
        self.piece.A.data, self.piece.B.data = B.T.astype(dtype, order="C"), A.T.astype(dtype, order="C")

    def _piece(self) -> Any:
        return self.model.embedding.weight.attached[self.attachment.name]

    def _rows(self, ids: Array) -> Tensor:
        return self.model.embedding(check_ids(ids, self.model.embedding.weight.base.shape[0], "ids"))

    def _head(self, h: Array) -> Tensor:
        return self.model.embedding.weight.project(h.astype(self.dtype)[None])

    def forward(self, ids: Array) -> Array:
        return self._rows(ids).data.astype(numpy.float64)

    def forward_decoder(self, ids: Array) -> Array:
        return self.forward(ids)

    def head(self, h: Array) -> Array:
        return self._head(h).data[0].astype(numpy.float64)

    def _gradients(self, loss: Any) -> dict:
        found = value_and_grad(loss, select(self.model, "@"))[1]
        of = {name.rsplit(".", 1)[-1]: g.astype(numpy.float64) for name, g in found.items()}
        return {"A": of["B"].T, "B": of["A"].T, "E": found.get("embedding.weight")}

    def vjp(self, ids: Array, g: Array) -> dict:
        return self._gradients(lambda: total(mul(self._rows(ids), g.astype(self.dtype))))

    def vjp_tied(self, ids: Array, g: Array, h: Array, q: Array) -> dict:
        return self._gradients(lambda: add(total(mul(self._rows(ids), g.astype(self.dtype))),
                                           total(mul(self._head(h), q.astype(self.dtype)[None]))))

    def weight(self) -> Array:
        slot = self.model.embedding.weight
        return (slot.fold().dense() if self.is_merged() else slot.base.dense()).data.astype(numpy.float64)

    def merge(self) -> None:
        self.attachment.merge()

    def unmerge(self) -> None:
        self.attachment.unmerge()

    def is_merged(self) -> bool:
        return self.attachment.state == "merged"

    def step(self, ids: Array, g: Array, lr: float) -> None:
        grads = self.vjp(ids, g)
        for parameter, leaf in ((self.piece.A, "B"), (self.piece.B, "A")):
            parameter.data = (parameter.data - lr * grads[leaf].T).astype(self.dtype, order="C")

    def trainable(self) -> set[str]:
        return {{"A": "B", "B": "A"}[name.rsplit(".", 1)[-1]] for name in select(self.model, "@")}

    def save(self) -> bytes:
        return bytes_of(self.attachment)

    def load(self, blob: bytes) -> None:
        """Replaces the attachment by that of the file. The old one is removed after the new one passed all checks."""
        found = loaded(self.model, blob)
        self.attachment.remove()
        self.attachment = found
        self.piece = self._piece()

    def state_keys(self) -> set[str]:
        return set(self.attachment.tensors)


def lora_embedding(E: Array, A: Array, B: Array, alpha: Any, dtype: str) -> Ours:
    """The factory: a table E [V, d] and an adapter of A [r, V], B [d, r]. Raises ValueError if A or B does not fit."""
    return Ours(E, A, B, alpha, dtype)
