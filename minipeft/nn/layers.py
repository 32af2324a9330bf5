"""Linear, Embedding, LayerNorm, RMSNorm, FeedForward: each holds slots, and calls the op that uses them."""
from __future__ import annotations

from typing import Any, Callable

from minipeft.engine.tensor import Tensor
from minipeft.backend import Array
from minipeft.nn.absent import absent_bias, is_absent
from minipeft.nn.module import Module
from minipeft.nn.site import Site
from minipeft.nn.slot import Slot
from minipeft.engine.ops import add, dropout, gelu, gelu_tanh, layer_norm, mul, relu, rms_norm, silu

ACTIVATIONS: dict[str, Callable[[Any], Tensor]] = {
    "relu": relu, "gelu": gelu, "gelu_new": gelu_tanh, "gelu_tanh": gelu_tanh, "silu": silu, "swish": silu}


class Linear(Module):
    """y = x W^T + b.   weight [d_out, d_in], bias [d_out]; without one, y = x W^T, and a place to add one."""

    def __init__(self, weight: Array | Slot, bias: Array | None = None):
        self.weight = weight if isinstance(weight, Slot) else Slot("linear", weight)
        self.bias = absent_bias(self.weight) if bias is None else Slot("bias", bias)

    def __call__(self, x: Any, rng: Any = None) -> Tensor:
        """x [batch, time, d_in] -> [batch, time, d_out]."""
        y = self.weight.project(x, rng)
        return y if is_absent(self.bias) and not self.bias.used else add(y, self.bias.vector())


class Embedding(Module):
    """Rows of a table.   weight [vocab, d_model]."""

    def __init__(self, weight: Array):
        self.weight = Slot("embedding", weight)

    def __call__(self, ids: Array) -> Tensor:
        """ids [batch, time] -> [batch, time, d_model]."""
        return self.weight.rows(ids)


class LayerNorm(Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis.   weight, bias [d_model].

    Ba et al., 2016, arXiv:1607.06450; the variance is the biased one (1/n)."""

    def __init__(self, weight: Array, bias: Array, eps: float):
        self.weight, self.bias, self.eps = Slot("norm", weight), Slot("bias", bias), eps

    def __call__(self, x: Any) -> Tensor:
        """x [batch, time, d_model] -> the same shape."""
        return layer_norm(x, self.weight.vector(), self.bias.vector(), eps=self.eps)


class RMSNorm(Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.   weight [d_model].

    Zhang & Sennrich, 2019, arXiv:1910.07467, which has no eps. This is T5's layer norm."""

    def __init__(self, weight: Array, eps: float):
        self.weight, self.eps = Slot("norm", weight), eps

    def __call__(self, x: Any) -> Tensor:
        """x [batch, time, d_model] -> the same shape."""
        return rms_norm(x, self.weight.vector(), eps=self.eps)


class FeedForward(Module):
    """wo(drop(f(wi x))), or with a gate wo(drop(f(wi_0 x) * wi_1 x)).

    wi and gate [d_ff, d_model], called wi_0 and wi_1 if there is a gate; wo [d_model, d_ff]; activation: the name of f
    in ACTIVATIONS; p: the dropout rate. Vaswani et al., 2017, arXiv:1706.03762, sec. 3.3; the gate: Shazeer, 2020,
    arXiv:2002.05202 (T5 v1.1). Dropout after f is T5's and torch's; the paper has it only on the sublayer's output."""

    def __init__(self, wi: Linear, wo: Linear, gate: Linear | None, activation: str, p: float):
        if gate is None:
            self.wi, self.wo = wi, wo
        else:
            self.wi_0, self.wi_1, self.wo = wi, gate, wo
        self.out = Site("sublayer", wo.weight.shape[0], wo.weight.dtype)
        self.gated, self.activation, self.p = gate is not None, ACTIVATIONS[activation], p

    def __call__(self, x: Any, rng: Any = None) -> Tensor:
        """x [batch, time, d_model] -> the same shape."""
        hidden = self.activation((self.wi_0 if self.gated else self.wi)(x, rng))              # [batch, time, d_ff]
        if self.gated:
            hidden = mul(hidden, self.wi_1(x, rng))
        return self.wo(dropout(hidden, self.p, rng), rng)
