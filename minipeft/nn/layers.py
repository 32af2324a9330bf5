"""Linear, Embedding, LayerNorm, RMSNorm, FeedForward: slots, and the op that uses them."""
from __future__ import annotations

from typing import Any, Callable

import numpy

from minipeft.autograd.tensor import Tensor
from minipeft.backend import Array, to_device, to_host
from minipeft.nn.module import Module
from minipeft.nn.site import Site
from minipeft.nn.weight import Slot
from minipeft.ops import add, dropout, gelu, gelu_tanh, layer_norm, mul, relu, rms_norm, silu

ACTIVATIONS: dict[str, Callable[[Any], Tensor]] = {
    "relu": relu, "gelu": gelu, "gelu_new": gelu_tanh, "gelu_tanh": gelu_tanh, "silu": silu, "swish": silu}


class Linear(Module):
    """y = x W^T + b.   weight [d_out, d_in], bias [d_out] or absent; x [..., d_in] -> [..., d_out]."""

    def __init__(self, weight: Array | Slot, bias: Array | None = None):
        self.weight = weight if isinstance(weight, Slot) else Slot("linear", weight)
        self.bias = None if bias is None else Slot("bias", bias)

    def __call__(self, x: Any, rng: Any = None) -> Tensor:
        y = self.weight.project(x, rng)
        return y if self.bias is None else add(y, self.bias.vector())


class Embedding(Module):
    """Rows of a table.   weight [vocab, d]; ids [batch, time] -> [batch, time, d]."""

    def __init__(self, weight: Array):
        self.weight = Slot("embedding", weight)

    def __call__(self, ids: Array) -> Tensor:
        return self.weight.rows(ids)


class LayerNorm(Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis."""

    def __init__(self, weight: Array, bias: Array, eps: float):
        self.weight, self.bias, self.eps = Slot("norm", weight), Slot("bias", bias), eps

    def __call__(self, x: Any) -> Tensor:
        return layer_norm(x, self.weight.vector(), self.bias.vector(), eps=self.eps)


class RMSNorm(Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def __init__(self, weight: Array, eps: float):
        self.weight, self.eps = Slot("norm", weight), eps

    def __call__(self, x: Any) -> Tensor:
        return rms_norm(x, self.weight.vector(), eps=self.eps)


class FeedForward(Module):
    """wo(drop(f(wi x))), or with a gate wo(drop(f(wi_0 x) * wi_1 x)).   [batch, time, d_model] -> the same.

    Vaswani et al., 2017, arXiv:1706.03762, sec. 3.3; the gate: Shazeer, 2020, arXiv:2002.05202 (T5 v1.1). Dropout
    after the activation is T5's and torch's; the paper has it only on the sublayer's output."""

    def __init__(self, wi: Linear, wo: Linear, gate: Linear | None, activation: str, p: float):
        if gate is None:
            self.wi = wi
        else:
            self.wi_0, self.wi_1 = wi, gate
        self.wo = wo
        self.out = Site("sublayer")
        self.gated, self.activation, self.p = gate is not None, ACTIVATIONS[activation], p

    def __call__(self, x: Any, rng: Any = None) -> Tensor:
        h = self.activation((self.wi_0 if self.gated else self.wi)(x, rng))
        if self.gated:
            h = mul(h, self.wi_1(x, rng))
        return self.wo(dropout(h, self.p, rng), rng)


def host_ids(ids: Any, name: str) -> numpy.ndarray:
    """Ids as one array on the host. Raises ValueError for lists of different length."""
    try:
        return to_host(ids)
    except ValueError:
        raise ValueError(f"{name} has rows of different length; pad them (minipeft.batch_of does)") from None


def check_ids(ids: Any, vocab: int, name: str) -> Array:
    """Token ids [batch, time] on the current backend, checked on the host: CuPy would wrap an id out of range.

    Raises ValueError for another number of axes, an empty batch, non-integers and ids outside 0 .. vocab - 1."""
    host = host_ids(ids, name)
    if host.ndim != 2 or host.size == 0:
        raise ValueError(f"{name} has shape {list(host.shape)}; expected [batch, time], neither of them 0")
    if not numpy.issubdtype(host.dtype, numpy.integer):
        raise ValueError(f"{name} has dtype {host.dtype}; expected integers")
    low, high = int(host.min()), int(host.max())
    if low < 0 or high >= vocab:
        raise ValueError(f"{name} holds {low if low < 0 else high}; expected ids from 0 to {vocab - 1}")
    return to_device(host)


def check_mask(mask: Any, shape: tuple, name: str) -> Array | None:
    """A boolean mask [batch, time] on the current backend, True where there is a token; None stays None.

    Raises ValueError for another shape or values other than 0 and 1."""
    if mask is None:
        return None
    host = to_host(mask)
    if host.shape != shape:
        raise ValueError(f"{name} has shape {list(host.shape)}; expected {list(shape)}, as the ids it masks")
    if not numpy.isin(host, (0, 1)).all():
        raise ValueError(f"{name} holds values other than 0 and 1")
    return to_device(host.astype(bool))
