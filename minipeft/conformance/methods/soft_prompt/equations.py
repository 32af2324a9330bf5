"""A soft prompt in front of one self-attention layer.

    X  = [P; E[ids]]           mask' = [1_p; mask]           Lester, Al-Rfou & Constant, 2021, arXiv:2104.08691, sec. 2
    X' = X + position[positions]                             where the case has a table of positions
    Y  = softmax(X' q^T (X' k^T)^T / sqrt(d) + bias) X' v^T o^T          softmax over the keys that mask' shows
    bias[i, j] = relative[clip(j - i, -R, R) + R]            where the case has relative positions; else 0
    y  = Y at the t tokens
    dP = sum over the batch of dX at the p prompt slots      g = dL/dy; nothing else has a gradient

P [p, d], ids and mask [b, t], E [V, d], q, k, v, o [d, d], position [L, d], relative [2 R + 1], y and g [b, t, d].
y at masked tokens has no meaning: it is taken as 0 here, and g is 0 there.

Conventions. positions: with "shifted", the columns of X are numbered from 0, so that the prompt counts as tokens and
token i has position p + i. With "restart", prompt and tokens are each numbered from 0.
left_padding: where the first l tokens of a row are masked, the prompt is "next to the text", between these and the
first visible token; or "outside the padding", left of the whole row. Where l = 0 both are the same.
numbering: with "columns", masked columns on the left take positions like all others. With "tokens", a row's positions
start at its first visible column (with "restart", the prompt's and the tokens' each do), and the masked columns to the
left of it take none and have position 0. A case without this convention means columns.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Callable

import numpy

from minipeft.conformance.case import Case, remembered
from minipeft.conformance.numbers import rounded
from minipeft.conformance.running import Bounded, softmax, sqrt, value_of
from minipeft.conformance.tolerance import Value

POSITIONS = ("shifted", "restart")
LEFT_PADDING = ("next to the text", "outside the padding")
NUMBERING = ("columns", "tokens")
BASE = ("E", "q", "k", "v", "o", "position", "relative")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where prompt and tokens are in the rows of X. prompt [b, p] and token [b, t]: their columns. order [b, p + t]:
    the content of each column, as an index into [P; tokens]. positions, mask [b, p + t]: those of the columns."""

    prompt: numpy.ndarray
    token: numpy.ndarray
    order: numpy.ndarray
    positions: numpy.ndarray
    mask: numpy.ndarray

    @property
    def rows(self) -> numpy.ndarray:
        """[b, 1]: the row numbers, to index together with prompt, token or order."""
        return numpy.arange(len(self.order))[:, None]


def layout(case: Case) -> Layout:
    """The Layout that the case's conventions give."""
    p, (b, t) = len(case["P"]), case["mask"].shape
    order = numpy.tile(numpy.arange(p + t), (b, 1))
    if case.conventions.get("left_padding", LEFT_PADDING[0]) == LEFT_PADDING[0]:
        for row, pads in enumerate(masked_first(case["mask"])):
            order[row, :pads + p] = [*range(p, p + pads), *range(p)]
    place = numpy.argsort(order, axis=1)                                     # the column of each of [P; tokens]
    seen = numpy.take_along_axis(numpy.concatenate([numpy.ones((b, p), bool), case["mask"]], axis=1), order, axis=1)
    return Layout(place[:, :p], place[:, p:], order, _positions(case, order, seen), seen)


def _positions(case: Case, order: numpy.ndarray, seen: numpy.ndarray) -> numpy.ndarray:
    """[b, p + t]: the positions of columns with the content `order` [b, p + t]. seen [b, p + t]: the visible ones."""
    p, (b, t) = len(case["P"]), case["mask"].shape
    tokens = case.conventions.get("numbering", NUMBERING[0]) == "tokens"
    if case.conventions.get("positions", POSITIONS[0]) == "restart":
        text = numpy.arange(t) - (masked_first(case["mask"])[:, None] if tokens else numpy.zeros((b, 1), int))
        numbers = numpy.concatenate([numpy.tile(numpy.arange(p), (b, 1)), text.clip(0)], axis=1)
        return numpy.take_along_axis(numbers, order, axis=1)
    return (numpy.arange(p + t) - (masked_first(seen)[:, None] if tokens else numpy.zeros((b, 1), int))).clip(0)


def masked_first(mask: numpy.ndarray) -> numpy.ndarray:
    """[b]: how many tokens are masked on the left of each row."""
    return numpy.logical_and.accumulate(~mask, axis=1).sum(axis=1)


def embeddings(case: Case, at: Layout) -> numpy.ndarray:
    """X [b, p + t, d], which nothing rounds. at: the layout."""
    prompts = numpy.tile(case["P"], (len(case["ids"]), 1, 1))
    return numpy.concatenate([prompts, case["E"][case["ids"]]], axis=1)[at.rows, at.order]


def equations(case: Case, number: Callable) -> dict[str, Any]:
    """{"y": [b, t, d], "dP": [p, d]} by the equations above. number: converts arrays, to longdouble, Bounded, or
    objects of many digits."""
    at, d = layout(case), case["E"].shape[1]
    q, k, v, o = (number(case[name]) for name in "qkvo")
    x = number(embeddings(case, at))
    if "position" in case:
        x = x + number(case["position"][at.positions])
    s = 1 / sqrt(number(d))
    Q, K, V = x @ q.T, x @ k.T, x @ v.T                                      # [b, p + t, d]
    scores = (Q * s) @ K.swapaxes(1, 2)                                      # [b, query, key]
    if "relative" in case:
        scores = scores + number(relative_bias(case["relative"], at.order.shape[1]))
    A = softmax(_hidden(scores, at.mask[:, None, :]))
    Y = A @ V @ o.T

    spread = numpy.zeros(at.order.shape + (d,))
    spread[at.rows, at.token] = case["g"]
    dH = number(spread) @ o
    dA = dH @ V.swapaxes(1, 2)
    dS = A * (dA - (dA * A).sum(axis=-1, keepdims=True)) * s
    dX = dS @ K @ q + dS.swapaxes(1, 2) @ Q @ k + A.swapaxes(1, 2) @ dH @ v
    return {"y": Y[at.rows, at.token], "dP": dX[at.rows, at.prompt].sum(axis=0)}


def relative_bias(table: numpy.ndarray, n: int) -> numpy.ndarray:
    """[n, n]: for query i and key j, the table's entry for the distance j - i. table: [2 R + 1]."""
    R = len(table) // 2
    column = numpy.arange(n)
    return table[numpy.clip(column[None, :] - column[:, None], -R, R) + R]


def _hidden(scores: Any, seen: numpy.ndarray) -> Any:
    """The scores, with -inf and error 0 for keys that are not seen; with None among objects."""
    if isinstance(scores, Bounded):
        return Bounded(numpy.where(seen, scores.value, -numpy.inf), numpy.where(seen, scores.error, 0), scores.arith)
    return numpy.where(seen, scores, None if scores.dtype == object else -numpy.inf)


def fits(case: Case) -> None:
    """Raises ValueError for arrays that are no valid case: ids, mask or tables that do not fit."""
    (b, t), n = case["ids"].shape, len(case["P"]) + case["ids"].shape[1]
    if case["ids"].min() < 0 or case["ids"].max() >= len(case["E"]) or case["E"].shape[1:] != case["P"].shape[1:]:
        raise ValueError("ids that E lacks, or a prompt of another width")
    if case["mask"].shape != (b, t) or not case["mask"].any(axis=1).all():
        raise ValueError("a mask of another shape, or a row without a visible token")
    if "position" in case and len(case["position"]) < n or "relative" in case and len(case["relative"]) % 2 == 0:
        raise ValueError("too few positions, or an even number of relative positions")


@remembered
def values(case: Case) -> dict[str, Value]:
    """{output: its reference in longdouble, with its bound}. Raises ValueError as `fits` does."""
    fits(case)
    found = {name: value_of(b) for name, b in equations(case, lambda x: Bounded(x, 0.0, case.arith)).items()}
    return {**found, "y": _at_tokens(case, found["y"])}


def exact_values(case: Case) -> dict[str, Value]:
    """As `values`, computed with 50 digits and rounded once, to float64."""
    import mpmath
    bounds = values(case)
    with mpmath.workdps(50):
        found = equations(case, numpy.vectorize(mpmath.mpf, otypes=[object]))
        exact = {name: Value(rounded(found[name]), bounds[name].mag.astype(numpy.float64), 1, 1) for name in bounds}
    return {**exact, "y": _at_tokens(case, exact["y"])}


def _at_tokens(case: Case, y: Value) -> Value:
    seen = case["mask"][..., None]
    return Value(numpy.where(seen, y.exact, 0), numpy.where(seen, y.mag, 0), y.k, y.n)


def never_rounded(case: Case) -> bool:
    """False for every case: y and dP pass through a softmax, and its roundings depend on how it is written. Where n
    keys have the same score s, exp(s - max) / sum is 1 / n, bit for bit if n is a power of two; exp(s - l) with
    l = s + log n is 1 / n only up to the rounding of l."""
    return False
