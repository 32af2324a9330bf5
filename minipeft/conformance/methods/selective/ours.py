"""minipeft itself as a plug-in: its layers and engine, and the attachment that `attach(model, Selective(...))` gives.

A difference is trained and added to a frozen base, so decay pulls towards the weights before training. minipeft trains
rows of embedding tables only; here, rows are given as a mask. minipeft has no plain gradient descent: the two products
of a step are written out here.
"""
from __future__ import annotations

import math
import re
from typing import Any, Mapping, Sequence

import numpy

from minipeft.engine.tensor import array_of, value_and_grad
from minipeft.nn.layers import LayerNorm, Linear
from minipeft.nn.module import Model
from minipeft.nn.weight import Parameter
from minipeft.engine.ops import add, mul, relu
from minipeft.engine.ops import sum as total
from minipeft.attaching.attach import attach
from minipeft.methods.selective import Selective

Array = numpy.ndarray
CONVENTIONS = {"decay": "towards the start"}
capabilities = {"name": "minipeft", "dtypes": ["float64", "float32"], "conventions": {"selective": CONVENTIONS}}


class Block(Model):
    """x [N, d] -> [N, d]."""

    def __init__(self, w: Mapping[str, Array], eps: float):
        self.norm = LayerNorm(w["norm.weight"], w["norm.bias"], eps)
        self.fc1, self.fc2 = (Linear(w[f"{name}.weight"], w[f"{name}.bias"]) for name in ("fc1", "fc2"))

    def __call__(self, x: Any) -> Any:
        return add(x, self.fc2(relu(self.fc1(self.norm(x)))))


class Handle:
    """The handle. Every call of it is a call of minipeft. The newest attachment is trained; older ones stay plugged."""

    def __init__(self, weights: Mapping[str, Array], train: Sequence[str], dtype: str, eps: float):
        (hidden, d), self.dtype = weights["fc1.weight"].shape, dtype
        for name, shape in {"norm.weight": (d,), "norm.bias": (d,), "fc1.bias": (hidden,), "fc2.weight": (d, hidden),
                            "fc2.bias": (d,)}.items():
            if weights[name].shape != shape:
                raise ValueError(f"{name} has shape {list(weights[name].shape)}; expected {list(shape)}")
        self.model = Block({name: w.astype(dtype) for name, w in weights.items()}, eps)
        self._train(Selective(where=[f"^{re.escape(name)}$" for name in train]))

    def _train(self, method: Selective) -> None:
        self.tuned = attach(self.model, method, numpy.random.default_rng(0), f"tuned-{len(self.model.attachments)}")

    def select(self, pattern: str) -> None:
        self._train(Selective(where=pattern))

    def train_elements(self, masks: Mapping[str, Array]) -> None:
        self._train(Selective(mask=dict(masks)))

    def train_rows(self, rows: Mapping[str, Array]) -> None:
        self._train(Selective(mask={name: self._elements(name, ids) for name, ids in rows.items()}))

    def _elements(self, name: str, rows: Array) -> Array:
        """The flat indices of these rows of a matrix, or of these elements of a vector."""
        width = math.prod(self.model.slots[name].base.shape[1:])
        return (rows[:, None] * width + numpy.arange(width)).reshape(-1)

    def _run(self, x: Any) -> Any:
        if x.shape[1:] != self.model.norm.weight.base.shape:
            raise ValueError(f"x has shape {list(x.shape)}; expected rows of {self.model.norm.weight.base.shape[0]}")
        return self.model(x)

    def forward(self, x: Array) -> Array:
        return array_of(self._run(x.astype(self.dtype))).astype(numpy.float64)

    def _gradients(self, x: Array, g: Array) -> dict[str, Array]:
        """{name: gradient of sum(y g)}, for the attachment's parameters and for x."""
        given = Parameter(x.astype(self.dtype))
        params = {"x": given, **self.tuned.parameters}
        return value_and_grad(lambda: total(mul(self._run(given), g.astype(self.dtype))), params)[1]

    def vjp(self, x: Array, g: Array) -> dict[str, Array]:
        """{name: gradient of sum(y g)} in the weights' shapes: where a mask is trained, 0 outside it."""
        found = {}
        for name, gradient in self._gradients(x, g).items():
            place = name.partition("@")[0]
            indices = self.tuned.tensors.get(f"{place}.indices")
            if indices is not None:
                full = numpy.zeros(self.model.slots[place].base.shape, self.dtype)
                full.reshape(-1)[indices] = gradient
                gradient = full
            found[place] = gradient.astype(numpy.float64)
        return found

    def trainable(self) -> set[str]:
        return {name.partition("@")[0] for name in self.tuned.parameters}

    def step(self, x: Array, g: Array, lr: float, weight_decay: float = 0.0) -> None:
        grads = self._gradients(x, g)
        for name, p in self.tuned.parameters.items():
            p.data = p.data * (1 - lr * weight_decay) - lr * grads[name]

    def weights(self) -> dict[str, Array]:
        return {name: array_of(slot.fold().dense()).astype(numpy.float64) for name, slot in self.model.slots.items()}

    def off(self) -> None:
        for attachment in list(self.model.attachments.values())[::-1]:
            attachment.unplug()

    def on(self) -> None:
        for attachment in self.model.attachments.values():
            attachment.plug()


def selective(weights: Mapping[str, Array], train: Sequence[str], dtype: str, *, eps: float = 1e-5) -> Handle:
    """The factory: a block with these weights {name: array}, of which the names `train` are trained. Raises ValueError
    for weights that do not fit."""
    return Handle(weights, train, dtype, eps)
