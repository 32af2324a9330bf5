"""Element masks: chosen elements of a weight, as flat indices, and the scores by which they are chosen.

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
    """{name: squared gradients} of params {name: Parameter}, the mean over one or more steps. Each step is a function
    that returns the loss of one example.

    The paper squares the gradient of each example. A step that returns the loss of a batch gives the square of its mean
    gradient instead, which is cheaper but another quantity. A parameter that no loss depends on scores 0. Raises
    ValueError for no steps, and otherwise as `value_and_grad` does."""
    steps = [step] if callable(step) else list(step)
    if not steps:
        raise ValueError("fisher: no steps; expected a function that returns a loss, or a list of them")
    total: dict[str, Array] = {}
    for one in steps:
        for name, g in value_and_grad(one, params, unused="zeros", training=False)[1].items():
            total[name] = total[name] + g * g if name in total else g * g
    return {name: t / len(steps) for name, t in total.items()}


def magnitude(params: Mapping[str, Leaf]) -> dict[str, Array]:
    """{name: |W|} of params {name: Parameter}."""
    return {name: abs(p.data) for name, p in params.items()}


def top(scores: Mapping[str, Array], share: float) -> dict[str, numpy.ndarray]:
    """{name: boolean array} for `Selective(mask=...)`: True at the largest scores, compared across all names. Of n
    scores, share * n are taken, rounded up; of equal scores, the first.

    Names without any True are left out. Raises ValueError for a share outside (0, 1], for no scores, and for scores
    that are not finite."""
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
    """`rows`, ascending. Raises ValueError for one that the matrix called `name`, of `shape`, lacks."""
    if max(rows) >= shape[0]:
        raise ValueError(f"rows holds {max(rows)}; {name} {list(shape)} has rows 0 to {shape[0] - 1}")
    return sorted(rows)


def indices_of_mask(name: str, shape: tuple, mask: Any) -> numpy.ndarray:
    """The flat indices [n], ascending, of `mask`: a boolean array of the weight's `shape`, or distinct flat indices.

    Raises ValueError, with the weight's `name`, for another shape or dtype, repeated indices, indices out of range, and
    for no element at all."""
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
