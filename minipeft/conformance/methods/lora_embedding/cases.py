"""Cases of LoRA on an embedding table: drawn at random, published, and invalid ones."""
from __future__ import annotations

from typing import Mapping

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.method import Refusal
from minipeft.conformance.numbers import drawn, nonzero


def draw(rng: numpy.random.Generator, dtype: str, exact: bool, sizes: Mapping[str, int]) -> Case:
    """A random case of these sizes {axis: length}; r is at most min(V, d). exact: on dyadic numbers, which no dtype
    rounds."""
    r = min(sizes["r"], sizes["V"], sizes["d"])
    if exact:  # s = alpha / r is a power of two
        alpha = r * float(rng.choice([0.5, 1.0, 2.0])) * float(rng.choice([-1, 1]))
    else:
        alpha = float(rng.choice([5.0, 16.0, 1.0, 0.3125, -2.5]))
    return filled(rng, dtype, exact, {**sizes, "r": r}, alpha)


def filled(rng: numpy.random.Generator, dtype: str, exact: bool, sizes: Mapping[str, int], alpha: float,
           label: str = "") -> Case:
    """A case of these sizes {axis: length}, with random numbers. label: what the case is about."""
    b, t, V, d, r, n = (sizes[axis] for axis in ("b", "t", "V", "d", "r", "N"))
    arrays = {"E": drawn(rng, (V, d), dtype, exact), "A": nonzero(rng, (r, V), dtype, exact),
              "B": nonzero(rng, (d, r), dtype, exact), "ids": ids_that_repeat(rng, b, t, V),
              "g": drawn(rng, (b, t, d), dtype, exact), "h": drawn(rng, (n, d), dtype, exact),
              "q": drawn(rng, (n, V), dtype, exact)}
    return Case("lora_embedding", dtype, exact, {"alpha": alpha}, arrays, label)


def ids_that_repeat(rng: numpy.random.Generator, b: int, t: int, V: int) -> numpy.ndarray:
    """Random ids [b, t] of a table of V rows. The first id and the last one are 0, which is often taken for padding. If
    there are more than two, the second is V - 1."""
    ids = rng.integers(0, V, b * t)
    ids[0] = ids[-1] = 0
    if b * t > 2:
        ids[1] = V - 1
    return ids.reshape(b, t)


def refusals(dtype: str) -> list[Refusal]:
    """Invalid cases. A table must raise an error for each, when it is made or at its first forward."""
    rng = numpy.random.default_rng(5)
    good = draw(rng, dtype, True, {"b": 2, "t": 3, "V": 5, "d": 4, "r": 2, "N": 2})
    r0 = {"A": numpy.zeros((0, 5)), "B": numpy.zeros((4, 0))}

    def ids(last: int) -> Case:
        return good.but({"ids": numpy.array([[0, 1, 2], [3, 4, last]])})

    return [Refusal("an id one beyond the table", ids(5)),
            Refusal("an id far beyond the table", ids(50)),
            Refusal("a negative id", ids(-1)),
            Refusal("A of rank 2, B of rank 1", good.but({"B": good["B"][:, :1]})),
            Refusal("rank 0", good.but(r0)),
            Refusal("alpha is infinite", good.but(params={"alpha": "inf"})),
            Refusal("alpha is NaN", good.but(params={"alpha": "nan"})),
            Refusal("alpha is missing", good.but(params={"alpha": None})),
            Refusal("A for another vocabulary", good.but({"A": good["A"][:, :4]})),
            Refusal("B for another width", good.but({"B": good["B"][:3]}))]


BOUNDED = ((2, 5, 11, 6, 3, 4, 5.0, "r does not divide alpha, r is no square; ids repeat"),
           (1, 4, 6, 6, 3, 2, 5.0, "V = d: a transposed merge is silent"),
           (3, 3, 9, 4, 1, 3, 16.0, "rank 1, alpha 16: alpha and alpha / r differ by nothing but r"),
           (2, 4, 4, 7, 4, 2, -2.5, "r = V: A transposed is silent; alpha negative"),
           (1, 8, 2, 5, 2, 1, 0.3125, "two ids, eight times"))
DYADIC = ((2, 4, 7, 5, 2, 3, 0.5, "dyadic: bit for bit"), (2, 3, 4, 4, 3, 2, 2.0, "dyadic, V = d, r = 3"),
          (1, 6, 5, 3, 3, 2, 0.5, "dyadic, alpha = 1.5: not to be read as an integer"))


def vectors() -> list[Case]:
    """The published cases: rectangular and square, r that does not divide alpha, ids that repeat. `vectors/__init__.py`
    has the rules for them."""
    cases = []
    for number, (exact, table) in enumerate(((False, BOUNDED), (True, DYADIC))):
        for seed, (b, t, V, d, r, n, alpha, label) in enumerate(table):
            sizes = {"b": b, "t": t, "V": V, "d": d, "r": r, "N": n}
            for dtype in ("float64", "float32", "bfloat16"):
                # an exact case has the same numbers in every dtype
                rng, grid = numpy.random.default_rng([3 + number, seed]), "bfloat16" if exact else dtype
                case = filled(rng, grid, exact, sizes, alpha * r if exact else alpha, label)
                cases.append(case.but(dtype=dtype))
    return cases + [case.but(conventions={"scaling": "alpha/sqrt(r)"}, label=f"{case.label}; s = alpha/sqrt(r)")
                    for case in cases if case.label == BOUNDED[3][-1]]  # r = 4, whose root is rational
