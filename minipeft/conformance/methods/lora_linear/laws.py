"""Laws of LoRA on a linear layer.

V: results against the reference. M: relations among the implementation's own results, some also against the reference.
S: facts, such as a set of names.
Neither V nor M suffices: dropout without its factor passes every M, and a merged forward that adds the adapter again
passes every V here.

A law is given a case and `make(case)`, which builds the implementation under test; it yields observations.
"""
from __future__ import annotations

from typing import Any, Callable, Iterator

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.fault import RAISES, Fault
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.lora_linear.equations import SCALINGS, forced_dropout, unmerge_bound, values
from minipeft.conformance.methods.lora_linear.steps import rate_of
from minipeft.conformance.numbers import derangement
from minipeft.conformance.observe import Observation, between, fact, near, none_of, same

LAWS = Laws()
law = LAWS.law
Seen = Iterator[Observation]


def out(layer: Any, case: Case, x: Any = None) -> numpy.ndarray:
    """y [N, out] of the case's x, or of another x."""
    x = case["x"] if x is None else x
    return layer.array("forward", (len(x), case["W"].shape[0]), x)


def gradients_of(layer: Any, case: Case) -> dict:
    """{"A", "B", "x": gradient} at the case's x and g."""
    return layer.arrays("vjp", {leaf: case[leaf].shape for leaf in "ABx"}, case["x"], case["g"])


def refusal(name: str, action: Callable[[], Any]) -> list[Observation]:
    """Calls `action`, which may be refused: [] if it was done, one observation called `name` if it raised an error.
    Raises the Fault where it went wrong in another way, such as not returning."""
    try:
        action()
    except Fault as fault:
        if fault.kind != RAISES:
            raise
        return [fact(name, fault.kind, RAISES)]
    return []


@law("L1", "V: the forward is the equation", "forward")
def forward(case: Case, make: Make) -> Seen:
    yield near(case, "y", out(make(case), case), values(case)["y"])


@law("L2", "V: dA, dB, dx are the equation's, summed over the batch", "vjp")
def gradients(case: Case, make: Make) -> Seen:
    found = gradients_of(make(case), case)
    for leaf in "ABx":
        yield near(case, f"d{leaf}", found[leaf], values(case)[f"d{leaf}"])


@law("L2s", "M: asking for gradients changes neither the layer nor the gradients", "vjp", "forward")
def gradients_alone(case: Case, make: Make) -> Seen:
    layer, ref = make(case), values(case)
    before, once, again = out(layer, case), gradients_of(layer, case), gradients_of(layer, case)
    yield same("y after gradients were asked for", out(layer, case), before)
    for leaf in "ABx":
        yield between(case, f"d{leaf}, asked for again", again[leaf], once[leaf], *[ref[f"d{leaf}"]] * 2)


@law("L3", "V: merged, the weight is W + s B A", "merge", "weight")
def merged_weight(case: Case, make: Make) -> Seen:
    layer = make(case)
    layer.merge()
    yield near(case, "merged W", layer.array("weight", case["W"].shape), values(case)["W_merged"])


@law("L3m", "M: merged, it computes what it did before", "merge", "forward")
def merged_forward(case: Case, make: Make) -> Seen:
    layer, ref = make(case), values(case)
    before = out(layer, case)
    layer.merge()
    yield between(case, "merged y", out(layer, case), before, ref["y"], ref["y_merged"])


@law("L4", "M: merging twice is refused or changes nothing", "merge", "weight")
def merged_once(case: Case, make: Make) -> Seen:
    layer = make(case)
    layer.merge()
    once = layer.array("weight", case["W"].shape)
    if layer.offers("is_merged"):
        yield fact("is_merged() after merge()", bool(layer.is_merged()), True)
    yield from refusal("the second merge", layer.merge)
    yield same("W after a second merge", layer.array("weight", case["W"].shape), once)


@law("L5", "M: unmerge(merge(W)) = W", "merge", "unmerge", "weight")
def unmerged(case: Case, make: Make) -> Seen:
    layer = make(case)
    layer.merge()
    layer.unmerge()
    yield restored("W after merge and unmerge", layer, case)
    if layer.offers("is_merged"):
        yield fact("is_merged() after unmerge()", bool(layer.is_merged()), False)


@law("L5c", "M: 100 cycles of merge and unmerge do not drift further than one", "merge", "unmerge", "weight",
     kinds=("bounded",), examples=5)
def cycles(case: Case, make: Make) -> Seen:
    layer = make(case)
    for _ in range(100):
        layer.merge()
        layer.unmerge()
    yield restored("W after 100 cycles", layer, case, "every cycle moves it: unmerging does not subtract what merging "
                                                      "added, rounding included")


def restored(name: str, layer: Any, case: Case, why: str = "") -> Observation:
    """W after unmerging against the case's W: bit for bit on exact cases, else within `unmerge_bound`."""
    w = layer.array("weight", case["W"].shape)
    return same(name, w, case["W"], why) if case.exact else \
        Observation(name, "B", w, case["W"], unmerge_bound(case), why)


@law("L6", "M: with B = 0 nothing is added: W keeps every bit, y is within its bounds", "forward")
def zero_is_nothing(case: Case, make: Make) -> Seen:
    """Bits of y are compared only on dyadic data: one product of [x, x A^T] with [W, s B]^T adds the terms of x W^T in
    another order than a product with W alone."""
    zero = case.but({"B": 0 * case["B"]})
    y, ref = out(make(zero), zero), values(zero)["y"]
    yield near(case, "y with B = 0", y, ref)
    twin = zero.but({"A": -2 * case["A"]})
    yield between(case, "y with B = 0 and with another A", y, out(make(twin), zero), ref, values(twin)["y"])
    layer = make(zero)
    if layer.offers("activate"):
        layer.activate([])
        yield between(case, "y with B = 0 and with no adapter active", y, out(layer, zero), ref, ref)
    if layer.offers("merge", "weight"):
        layer = make(zero)
        layer.merge()
        yield same("merged W with B = 0", layer.array("weight", case["W"].shape), case["W"])


@law("L7", "S: the gradients of W and b do not exist", "vjp")
def frozen(case: Case, make: Make) -> Seen:
    yield none_of(("W", "b"), make(case).arrays("vjp", {}, case["x"], case["g"]))


@law("L7t", "S: exactly A and B are trained", "trainable")
def trainable(case: Case, make: Make) -> Seen:
    yield fact("trainable()", sorted(make(case).trainable()), ["A", "B"])


@law("L7s", "M: a step leaves W as it was, bit for bit", "step", "weight")
def stepped(case: Case, make: Make) -> Seen:
    layer = make(case)
    layer.step(case["x"], case["g"], rate_of(values(case)))
    yield same("W after a step", layer.array("weight", case["W"].shape), case["W"])


@law("L10", "M: rows do not see each other", "forward")
def independent_rows(case: Case, make: Make) -> Seen:
    layer, ref, n = make(case), values(case)["y"], len(case["x"])
    y = out(layer, case)
    order = derangement(numpy.random.default_rng(case.seed), n)
    moved = _rows(ref, order)
    yield between(case, "y of the rows in another order", out(layer, case, case["x"][order]), y[order], moved, moved)
    half = _rows(ref, slice(n // 2, n))
    yield between(case, "y of the last rows alone", out(layer, case, case["x"][n // 2:]), y[n // 2:], half, half)


def _rows(value: Any, chosen: Any) -> Any:
    return type(value)(value.exact[chosen], value.mag[chosen], value.k, value.n)


@law("L11a", "M: (2 A, B / 2) is the same function", "forward")
def factor_moved(case: Case, make: Make) -> Seen:
    ref = values(case)["y"]
    twin = case.but({"A": 2 * case["A"], "B": case["B"] / 2})
    yield between(case, "y", out(make(twin), case), out(make(case), case), ref, ref)


@law("L11b", "M: padded with zeros to a larger rank, with alpha to match, A and B give the same y", "forward")
def padded(case: Case, make: Make) -> Seen:
    rule, r = case.conventions.get("scaling", SCALINGS[0]), case["A"].shape[0]
    times = 4 if rule == "alpha/sqrt(r)" else 2                # sqrt(4 r) = 2 sqrt(r) is not rounded
    grow = {"alpha/r": 2.0, "alpha/sqrt(r)": 2.0, "alpha": 1.0}[rule]
    a, b = numpy.zeros((times * r, case["A"].shape[1])), numpy.zeros((case["B"].shape[0], times * r))
    a[:r], b[:, :r] = case["A"], case["B"]
    twin = case.but({"A": a, "B": b}, {"alpha": grow * case.params["alpha"]})
    yield between(case, "y", out(make(twin), case), out(make(case), case), values(twin)["y"], values(case)["y"])


@law("L11c", "M: -alpha gives the opposite update", "forward")
def opposite(case: Case, make: Make) -> Seen:
    twin, zero = case.but(params={"alpha": -case.params["alpha"]}), case.but({"B": 0 * case["B"]})
    ref, base = values(case)["y"], out(make(zero), case)
    yield between(case, "y(alpha) + y(-alpha) against 2 y(B = 0)",
                  out(make(case), case) + out(make(twin), case), 2 * base, ref, ref, ref, ref)


@law("L11d", "M: the output is affine in B", "forward")
def affine(case: Case, make: Make) -> Seen:
    zero, twice = (case.but({"B": c * case["B"]}) for c in (0, 2))
    ref, y = values(twice)["y"], out(make(case), case)
    yield between(case, "y(2 B) - y(B) against y(B) - y(0)", out(make(twice), case) - y,
                  y - out(make(zero), case), ref, ref, ref, ref)


@law("L11e", "M: <dA, A> = <dB, B>", "vjp")
def euler(case: Case, make: Make) -> Seen:
    found, ref = gradients_of(make(case), case), values(case)
    a, b = ((found[k] * case[k]).sum() for k in "AB")
    bound = sum((case.tau(ref[f"d{k}"]) * abs(case[k])).sum() for k in "AB")
    own = case["A"].size * 2.0 ** -53 * sum((ref[f"d{k}"].mag * abs(case[k])).sum() for k in "AB")  # of these two sums
    yield Observation("<dA, A> against <dB, B>", "B", numpy.array([a]), numpy.array([b]),
                      numpy.array([bound + own], numpy.float64))


@law("L11f", "M: merged, the weight moved by a matrix of rank r at most", "merge", "weight",
     where=lambda case: min(case["W"].shape) > case["A"].shape[0])
def rank(case: Case, make: Make) -> Seen:
    layer = make(case)
    layer.merge()
    moved = layer.array("weight", case["W"].shape) - case["W"]
    rest = numpy.linalg.svd(moved, compute_uv=False)[case["A"].shape[0]:]
    bound = numpy.sqrt((numpy.float64(case.tau(values(case)["W_merged"])) ** 2).sum())  # Weyl: at most the error's norm
    own = max(moved.shape) * 2.0 ** -52 * numpy.linalg.norm(moved)  # of the decomposition, as LAPACK states it
    yield Observation("singular values beyond r", "B", rest, 0 * rest, numpy.full(rest.shape, bound + own))


@law("L12", "M: in evaluation there is no dropout", "forward")
def no_dropout(case: Case, make: Make) -> Seen:
    layer = make(case.but(params={"dropout": 0.5}))
    y = out(layer, case)
    yield near(case, "y of a layer with dropout 0.5", y, values(case)["y"])
    yield same("y, once more", out(layer, case), y)


KEPT = 0.25  # 1 - p: a power of two, and not p, so that division by p instead of 1 - p is found


@law("L12f", "V: dropout acts only on the input of A, scaled by 1 / (1 - p), and only in training", "forward_train",
     "forward")
def with_mask(case: Case, make: Make) -> Seen:
    rng = numpy.random.default_rng(case.seed)
    keep = (rng.random(case["x"].shape) < KEPT).astype(numpy.float64)
    layer = make(case.but(params={"dropout": 1 - KEPT}))
    y = layer.array("forward_train", case["g"].shape, case["x"], keep)
    yield near(case, "y in training", y, forced_dropout(case, keep, 1 - KEPT))
    yield near(case, "y in evaluation, after training", out(layer, case), values(case)["y"])
