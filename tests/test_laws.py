"""The laws of the house for LoRA and selection, each over model family, pattern, rank, alpha, dtype and seed.

    1 definition, 2 transparency, 3 merge, 6 names, 7 round trip, 9 fused = definition, 10 rank, 12 dtype,
    13 accumulation: here.    4 undo: test_laws_undo.py.    5 masking: test_laws_masking.py.
    8 swap and mixed batches: test_laws_routing.py.         11 backends: test_backend.py.
    1, 3, 5, 10, 13 and the scaling laws as equalities, on Fractions: test_laws_exact.py.

Tolerances are derived in bounds.py; where nothing moves in mathematics, bits are compared.
"""
from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
from typing import Any, Callable, Iterator

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft import ops
from minipeft.autograd.tensor import Leaf, Tensor, _observer
from minipeft.nn import layers
from minipeft.nn.weight import Parameter, Slot
from minipeft.ops import definitions, fused
from minipeft.train.data import batch_of
from tests.bounds import close, close_gradients, norm_of, tau, wide, within
from tests.models_under_test import D_MODEL, FAMILIES, TIED, Case, bits, cases, logits, same_values, slots_of


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


# ---- law 2: attaching changes nothing


@given(cases(), st.sampled_from(["gaussian", "uniform"]))
def test_law_2_attaching_changes_no_output_value_at_initialization(case, start):
    model, batch = case.model(), case.batch()

    def outputs() -> list[numpy.ndarray]:
        return [logits(model, batch), model.loss(**batch).data, model.encode(batch["input_ids"]).data,
                model.generate(batch["input_ids"], max_new_tokens=3)]

    before = outputs()
    method = dataclasses.replace(case.method, start=start, dropout=0.5)
    attachment = minipeft.attach(model, method, numpy.random.default_rng(case.seed))
    assert attachment.state == "plugged" and any(p.data.any() for p in attachment.parameters.values())
    assert all(same_values(a, b) for a, b in zip(before, outputs()))


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


@given(cases(), st.booleans())
def test_law_3_a_merged_model_computes_what_the_unmerged_one_does(case, stacked):
    model, batch = case.model(), case.batch()
    base = logits(model, batch)
    attachments = [case.attach(model)] + ([case.attach(model, "upper", 3)] if stacked else [])
    before, loss = logits(model, batch), model.loss(**batch).data
    assert not close(before, base, case.u), "this LoRA does nothing: the law would hold for any merge"
    for attachment in attachments:
        attachment.merge()
    assert close(logits(model, batch), before, case.u)
    assert close(model.loss(**batch).data, loss, case.u)


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


# ---- law 6: names


@given(cases(), st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True))
def test_law_6_attaching_changes_no_base_name_and_no_base_object(case, name):
    model = case.model()
    before, arrays = dict(model.base_parameters), bits(model.state())
    objects = [(place, getattr(place, "base", None)) for _, place in model.named_places()]
    attachment = case.attach(model, name)
    assert list(model.base_parameters) == list(before)
    assert all(model.base_parameters[n] is before[n] for n in before)
    assert all(place is old and getattr(place, "base", None) is base
               for (_, place), (old, base) in zip(model.named_places(), objects, strict=True))
    assert bits(model.state()) == arrays
    own = [f"{place}@{name}.{leaf}" for place in attachment.places for leaf in "AB"]
    assert list(attachment.parameters) == own
    assert list(minipeft.select(model, ".")) == [*before, *own]
    assert all(model.slots[n.partition("@")[0]] is attachment.places[n.partition("@")[0]] for n in own)


# ---- law 7: round trip through a file


@given(cases(), st.sampled_from(["off", "plugged", "merged"]), st.booleans())
def test_law_7_what_is_loaded_is_what_was_saved(case, state, into_itself):
    model, batch = case.model(), case.batch()
    attachment = case.attach(model, "mine")
    own, outputs = bits(attachment.parameters), logits(model, batch)
    {"off": attachment.unplug, "merged": attachment.merge, "plugged": lambda: None}[state]()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "adapter.safetensors")
        attachment.save(path)
        assert attachment.state == state
        target = model if into_itself else model.clone()
        old = target.attachments["mine"]
        if old.state == "merged":
            old.unmerge()
        old.remove()
        loaded = minipeft.load(target, path)
    assert (loaded.name, loaded.state) == ("mine", "plugged") and target.attachments == {"mine": loaded}
    assert list(loaded.places) == list(attachment.places) or into_itself
    assert bits(loaded.parameters) == own
    assert dataclasses.replace(loaded.method, where="") == dataclasses.replace(case.method, where="")
    assert same_values(logits(target, batch), outputs)


# ---- law 9: fused = definition


@contextlib.contextmanager
def by_definition() -> Iterator[set[str]]:
    """Every name in the package (but in `ops`) that means a fused op means its definition instead.

    Gives the names of the definitions that were called."""
    called: set[str] = set()

    def counted(name: str) -> Callable:
        def run(*inputs: Any, **options: Any) -> Any:
            called.add(name)
            return getattr(definitions, name)(*inputs, **options)
        return run

    twins = {id(getattr(fused, n)): counted(n) for n in vars(fused) if hasattr(definitions, n) and n in vars(ops)
             and isinstance(getattr(getattr(fused, n), "__wrapped__", None), type(counted))}
    spaces = [vars(m) for n, m in list(sys.modules.items()) if n.startswith("minipeft.") and ".ops" not in n]
    changed = [(space, key, value) for space in [*spaces, layers.ACTIVATIONS] for key, value in space.items()
               if id(value) in twins]
    for space, key, value in changed:
        space[key] = twins[id(value)]
    try:
        yield called
    finally:
        for space, key, value in changed:
            space[key] = value


@given(cases(dtypes=("float64",)), st.booleans())
def test_law_9_a_whole_model_of_fused_ops_is_the_model_of_definitions(case, training):
    batch = case.batch()

    def result() -> tuple:
        model = case.model()  # built here, because a feed-forward looks its activation up once
        case.attach(model)
        params = minipeft.select(model, ".")
        rng = numpy.random.default_rng(case.seed) if training else None
        loss, grads = minipeft.value_and_grad(lambda: model.loss(**batch, rng=rng), params, unused="zeros")
        return logits(model, batch), numpy.array(loss), grads

    found, loss, grads = result()
    with by_definition() as called:
        wanted, wanted_loss, wanted_grads = result()
    activation = {"t5 v1.1": {"gelu_tanh"}, "pre-LN": {"gelu"}}.get(case.family, set())
    norm = "rms_norm" if case.family.startswith("t5") else "layer_norm"
    assert called >= {"linear", "embedding", "attention", "cross_entropy", norm} | activation
    assert "low_rank_linear" in called or case.pattern == "embedding" and case.family not in TIED
    assert close(found, wanted, case.u) and close(loss, wanted_loss, case.u)
    assert close_gradients(grads, wanted_grads, case.u) is None


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


# ---- law 12: float32 in, float32 out


@given(cases(dtypes=("float32",)), st.integers(1, 3))
def test_law_12_a_float32_training_step_computes_in_float32_alone(case, accumulate):
    """Every floating input and output of every op, and every array that a VJP returns; moments and parameters too."""
    model = case.model()
    case.attach(model)
    params, ops_seen = minipeft.select(model, "."), set()

    def floating(a: Any) -> list[Any]:
        return [a.dtype] if hasattr(a, "dtype") and a.dtype.kind == "f" else []

    def checked(name: str, vjp: Callable) -> Callable:
        def run(g: numpy.ndarray) -> numpy.ndarray:
            out = vjp(g)
            assert floating(g) == floating(out) == [numpy.float32], f"a VJP of {name}"
            return out
        return run

    def observe(name: str, inputs: Any, out: Any, vjps: Any, node: Any) -> None:
        ops_seen.add(name)
        inside = [d for x in inputs for d in floating(getattr(x, "data", x) if isinstance(x, Tensor) else x)]
        assert set(inside) <= {numpy.dtype("float32")}, f"an input of {name}"
        assert floating(out) in ([], [numpy.float32]), f"the output of {name}"
        if node is not None:
            node.edges = [(parent, checked(name, vjp)) for parent, vjp in node.edges]

    pairs = [([1, 2, 3], [4, 1]), ([2], [5, 6, 1]), ([7, 8], [1])] * 2
    optimizer = minipeft.AdamW(1e-3)
    token = _observer.set(observe)
    try:
        minipeft.fit(model, {n: p for n, p in params.items() if "position" not in n}, minipeft.Batches(pairs, 2),
                     steps=2, optimizer=optimizer, accumulate=accumulate, progress=False)
    finally:
        _observer.reset(token)
    assert {"linear", "attention", "cross_entropy", "mul"} <= ops_seen
    assert {p.dtype for p in params.values()} == {numpy.dtype("float32")}
    assert {a.dtype for a in [*optimizer.m.values(), *optimizer.v.values()]} == {numpy.dtype("float32")}


# ---- law 13: accumulation


def ids() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, 12), min_size=1, max_size=5)


@given(cases(dtypes=("float64",)), st.lists(st.tuples(ids(), ids()), min_size=2, max_size=6), st.integers(1, 4))
def test_law_13_accumulated_micro_batches_are_one_batch(case, pairs, size):
    """A short last one included; the micro-batches are weighted by their label tokens, which differ."""
    model = case.model()
    params = case.attach(model).parameters
    optimizer = minipeft.AdamW(lr=0.0, betas=(0.0, 0.0), weight_decay=0.0)  # changes nothing, and its m is the gradient
    history = minipeft.fit(model, params, minipeft.Batches(pairs, size), steps=1, optimizer=optimizer, clip=None,
                           accumulate=-(-len(pairs) // size), dropout=False, progress=False)
    loss, grads = minipeft.value_and_grad(lambda: model.loss(**batch_of(pairs)), params)
    assert close(numpy.array(history.losses[0]), numpy.array(loss), case.u)
    assert close_gradients(optimizer.m, grads, case.u) is None
