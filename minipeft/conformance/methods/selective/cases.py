"""Cases of selective tuning: drawn at random, published, and invalid ones.

Exact cases do not depend on how a norm is rounded: norm.weight is 0 and not trained, so n is norm.bias. Dyadic cases
where it is trained are bounded, although no digit need be lost. Half of the entries of their rows are m + a and half
m - a, so that the variance is a^2; eps makes a^2 + eps the square of a power of two, and the width is a power of two.
Then z is 1/2 or -1/2. fc1.bias keeps every h away from 0, where relu has no slope.
"""
from __future__ import annotations

from typing import Mapping

import numpy

from minipeft.conformance.arithmetic import on_grid
from minipeft.conformance.case import Case
from minipeft.conformance.method import Refusal
from minipeft.conformance.methods.selective.equations import (NAMES, elements, equations, moved, rows, whole)
from minipeft.conformance.numbers import floats

SELECTIONS = {"the biases (BitFit)": "norm.bias fc1.bias fc2.bias", "the norm": "norm.weight norm.bias",
              "one layer": "fc1.weight fc1.bias", "one matrix": "fc2.weight", "one matrix below": "fc1.weight",
              "the norm's scale and a matrix": "norm.weight fc2.weight", "everything": " ".join(NAMES)}
POLYNOMIAL = [names for names in SELECTIONS.values() if "norm.weight" not in names.split()]
BOUNDED = {"eps": 1e-5, "lr": 2.0 ** -4, "decay": 0.5, "steps": 5}
EXACT = {"lr": 0.5, "decay": 0.5, "steps": 1}


def selections(case: Case) -> list[Case]:
    """The case with each of the SELECTIONS trained, its own first."""
    others = [names for names in SELECTIONS.values() if names != case.params["train"]]
    return [case, *(case.but(params={"train": names}) for names in others)]


def draw(rng: numpy.random.Generator, dtype: str, exact: bool, sizes: Mapping[str, int]) -> Case:
    """A random case of these sizes {axis: length}. exact: on dyadic numbers, see above."""
    n, d, hidden = (sizes[axis] for axis in ("N", "d", "hidden"))
    some = POLYNOMIAL if exact else list(SELECTIONS.values())
    return (dyadic_case if exact else bounded_case)(rng, dtype, n, d, hidden, some[rng.integers(len(some))])


def bounded_case(rng: numpy.random.Generator, dtype: str, n: int, d: int, hidden: int, names: str) -> Case:
    """A case with Gaussian numbers. Every fourth row has a small variance, and every fourth is constant. names: of the
    trained weights, separated by spaces."""
    x = rng.standard_normal((n, d))
    x[1::4] = (0 if dtype in ("bfloat16", "float16") else 1) + 0.01 * x[1::4]
    x[3::4] = x[3::4, :1]
    arrays = {"norm.weight": on_grid(1 + 0.3 * rng.standard_normal(d), dtype),
              "norm.bias": floats(rng, (d,), dtype, 0.3),
              "fc1.weight": floats(rng, (hidden, d), dtype, d ** -0.5), "fc1.bias": floats(rng, (hidden,), dtype, 0.5),
              "fc2.weight": floats(rng, (d, hidden), dtype, hidden ** -0.5), "fc2.bias": floats(rng, (d,), dtype, 0.5),
              "x": on_grid(x, dtype), "g": floats(rng, (n, d), dtype)}
    return Case("selective", dtype, False, {"train": names, **BOUNDED}, {**arrays, **chosen(rng, d, hidden)})


def dyadic_case(rng: numpy.random.Generator, dtype: str, n: int, d: int, hidden: int, names: str) -> Case:
    """A case with dyadic numbers: the first of ever sparser draws that the dtype holds; it holds small or nearly empty
    ones. names: of the trained weights, separated by spaces. It is exact where norm.weight is not among them."""
    exact = names in POLYNOMIAL
    d, most = 2 ** max(1, min(d, 8).bit_length() - 1), 1 if dtype in ("bfloat16", "float16") else 2
    shapes = {"fc1.weight": (hidden, d), "fc2.weight": (d, hidden), "fc2.bias": (d,), "g": (n, d)}
    for share in (0.8, 0.5, 0.5, 0.3, 0.3, 0.2, 0.2, 0.1, 0.0):
        arrays = {name: rng.integers(-most, most + 1, shape) * (rng.random(shape) < share) * 1.0
                  for name, shape in shapes.items()}
        a, eps = ((1.0, 3.0), (0.5, 0.75))[rng.integers(2)]
        signs = rng.permuted(numpy.tile(numpy.repeat([1.0, -1.0], d // 2), (n, 1)), axis=1)
        arrays["norm.weight"] = 0 * rng.choice([-1.0, 1.0], d) if exact else rng.choice([-1.0, 1.0, 2.0], d)
        arrays["norm.bias"] = rng.choice([-1.0, 1.0], d)
        arrays["fc1.bias"] = rng.choice([-1.0, 1.0], hidden) * (0.5 if exact else 0.25)  # else n has halves
        arrays["x"] = rng.integers(-1, 2, (n, 1)) + a * signs
        case = Case("selective", dtype, exact, {"train": names, "eps": eps, **EXACT},
                    {**arrays, **chosen(rng, d, hidden)})
        if fits(case):
            return case
    return case


def chosen(rng: numpy.random.Generator, d: int, hidden: int) -> dict[str, numpy.ndarray]:
    """{"mask": some elements of fc1.weight, "rows": some rows of fc2.weight}, all as booleans. Where there are several,
    the first is left out and the last is taken, so that taking the first ones by count is another choice."""
    mask, picked = rng.random((hidden, d)) < 0.5, rng.random(d) < 0.5
    for some in (mask.reshape(-1), picked):
        some[0], some[-1] = False, True
    return {"mask": mask, "rows": picked}


def fits(case: Case) -> bool:
    """Whether every intermediate result that is stored is on the grid of the dtype."""
    w = {name: case[name] for name in NAMES}
    x, g, eps = case["x"], case["g"], case.params["eps"]
    mean = x.mean(axis=-1, keepdims=True)
    z = (x - mean) / numpy.sqrt(((x - mean) ** 2).mean(axis=-1, keepdims=True) + eps)
    n = z * w["norm.weight"] + w["norm.bias"]
    h = n @ w["fc1.weight"].T + w["fc1.bias"]
    found = equations(w, x, g, eps)
    gh = (g @ w["fc2.weight"]) * (h > 0)
    gn = gh @ w["fc1.weight"]
    inside = (n @ w["fc1.weight"].T, numpy.maximum(h, 0) @ w["fc2.weight"].T, g @ w["fc2.weight"], gn,
              gn * w["norm.weight"], found["dx"] - g, found["y"] - x)
    after = [v for some in (whole(case, NAMES), elements(case), rows(case))
             for v in moved(w, some, x, g, eps, case).values()]
    return all(numpy.array_equal(on_grid(v, case.dtype), v) for v in (z, n, h, gn, *inside, *found.values(), *after))


def refusals(dtype: str) -> list[Refusal]:
    """Invalid cases. A block must raise an error for each, when it is made or at its first forward."""
    good = dyadic_case(numpy.random.default_rng(5), dtype, 2, 4, 3, "fc1.weight")
    return [Refusal("a name that does not exist", good.but(params={"train": "fc1.weight fc3.weight"})),
            Refusal("a part of a name", good.but(params={"train": "fc1"})),
            Refusal("nothing is selected", good.but(params={"train": ""})),
            Refusal("fc1.weight for another width", good.but({"fc1.weight": good["fc1.weight"][:, :3]})),
            Refusal("fc2.weight for another hidden size", good.but({"fc2.weight": good["fc2.weight"][:, :2]})),
            Refusal("a bias for another width", good.but({"norm.bias": good["norm.bias"][:1]})),
            Refusal("x of another width", good.but({"x": good["x"][:, :1]}))]


def vectors() -> list[Case]:
    """The published cases: rectangular and square, width 4, small and zero variance. `vectors/__init__.py` has the
    rules for them."""
    cases = []
    for seed, (n, d, hidden, which) in enumerate([(4, 5, 3, "the biases (BitFit)"), (4, 4, 6, "the norm"),
                                                  (3, 4, 4, "one layer"), (2, 3, 5, "one matrix")]):
        for dtype in ("float64", "float32", "bfloat16"):
            rng = numpy.random.default_rng([1, seed])
            case = bounded_case(rng, dtype, n, d, hidden, SELECTIONS[which])
            cases.append(case.but(params={"steps": 2}, label=f"{which} trained; a row of small variance"
                                  f"{', a constant row' if n > 3 else ''}{', square weights' if d == hidden else ''}"))
    for seed, (n, d, hidden, which) in enumerate([(3, 4, 3, "the norm's scale and a matrix"), (2, 2, 2, "everything"),
                                                  (2, 4, 4, "one matrix below"), (3, 4, 3, "the biases (BitFit)")]):
        # the same numbers in every dtype, drawn so that the narrowest holds them all
        case = dyadic_case(numpy.random.default_rng([2, seed]), "bfloat16", n, d, hidden, SELECTIONS[which])
        how = ": bit for bit, norm.weight is 0" if case.exact else "; through the norm, so within a bound"
        case = case.but(label=f"dyadic, {which} trained{how}")
        cases += [case.but(dtype=dtype) for dtype in ("float64", "float32", "bfloat16")]
    return cases
