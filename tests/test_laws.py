"""The laws of the house, over all families of methods, both kinds of model and both dtypes, variants and seeds drawn.

    2 transparency, 3 merge, 6 names, 7 round trip, 9 fused = definition, 12 dtype, 13 accumulation: here.
    1 definition, 3 slot by slot, 10 rank: test_laws_lora.py (LoRA), test_laws_exact.py (LoRA and deltas, on Fractions);
      of prompts, the extended vocabulary: methods/test_prompt.py; of adapters, by hand: methods/test_bottleneck.py.
    4 undo: test_laws_undo.py.    5 masking: test_laws_masking.py.    8 swap and mixed batches: test_laws_routing.py.
    11 backends: test_backend.py.    1, 2, 3, 5, 8, 13 as equalities, on Fractions: test_laws_exact.py.

Tolerances are derived in bounds.py; where nothing moves in mathematics, bits are compared. Each law is met by at least
100 examples for each of the first four families on every kind of model. The others take half of the grid.
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
from minipeft import laws
from minipeft.engine import ops
from minipeft.nn import layers
from minipeft.engine.ops import definitions, fused
from minipeft.laws.bounds import close, close_gradients
from minipeft.laws.models import FAMILIES
from minipeft.laws.values import _ops_run
from tests.methods_under_test import (HALF, METHODS, ON_STREAMS, ON_WEIGHTS, OPAQUE, VARIANTS, WHOLE, Variant, each,
                                      fits, share, variants)
from tests.models_under_test import bits, logits, same_values


# ---- law 2: attaching changes nothing


@each(*(family for family in METHODS if family not in OPAQUE))
@HALF
@given(st.data())
def test_law_2_attaching_changes_no_output_value_at_initialization(method, kind, dtype, data):
    """Prompts excepted: they are read. Of adapters that start near the identity the law asks that they say so."""
    case = data.draw(variants(method, kind, dtype))
    model = case.model()
    chosen = case.make(model)
    if method == "Bottleneck":
        assert chosen.transparent == (not case.variant.endswith("bert"))
    if method == "LoRA":
        inits = ["gaussian", "kaiming", "orthogonal", *(["pissa"] if chosen.enable is None else [])]
        chosen = dataclasses.replace(chosen, init=data.draw(st.sampled_from(inits)), dropout=0.5)
    laws.transparency(chosen, model, case.seed)


@each(*OPAQUE)
@HALF
@given(st.data())
def test_a_prompt_is_read_from_the_start_and_gone_when_it_is_unplugged(method, kind, dtype, data):
    """In a forward, in the loss and in generation (where a peer forgets to switch it off)."""
    case = data.draw(variants(method, kind, dtype))
    model = case.model()
    chosen = case.make(model)
    assert not chosen.transparent
    laws.transparency(chosen, model, case.seed)


# ---- law 3: merged = unmerged


@each(*ON_WEIGHTS)
@HALF
@given(st.data())
def test_law_3_a_merged_model_computes_what_the_unmerged_one_does(method, kind, dtype, data):
    """Alone, and below a LoRA on the same weight; stacked, two that act on some of the same weights."""
    case, stacked = data.draw(variants(method, kind, dtype)), data.draw(st.booleans())
    model = case.model()
    if not stacked:
        laws.merge(case.make(model), model, case.seed)
        return
    batch = case.batch()
    base = logits(model, batch)
    attachments = [case.attach(model), case.attach(model, "upper", 3, ("LoRA", "every linear"))]
    before, loss = logits(model, batch), model.loss(**batch).data
    assert not close(before, base, case.u), "this attachment does nothing: the law would hold for any merge"
    for attachment in attachments:
        attachment.merge()
    assert close(logits(model, batch), before, case.u)
    assert close(model.loss(**batch).data, loss, case.u)


@each(*ON_STREAMS)
@share(10)
@given(st.data())
def test_law_3_what_no_weight_can_absorb_is_not_merged_and_nothing_changes(method, kind, dtype, data):
    case = data.draw(variants(method, kind, dtype))
    model = case.model()
    with pytest.raises(laws.DoesNotApply, match="refuses to be merged"):
        laws.merge(case.make(model), model, case.seed)
    with pytest.raises(ValueError, match="cannot be merged: at .* it acts on hidden states"):
        case.attach(model).merge()


@each(*ON_WEIGHTS, dtypes=("float64",))
@share(20)
@given(st.data())
def test_law_3_a_merged_model_runs_the_ops_of_the_base_and_no_other(method, kind, dtype, data):
    """Which is what "no cost at inference" means: the same ops on the same shapes, in the same order."""
    case = data.draw(variants(method, kind, dtype))
    model, batch = case.model(), case.batch()

    base = _ops_run(model, batch)
    attachment = case.attach(model)
    plugged = _ops_run(model, batch)
    assert len(plugged) >= len(base) and plugged != base
    attachment.merge()
    ops = _ops_run(model, batch)
    if case.variant == "added biases":  # the base adds none: a merged one is one more addition
        assert len(ops) == len(base) + len(attachment.places)
        ops, base = ([found for found in run if found[0] != "add"] for run in (ops, base))
    assert ops == base


# ---- law 6: names


@each()
@HALF
@given(st.data(), st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True))
def test_law_6_attaching_changes_no_base_name_and_no_base_object(method, kind, dtype, data, name):
    case = data.draw(variants(method, kind, dtype))
    model = case.model()
    before, arrays = dict(model.base_parameters), bits(model.state())
    objects = [(place, getattr(place, "base", None)) for _, place in model.named_places()]
    attachment = case.attach(model, name)
    assert list(model.base_parameters) == list(before)
    assert all(model.base_parameters[n] is before[n] for n in before)
    assert all(place is old and getattr(place, "base", None) is base
               for (_, place), (old, base) in zip(model.named_places(), objects, strict=True))
    assert bits(model.state()) == arrays
    places = {n.partition("@")[0] for n in attachment.parameters}  # or the name under which places share an array
    assert all(f"@{name}." in n for n in attachment.parameters)
    held = {id(p) for piece in attachment.at.values() for p in piece.arrays.values()}
    assert held == {id(p) for p in attachment.arrays.values()}
    assert list(minipeft.select(model, ".")) == [*before, *attachment.parameters]
    found = dict(model.named_places())
    assert all(found[where] is place for where, place in attachment.places.items()) and places


# ---- law 7: round trip through a file


@each()
@HALF
@given(st.data())
def test_law_7_what_is_loaded_is_what_was_saved(method, kind, dtype, data):
    case, into_itself = data.draw(variants(method, kind, dtype)), data.draw(st.booleans())
    state = data.draw(st.sampled_from(["off", "plugged", "merged"] if case.is_weight else ["off", "plugged"]))
    model, batch = case.model(), case.batch()
    attachment = case.attach(model, "mine")
    own, result = bits(attachment.tensors), logits(model, batch)
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
    assert bits(loaded.tensors) == own
    assert dataclasses.replace(loaded.method, where="") == dataclasses.replace(attachment.method, where="")
    assert same_values(logits(target, batch), result)


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


@each(dtypes=("float64",))
@WHOLE
@given(st.data(), st.booleans())
def test_law_9_a_whole_model_of_fused_ops_is_the_model_of_definitions(method, kind, dtype, data, training):
    case = data.draw(variants(method, kind, dtype))
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
    if case.variant == "every linear":
        assert "low_rank_linear" in called
    assert close(found, wanted, case.u) and close(loss, wanted_loss, case.u)
    assert close_gradients(grads, wanted_grads, case.u) is None


# ---- law 12: float32 in, float32 out


@each(dtypes=("float32",))
@WHOLE
@given(st.data(), st.integers(1, 3))
def test_law_12_a_float32_training_step_computes_in_float32_alone(method, kind, dtype, data, accumulate):
    """Every floating input and output of every op, and every array that a VJP returns; moments and parameters too."""
    case = data.draw(variants(method, kind, dtype))
    model = case.model()
    laws.dtype_kept(case.make(model), model, case.seed + accumulate)


# ---- law 13: accumulation


@each(dtypes=("float64",))
@WHOLE
@given(st.data())
def test_law_13_accumulated_micro_batches_are_one_batch(method, kind, dtype, data):
    """A short last one included; the micro-batches are weighted by their label tokens, which differ."""
    case = data.draw(variants(method, kind, dtype))
    model = case.model()
    laws.accumulation(case.make(model), model, case.seed)


# ---- the others, as everybody can run them


@pytest.mark.parametrize("law", sorted(laws.LAWS))
@each()
@share(6)
@given(st.data())
def test_every_law_of_the_package_holds_for_every_method(law, method, kind, dtype, data):
    """The same functions that `minipeft.laws.check` runs on methods of other people."""
    case = data.draw(variants(method, kind, dtype))
    model = case.model()
    try:
        laws.LAWS[law](case.make(model), model, case.seed)
    except laws.DoesNotApply:
        pass


def test_the_check_of_a_method_runs_every_law_and_prints_a_table():
    report = laws.check(minipeft.LoRA(2, 3))
    assert report.ok and len(report.all) == 8 * len(laws.LAWS) and not report.skipped
    assert f"{'3 merge':<36}holds on 8 models" in str(report) and str(report).endswith("all laws hold")
    report.raise_for_failures()


def test_a_method_that_fits_no_model_is_not_said_to_be_right():
    report = laws.check(minipeft.LoRA(99))
    assert not report.ok and set(report.skipped) and "fits no model" in str(report)
    with pytest.raises(AssertionError, match="fits no model"):
        report.raise_for_failures()


def test_every_method_that_a_file_can_hold_is_under_these_laws():
    from minipeft.attaching.method import METHODS as known
    under = {type(case.make(case.model())) for family, found in VARIANTS.items() for variant in found
             for case in [Variant(family, variant, next(f for f in FAMILIES if fits(family, variant, f)), "float64",
                                  0)]}
    assert under == {kind for kind in known.values() if kind.__module__.startswith("minipeft.")}
