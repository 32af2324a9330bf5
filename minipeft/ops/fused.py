"""The ops that models call: one node each, equal to `definitions.py` in value and gradient (law 9).

Each docstring derives the gradient. Matrix products go through 2-D reshapes (a 3-D x @ W.T loops over the batch), sums
are made in buffers that the op itself took, and what several VJPs need is computed once. What is fused depends on the
model, never on what is attached to it, so that no bit moves when something is plugged elsewhere.
"""
from __future__ import annotations

import math

import numpy

from minipeft.autograd.tensor import once, op
from minipeft.backend import scalar, segment_sum, to_device, to_host, xp
from minipeft.ops.erf import erf_of


FEW_ROWS, LARGE = 32, 2 ** 16  # rows of x below which, and numbers of w from which on, BLAS does better turned round
BLOCK = 2048                   # rows of w at a time


@op
def linear(x, w):
    """x W^T.   x [..., d_in], w [d_out, d_in] -> [..., d_out];   dx = g W,   dW = g^T x, summed over all rows."""
    d_out, d_in = w.shape
    lead = x.shape[:-1]
    rows = x.reshape(-1, d_in)
    out = (_by_few_rows(rows, w) if 1 < len(rows) < FEW_ROWS and w.size >= LARGE else rows @ w.T).reshape(*lead, d_out)
    return out, (lambda g: (g.reshape(-1, d_out) @ w).reshape(*lead, d_in),
                 lambda g: g.reshape(-1, d_out).T @ x.reshape(-1, d_in))


def _by_few_rows(x, w):
    """x W^T as (W x^T)^T, a block of W at a time. A CPU's BLAS copies W into an order of its own before it multiplies,
    which for a few rows of x is most of the work: turned round, the copying is faster, and faster again in blocks that
    a cache holds. The result is C-contiguous, as always: later sums over a row go in the same order."""
    out = xp.empty((len(w), len(x)), dtype=xp.result_type(x.dtype, w.dtype))
    for start in range(0, len(w), BLOCK):
        xp.matmul(w[start:start + BLOCK], x.T, out=out[start:start + BLOCK])
    return xp.ascontiguousarray(out.T)


@op
def low_rank_linear(y, x, a, b, *, scale):
    """y + s (x A^T) B^T, never forming B A.   y [..., d_out], x [..., d_in], a [rank, d_in], b [d_out, rank].

    dy = g,   dx = s (g B) A,   dA = s (g B)^T x,   dB = s g^T (x A^T): s (g B) [n, rank] is shared by two of them."""
    d_out, d_in = b.shape[0], a.shape[1]
    lead = x.shape[:-1]
    s = scalar(scale, a)
    h = x.reshape(-1, d_in) @ a.T                                         # [n, rank]
    h *= s
    out = h @ b.T
    out += y.reshape(-1, d_out)
    gb = once(lambda g: (g.reshape(-1, d_out) @ b) * s)                   # [n, rank]
    return out.reshape(*lead, d_out), (
        lambda g: g,
        lambda g: (gb(g) @ a).reshape(*lead, d_in),
        lambda g: gb(g).T @ x.reshape(-1, d_in),
        lambda g: g.reshape(-1, d_out).T @ h)


@op
def embedding(table, ids):
    """Rows of a table.   table [vocab, d], ids [...] on the same device -> [..., d];   dE[i] = sum of g where ids = i.

    The ids are sorted and runs of one id are summed, in order: the bits do not depend on a device's atomics. Ids must
    be in range: `nn.inputs.check_ids` sees to it, because CuPy would wrap them silently."""
    shape = table.shape

    def vjp(g):
        flat = to_host(ids).reshape(-1)
        order = numpy.argsort(flat, kind="stable")
        ordered = flat[order]
        starts = numpy.flatnonzero(numpy.diff(ordered, prepend=-1))
        out = xp.zeros(shape, dtype=g.dtype)
        out[to_device(ordered[starts])] = segment_sum(g.reshape(-1, shape[1])[to_device(order)], starts)
        return out

    return table[ids], (vjp, None)


@op
def softmax(x, *, axis=-1):
    """p = e^x / sum e^x along `axis`;   dx = p (g - sum(g p))."""
    p = x - x.max(axis=axis, keepdims=True)
    xp.exp(p, out=p)
    p /= p.sum(axis=axis, keepdims=True)
    return p, (lambda g: p * (g - (g * p).sum(axis=axis, keepdims=True)),)


@op
def key_first(bias):
    """The same bias [batch, heads, query, key], lying in memory as `attention` keeps its scores;   dbias = g."""
    laid = xp.ascontiguousarray(bias.transpose(0, 3, 1, 2))               # [batch, key, heads, query]
    return laid.transpose(0, 2, 3, 1), (lambda g: g,)


@op
def attention(q, k, v, bias=None, keep=None, *, heads, scale):
    """concat_h softmax(scale Q_h K_h^T + bias_h) V_h; shapes as in `definitions.attention`.

    With P the probabilities, R = P * keep, and O = R V per head:
        dV = R^T g,   dP = (g V^T) * keep,   dS = P (dP - sum_key(dP P)),   dQ = scale dS K,   dK = scale dS^T Q,
        dbias = dS.
    Scores lie in memory as [batch, key, heads, query], and a sum over keys is one of long rows: NumPy reduces over a
    short last axis a few times as slowly. NumPy copies nothing for it: a head is a view of the projections, and a
    product is written where the next one reads it."""

    def split(x):  # [batch, time, heads * d] -> [batch, heads, time, d]
        return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)

    def joined(x):  # [batch, time, heads, d] -> [batch, time, heads * d]
        return x.reshape(*x.shape[:2], -1)

    def product(a, b):  # per head: [batch, heads, m, d], [batch, heads, d, n] -> [batch, m, heads, n]
        if b.shape[3] == 1:  # in decoding, one query: its scores lie together, one head after the other
            return xp.matmul(a, b).swapaxes(1, 2)
        out = xp.empty((max(len(a), len(b)), a.shape[2], heads, b.shape[3]), dtype=xp.result_type(a.dtype, b.dtype))
        xp.matmul(a, b, out=out.swapaxes(1, 2))
        return out

    def by_key(x):  # what broadcasts to [batch, heads, query, key] -> to [batch, key, heads, query]
        return x.reshape((1,) * (4 - x.ndim) + x.shape).transpose(0, 3, 1, 2)

    s = scalar(scale, q)
    qh, kh, vh = split(q if s == 1 else q * s), split(k), split(v)
    p = product(kh, qh.swapaxes(-1, -2))                                  # [batch, key, heads, query]
    if bias is not None:
        p += by_key(bias)
    p -= p.max(axis=1, keepdims=True)
    xp.exp(p, out=p)
    p /= p.sum(axis=1, keepdims=True)
    kept = None if keep is None else by_key(keep)
    r = (p if kept is None else p * kept).swapaxes(1, 2)                  # [batch, heads, key, query]

    @once
    def d_scores(g):  # [batch, key, heads, query]
        dp = product(vh, split(g).swapaxes(-1, -2))
        if kept is not None:
            dp *= kept
        dp *= p
        dp -= p * dp.sum(axis=1, keepdims=True)
        return dp

    def dq(g):
        d = product(d_scores(g).transpose(0, 2, 3, 1), kh)
        if s != 1:
            d *= s
        return joined(d)

    return joined(product(r.swapaxes(-1, -2), vh)), (
        dq,
        lambda g: joined(product(d_scores(g).swapaxes(1, 2), qh)),
        lambda g: joined(product(r, split(g))),
        lambda g: d_scores(g).transpose(0, 2, 3, 1),
        None)


def _mean_product(a, b):
    """mean(a b) over the last axis, which stays as 1: one pass, no array of products, and added up in order, not in
    pairs as `mean` does."""
    return xp.einsum("...i,...i->...", a, b)[..., None] / a.shape[-1]


@op
def layer_norm(x, w, b, *, eps):
    """z w + b with z = (x - mean) / sqrt(variance + eps) over the last axis (biased variance).

    dw = g z,   db = g,   and with h = g w:   dx = (h - mean(h) - z mean(h z)) / sqrt(variance + eps)."""
    z = x - x.mean(axis=-1, keepdims=True)
    r = 1 / xp.sqrt(_mean_product(z, z) + eps)
    z *= r
    out = z * w
    out += b

    def dx(g):
        h = g * w
        h -= h.mean(axis=-1, keepdims=True) + z * _mean_product(h, z)
        h *= r
        return h

    return out, (dx, lambda g: g * z, lambda g: g)


@op
def rms_norm(x, w, *, eps):
    """z w with z = x / sqrt(mean(x^2) + eps) over the last axis.

    dw = g z,   and with h = g w:   dx = (h - z mean(h z)) / sqrt(mean(x^2) + eps)."""
    r = 1 / xp.sqrt(_mean_product(x, x) + eps)
    z = x * r

    def dx(g):
        h = g * w
        h -= z * _mean_product(h, z)
        h *= r
        return h

    return z * w, (dx, lambda g: g * z)


@op
def gelu(x):
    """x Phi(x);   dx = g (Phi(x) + x phi(x)), phi the normal density."""
    cdf = erf_of(x * math.sqrt(0.5))
    cdf += 1
    cdf *= 0.5
    return x * cdf, (lambda g: g * (cdf + x * xp.exp(-0.5 * (x * x)) * (1 / math.sqrt(2 * math.pi))),)


@op
def gelu_tanh(x):
    """x (1 + t) / 2 with t = tanh(c (x + a x^3)), c = sqrt(2/pi), a = 0.044715.

    dx = g ((1 + t) / 2 + x (1 - t^2) c (1 + 3 a x^2) / 2)."""
    c, a = math.sqrt(2 / math.pi), 0.044715
    t = xp.asarray(x * x)  # NumPy makes a scalar of a 0-d product
    t *= a
    t += 1
    t *= x
    t *= c
    xp.tanh(t, out=t)
    out = t + 1
    out *= x
    out *= 0.5

    def vjp(g):
        d = x * x
        d *= 3 * a * c
        d += c
        d *= x
        d *= 1 - t * t
        d += t
        d += 1
        d *= 0.5
        d *= g
        return d

    return out, (vjp,)


@op
def silu(x):
    """x S(x), S(x) = 1 / (1 + e^-x);   dx = g S(x) (1 + x (1 - S(x)))."""
    s = xp.tanh(x * 0.5)
    s += 1
    s *= 0.5
    return x * s, (lambda g: g * (s * (1 + x * (1 - s))),)


@op
def cross_entropy(logits, labels, *, smoothing=0.0, ignore=-100):
    """Mean over the counted positions of -sum_i t_i log softmax(logits)_i; target t as in `definitions.cross_entropy`.

    dlogits = g (p - t) / count at counted positions, 0 at ignored ones. Labels must be in range, as ids are."""
    shape, vocab = logits.shape, logits.shape[-1]
    gold = labels.reshape(-1)
    counted = gold != ignore
    count = int(counted.sum())
    rows = xp.arange(gold.shape[0])
    gold = xp.where(counted, gold, 0)
    z = logits.reshape(-1, vocab)
    z = z - z.max(axis=-1, keepdims=True)
    loss = -z[rows, gold] * (1 - smoothing)
    if smoothing:
        loss -= z.mean(axis=-1) * smoothing
    p = xp.exp(z, out=z)
    total = p.sum(axis=-1)
    loss += xp.log(total)
    p /= total[:, None]

    def vjp(g):
        d = p - smoothing / vocab
        d[rows, gold] -= 1 - smoothing
        d *= (counted * (g / count))[:, None]
        return d.reshape(shape)

    return (loss * counted).sum() / count, (vjp, None)
