"""What the laws say of LoRA alone, with a bound derived for every slot: the definition, the merged weight, the rank.

    1 definition, 3 merge (slot by slot), 10 rank, and the three uses of a tied table. The laws that hold for every
    family of methods are in test_laws.py. Tolerances are derived in bounds.py.
"""
from __future__ import annotations

from typing import Any, Callable

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.engine import ops
from minipeft.engine.tensor import Leaf, Tensor
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Parameter
from minipeft.laws.bounds import close, norm_of, tau, wide, within
from tests.models_under_test import D_MODEL, FAMILIES, TIED, Case, cases, logits, slots_of


# ---- law 1: project(x) = x dense^T, rows(ids) = dense[ids]


def evaluated(run: Callable[[], Tensor], leaves: dict[str, Leaf], g: numpy.ndarray) -> dict[str, numpy.ndarray]:
    """y = run(), and the gradients of <y, g>."""
    seen = {}

    def step() -> Tensor:
        seen["y"] = y = run()
        return ops.sum(ops.mul(y, g))

    _, grads = minipeft.value_and_grad(step, leaves)
    return {"y": seen["y"].data, **grads}


def pieces(slot: Slot) -> dict[str, tuple[Any, Any, Any]]:
    """{attachment: (A, B, |s|)} in long floats."""
    return {n: (wide(p.A), wide(p.B), abs(wide(numpy.float64(p.scale)))) for n, p in slot.attached.items()}


def dense_magnitude(slot: Slot) -> numpy.ndarray:
    """|W| + sum |s| |B| |A|: the definition on absolute values."""
    return abs(wide(slot.base)) + sum(s * (abs(b) @ abs(a)) for a, b, s in pieces(slot).values())


def leaves_of(slot: Slot) -> dict[str, Leaf]:
    return {"W": slot.base} | {f"{n}.{leaf}": getattr(p, leaf) for n, p in slot.attached.items() for leaf in "AB"}


@given(cases(), st.booleans())
def test_law_1_project_is_multiplication_by_the_dense_weight_in_value_and_gradient(case, stacked):
    model = case.model()
    places = slots_of(case.attach(model))
    if stacked:
        case.attach(model, "upper", 3)
    rng = numpy.random.default_rng(case.seed)
    for name, slot in places.items():
        if slot.kind != "linear":
            continue
        d_out, d_in = slot.base.shape
        x = Parameter(rng.standard_normal((2, 5, d_in)).astype(case.dtype))
        g = rng.standard_normal((2, 5, d_out)).astype(case.dtype)
        leaves = {"x": x, **leaves_of(slot)}
        found = evaluated(lambda: slot.project(x), leaves, g)
        wanted = evaluated(lambda: ops.linear(x, slot.fold().dense()), leaves, g)

        # conformance table: k roundings and sums of total length n, for each of the two ways; one more rounding and
        # one more addition per stacked attachment. All from the absolute values.
        ax, ag, parts = abs(wide(x)).reshape(10, d_in), abs(wide(g)).reshape(10, d_out), pieces(slot)
        ranks, k = case.rank * len(parts), 5 + 2 * len(parts)
        bound = {"y": 2 * tau(ax @ dense_magnitude(slot).T, d_in + ranks + 4, k, case.u).reshape(g.shape),
                 "x": 2 * tau(ag @ dense_magnitude(slot), d_out + ranks + 3, k, case.u).reshape(x.shape),
                 "W": 2 * tau(ag.T @ ax, 10, 1, case.u)}
        for n, (a, b, s) in parts.items():
            bound[f"{n}.A"] = 2 * tau(s * (ag @ abs(b)).T @ ax, d_out + 10 + 2, k, case.u)
            bound[f"{n}.B"] = 2 * tau(s * ag.T @ (ax @ abs(a).T), d_in + 10 + 2, k, case.u)
        for what, limit in bound.items():
            assert within(found[what], wanted[what], limit), (name, what)


@given(cases(places=[(f, p) for f in FAMILIES for p in ("embedding", "mixture")]), st.booleans())
def test_law_1_rows_are_rows_of_the_dense_weight_in_value_and_gradient(case, stacked):
    model = case.model()
    slot = slots_of(case.attach(model))["embedding.weight"]
    if stacked:
        case.attach(model, "upper", 3, "^embedding")
    vocab, d = slot.base.shape
    rng = numpy.random.default_rng(case.seed)
    ids = rng.integers(0, vocab, (2, 9))  # more ids than rows would be distinct: repeated ones add up
    g = rng.standard_normal((2, 9, d)).astype(case.dtype)
    leaves = leaves_of(slot)
    found = evaluated(lambda: slot.rows(ids), leaves, g)
    wanted = evaluated(lambda: ops.embedding(slot.fold().dense(), ids), leaves, g)

    parts, scattered = pieces(slot), numpy.zeros((vocab, d), numpy.longdouble)
    numpy.add.at(scattered, ids.reshape(-1), abs(wide(g)).reshape(-1, d))
    k, n_ids = 3 + 2 * len(parts), ids.size
    bound = {"y": 2 * tau(dense_magnitude(slot)[ids], case.rank * len(parts) + 2, k, case.u),
             "W": 2 * tau(scattered, n_ids, 1, case.u)}
    for n, (a, b, s) in parts.items():
        bound[f"{n}.A"] = 2 * tau(s * abs(b).T @ scattered, vocab + n_ids + 2, k, case.u)
        bound[f"{n}.B"] = 2 * tau(s * scattered @ abs(a).T, d + n_ids + 2, k, case.u)
    for what, limit in bound.items():
        assert within(found[what], wanted[what], limit), what


@given(cases())
def test_law_1_the_dense_weight_is_the_equation_of_the_paper(case):
    """W + (alpha / r) B A, with alpha and r taken from the method and nothing else from the library."""
    model = case.model()
    for name, slot in slots_of(case.attach(model)).items():
        a, b, _ = pieces(slot)["lora"]
        s = numpy.longdouble(case.alpha) / case.rank
        limit = tau(dense_magnitude(slot), case.rank + 2, 3, case.u)
        reference = tau(dense_magnitude(slot), case.rank + 2, 3, float(numpy.finfo(numpy.longdouble).eps))
        assert within(slot.fold().dense().data, wide(slot.base) + s * (b @ a), limit + reference), name
        assert norm_of(b @ a) > 0


# ---- law 3: merged = unmerged


@given(cases(), st.booleans())
def test_law_3_the_merged_weight_and_its_product_are_within_the_bound_at_every_slot(case, stacked):
    model = case.model()
    attachments = [case.attach(model)] + ([case.attach(model, "upper", 3)] if stacked else [])
    shapes = {name: p.shape for name, p in model.base_parameters.items()}
    rng = numpy.random.default_rng(case.seed)
    inputs = {name: rng.standard_normal((2, 3, slot.base.shape[1])).astype(case.dtype)
              for name, slot in slots_of(attachments[0]).items()}
    unmerged = {name: slot.project(inputs[name]).data for name, slot in slots_of(attachments[0]).items()}
    for attachment in attachments:
        attachment.merge()
    for name, slot in slots_of(attachments[0]).items():
        parts, magnitude = pieces(slot).values(), dense_magnitude(slot)
        ranks, k, d_in = case.rank * len(parts), 2 * len(parts), slot.base.shape[1]
        exact = wide(slot.base) + sum(wide(numpy.float64(p.scale)) * (wide(p.B) @ wide(p.A))
                                      for p in slot.attached.values())
        reference = tau(magnitude, ranks + 4, 3, float(numpy.finfo(numpy.longdouble).eps))
        merged = slot.fold().dense()
        assert merged.shape == slot.base.shape and merged.dtype == case.dtype
        assert within(merged.data, exact, tau(magnitude, ranks + 2, k + 1, case.u) + reference), name
        assert within(slot.project(inputs[name]).data, unmerged[name], 2 * tau(
            abs(wide(inputs[name])) @ magnitude.T, d_in + ranks + 4, k + 4, case.u)), name
    assert {name: p.shape for name, p in model.base_parameters.items()} == shapes


@pytest.mark.parametrize("family", TIED)
@given(seed=st.integers(0, 999))
def test_lora_on_a_tied_table_acts_at_all_three_uses_merged_or_not(family, seed):
    case = Case((family, "embedding"), 2, 3, "float64", seed)
    model, batch = case.model(), case.batch()
    assert model.head.weight is model.embedding.weight
    attachment = case.attach(model)
    table = model.embedding.weight.fold().dense().data
    wanted = case.model()  # the same base, its one array replaced by W + s B A
    wanted.embedding.weight.base.data = table
    for move in (lambda: None, attachment.merge):
        move()
        assert close(logits(model, batch), logits(wanted, batch), case.u)
    ids = batch["input_ids"]
    hidden = numpy.random.default_rng(seed).standard_normal((1, 1, 12))
    assert close(model.embedding(ids).data, table[ids], case.u)
    assert close(model.head(hidden).data, hidden @ table.T, case.u)


# ---- law 10: the update has rank at most r


@given(cases())
def test_law_10_the_update_of_a_weight_has_rank_at_most_r(case):
    model = case.model()
    for name, slot in slots_of(case.attach(model)).items():
        update = slot.fold().dense().data.astype("float64") - slot.base.data.astype("float64")
        singular = numpy.linalg.svd(update, compute_uv=False)
        # Weyl: the computed weight is W + s B A + E, |E| <= tau, so sigma_{r+1} <= ||E||_F; the difference above
        # adds u |update| in float64, and the SVD a modest multiple (here the sum of the sides) of u sigma_1.
        e = norm_of(tau(dense_magnitude(slot), case.rank + 2, 3, case.u))
        e += sum(update.shape) * 2 ** -53 * norm_of(update)
        assert (singular[case.rank:] <= e).all(), name
        assert case.rank == D_MODEL or singular[case.rank - 1] > e, f"{name}: its rank is smaller: nothing was tested"
