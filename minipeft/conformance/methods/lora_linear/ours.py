"""minipeft itself as a plug-in: one Linear layer of its engine, with the adapter that `attach(LoRA(...))` gives.

It is written as anybody would write a plug-in, and is the longest example of the protocol. There is no `merge_safe`:
minipeft has one way of merging.
"""
from __future__ import annotations

from fractions import Fraction
from typing import Any, Sequence

import numpy

from minipeft.engine.tensor import array_of, value_and_grad
from minipeft.conformance.saved import bytes_of, loaded
from minipeft.nn.layers import Linear
from minipeft.nn.module import Model
from minipeft.nn.routing import routed
from minipeft.nn.weight import Parameter
from minipeft.engine.ops import mul
from minipeft.engine.ops import sum as total
from minipeft.attaching.attach import attach, put
from minipeft.attaching.attachment import Attachment
from minipeft.methods.lora import LoRA, LowRank

Array = numpy.ndarray
capabilities = {"name": "minipeft", "dtypes": ["float64", "float32"]}
PLACE = "layer.weight"


class OneLinear(Model):
    """A whole model: x [N, in] -> [N, out]."""

    def __init__(self, W: Array, b: Array):
        self.layer = Linear(W, b)

    def __call__(self, x: Any, rng: Any = None, adapter: Any = None) -> Any:
        with routed(self.host, adapter, len(array_of(x))):
            return self.layer(x, rng)


class Forced:
    """Takes the place of the random generator of dropout, so that exactly the numbers where `keep` is 1 are kept."""

    def __init__(self, keep: Array):
        self.keep = keep

    def random(self, shape: tuple, dtype: Any) -> Array:
        assert self.keep.shape == shape
        return self.keep.astype(dtype)  # >= p where it is 1, below it where it is 0


class Layer:
    """The handle. Every call of it is a call of minipeft; `--list --method lora_linear` describes them."""

    def __init__(self, W: Array, b: Array, A: Array, B: Array, alpha: float, dtype: str, dropout: float):
        self.dtype, self.dropout = dtype, dropout
        self.model = OneLinear(W.astype(dtype), b.astype(dtype))
        self.named = {"default": self._attach("default", A, B, alpha)}

    def _attach(self, name: str, A: Array, B: Array, alpha: float) -> Attachment:
        slot, r = self.model.layer.weight, len(A)
        if A.shape != (r, slot.base.shape[1]) or B.shape != (slot.base.shape[0], r):
            raise ValueError(f"A {A.shape} and B {B.shape} do not fit W {slot.base.shape}")
        method = LoRA(rank=r, alpha=alpha, dropout=self.dropout, where=f"^{PLACE}$")
        a, b = A.astype(self.dtype), B.astype(self.dtype)
        if r > min(slot.base.shape):  # LoRA refuses what cannot pay; the equation is held there too
            own = {f"{PLACE}.A": Parameter(a), f"{PLACE}.B": Parameter(b)}
            piece = LowRank(A=own[f"{PLACE}.A"], B=own[f"{PLACE}.B"], scale=Fraction(alpha) / r, p=self.dropout)
            put(self.model, [forced := Attachment(self.model, name, method, {PLACE: slot}, {PLACE: piece}, own)])
            return forced
        attachment = attach(self.model, method, numpy.random.default_rng(0), name)
        for leaf, array in (("A", a), ("B", b)):
            attachment.parameters[f"{PLACE}@{name}.{leaf}"].data = array
        return attachment

    def _run(self, x: Array, rng: Any = None) -> Array:
        return array_of(self.model(x.astype(self.dtype), rng)).astype(numpy.float64)

    def _first(self) -> Attachment:
        """The active adapter, or the only one."""
        return next((a for a in self.named.values() if a.state != "off"), next(iter(self.named.values())))

    def forward(self, x: Array) -> Array:
        return self._run(x)

    def forward_train(self, x: Array, keep: Array) -> Array:
        return self._run(x, Forced(keep))

    def forward_rows(self, x: Array, rows: Sequence[str | None]) -> Array:
        names = [None if row is None else self.named[row].name for row in rows]
        y = array_of(self.model(x[:, None].astype(self.dtype), adapter=names))
        return y[:, 0].astype(numpy.float64)

    def _gradients(self, x: Array, g: Array) -> dict[str, Array]:
        """{name: gradient of sum(y g)}, for the attachment's parameters and for x."""
        given = Parameter(x.astype(self.dtype))
        params = {"x": given, **self._first().parameters}
        return value_and_grad(lambda: total(mul(self.model(given), g.astype(self.dtype))), params)[1]

    def vjp(self, x: Array, g: Array) -> dict[str, Array]:
        return {name.rsplit(".", 1)[-1]: found.astype(numpy.float64) for name, found in self._gradients(x, g).items()}

    def step(self, x: Array, g: Array, lr: float) -> None:
        """Plain gradient descent, written here: minipeft's only optimizer is AdamW."""
        grads = self._gradients(x, g)
        for name, parameter in self._first().parameters.items():
            parameter.data = (parameter.data - lr * grads[name]).astype(self.dtype)

    def trainable(self) -> set[str]:
        return {name.rsplit(".", 1)[-1] for name in self._first().parameters}

    def weight(self) -> Array:
        """W [out, in] of the layer, with the update if it is merged; a plugged attachment is not in it."""
        slot = self.model.layer.weight
        held = slot.fold().dense() if self.is_merged() else slot.base.dense()
        return array_of(held).astype(numpy.float64)

    def merge(self) -> None:
        self._first().merge()

    def unmerge(self) -> None:
        self._first().unmerge()

    def is_merged(self) -> bool:
        return self._first().state == "merged"

    def add(self, name: str, A: Array, B: Array, alpha: float) -> None:
        if name in self.named:
            raise ValueError(f"{name!r} is taken")
        self.named[name] = self._attach(name, A, B, alpha)
        self.named[name].unplug()

    def activate(self, names: Sequence[str]) -> None:
        wanted = [self.named[name] for name in names]
        for attachment in self.named.values():
            if attachment.state == "merged":
                attachment.unmerge()
            if attachment.state == "plugged":
                attachment.unplug()
        for attachment in wanted:
            attachment.plug()

    def remove(self, name: str) -> None:
        attachment = self.named.pop(name)
        if attachment.state == "merged":
            attachment.unmerge()
        attachment.remove()

    def save(self) -> bytes:
        return bytes_of(self._first())

    def load(self, blob: bytes) -> None:
        """Replaces the first adapter by that of the file. If the file does not fit, the adapter stays."""
        found = loaded(self.model, blob)
        self.remove("default")
        self.named = {"default": found, **self.named}

    def state_keys(self) -> set[str]:
        return set(self._first().tensors)


def lora_linear(W: Array, b: Array, A: Array, B: Array, alpha: float, dtype: str, *, dropout: float = 0.0) -> Layer:
    """The factory: a layer with W [out, in], b [out] and the adapter "default" of A [r, in], B [out, r]. Raises
    ValueError for arrays that do not fit."""
    return Layer(W, b, A, B, alpha, dtype, dropout)
