"""Cases of LoRA on a linear layer: drawn at random, published, and invalid ones."""
from __future__ import annotations

from typing import Mapping

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.method import Refusal
from minipeft.conformance.methods.lora_linear.equations import SCALINGS
from minipeft.conformance.numbers import drawn, floats, integers, nonzero


def draw(rng: numpy.random.Generator, dtype: str, exact: bool, sizes: Mapping[str, int]) -> Case:
    """A random case of these sizes {axis: length}; r is at most min(in, out). exact: on dyadic numbers, which no dtype
    rounds."""
    n, d_in, d_out, r = (sizes[axis] for axis in ("N", "in", "out", "r"))
    r = min(r, d_in, d_out)
    if exact:  # s = alpha / r is a power of two
        alpha = r * float(rng.choice([0.5, 1.0, 2.0])) * float(rng.choice([-1, 1]))
    else:
        alpha = float(rng.choice([5.0, 16.0, 1.0, 0.3125, -2.5]))
    arrays = {"W": drawn(rng, (d_out, d_in), dtype, exact), "b": drawn(rng, (d_out,), dtype, exact),
              "A": drawn(rng, (r, d_in), dtype, exact), "B": nonzero(rng, (d_out, r), dtype, exact),
              "x": drawn(rng, (n, d_in), dtype, exact), "g": drawn(rng, (n, d_out), dtype, exact)}
    return Case("lora_linear", dtype, exact, {"alpha": alpha}, arrays)


def refusals(dtype: str) -> list[Refusal]:
    """Invalid cases. A layer must raise an error for each, when it is made or at its first forward."""
    rng = numpy.random.default_rng(5)
    good = draw(rng, dtype, True, {"N": 2, "in": 3, "out": 4, "r": 2})
    r0 = {"A": numpy.zeros((0, 3)), "B": numpy.zeros((4, 0))}
    return [Refusal("A of rank 2, B of rank 1", good.but({"B": good["B"][:, :1]})),
            Refusal("rank 0", good.but(r0)),
            Refusal("alpha is infinite", good.but(params={"alpha": "inf"})),
            Refusal("alpha is NaN", good.but(params={"alpha": "nan"})),
            Refusal("alpha is missing", good.but(params={"alpha": None})),
            Refusal("A for another d_in", good.but({"A": good["A"][:, :2]})),
            Refusal("B for another d_out", good.but({"B": good["B"][:3]})),
            Refusal("x of another width", good.but({"x": good["x"][:, :2]}))]


CHOSEN = ("r a square: sqrt(r) is exact", "dyadic, r = in = out, alpha = r")


def declared(case: Case, scaling: str) -> Case:
    """The same numbers with `scaling` as the declared convention. Under "alpha" an exact case has half its alpha: with
    s = alpha = 4, sums would pass 2^8, where bfloat16 no longer holds every integer."""
    alpha = case.params["alpha"] / 2 if case.exact and scaling == "alpha" else case.params["alpha"]
    return case.but(params={"alpha": alpha}, conventions={"scaling": scaling}, label=f"{case.label}; s = {scaling}")


def vectors() -> list[Case]:
    """The published cases: rectangular and square, r that does not divide alpha, small n. `vectors/__init__.py` has the
    rules for them."""
    cases = []
    for seed, (n, d_in, d_out, r, alpha, label) in enumerate([
            (7, 24, 17, 3, 5.0, "r does not divide alpha, r is no square; B != 0"),
            (4, 9, 9, 3, 5.0, "a square W: a transposed merge is silent"),
            (3, 16, 12, 1, 16.0, "rank 1, alpha 16: alpha and alpha / r differ by nothing but r"),
            (5, 12, 16, 4, 2.0, "r a square: sqrt(r) is exact"),
            (2, 5, 4, 2, -3.0, "a negative alpha"),
            (1, 3, 3, 3, 0.3125, "alpha below 1, r = in = out: A transposed is silent")]):
        for dtype in ("float64", "float32", "bfloat16"):
            rng = numpy.random.default_rng([1, seed])
            arrays = {name: floats(rng, shape, dtype) for name, shape in {
                "W": (d_out, d_in), "b": (d_out,), "A": (r, d_in), "B": (d_out, r), "x": (n, d_in),
                "g": (n, d_out)}.items()}
            cases.append(Case("lora_linear", dtype, False, {"alpha": alpha}, arrays, label))
    for seed, (n, d_in, d_out, r, s, label) in enumerate([
            (3, 5, 4, 2, 0.5, "dyadic: bit for bit"), (2, 4, 4, 3, 2.0, "dyadic, square, r = 3"),
            (4, 6, 3, 3, 0.5, "dyadic, alpha = 1.5: not to be read as an integer"),
            (2, 3, 5, 1, -1.0, "dyadic, alpha = -1"), (2, 4, 4, 4, 1.0, "dyadic, r = in = out, alpha = r")]):
        rng = numpy.random.default_rng([2, seed])
        arrays = {name: integers(rng, shape, "bfloat16") for name, shape in {
            "W": (d_out, d_in), "b": (d_out,), "A": (r, d_in), "x": (n, d_in), "g": (n, d_out)}.items()}
        arrays["B"] = nonzero(rng, (d_out, r), "bfloat16", True)
        for dtype in ("float64", "float32", "bfloat16"):
            cases.append(Case("lora_linear", dtype, True, {"alpha": s * r}, arrays, label))
    return cases + [declared(case, scaling) for scaling in SCALINGS[1:] for case in cases if case.label in CHOSEN]
