"""How many floating-point operations an op takes: its forward, and those VJPs that were kept.

    a multiply-add is 2;  y = x W^T with n rows: 2 n d_in d_out forward, as much again for dx, as much again for dW

so a step that trains N weights on n tokens takes 2 N n forward and 4 N n backward (Kaplan et al., 2020,
arXiv:2001.08361, sec. 2.1), and one with these weights frozen 2 N n and 2 N n.

The matrix products of linear, dequantized_linear, low_rank_linear, matmul and attention are counted exactly, and
nothing else in these ops. Left out are the softmax inside attention, 7 per score beside 4 d_k for its products, the
work of decoding a quantized weight, and the lower-order terms of solve. Work that several VJPs share (low_rank_linear's
g B, attention's g V^T, the system that solve solves for g) counts once, if one of them is kept. Other ops take a fixed
number per element: the arithmetic in the source of the op, where exp, tanh, erf, max and a comparison count as 1.
Moving data takes 0. The engine's own sums (over broadcast axes, and of several terms) are not counted.

An op without a rule counts 1 per element of its output, forward and for each kept VJP. `has_rule` says whether an op
has one.
"""
from __future__ import annotations

import math
from typing import Callable, Collection, Sequence

Shapes = Sequence[tuple[int, ...]]  # one per input; () for an absent one and for a number
Kept = Collection[int]              # positions of the inputs whose VJPs were kept

# Per element of the larger of the output and the first input: the forward, then the VJP of each input in order.
PER_ELEMENT: dict[str, tuple[int, ...]] = {
    "add": (1, 0, 0), "sub": (1, 0, 1), "mul": (1, 1, 1), "div": (1, 1, 4), "neg": (1, 1), "power": (1, 3),
    "exp": (1, 1), "log": (1, 1), "tanh": (1, 3), "erf": (1, 5), "relu": (2, 1), "where": (0, 0, 1, 2), "sum": (1, 0),
    "matrix_transpose": (0, 0), "transpose": (0, 0), "reshape": (0, 0), "index": (0, 0), "scatter": (0, 0),
    "concat": (0,), "key_first": (0, 0), "toeplitz": (0, 1),
    "softmax": (5, 4), "layer_norm": (7, 8, 1, 0), "rms_norm": (4, 6, 1), "rotate": (3, 3), "gelu": (5, 7),
    "gelu_tanh": (9, 12), "silu": (5, 5), "cross_entropy": (5, 2, 0)}


def _product(shapes: Shapes, out: tuple, kept: Kept) -> tuple[int, int]:
    """[..., m, k] times [k, n]: 2 k per number of the output, and as much for the VJP of either factor."""
    product = 2 * math.prod(out) * shapes[0][-1]
    return product, product * len(kept)


def _low_rank_linear(shapes: Shapes, out: tuple, kept: Kept) -> tuple[int, int]:
    """y + s (x A^T) B^T: x A^T, dx and dA take 2 n r d_in; the product with B^T, g B and dB take 2 n r d_out."""
    n, (rank, d_in), d_out = math.prod(out[:-1]), shapes[2], out[-1]
    down, up = 2 * n * rank * d_in, 2 * n * rank * d_out
    gb = up if {1, 2} & set(kept) else 0
    return down + up, gb + down * len({1, 2} & set(kept)) + up * (3 in kept)


def _attention(shapes: Shapes, out: tuple, kept: Kept) -> tuple[int, int]:
    """Q K^T, dQ and dK take 2 (queries) (keys) (heads d_k) per row; P V, g V^T and dV the same with d_v."""
    (batch, queries, width), keys = shapes[0], shapes[1][1]
    scores, mix = (2 * batch * queries * keys * d for d in (width, shapes[2][-1]))
    gv = mix if {0, 1, 3} & set(kept) else 0
    return scores + mix, gv + scores * len({0, 1} & set(kept)) + mix * (2 in kept)


def _solve(shapes: Shapes, out: tuple, kept: Kept) -> tuple[int, int]:
    """Per matrix, 2/3 n^3 to factorize a and 2 n^2 m for x; as much again for a^-T g, and 2 n^2 m for da."""
    n, m = out[-2:]
    systems = math.prod(out[:-2])
    once, product = systems * (2 * n ** 3 // 3 + 2 * n * n * m), systems * 2 * n * n * m
    return once, once * bool(kept) + product * (0 in kept)


def _embedding(shapes: Shapes, out: tuple, kept: Kept) -> tuple[int, int]:
    """The forward looks rows up; dE adds each row to another one."""
    return 0, math.prod(out) * len(kept)


RULES: dict[str, Callable[[Shapes, tuple, Kept], tuple[int, int]]] = {
    "linear": _product, "dequantized_linear": _product, "matmul": _product, "low_rank_linear": _low_rank_linear,
    "attention": _attention, "embedding": _embedding, "solve": _solve}


def has_rule(op: str) -> bool:
    """Whether the op of this name is counted by a rule of its own."""
    return op in RULES or op in PER_ELEMENT


def flops(op: str, shapes: Shapes, out: tuple, kept: Kept) -> tuple[int, int]:
    """The FLOPs (forward, backward) of one op of this name. shapes: of its inputs, () for an absent one or a number;
    out: the shape of its output; kept: the positions of the inputs whose VJPs were kept."""
    if op in RULES:
        return RULES[op](shapes, out, kept)
    if op not in PER_ELEMENT:
        return math.prod(out), math.prod(out) * len(kept)
    forward, *backward = PER_ELEMENT[op]
    n = max(math.prod(shape) for shape in (out, *shapes[:1]))
    return forward * n, n * sum(backward[i] for i in kept if i < len(backward))
