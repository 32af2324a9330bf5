"""minipeft's own bottleneck adapter, as a plug-in: the real site, attachment, file and backward pass."""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.engine.tensor import Leaf, Tensor, value_and_grad
from minipeft.conformance.saved import bytes_of, loaded
from minipeft.nn.layers import Embedding
from minipeft.nn.module import Model
from minipeft.nn.site import Site
from minipeft.nn.weight import Parameter
from minipeft.engine.ops import add, mul
from minipeft.engine.ops import sum as total
from minipeft.attaching.attach import attach
from minipeft.methods.bottleneck import Bottleneck
from minipeft.attaching.select import select

Array = numpy.ndarray


class OneSublayer(Model):
    """A model of one sublayer site, after which the residual stream is added. Its table only gives the width."""

    def __init__(self, d: int, dtype: str):
        self.embedding, self.out = Embedding(numpy.zeros((1, d), dtype)), Site("sublayer", d, dtype)

    def __call__(self, x: Any, n: Any, F: Any) -> Tensor:
        return add(x, self.out(x, n, F))


class Ours:
    """The handle. input: "stream" or "norm", the input of a parallel adapter."""

    def __init__(self, D: Array, b_D: Array, U: Array, b_U: Array, dtype: str, activation: str, placement: str,
                 scale: Any, input: str):
        (m, d), self.dtype = D.shape, dtype
        self.model = OneSublayer(d, dtype)
        method = Bottleneck(placement=placement, size=m, activation=activation, scale=scale, where="^out$",
                            input=input if placement == "parallel" else "stream")
        self.reads_n = method.input == "norm"
        self.attachment = attach(self.model, method, numpy.random.default_rng(0), "default")
        for leaf, array in (("D", D), ("b_D", b_D), ("U", U), ("b_U", b_U)):
            parameter = self.attachment.parameters[f"out@default.{leaf}"]
            if parameter.shape != array.shape:
                raise ValueError(f"{leaf} has shape {array.shape}; expected {parameter.shape}")
            parameter.data = array.astype(dtype)

    def _stream(self, *arrays: Array) -> list[Parameter]:
        """Arrays [N, d] as parameters [1, N, d], a batch of one, so that their gradients can be taken."""
        if len({a.shape for a in arrays}) > 1:
            raise ValueError(f"x, n and F have shapes {[a.shape for a in arrays]}; expected the same")
        return [Parameter(a.astype(self.dtype)[None]) for a in arrays]

    def forward(self, x: Array, n: Array, F: Array) -> Array:
        return self.model(*self._stream(x, n, F)).data[0].astype(numpy.float64)

    def vjp(self, x: Array, n: Array, F: Array, g: Array) -> dict:
        stream, weight = dict(zip("xnF", self._stream(x, n, F))), g.astype(self.dtype)[None]
        own: dict[str, Leaf] = {name.rsplit(".", 1)[-1]: p for name, p in select(self.model, "@").items()}
        watched = own | {name: p for name, p in stream.items() if name != "n" or self.reads_n}
        found = value_and_grad(lambda: total(mul(self.model(*stream.values()), weight)), watched)[1]
        wide = {name: array.astype(numpy.float64) for name, array in found.items()}
        return {name: array[0] if name in stream else array for name, array in wide.items()}

    def merge(self) -> None:
        self.attachment.merge()

    def trainable(self) -> set[str]:
        return {name.rsplit(".", 1)[-1] for name in select(self.model, "@")}

    def save(self) -> bytes:
        return bytes_of(self.attachment)

    def load(self, blob: bytes) -> None:
        """Replaces the attachment by that of the file. The old one is removed after the new one passed all checks."""
        found = loaded(self.model, blob)
        self.attachment.remove()
        self.attachment = found


def bottleneck_adapter(D: Array, b_D: Array, U: Array, b_U: Array, dtype: str, *, activation: str = "relu",
                       placement: str = "houlsby", scale: float = 1.0) -> Ours:
    """The factory: an adapter of D [m, d], b_D [m], U [d, m], b_U [d]. Raises ValueError for arrays that do not fit."""
    return Ours(D, b_D, U, b_U, dtype, activation, placement, scale, "stream")


def reading_the_norm(D: Array, b_D: Array, U: Array, b_U: Array, dtype: str, *, activation: str = "relu",
                     placement: str = "houlsby", scale: float = 1.0) -> Ours:
    """The same factory under the convention parallel_input "norm": a parallel adapter reads the sublayer's input."""
    return Ours(D, b_D, U, b_U, dtype, activation, placement, scale, "norm")
