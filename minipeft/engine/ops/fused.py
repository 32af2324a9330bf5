"""The ops that models call: one node each, equal to `definitions.py` in value and gradient (law 9, fused = definition).

Each docstring gives the gradient. Matrix products go through 2-D reshapes (a 3-D x @ W.T loops over the batch). Sums
accumulate in buffers that the op itself allocated. Work that several VJPs share is done once. Which ops are fused
depends on the model alone, so plugging an attachment changes no bit at other places.
"""
from __future__ import annotations

import numpy

from minipeft.engine.calling import once
from minipeft.engine.tensor import op
from minipeft.backend import scalar, segment_sum, to_device, to_host, xp
from minipeft.engine.ops.activations import gelu, gelu_tanh, silu  # noqa: F401  (fused too)
from minipeft.engine.ops.overflow import mean_product, normalize_again, quiet, score_again


FEW_ROWS, LARGE = 32, 2 ** 16  # for fewer rows of x and at least so many numbers of w, `_by_few_rows` is faster
BLOCK = 2048                   # rows of w at a time


@op
def linear(x, w):
    """x W^T.   x [..., d_in], w [d_out, d_in] -> [..., d_out];   dx = g W,   dW = g^T x, summed over all rows."""
    d_out, d_in = w.shape
    lead = x.shape[:-1]
    return _product(x, w), (lambda g: (g.reshape(-1, d_out) @ w).reshape(*lead, d_in),
                            lambda g: g.reshape(-1, d_out).T @ x.reshape(-1, d_in))


@op
def dequantized_linear(x, *, dequantize):
    """x W^T with W = dequantize() [d_out, d_in], made for each product and dropped after it; x [..., d_in] -> [...,
    d_out];   dx = g W, with the bits of `linear`. W is no input, so there is no dW, and no W waits for the backward
    pass."""
    shape = x.shape
    out = _product(x, dequantize())
    d_out = out.shape[-1]
    return out, (lambda g: (g.reshape(-1, d_out) @ dequantize()).reshape(shape),)


def _product(x, w):
    """x W^T.   x [..., d_in], w [d_out, d_in] -> [..., d_out]."""
    rows = x.reshape(-1, w.shape[1])
    out = _by_few_rows(rows, w) if 1 < len(rows) < FEW_ROWS and w.size >= LARGE else rows @ w.T
    return out.reshape(*x.shape[:-1], len(w))


def _by_few_rows(x, w):
    """x W^T as (W x^T)^T, a block of W at a time. A CPU's BLAS copies W into a layout of its own before it multiplies.
    For a few rows of x this copying is most of the work. The product is faster with W on the left, and still faster in
    blocks that fit into the cache. The result is C-contiguous as always, so later sums over a row keep their order."""
    out = xp.empty((len(w), len(x)), dtype=xp.result_type(x.dtype, w.dtype))
    for start in range(0, len(w), BLOCK):
        xp.matmul(w[start:start + BLOCK], x.T, out=out[start:start + BLOCK])
    return xp.ascontiguousarray(out.T)


@op
def low_rank_linear(y, x, a, b, *, scale):
    """y + s (x A^T) B^T, never forming B A.   y [..., d_out], x [..., d_in], a [rank, d_in], b [d_out, rank]; scale: s.

    dy = g,   dx = s (g B) A,   dA = s (g B)^T x,   dB = s g^T (x A^T).   dx and dA share s (g B) [n, rank]."""
    d_out, d_in = b.shape[0], a.shape[1]
    lead = x.shape[:-1]
    s = scalar(scale, a)
    narrow = x.reshape(-1, d_in) @ a.T                                    # [n, rank]
    narrow *= s
    out = narrow @ b.T
    out += y.reshape(-1, d_out)
    gb = once(lambda g: (g.reshape(-1, d_out) @ b) * s)                   # [n, rank]
    return out.reshape(*lead, d_out), (
        lambda g: g,
        lambda g: (gb(g) @ a).reshape(*lead, d_in),
        lambda g: gb(g).T @ x.reshape(-1, d_in),
        lambda g: g.reshape(-1, d_out).T @ narrow)


@op
def embedding(table, ids):
    """Rows of a table.   table [vocab, d], ids [...] on the same device -> [..., d];   dE[i] = sum of g where ids = i.

    The ids are sorted, and the rows of g for each id are added in order, so the bits do not depend on a GPU's atomic
    additions. Ids must be in range: `nn.inputs.check_ids` checks them, because CuPy would wrap them silently."""
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
    """p = e^x / sum e^x along `axis`, x and p [...];   dx = p (g - sum(g p))."""
    with quiet(over="ignore"):  # e^-inf is 0
        p = x - x.max(axis=axis, keepdims=True)
    xp.exp(p, out=p)
    p /= p.sum(axis=axis, keepdims=True)
    return p, (lambda g: p * (g - (g * p).sum(axis=axis, keepdims=True)),)


@op
def toeplitz(values, *, queries):
    """bias[h, q, k] = values[q - k + keys - 1, h], shapes as in `definitions.toeplitz`;   dvalues = sums of diagonals.

    The result is a view of one number per distance and head, in which neighboring queries are neighbors in memory."""
    n, heads = values.shape[-2:]
    keys = n + 1 - queries
    laid = xp.ascontiguousarray(values.reshape(-1, n, heads).swapaxes(1, 2))       # [batch, heads, n]
    batch_step, head_step, step = laid.strides
    view = xp.lib.stride_tricks.as_strided(laid, (len(laid), heads, queries, keys),
                                           (batch_step, head_step, step, step))    # [.., q, k'], k' = keys - 1 - k

    def vjp(g):
        d = xp.zeros((len(g), heads, n), dtype=g.dtype)
        for k in range(keys):
            d[..., keys - 1 - k:keys - 1 - k + queries] += g[..., k]
        return d.swapaxes(1, 2).reshape(values.shape)

    return view[..., ::-1], (vjp,)


@op
def attention(q, k, v, bias=None, keep=None, mask=None, *, heads, scale):
    """concat_h softmax(scale Q_h K_h^T + bias_h + mask) V_h; arguments and shapes as in `definitions.attention`.

    With P the probabilities, R = P * keep, and O = R V per head:
        dV = R^T g,   dP = (g V^T) * keep,   dS = P (dP - sum_key(dP P)),   dQ = scale dS K,   dK = scale dS^T Q,
        dbias = dS,   and dS = 0 where a query may look nowhere.
    Scores lie in memory as [batch, key, heads, query], so that a sum over keys adds long rows: along a short last
    axis NumPy is a few times slower. Nothing is copied for this layout: a head is a view of the projections, and each
    product is written where the next one reads it."""

    def split(x):  # [batch, time, heads * d] -> [batch, heads, time, d]
        return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)

    def joined(x):  # [batch, time, heads, d] -> [batch, time, heads * d]
        return x.reshape(*x.shape[:2], -1)

    def product(a, b):  # per head: [batch, heads, m, d], [batch, heads, d, n] -> [batch, m, heads, n]
        if b.shape[3] == 1:  # one query, in decoding: its scores lie together, head after head
            return xp.matmul(a, b).swapaxes(1, 2)
        out = xp.empty((max(len(a), len(b)), a.shape[2], heads, b.shape[3]), dtype=xp.result_type(a.dtype, b.dtype))
        xp.matmul(a, b, out=out.swapaxes(1, 2))
        return out

    def by_key(x):  # of any shape that broadcasts to [batch, heads, query, key] -> to [batch, key, heads, query]
        return x.reshape((1,) * (4 - x.ndim) + x.shape).transpose(0, 3, 1, 2)

    s = scalar(scale, q)
    qh, kh, vh = split(q if s == 1 else q * s), split(k), split(v)
    biases = [by_key(x) for x in (bias, mask) if x is not None]
    with quiet(over="ignore", invalid="ignore"):
        p = product(kh, qh.swapaxes(-1, -2))                              # [batch, key, heads, query]
        for x in biases:
            p += x
        top = p.max(axis=1, keepdims=True)
        blind = None if xp.isfinite(top).all() else score_again(p, top, qh, kh, biases, product)
        p -= top
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
        if blind is not None:
            dp *= ~blind
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
        None,
        None)


@op
def layer_norm(x, w, b, *, eps):
    """z w + b with z = (x - mean) / sqrt(variance + eps) over the last axis; shapes as in `definitions.layer_norm`.

    dw = g z,   db = g,   and with u = g w:   dx = (u - mean(u) - z mean(u z)) / sqrt(variance + eps)."""
    with quiet(over="ignore", invalid="ignore"):
        z = x - x.mean(axis=-1, keepdims=True)
        variance = mean_product(z, z)
        r = 1 / xp.sqrt(variance + eps)
        z *= r
    if not xp.isfinite(variance).all():
        normalize_again(x, z, r, ~xp.isfinite(variance[..., 0]), eps, centered=True)
    out = z * w
    out += b

    def dx(g):
        u = g * w
        u -= u.mean(axis=-1, keepdims=True) + z * mean_product(u, z)
        u *= r
        return u

    return out, (dx, lambda g: g * z, lambda g: g)


@op
def rms_norm(x, w, *, eps):
    """z w with z = x / sqrt(mean(x^2) + eps) over the last axis; shapes as in `definitions.rms_norm`.

    dw = g z,   and with u = g w:   dx = (u - z mean(u z)) / sqrt(mean(x^2) + eps)."""
    square = mean_product(x, x)
    r = 1 / xp.sqrt(square + eps)
    z = x * r
    if not xp.isfinite(square).all():
        normalize_again(x, z, r, ~xp.isfinite(square[..., 0]), eps, centered=False)

    def dx(g):
        u = g * w
        u -= z * mean_product(u, z)
        u *= r
        return u

    return z * w, (dx, lambda g: g * z)


@op
def rotate(x, cos, sin):
    """Each pair of every head turned by its angle, as in `definitions.rotate`;   dx = g turned back."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]                           # [1 or batch, time, 1, d/2]

    def turned(x, sin):
        a, b = (x.reshape(*x.shape[:2], x.shape[2] // (2 * half), 2, half)[..., i, :] for i in (0, 1))
        out = xp.empty((*a.shape[:3], 2, half), dtype=x.dtype)
        xp.subtract(a * cos, b * sin, out=out[..., 0, :])
        xp.add(b * cos, a * sin, out=out[..., 1, :])
        return out.reshape(x.shape)

    return turned(x, sin), (lambda g: turned(g, -sin), None, None)


@op
def cross_entropy(logits, labels, *, smoothing=0.0, ignore=-100):
    """Mean over the counted positions of -sum_i t_i log softmax(logits)_i, all as in `definitions.cross_entropy`.

    dlogits = g (p - t) / count at counted positions, 0 at ignored ones, with p = softmax(logits). Counted labels
    must be in range, like ids."""
    shape, vocab = logits.shape, logits.shape[-1]
    gold = labels.reshape(-1)
    counted = gold != ignore
    count = int(counted.sum())
    rows = xp.arange(gold.shape[0])
    gold = xp.where(counted, gold, 0)
    z = logits.reshape(-1, vocab)
    with quiet(over="ignore"):  # e^-inf is 0
        z = z - z.max(axis=-1, keepdims=True)
        loss = -z[rows, gold] * (1 - smoothing)
        if smoothing:
            mean = z.mean(axis=-1)
            loss -= (mean if xp.isfinite(mean).all() else (z / vocab).sum(axis=-1)) * smoothing
    p = xp.exp(z, out=z)
    total = p.sum(axis=-1)
    loss += xp.log(total)
    p /= total[:, None]

    def vjp(g):
        d = p - smoothing / vocab
        d[rows, gold] -= 1 - smoothing
        d *= (counted * (g / count))[:, None]
        return d.reshape(shape)

    loss = xp.where(counted, loss, xp.zeros((), loss.dtype))
    with quiet(over="ignore"):
        total = loss.sum()
    return total / count if xp.isfinite(total) else (loss / count).sum(), (vjp, None)
