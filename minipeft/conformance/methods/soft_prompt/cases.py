"""Cases of a soft prompt: drawn at random, published, and invalid ones.

Scores are of size 1 whatever d is, so that no softmax is saturated. (Where one key has all the weight, a wrong mask
changes nothing; where all keys have the same weight, a wrong scale changes nothing.) Rows are padded on the left, on
the right, or not at all, or have a hole after the first token. Ids repeat. A table of positions is just long enough, or
has a row or two to spare.

Dyadic cases have small integers, and q = 0, so that every visible key has the same weight; v and o have two entries +-1
in every row and column. Only the inputs of the layer, which `embed` returns, are compared bit for bit on them: after
these comes a softmax.
"""
from __future__ import annotations

from typing import Mapping

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.method import Refusal
from minipeft.conformance.numbers import drawn, floats

DTYPES = ("float64", "float32", "bfloat16")
SIDES = ("left", "right", "none", "hole")


def draw(rng: numpy.random.Generator, dtype: str, exact: bool, sizes: Mapping[str, int]) -> Case:
    """A random case of these sizes {axis: length}. exact: with dyadic numbers, see above."""
    first, relative = int(rng.integers(len(SIDES))), bool(rng.random() < (0.2 if exact else 0.6))
    sides = [SIDES[(first + row) % len(SIDES)] for row in range(sizes["b"])]
    return made(rng, dtype, exact, sizes, sides, relative)


def made(rng: numpy.random.Generator, dtype: str, exact: bool, sizes: Mapping[str, int], sides: list[str],
         relative: bool, label: str = "") -> Case:
    """A case of these sizes, with random numbers. sides: of SIDES, for each row. relative: with relative positions, not
    a table of positions. label: what the case is about."""
    b, t, p, d, V = (sizes[axis] for axis in ("b", "t", "p", "d", "V"))
    arrays = {"P": drawn(rng, (p, d), dtype, exact), "E": drawn(rng, (V, d), dtype, exact)}
    if exact:
        arrays |= {"q": numpy.zeros((d, d)), "k": drawn(rng, (d, d), dtype, True),
                   "v": two_a_row(rng, d), "o": two_a_row(rng, d)}
    else:
        arrays |= {name: floats(rng, (d, d), dtype, (0.75 if name in "qk" else 1) * d ** -0.5) for name in "qkvo"}
    arrays["ids"] = rng.integers(0, V, (b, t))
    arrays["mask"] = numpy.array([_mask(rng, side, t) for side in sides])
    arrays["g"] = drawn(rng, (b, t, d), dtype, exact) * arrays["mask"][..., None]
    if relative:
        arrays["relative"] = numpy.full(5, 2.0) if exact else floats(rng, (2 * int(rng.integers(1, 5)) + 1,), dtype)
    else:
        arrays["position"] = drawn(rng, (p + t + int(rng.integers(3)), d), dtype, exact)
    return Case("soft_prompt", dtype, exact, {}, arrays, label)


def two_a_row(rng: numpy.random.Generator, d: int) -> numpy.ndarray:
    """[d, d], entries +-1 in two places of every row and column (one, where d = 1)."""
    places = numpy.eye(d) + (numpy.roll(numpy.eye(d), 1, axis=1) if d > 1 else 0)
    signs = rng.choice([-1.0, 1.0], (d, d))
    return places[rng.permutation(d)] * signs if d > 2 else places * signs


def _mask(rng: numpy.random.Generator, side: str, t: int) -> numpy.ndarray:
    """[t]: True for the visible tokens, of which there is at least one."""
    seen = t if side == "none" else int(rng.integers(1, max(2, t)))
    mask = numpy.arange(t) < seen
    if side == "left":
        return mask[::-1]
    return numpy.concatenate([mask[:1], rng.permutation(mask[1:])]) if side == "hole" else mask


def refusals(dtype: str) -> list[Refusal]:
    """Invalid cases. A layer must raise an error for each, when it is made or at its first forward."""
    rng = numpy.random.default_rng(5)
    sizes = {"b": 2, "t": 3, "p": 2, "d": 4, "V": 5}
    good = made(rng, dtype, True, sizes, ["left", "right"], False)
    wrong, negative = good["ids"].copy(), good["ids"].copy()
    wrong[1, 2], negative[0, 1] = 5, -1
    return [Refusal("an id that the vocabulary has not", good.but({"ids": wrong})),
            Refusal("a negative id", good.but({"ids": negative})),
            Refusal("a mask of another length", good.but({"mask": good["mask"][:, 1:]})),
            Refusal("a mask for one row of two", good.but({"mask": good["mask"][:1]})),
            Refusal("a mask that is longer by the prompt",
                    good.but({"mask": numpy.concatenate([numpy.ones((2, 2), bool), good["mask"]], axis=1)})),
            Refusal("a prompt of another width", good.but({"P": good["P"][:, :3]})),
            Refusal("a prompt of width 1", good.but({"P": good["P"][:, :1]})),
            Refusal("a prompt for which the table of positions has no room",
                    good.but({"position": good["position"][:4]}))]


def vectors() -> list[Case]:
    """The published cases: both kinds of positions, prompts longer and shorter than the text, rows padded on either
    side."""
    cases = []
    for seed, (b, t, p, d, sides, relative, label) in enumerate([
            (3, 5, 2, 4, ["hole", "right", "none"], False, "a table of positions, a padded row, a row with a hole"),
            (3, 5, 2, 16, ["right", "hole", "none"], True, "relative positions; d is large enough that sqrt(d) shows"),
            (1, 2, 4, 16, ["none"], False, "a prompt longer than the text, one row, nothing masked"),
            (2, 6, 1, 3, ["right", "hole"], True, "a prompt of one vector"),
            (4, 4, 4, 4, ["right", "none", "hole", "right"], False, "batch, text, prompt and width the same: a wrong "
                                                                    "axis is silent"),
            (3, 6, 2, 5, ["left", "none", "left"], False, "rows padded on the left, a table of positions"),
            (3, 5, 3, 16, ["left", "right", "left"], True, "rows padded on either side, relative positions: the "
                                                           "distance from prompt to text must not grow")]):
        for dtype in DTYPES:
            sizes = {"b": b, "t": t, "p": p, "d": d, "V": 7}
            cases.append(made(numpy.random.default_rng([1, seed]), dtype, False, sizes, sides, relative, label))
    return cases
