"""Cases of bottleneck adapters: drawn at random, published, and invalid ones."""
from __future__ import annotations

from typing import Any, Mapping

import numpy

from minipeft.conformance.arithmetic import on_grid
from minipeft.conformance.case import Case
from minipeft.conformance.method import Refusal
from minipeft.conformance.methods.bottleneck_adapter.activations import ACTIVATIONS
from minipeft.conformance.methods.bottleneck_adapter.equations import PLACEMENTS
from minipeft.conformance.numbers import drawn, floats, nonzero

SCALES = (1.0, 4.0, 0.5, -1.5)  # every dtype holds these; `draw` adds its own 0.1, which no narrower one holds


def draw(rng: numpy.random.Generator, dtype: str, exact: bool, sizes: Mapping[str, int]) -> Case:
    """A random case of these sizes {axis: length}. exact: relu on dyadic numbers, which no dtype rounds."""
    activation = "relu" if exact else str(rng.choice(list(ACTIVATIONS)))
    params = {"activation": activation, "placement": str(rng.choice(PLACEMENTS)),
              "scale": float(rng.choice([0.5, 1.0, 2.0, -1.0] if exact else [*SCALES, float(on_grid(0.1, dtype))]))}
    return filled(rng, dtype, exact, sizes, params)


def filled(rng: numpy.random.Generator, dtype: str, exact: bool, sizes: Mapping[str, int], params: Mapping[str, Any],
           label: str = "") -> Case:
    """A case of these sizes {axis: length}, with random numbers. The activation is given numbers of size 1, where
    activations differ, and relu none near its kink. params: activation, placement, scale. label: its subject."""
    n, d, m = (sizes[axis] for axis in ("N", "d", "m"))
    arrays = {name: drawn(rng, (n, d), dtype, exact) for name in ("x", "n", "F", "g")}
    arrays["D"] = drawn(rng, (m, d), dtype, exact) if exact else floats(rng, (m, d), dtype, d ** -0.5)
    arrays["U"], arrays["b_U"] = nonzero(rng, (d, m), dtype, exact), nonzero(rng, (d,), dtype, exact)
    arrays["b_D"] = _off_the_kink(rng, dtype, exact, arrays)
    return Case("bottleneck_adapter", dtype, exact, params, arrays, label)


def _off_the_kink(rng: numpy.random.Generator, dtype: str, exact: bool, arrays: Mapping[str, Any]) -> numpy.ndarray:
    """b_D [m]. For integer data it is half of an odd number, so that no D h + b_D is 0. Otherwise it is, for each unit,
    the one of 20 numbers that keeps D h + b_D farthest from 0, whatever the adapter reads."""
    m = len(arrays["D"])
    if exact:
        return rng.choice([-1.5, -0.5, 0.5, 1.5], m)
    x, n, F = (arrays[name] for name in ("x", "n", "F"))
    z = numpy.concatenate([x, n, F, x + F]) @ arrays["D"].T                            # [4 N, m]
    tries = floats(rng, (20, m), dtype)
    nearest = abs(z[None] + tries[:, None]).min(axis=1)                                # [20, m]
    return tries[nearest.argmax(axis=0), numpy.arange(m)]


def refusals(dtype: str) -> list[Refusal]:
    """Invalid cases. An adapter must raise an error for each, when it is made or at its first forward."""
    rng = numpy.random.default_rng(5)
    good = draw(rng, dtype, True, {"N": 2, "d": 4, "m": 3})
    none = {"D": numpy.zeros((0, 4)), "b_D": numpy.zeros(0), "U": numpy.zeros((4, 0))}
    return [Refusal("D for another width", good.but({"D": good["D"][:, :3]})),
            Refusal("U for another bottleneck", good.but({"U": good["U"][:, :2]})),
            Refusal("U for another width", good.but({"U": good["U"][:3]})),
            Refusal("b_D with one number, which would be broadcast", good.but({"b_D": good["b_D"][:1]})),
            Refusal("b_U with one number, which would be broadcast", good.but({"b_U": good["b_U"][:1]})),
            Refusal("a bottleneck of width 0", good.but(none)),
            Refusal("an unknown activation", good.but(params={"activation": "rleu"})),
            Refusal("an unknown placement", good.but(params={"placement": "serial"})),
            Refusal("the scale is infinite", good.but(params={"scale": "inf"})),
            Refusal("the scale is NaN", good.but(params={"scale": "nan"})),
            Refusal("F of another width than x, which would be broadcast", good.but({"F": good["F"][:, :1]})),
            Refusal("x and F of another width", good.but({name: good[name][:, :3] for name in "xnF"}))]


BOUNDED = ((5, 7, 3, "relu", "houlsby", 1.0, "the first paper's"),
           (4, 6, 4, "relu", "pfeiffer", 1.0, "reads x + F"),
           (3, 8, 2, "relu", "parallel", 4.0, "beside the sublayer, scale 4: b_U is scaled too"),
           (4, 5, 5, "gelu", "houlsby", 0.5, "m = d: a transposed matrix is silent; gelu by erf, not by tanh"),
           (4, 6, 3, "gelu_tanh", "pfeiffer", 1.0, "gelu by tanh, not by erf"),
           (3, 6, 4, "swish", "houlsby", -1.5, "swish, a negative scale"))
DYADIC = ((3, 5, 3, "relu", "houlsby", 1.0, "dyadic: bit for bit"),
          (2, 4, 4, "relu", "pfeiffer", 0.5, "dyadic, m = d, scale 1/2"),
          (3, 6, 2, "relu", "parallel", 2.0, "dyadic, beside the sublayer, scale 2"))


def vectors() -> list[Case]:
    """The published cases: rectangular and square, biases and scale that matter, small n. `vectors/__init__.py` has the
    rules for them."""
    cases = []
    for number, (exact, table) in enumerate(((False, BOUNDED), (True, DYADIC))):
        for seed, (n, d, m, activation, placement, scale, label) in enumerate(table):
            params = {"activation": activation, "placement": placement, "scale": scale}
            for dtype in ("float64", "float32", "bfloat16"):
                # an exact case has the same numbers in every dtype
                rng, grid = numpy.random.default_rng([5 + number, seed]), "bfloat16" if exact else dtype
                case = filled(rng, grid, exact, {"N": n, "d": d, "m": m}, params, label)
                cases.append(case.but(dtype=dtype))
    return cases
