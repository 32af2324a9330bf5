"""Element masks: which elements of a weight, as flat indices; and scores that say which elements matter.

    F = mean_i (d loss_i / d W)^2          the diagonal of the empirical Fisher information (labels from the data)

Sung, Nair & Raffel, 2021, arXiv:2111.09839 (the "FISH mask"): the elements of largest F are trained, and nothing else.
"""
from __future__ import annotations

import math
from typing import Any, Callable, Mapping, Sequence

import numpy

from minipeft.engine.tensor import Leaf, Tensor, value_and_grad
from minipeft.backend import Array, to_host

Step = Callable[[], Tensor]


def fisher(step: Step | Sequence[Step], params: Mapping[str, Leaf]) -> dict[str, Array]:
    """{name: squared gradients}, the mean over one or more steps, functions that return the loss of one example each.

    The paper squares the gradient of each example; a step that returns the loss of a batch gives the square of its
    mean gradient instead, which is cheaper and another quantity. What a loss does not depend on scores 0. Otherwise
    raises as `value_and_grad` does, and ValueError for no steps."""
    steps = [step] if callable(step) else list(step)
    if not steps:
        raise ValueError("fisher: no steps; expected a function that returns a loss, or a list of them")
    total: dict[str, Array] = {}
    for one in steps:
        for name, g in value_and_grad(one, params, unused="zeros", training=False)[1].items():
            total[name] = total[name] + g * g if name in total else g * g
    return {name: t / len(steps) for name, t in total.items()}


def magnitude(params: Mapping[str, Leaf]) -> dict[str, Array]:
    """{name: |W|}."""
    return {name: abs(p.data) for name, p in params.items()}


def top(scores: Mapping[str, Array], share: float) -> dict[str, numpy.ndarray]:
    """{name: boolean array}: the share n largest, rounded up, of all n scores together, of equal ones the first.

    Names of which nothing is chosen are left out. For `Selective(mask=...)`. Raises ValueError for a share outside
    (0, 1], for no scores, and for scores that are not finite."""
    if not 0 < share <= 1:
        raise ValueError(f"top: share is {share!r}; expected a number in (0, 1]")
    if not scores:
        raise ValueError("top: no scores; expected {name: array}")
    host = {name: to_host(array) for name, array in scores.items()}
    for name, array in host.items():
        if not numpy.isfinite(array).all():
            raise ValueError(f"top: the scores of {name} are not finite")
    flat = numpy.concatenate([array.reshape(-1) for array in host.values()])
    chosen = numpy.zeros(flat.size, dtype=bool)
    descending = flat.size - 1 - numpy.argsort(flat[::-1], kind="stable")[::-1]  # no minus: counts may be unsigned
    chosen[descending[:max(1, math.ceil(round(share * flat.size, 6)))]] = True
    ends = numpy.cumsum([array.size for array in host.values()])
    masks = {name: chosen[end - array.size:end].reshape(array.shape) for (name, array), end in zip(host.items(), ends)}
    return {name: mask for name, mask in masks.items() if mask.any()}


def check_rows(name: str, shape: tuple, rows: Sequence[int]) -> list[int]:
    """The rows of a matrix of `shape`, ascending. ValueError for one that it lacks."""
    if max(rows) >= shape[0]:
        raise ValueError(f"rows holds {max(rows)}; {name} {list(shape)} has rows 0 to {shape[0] - 1}")
    return sorted(rows)


def indices_of_mask(name: str, shape: tuple, mask: Any) -> numpy.ndarray:
    """The flat indices that a boolean array of `shape`, or an array of distinct flat indices, means; ascending.

    Raises ValueError for another shape or dtype, repeated indices, indices out of range, and for no element at all."""
    array, size = to_host(mask), math.prod(shape)
    kind = "int32" if size < 2 ** 31 else "int64"
    if array.dtype == bool and array.shape == shape:
        if not array.any():
            raise ValueError(f"the mask of {name} is False everywhere: it chooses nothing; leave the name out")
        return numpy.flatnonzero(array).astype(kind)
    if array.dtype.kind in "iu" and array.ndim == 1 and array.size:
        flat = numpy.unique(array)
        if flat.size == array.size and flat[0] >= 0 and flat[-1] < size:
            return flat.astype(kind)
    raise ValueError(f"the mask of {name} is {array.dtype} {list(array.shape)}; expected booleans {list(shape)} (of "
                     f"0 and 1: mask.astype(bool)), or distinct flat indices from 0 to {size - 1}")
