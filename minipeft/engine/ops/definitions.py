"""The fused ops as the papers write them: the same names and arguments, composed of primitives.

Read these first. `fused.py` is faster and equal in value and all gradients (law 9, fused = definition). Nothing here is
arranged for speed or memory; softmax, cross_entropy and silu alone are arranged against overflow.

Elsewhere, intermediate results must fit into the dtype: x^2 in the norms (float32: |x| < 1.8e19), the sum of a row in
layer_norm, x^3 in gelu_tanh (7e12), q k in attention. Beyond these limits the definitions give 0, NaN or infinities.
The fused ops still give the right number there, if it fits (`overflow.py`).
"""
from __future__ import annotations

import math
from typing import Any, Callable

from minipeft.backend import Array, xp
from minipeft.engine.ops.primitives import concat, erf, exp, log, matmul, matrix_transpose, mean, reshape, tanh, where
from minipeft.engine.stopped import stop_gradient
from minipeft.engine.tensor import Tensor, array_of


def linear(x: Any, w: Any) -> Tensor:
    """x W^T.   x [..., d_in], w [d_out, d_in] -> [..., d_out]."""
    return x @ matrix_transpose(w)


def dequantized_linear(x: Any, *, dequantize: Callable[[], Array]) -> Tensor:
    """x W^T with W = dequantize() [d_out, d_in], a constant.   x [..., d_in] -> [..., d_out]."""
    return x @ matrix_transpose(dequantize())


def low_rank_linear(y: Any, x: Any, a: Any, b: Any, *, scale: Any) -> Tensor:
    """y + s (x A^T) B^T.   y [..., d_out], x [..., d_in], a [rank, d_in], b [d_out, rank] -> [..., d_out].

    scale: s. Hu et al., 2021, arXiv:2106.09685, eq. (3), with s = alpha / r (sec. 4.1)."""
    return y + scale * (x @ matrix_transpose(a) @ matrix_transpose(b))


def embedding(table: Any, ids: Array) -> Tensor:
    """one_hot(ids) E.   table [vocab, d], ids [...] -> [..., d]."""
    one_hot = (ids[..., None] == xp.arange(array_of(table).shape[0])).astype(array_of(table).dtype)
    return matmul(one_hot, table)


def softmax(x: Any, *, axis: int = -1) -> Tensor:
    """e^x / sum e^x along `axis`, x [...]. The largest x is subtracted first, which changes nothing but the range."""
    largest = stop_gradient(array_of(x).max(axis=axis, keepdims=True))
    e = exp(x - largest)
    return e / e.sum(axis=axis, keepdims=True)


def toeplitz(values: Any, *, queries: int) -> Tensor:
    """bias[h, q, k] = values[q - k + keys - 1, h]: one number per distance key - query, that of the largest first.

    values [distances, heads] -> [1, heads, queries, keys], or [batch, distances, heads] -> [batch, heads, queries,
    keys]; there are queries + keys - 1 distances."""
    distances, heads = array_of(values).shape[-2:]
    keys = distances + 1 - queries
    at = xp.arange(queries)[:, None] - xp.arange(keys)[None, :] + keys - 1                # [query, key]
    one_hot = (at[..., None] == xp.arange(distances)).astype(array_of(values).dtype)
    bias = one_hot @ reshape(values, shape=(-1, 1, distances, heads))                     # [batch, query, key, heads]
    return bias.transpose(0, 3, 1, 2)


def attention(q: Any, k: Any, v: Any, bias: Any = None, keep: Any = None, mask: Any = None, *, heads: int,
              scale: float) -> Tensor:
    """concat_h softmax(scale Q_h K_h^T + bias_h + mask) V_h.   Vaswani et al., 2017, arXiv:1706.03762, sec. 3.2.1-2.

    q [batch, query, heads * d_k], k [batch, key, heads * d_k], v [batch, key, heads * d_v] -> [batch, query, heads *
    d_v]. bias (relative positions) and mask (a constant, 0 where a query may look and -inf elsewhere) broadcast to
    [batch, heads, query, key]. A query that may look nowhere averages all values, whatever its scores are. keep, of
    that shape: a dropout mask on the probabilities, already divided by 1 - p. heads: how many. scale: d_k^-1/2 in the
    paper, 1 in T5."""

    def split(x: Any) -> Tensor:  # [batch, time, heads * d] -> [batch, heads, time, d]
        batch, time, width = array_of(x).shape
        return reshape(x, shape=(batch, time, heads, width // heads)).transpose(0, 2, 1, 3)

    scores = scale * (split(q) @ split(k).mT)                     # [batch, heads, query, key]
    for added in (bias, mask):
        scores = scores if added is None else scores + added
    blind = (scores.data == -math.inf).all(axis=-1, keepdims=True)
    probabilities = softmax(where(blind, xp.zeros((), scores.dtype), scores))
    if keep is not None:
        probabilities = probabilities * keep
    mixed = (probabilities @ split(v)).transpose(0, 2, 1, 3)      # [batch, query, heads, d_v]
    return mixed.reshape(mixed.shape[0], mixed.shape[1], -1)


def layer_norm(x: Any, w: Any, b: Any, *, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * w + b over the last axis; the variance is the biased one (1/n).

    Ba et al., 2016, arXiv:1607.06450.   x [..., d], w and b broadcast to x ([d], or [batch, 1, d])."""
    centered = x - mean(x, axis=-1, keepdims=True)
    variance = (centered * centered).mean(axis=-1, keepdims=True)
    return centered * (variance + eps) ** -0.5 * w + b


def rms_norm(x: Any, w: Any, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * w over the last axis.   Zhang & Sennrich, 2019, arXiv:1910.07467; T5's layer norm.

    x [..., d], w broadcasts to x ([d], or [batch, 1, d]). The paper has no eps."""
    return x * (mean(x * x, axis=-1, keepdims=True) + eps) ** -0.5 * w


def rotate(x: Any, cos: Array, sin: Array) -> Tensor:
    """a cos - b sin, b cos + a sin: the halves a, b of each head turn by an angle. Su et al., 2021, arXiv:2104.09864,
    sec. 3.2.2. x [batch, time, heads * d]; cos, sin [1 or batch, time, d/2]. Departure: the paper pairs neighbors."""
    halves = reshape(x, shape=(*array_of(x).shape[:2], array_of(x).shape[2] // (2 * cos.shape[-1]), 2, cos.shape[-1]))
    a, b, cos, sin = halves[..., :1, :], halves[..., 1:, :], cos[:, :, None, None], sin[:, :, None, None]
    return reshape(concat(a * cos - b * sin, b * cos + a * sin, axis=-2), shape=array_of(x).shape)


def gelu(x: Any) -> Tensor:
    """x Phi(x), elementwise, with the normal distribution function Phi(x) = (1 + erf(x / sqrt 2)) / 2.

    Hendrycks & Gimpel, 2016, arXiv:1606.08415."""
    return x * ((erf(x * math.sqrt(0.5)) + 1) * 0.5)


def gelu_tanh(x: Any) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), elementwise: the same paper's approximation (gelu_new in T5)."""
    cubic = x + x * x * x * 0.044715
    return x * (tanh(cubic * math.sqrt(2 / math.pi)) + 1) * 0.5


def silu(x: Any) -> Tensor:
    """x / (1 + e^-x), elementwise, also called swish; written as x (1 + tanh(x / 2)) / 2, which cannot overflow."""
    return x * ((tanh(x * 0.5) + 1) * 0.5)


def cross_entropy(logits: Any, labels: Array, *, smoothing: float = 0.0, ignore: int = -100) -> Tensor:
    """-sum_i t_i log softmax(logits)_i, the mean over the positions whose label is not `ignore`.

    logits [..., vocab], integer labels [...] -> a number. The target t is 1 - e on the label plus e / vocab on every
    token, the label included, with e = `smoothing` (Szegedy et al., 2015, arXiv:1512.00567, sec. 7)."""
    z = array_of(logits)
    shifted = logits - stop_gradient(z.max(axis=-1, keepdims=True))
    log_p = shifted - log(exp(shifted).sum(axis=-1, keepdims=True))
    counted = (labels != ignore)[..., None]
    one_hot = (labels[..., None] == xp.arange(z.shape[-1])).astype(z.dtype)
    target = (one_hot * (1 - smoothing) + smoothing / z.shape[-1]) * counted
    return (log_p * -target).sum() / int(counted.sum())
