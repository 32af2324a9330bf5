"""LoRA trained on squared errors: y = x W^T + b + s (x A^T) B^T, s = alpha / r; A and B are trained, W and b are not.

    L   = sum_j w_j 1/2 |y_j - t_j|^2 / sum_j w_j          one mean over all tokens j of a step, of all micro-batches
    G   = w (y - t) / sum w      dA = s (G B)^T x      dB = s G^T (x A^T)
    g   = (dA, dB) min(1, clip / |(dA, dB)|)                 one norm, of the step's gradient over A and B
    lr' = lr factor(t)                                       t = 1, 2, ...
    sgd     p = p - lr' decay p - lr' g
    adamw   m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2
            p = p - lr' decay p - lr' (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Hu et al., 2021, arXiv:2106.09685, eq. (3) (y); Kingma & Ba, 2015, arXiv:1412.6980 (m, v, bias correction);
Loshchilov & Hutter, 2019, arXiv:1711.05101, Algorithm 2 (decoupled decay).
Departure from that algorithm: the decay is multiplied by the learning rate, as torch does, and others after it.

    linear    factor(t) = min(1, t / warmup) min(1, (steps - t + 1) / (steps - warmup))
    cosine    factor(t) = min(1, t / warmup) (1 + cos(pi (t - 1 - warmup) / (steps - warmup))) / 2
              every fraction is cut to 0 .. 1

Under the convention "first step at 0" the warm-up is min(1, (t - 1) / warmup): the first step moves nothing. Under
"clip / (norm + 1e-6)", 1e-6 is added to the norm.
"""
from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy

from minipeft.conformance.case import Case, remembered
from minipeft.conformance.methods.lora_training.batches import joined, steps_of
from minipeft.conformance.methods.lora_training.field import Bounds, Digits, Field
from minipeft.conformance.running import Bounded, value_of
from minipeft.conformance.tolerance import Value, rounded_values

WARMUPS = ("first step at 1", "first step at 0")
CLIPS = ("clip / norm", "clip / (norm + 1e-6)")


@dataclasses.dataclass
class After:
    """The results of a step. norm: of the gradient before clipping. weights: {"A", "B"}. moments: {"m.A", "m.B", "v.A",
    "v.B"}, empty for SGD."""

    loss: Any
    norm: Any
    lr: Any
    weights: dict[str, Any]
    moments: dict[str, Any]


def residual(s: Any, W: Any, b: Any, A: Any, B: Any, x: Any, minus_t: Any) -> Any:
    """y - t [N, out]; minus_t: -t."""
    return x @ W.T + b + s * ((x @ A.T) @ B.T) + minus_t


def loss(share: Any, e: Any) -> Any:
    """L. share [N, 1]: w / sum w. e [N, out]: y - t."""
    return (share * (e * e)).sum() / 2


def grad_a(s: Any, share: Any, B: Any, x: Any, e: Any) -> Any:
    """dA; share and e as in `loss`."""
    return s * (((share * e) @ B).T @ x)                                               # [r, in]


def grad_b(s: Any, share: Any, A: Any, x: Any, e: Any) -> Any:
    """dB; share and e as in `loss`."""
    return s * ((share * e).T @ (x @ A.T))                                             # [out, r]


def factor(case: Case, t: int, field: Field) -> Any:
    """The schedule's factor(t) at step t = 1, 2, ..., by the case's convention."""
    p, late = case.params, case.conventions.get("schedule", WARMUPS[0]) == WARMUPS[1]
    one = numpy.longdouble if isinstance(field, Bounds) else field.scalar
    if p["schedule"] == "constant":
        return one(1)
    warmup, steps = p["warmup"], p["steps"]
    warm = one(min(t - late, warmup)) / one(warmup) if warmup else one(1)
    gone = one(min(max(t - 1 - warmup, 0), steps - warmup)) / one(steps - warmup)
    return warm * ((1 - gone) if p["schedule"] == "linear" else (1 + field.cos_pi(gone)) / 2)


def train(case: Case, field: Field) -> list[After]:
    """The results of every step, in order. field: the kind of number that they are computed in."""
    p, (r, d_in), d_out = case.params, case["A"].shape, case["B"].shape[0]
    s = field.stored(field.scalar(p["alpha"]) / field.scalar(r))
    W, b, weights = field.array(case["W"]), field.array(case["b"]), {n: field.array(case[n]) for n in "AB"}
    kinds = "" if p["optimizer"] == "sgd" else "mv"
    moments = {f"{kind}.{n}": field.array(0 * case[n]) for kind in kinds for n in "AB"}
    path = []
    for t, micro_batches in enumerate(steps_of(case), start=1):
        rows, parts = joined(micro_batches), len(micro_batches)
        x, n = field.array(rows[0]), len(rows[0])
        share = field.array(rows[2][:, None]) / field.array(rows[2].sum())
        A, B = weights["A"], weights["B"]
        e = field.block(residual, 6, d_in + r + 4, s, W, b, A, B, x, field.array(-rows[1]))
        # the mean of each micro-batch, times its tokens, divided by those of the step: three roundings; and the sum
        k = 6 + parts
        found = field.block(loss, k, n + d_out + parts, share, e)
        g = {"A": field.block(grad_a, k, d_out + n + parts + 2, s, share, B, x, e),
             "B": field.block(grad_b, k, d_in + n + parts + 2, s, share, A, x, e)}
        norm = field.norm(*g.values())
        if p.get("clip") is not None:
            extra = 1e-6 if case.conventions.get("clip", CLIPS[0]) == CLIPS[1] else 0.0
            scale = field.clipped(p["clip"], norm, extra)
            g = {name: field.within(field.block(lambda a, c: a * c, 1, 1, value, scale), p["clip"], 12)
                 for name, value in g.items()}
        lr = field.scalar(p["lr"]) * field.factor(factor(case, t, field), t)
        weights, moments = updated(p, field, t, lr, weights, moments, g)
        path.append(After(found, norm, lr, weights, moments))
    return path


def updated(p: Any, field: Field, t: int, lr: Any, weights: dict, moments: dict, g: dict) -> tuple[dict, dict]:
    """Weights and moments after the optimizer's step on the gradients g. p: the case's params. t: the step. lr: the
    learning rate with its factor."""
    minus_lr, minus_decay = field.stored(-lr), field.stored(-lr * field.scalar(p["weight_decay"]))
    after, direction = {}, g
    if moments:
        direction = {}
        for name in g:
            after[f"m.{name}"], after[f"v.{name}"], direction[name] = adam(
                p, field, t, moments[f"m.{name}"], moments[f"v.{name}"], g[name])
    return {name: field.block(lambda p, u, d, rate: p + d * p + rate * u, 6, 3, value, direction[name], minus_decay,
                              minus_lr) for name, value in weights.items()}, after


def adam(p: Any, field: Field, t: int, m: Any, v: Any, g: Any) -> tuple:
    """The new m and v of one array, and its direction m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)."""
    b1, b2 = field.scalar(p["beta1"]), field.scalar(p["beta2"])
    m = field.block(lambda b, rest, m, g: b * m + rest * g, 4, 2, field.stored(b1), field.stored(1 - b1), m, g)
    v = field.block(lambda b, rest, v, g: b * v + rest * (g * g), 4, 2, field.stored(b2), field.stored(1 - b2), v, g)
    c1, c2 = (field.stored(1 - power(b, t)) for b in (b1, b2))
    u = (m / c1) / (field.root(v / c2) + field.stored(field.scalar(p["eps"])))
    return m, v, field.within(u, longest(p["beta1"], p["beta2"], t), 12 * t)


def longest(b1: float, b2: float, t: int) -> float:
    """The largest |u| of the direction u that any gradients give at step t. Let a_i and c_i be the weights of g_i in m
    and of g_i^2 in v. By Cauchy and Schwarz, |sum a_i g_i| <= sqrt(sum a_i^2 / c_i) sqrt(sum c_i g_i^2). To this `adam`
    adds 12 t roundings: ten of the moments at every step, and two of the quotient."""
    ratios = sum((1 - b1) ** 2 * b1 ** (2 * i) / ((1 - b2) * b2 ** i) for i in range(t))
    return math.sqrt(ratios * (1 - b2 ** t)) / (1 - b1 ** t)


def power(b: Any, t: int) -> Any:
    """b^t, t >= 1, by products."""
    product = b
    for _ in range(t - 1):
        product = product * b
    return product


@remembered
def path_values(case: Case) -> list[After]:
    """The results of every step, in order; every number is a Value, with its bound."""
    def of(x: Bounded) -> Value:
        return value_of(Bounded(x.value, x.error, case.arith))

    return [After(of(a.loss), of(a.norm), of(a.lr), {k: of(x) for k, x in a.weights.items()},
                  {k: of(x) for k, x in a.moments.items()}) for a in train(case, Bounds(case.arith))]


def values(case: Case) -> dict[str, Value]:
    """{output: its reference, with its bound}; the first axis is the step."""
    path = path_values(case)
    return {"losses": stacked([a.loss for a in path]), "A": stacked([a.weights["A"] for a in path]),
            "B": stacked([a.weights["B"] for a in path]), "lr": stacked([a.lr for a in path])}


def stacked(found: list[Value]) -> Value:
    """The Values of all steps as one, whose first axis is the step."""
    return Value(numpy.stack([v.exact for v in found]), numpy.stack([v.mag for v in found]), 1, 1)


def exact_values(case: Case) -> dict[str, Value]:
    """As `values`, computed in 50 digits and rounded once, to float64."""
    import mpmath
    with mpmath.workdps(50):
        path = train(case, Digits())
        many = {"losses": [a.loss for a in path], "A": [a.weights["A"] for a in path],
                "B": [a.weights["B"] for a in path], "lr": [a.lr for a in path]}
        return rounded_values({name: dataclasses.replace(value, exact=numpy.array(many[name], object))
                               for name, value in values(case).items()})
