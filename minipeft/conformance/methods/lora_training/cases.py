"""Cases of training steps: drawn at random, published, and invalid ones.

Gradients near 0 would make the bounds of AdamW wide, since it divides them by their own size. So of a few draws, the
one with the narrowest bounds is taken.
"""
from __future__ import annotations

from typing import Any, Mapping

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.method import Refusal
from minipeft.conformance.methods.lora_training.batches import first_steps
from minipeft.conformance.methods.lora_training.equations import path_values
from minipeft.conformance.methods.lora_training.lattice import stays_exact
from minipeft.conformance.numbers import floats, nonzero

STEPS = 5
PLAIN = {"optimizer": "sgd", "lr": 0.25, "weight_decay": 0.5, "schedule": "constant", "warmup": 0, "steps": STEPS}


def draw(rng: numpy.random.Generator, dtype: str, exact: bool, sizes: Mapping[str, int]) -> Case:
    """A random case of these sizes {axis: length}; "N" is the least number of rows of a step. exact: on dyadic numbers,
    whose sizes are their own."""
    n, d_in, d_out, r = (sizes[axis] for axis in ("N", "in", "out", "r"))
    return dyadic(rng, dtype) if exact else bounded(rng, dtype, n, d_in, d_out, min(r, d_in, d_out))


def rows(rng: numpy.random.Generator, counts: list[list[int]], padded: bool) -> dict[str, numpy.ndarray]:
    """{"w", "step", "micro": [N]}. counts: [step][micro-batch], the number of tokens. padded: every second micro-batch
    of a step also has a row of padding."""
    w, step, micro = [], [], []
    for i, of_step in enumerate(counts):
        for j, tokens in enumerate(of_step):
            ones = [1.0] * tokens + [0.0] * (padded and j % 2 == 0)
            w += list(rng.permutation(ones))
            step += [i] * len(ones)
            micro += [j] * len(ones)
    return {"w": numpy.array(w), "step": numpy.array(step, numpy.int64), "micro": numpy.array(micro, numpy.int64)}


def bounded(rng: numpy.random.Generator, dtype: str, n: int, d_in: int, d_out: int, r: int, **params: Any) -> Case:
    """A case with Gaussian numbers and five steps. The first has two micro-batches, of 1 and n - 1 tokens; the others
    have one to three. params: take the place of drawn ones."""
    others = [uneven(rng, n + int(rng.integers(0, 3)), int(rng.integers(1, 4))) for _ in range(STEPS - 1)]
    layout = rows(rng, [[1, n - 1], *others], True)
    settings = {"alpha": float(rng.choice([5.0, 1.0, 3.0, -2.5])), **hyper_parameters(rng)}
    size = 1.0
    if dtype in ("float16", "bfloat16"):  # errors of 1 % grow at each step: smaller numbers, larger eps
        size, settings["alpha"] = 0.5, float(rng.choice([0.75, 1.0, -1.5]))
        settings |= {"eps": float(rng.choice([0.25, 0.5])), "lr": float(rng.choice([0.05, 0.0625, 0.1]))}
    settings |= params
    if settings["optimizer"] == "sgd":
        settings = {name: value for name, value in settings.items() if name not in ("beta1", "beta2", "eps")}
    found = []
    for _ in range(3):
        arrays = {"W": floats(rng, (d_out, d_in), dtype), "b": floats(rng, (d_out,), dtype),
                  "A": floats(rng, (r, d_in), dtype, size), "B": floats(rng, (d_out, r), dtype, 0.5),
                  "x": floats(rng, (len(layout["w"]), d_in), dtype, size),
                  "t": floats(rng, (len(layout["w"]), d_out), dtype, size)}
        found.append(scaled(Case("lora_training", dtype, False, settings, {**arrays, **layout})))
    return min(found, key=lambda case: (near_one(case, settings["clip"]), width(case)))


def near_one(case: Case, part: float | None) -> bool:
    """Whether half precision cannot tell the first gradient's norm, clip / part, from its square: it is near 1."""
    half = case.dtype in ("float16", "bfloat16")
    return half and part is not None and 0.5 < case.params["clip"] / part < 2


def hyper_parameters(rng: numpy.random.Generator) -> dict[str, Any]:
    """Random settings, mostly of AdamW. Its "clip" is a fraction of the first gradient's norm, see `scaled`."""
    beta1, beta2 = [(0.5, 0.75), (0.75, 0.9375), (0.9, 0.999), (0.9, 0.95)][int(rng.integers(4))]
    warmup, steps = [(2, 6), (3, 8), (1, 5), (4, 12)][int(rng.integers(4))]
    common = {"lr": float(rng.choice([0.125, 0.05, 0.1])), "weight_decay": float(rng.choice([0.25, 0.1, 0.5])),
              "clip": float(rng.choice([0.4, 0.7])), "schedule": str(rng.choice(["linear", "linear", "cosine"])),
              "warmup": warmup, "steps": steps}
    if rng.random() < 0.2:
        return {"optimizer": "sgd", **common}
    return {"optimizer": "adamw", **common, "beta1": beta1, "beta2": beta2,
            "eps": float(rng.choice([2.0 ** -5, 0.01, 2.0 ** -4, 1e-3]))}


def scaled(case: Case) -> Case:
    """The case with "clip" multiplied by the norm of the first step: it acts there, and at some later steps."""
    if case.params["clip"] is None:
        return case
    norm = float(path_values(first_steps(case.but(params={"clip": None}), 1))[0].norm.exact)
    digits = float(f"{case.params['clip'] * norm:.3g}")
    return case.but(params={"clip": digits or 1.0})


def width(case: Case) -> float:
    """The larger of two ratios, for A and for B: the largest bound over the largest number, after all steps."""
    last = path_values(case)[-1].weights
    return max(float(case.tau(v).max() / abs(v.exact).max()) for v in last.values())


def uneven(rng: numpy.random.Generator, n: int, parts: int) -> list[int]:
    """n as a sum of `parts` positive integers at random, or of n of them if n is less."""
    cuts = sorted(rng.choice(numpy.arange(1, n), min(parts, n) - 1, replace=False).tolist())
    return [int(b - a) for a, b in zip([0, *cuts], [*cuts, n])]


def dyadic(rng: numpy.random.Generator, dtype: str) -> Case:
    """A case of plain SGD on small integers, with one step in half precision and two in float32 and float64."""
    half = dtype in ("float16", "bfloat16")
    for attempt in range(200):
        d_in, d_out = (int(rng.integers(1, 3 if half else 4)) for _ in range(2))
        r = int(rng.integers(1, min(d_in, d_out) + 1)) if attempt < 40 else 1
        layout = rows(rng, [[1, 1]] if half else [[1, 1, 2], [2]], True)
        arrays = {name: rng.integers(-1, 2, shape).astype(numpy.float64) for name, shape in {
            "W": (d_out, d_in), "b": (d_out,), "A": (r, d_in), "x": (len(layout["w"]), d_in),
            "t": (len(layout["w"]), d_out)}.items()}
        arrays["B"] = nonzero(rng, (d_out, r), dtype, True)
        params = {**PLAIN, "alpha": r * float(rng.choice([0.5, 2.0, -1.0])),
                  "lr": float(rng.choice([0.5, 0.25])), "weight_decay": float(rng.choice([0.5, 0.25]))}
        case = Case("lora_training", dtype, True, params, {**arrays, **layout})
        if stays_exact(case):
            return case
    raise AssertionError("no dyadic case was found in 200 draws")


def refusals(dtype: str) -> list[Refusal]:
    """Invalid cases. An error must be raised for each, when the factory is called or at the first step."""
    rng = numpy.random.default_rng(5)
    good = bounded(rng, dtype, 4, 3, 4, 2, optimizer="adamw", beta1=0.9, beta2=0.95, eps=0.01)
    changed: list[tuple[str, dict[str, Any]]] = [
        ("an optimizer that does not exist", {"optimizer": "adamx"}), ("a negative learning rate", {"lr": -0.1}),
        ("a negative weight decay", {"weight_decay": -0.1}), ("clip 0", {"clip": 0.0}), ("beta 1", {"beta2": 1.0}),
        ("a schedule that does not exist", {"schedule": "sideways"}), ("alpha is missing", {"alpha": None}),
        ("a warm-up as long as the run", {"warmup": 5, "steps": 5})]
    return [*(Refusal(what, good.but(params=params)) for what, params in changed),
            Refusal("A of rank 2, B of rank 1", good.but({"B": good["B"][:, :1]})),
            Refusal("A for another d_in", good.but({"A": good["A"][:, :2]})),
            Refusal("x of another width", good.but({"x": good["x"][:, :2]})),
            Refusal("t of another width", good.but({"t": good["t"][:, :2]}))]


def vectors() -> list[Case]:
    """The published cases: small, with uneven micro-batches and padding; parts of a step one at a time, and together.
    In half precision they have two steps: bounds grow from step to step, and say little at the fifth."""
    adamw = {"optimizer": "adamw", "lr": 0.1, "weight_decay": 0.25, "clip": 0.5, "schedule": "linear", "warmup": 2,
             "steps": 8, "beta1": 0.9, "beta2": 0.95, "eps": 0.01, "alpha": 5.0}
    cases = []
    kinds: list[tuple[dict[str, Any], str]] = [
        ({}, "AdamW, clipped, linear with warm-up"),
        ({"clip": None, "schedule": "constant", "weight_decay": 0.0}, "AdamW alone"),
        ({"clip": None, "schedule": "constant", "weight_decay": 0.5}, "AdamW, decay decoupled from the gradient"),
        ({"beta2": 0.999, "eps": 0.001, "schedule": "cosine"}, "AdamW, cosine, the usual betas"),
        ({"optimizer": "sgd"}, "SGD, clipped: one norm over A and B, of the step's gradient")]
    for seed, (changed, label) in enumerate(kinds):
        for dtype in ("float64", "float32", "bfloat16"):
            rng = numpy.random.default_rng([3, seed])
            half = dtype == "bfloat16"
            gentle = {"alpha": 1.0, "lr": 0.0625, "eps": 0.25} if half else {}
            case = bounded(rng, dtype, 4, 3 + seed % 2, 3, 2, **{**adamw, **changed, **gentle}).but(label=label)
            cases.append(first_steps(case, 2) if half else case)
    for seed in (1, 2):
        for dtype in ("float64", "float32", "bfloat16"):
            case = dyadic(numpy.random.default_rng([4, seed]), dtype)
            cases.append(case.but(label="SGD on dyadic numbers, decay: bit for bit"))
    return cases
