"""Laws of LoRA on an embedding table.

V: results against the reference. M: relations among the implementation's own results, some also against the reference.
S: facts, such as a set of names.
A law is given a case and `make(case)`, which builds the implementation under test; it yields observations.
"""
from __future__ import annotations

from typing import Any, Iterator

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.lora_embedding.equations import unmerge_bound, values
from minipeft.conformance.methods.lora_linear.equations import SCALINGS
from minipeft.conformance.methods.lora_linear.laws import refusal
from minipeft.conformance.methods.lora_linear.steps import rate_of
from minipeft.conformance.numbers import derangement
from minipeft.conformance.observe import Observation, between, fact, near, none_of, raised, same
from minipeft.conformance.tolerance import Value

LAWS = Laws()
law = LAWS.law
Seen = Iterator[Observation]


def out(table: Any, case: Case, ids: Any = None) -> numpy.ndarray:
    """y [b, t, d] of the case's ids, or of others."""
    ids = case["ids"] if ids is None else ids
    return table.array("forward", (*ids.shape, case["E"].shape[1]), ids)


def gradients_of(table: Any, case: Case) -> dict:
    """{"A", "B": gradient} at the case's ids and g."""
    return table.arrays("vjp", {leaf: case[leaf].shape for leaf in "AB"}, case["ids"], case["g"])


@law("L1", "V: the forward is the equation", "forward")
def forward(case: Case, make: Make) -> Seen:
    yield near(case, "y", out(make(case), case), values(case)["y"])


@law("L2", "V: dA, dB are the equation's, summed over all occurrences of an id", "vjp")
def gradients(case: Case, make: Make) -> Seen:
    found, ref = gradients_of(make(case), case), values(case)
    for leaf in "AB":
        yield near(case, f"d{leaf}", found[leaf], ref[f"d{leaf}"])


@law("L2s", "M: asking for gradients changes neither the table nor the gradients", "vjp", "forward")
def gradients_alone(case: Case, make: Make) -> Seen:
    table, ref = make(case), values(case)
    before, once, again = out(table, case), gradients_of(table, case), gradients_of(table, case)
    yield same("y after gradients were asked for", out(table, case), before)
    for leaf in "AB":
        yield between(case, f"d{leaf}, asked for again", again[leaf], once[leaf], *[ref[f"d{leaf}"]] * 2)


@law("L2r", "M: the same batch twice gives twice the gradient", "vjp")
def repeated(case: Case, make: Make) -> Seen:
    twice = case.but({name: numpy.concatenate([case[name]] * 2) for name in ("ids", "g")})
    once, both, ref = gradients_of(make(case), case), gradients_of(make(twice), twice), values(twice)
    for leaf in "AB":
        yield between(twice, f"d{leaf} of the batch twice", both[leaf], 2 * once[leaf], *[ref[f"d{leaf}"]] * 2)


@law("L2a", "M: an id that does not occur has gradient 0 in A", "vjp",
     where=lambda case: len(numpy.unique(case["ids"])) < len(case["E"]))
def unseen(case: Case, make: Make) -> Seen:
    others = numpy.setdiff1d(numpy.arange(len(case["E"])), case["ids"])
    column = gradients_of(make(case), case)["A"][:, others]
    yield same("dA at ids that do not occur", column, 0 * column)


@law("L3", "V: merged, the table is E + s (B A)^T", "merge", "weight")
def merged_table(case: Case, make: Make) -> Seen:
    table = make(case)
    table.merge()
    yield near(case, "merged E", table.array("weight", case["E"].shape), values(case)["E_merged"])


@law("L3m", "M: merged, it computes what it did before", "merge", "forward")
def merged_forward(case: Case, make: Make) -> Seen:
    table, ref = make(case), values(case)
    before = out(table, case)
    table.merge()
    yield between(case, "merged y", out(table, case), before, ref["y"], ref["y_merged"])


@law("L4", "M: merging twice is refused or changes nothing", "merge", "weight")
def merged_once(case: Case, make: Make) -> Seen:
    table = make(case)
    table.merge()
    once = table.array("weight", case["E"].shape)
    if table.offers("is_merged"):
        yield fact("is_merged() after merge()", bool(table.is_merged()), True)
    yield from refusal("the second merge", table.merge)
    yield same("E after a second merge", table.array("weight", case["E"].shape), once)


@law("L5", "M: unmerge(merge(E)) = E", "merge", "unmerge", "weight")
def unmerged(case: Case, make: Make) -> Seen:
    table = make(case)
    table.merge()
    table.unmerge()
    yield restored("E after merge and unmerge", table, case)
    if table.offers("is_merged"):
        yield fact("is_merged() after unmerge()", bool(table.is_merged()), False)


@law("L5c", "M: 100 cycles of merge and unmerge do not drift further than one", "merge", "unmerge", "weight",
     examples=3)
def cycles(case: Case, make: Make) -> Seen:
    table = make(case)
    for _ in range(100):
        table.merge()
        table.unmerge()
    yield restored("E after 100 cycles", table, case)


def restored(name: str, table: Any, case: Case) -> Observation:
    """E after unmerging against the case's E: bit for bit on exact cases, else within `unmerge_bound`."""
    e = table.array("weight", case["E"].shape)
    return same(name, e, case["E"]) if case.exact else Observation(name, "B", e, case["E"], unmerge_bound(case))


@law("L6", "M: with A = 0 or B = 0 nothing is added: E keeps every bit, y is within its bounds", "forward")
def zero_is_nothing(case: Case, make: Make) -> Seen:
    """Bits of y are compared only on dyadic data: a lookup by a product with unit vectors may round E, if the
    implementation declares that."""
    for leaf in "AB":
        zero = case.but({leaf: 0 * case[leaf]})
        yield near(case, f"y with {leaf} = 0", out(make(zero), zero), values(zero)["y"])
        table = make(zero)
        if table.offers("merge", "weight"):
            table.merge()
            yield same(f"merged E with {leaf} = 0", table.array("weight", case["E"].shape), case["E"])


@law("L7", "S: the gradient of E does not exist", "vjp")
def frozen(case: Case, make: Make) -> Seen:
    yield none_of("E", make(case).arrays("vjp", {}, case["ids"], case["g"]))


@law("L7t", "S: exactly A and B are trained", "trainable")
def trainable(case: Case, make: Make) -> Seen:
    yield fact("trainable()", sorted(make(case).trainable()), ["A", "B"])


@law("L7s", "M: a step leaves E as it was, bit for bit", "step", "weight")
def stepped(case: Case, make: Make) -> Seen:
    table = make(case)
    table.step(case["ids"], case["g"], rate_of(values(case)))
    yield same("E after a step", table.array("weight", case["E"].shape), case["E"])


@law("L10", "M: positions do not see each other", "forward")
def independent_positions(case: Case, make: Make) -> Seen:
    table, ref, ids = make(case), values(case)["y"], case["ids"]
    y, (b, t) = out(table, case), ids.shape
    order, flat = derangement(numpy.random.default_rng(case.seed), b * t), y.reshape(b * t, -1)
    moved = _at(ref, lambda v: v.reshape(flat.shape)[order].reshape(y.shape))
    yield between(case, "y of the ids in another order", out(table, case, ids.reshape(-1)[order].reshape(b, t)),
                  flat[order].reshape(y.shape), moved, moved)
    first = _at(ref, lambda v: v[:1, -1:])
    yield between(case, "y of one id alone", out(table, case, ids[:1, -1:]), y[:1, -1:], first, first)


def _at(value: Value, choose: Any) -> Value:
    return Value(choose(value.exact), choose(value.mag), value.k, value.n)


@law("L11a", "M: (2 A, B / 2) is the same table", "forward")
def factor_moved(case: Case, make: Make) -> Seen:
    ref = values(case)["y"]
    twin = case.but({"A": 2 * case["A"], "B": case["B"] / 2})
    yield between(case, "y", out(make(twin), case), out(make(case), case), ref, ref)


@law("L11b", "M: A and B padded with zeros to a larger rank, with alpha to match, are the same table", "forward",
     where=lambda case: _times(case) * len(case["A"]) <= min(case["E"].shape))  # a higher rank may be refused
def padded(case: Case, make: Make) -> Seen:
    r, times = len(case["A"]), _times(case)
    grow = 1.0 if _rule(case) == "alpha" else 2.0              # sqrt(4 r) = 2 sqrt(r) is not rounded
    a, b = numpy.zeros((times * r, len(case["E"]))), numpy.zeros((len(case["B"]), times * r))
    a[:r], b[:, :r] = case["A"], case["B"]
    twin = case.but({"A": a, "B": b}, {"alpha": grow * case.params["alpha"]})
    yield between(case, "y", out(make(twin), case), out(make(case), case), values(twin)["y"], values(case)["y"])


def _rule(case: Case) -> str:
    return case.conventions.get("scaling", SCALINGS[0])


def _times(case: Case) -> int:
    return 4 if _rule(case) == "alpha/sqrt(r)" else 2


@law("L11c", "M: -alpha gives the opposite update", "forward")
def opposite(case: Case, make: Make) -> Seen:
    twin, ref = case.but(params={"alpha": -case.params["alpha"]}), values(case)["y"]
    yield between(case, "y(alpha) + y(-alpha) against 2 E[ids]", out(make(case), case) + out(make(twin), case),
                  2 * case["E"][case["ids"]], ref, ref)


@law("L11d", "M: the output is affine in B", "forward")
def affine(case: Case, make: Make) -> Seen:
    twice = case.but({"B": 2 * case["B"]})
    ref, y = values(twice)["y"], out(make(case), case)
    yield between(case, "y(2 B) - y(B) against y(B) - E[ids]", out(make(twice), case) - y,
                  y - case["E"][case["ids"]], ref, ref, ref)


@law("L11e", "M: <dA, A> = <dB, B>", "vjp")
def euler(case: Case, make: Make) -> Seen:
    found, ref = gradients_of(make(case), case), values(case)
    a, b = ((found[k] * case[k]).sum() for k in "AB")
    bound = sum((case.tau(ref[f"d{k}"]) * abs(case[k])).sum() for k in "AB")
    own = case["A"].size * 2.0 ** -53 * sum((ref[f"d{k}"].mag * abs(case[k])).sum() for k in "AB")  # of these two sums
    yield Observation("<dA, A> against <dB, B>", "B", numpy.array([a]), numpy.array([b]),
                      numpy.array([bound + own], numpy.float64))


@law("L11f", "M: merged, the table moved by a matrix of rank r at most", "merge", "weight",
     where=lambda case: min(case["E"].shape) > case["A"].shape[0])
def rank(case: Case, make: Make) -> Seen:
    table = make(case)
    table.merge()
    moved = table.array("weight", case["E"].shape) - case["E"]
    rest = numpy.linalg.svd(moved, compute_uv=False)[case["A"].shape[0]:]
    bound = numpy.sqrt((numpy.float64(case.tau(values(case)["E_merged"])) ** 2).sum())  # Weyl: at most the error's norm
    yield Observation("singular values beyond r", "B", rest, 0 * rest, numpy.full(rest.shape, 4 * bound))


@law("X2", "S: ids that the table lacks are refused everywhere, and leave everything as it was", "forward",
     kinds=("exact",))
def refused(case: Case, make: Make) -> Seen:
    table, V = make(case), len(case["E"])
    y = out(table, case)
    for what, wrong in (("V", V), ("-1", -1)):
        ids = case["ids"].copy()
        ids[-1, -1] = wrong
        for call, args in (("forward", ()), ("forward_decoder", ()), ("vjp", ("g",)), ("vjp_tied", ("g", "h", "q"))):
            if table.offers(call):
                yield raised(f"{call}() with id {what}",
                             lambda: getattr(table, call)(ids, *(case[name] for name in args)))
    yield same("y after these", out(table, case), y)
