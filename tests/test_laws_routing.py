"""Law 8: swapping attachments restores every bit, and each row of a mixed-task batch is that row run alone.

Three attachments of different families share a model; among them are prompts of different lengths.

Rows of a batch and a row alone go through BLAS in matrices of another height, whose sums may be ordered otherwise:
bits are compared where the shapes agree, and bounds (bounds.py) where they do not.
"""
from __future__ import annotations

import dataclasses
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.engine.tensor import _observer
from minipeft.nn.routing import _view
from minipeft.laws.bounds import close, close_gradients
from tests.methods_under_test import HALF, Variant, each, share, variants
from tests.models_under_test import bits, logits, same_values

ENTRIES = [None, "a", "b", ("a", "b"), ("b", "a"), ()]
PARTNERS = {  # of each method: b and c, of other families
    "LoRA": (("Bottleneck", "houlsby, cross"), ("PromptTuning", "2")),
    "Bottleneck": (("Selective", "embedding"), ("PromptTuning", "3 tokens")),
    "Selective": (("PromptTuning", "3 tokens"), ("LoRA", "every linear")),
    "Relatives": (("Selective", "norms"), ("LoRA", "every linear")),
    "Zoo": (("Bottleneck", "houlsby"), ("LoRA", "every linear")),
    "PromptTuning": (("LoRA", "mixture"), ("PromptTuning", "2")),
    "PrefixTuning": (("PromptTuning", "2 next to the text"), ("PrefixTuning", "3"))}
FEW = Variant("LoRA", "q and v", "t5 v1.0", "float64", 0)


def with_three(case: Variant) -> Any:
    """Attachments a (the case's method), b and c (its partners), all of them off."""
    model = case.model()
    for at, (name, variant) in enumerate(zip("abc", (None, *PARTNERS[case.method])), 2):
        case.attach(model, name, at, variant).unplug()
    return model


def alone(model: Any, names: Any, run: Any) -> Any:
    """run() with just these plugged, in this order."""
    for name in names:
        model.attachments[name].plug()
    try:
        return run()
    finally:
        for name in names:
            model.attachments[name].unplug()


@each()
@HALF
@given(st.data())
def test_law_8_swapping_a_b_a_gives_the_bits_of_a_again(method, kind, dtype, data):
    case = data.draw(variants(method, kind, dtype))
    model, batch = with_three(case), case.batch()
    base = logits(model, batch)
    first, second, third = (alone(model, name, lambda: logits(model, batch)) for name in "aba")
    assert first.tobytes() == third.tobytes() and not same_values(first, second)
    assert logits(model, batch).tobytes() == base.tobytes()
    other = case.model()
    case.attach(other, "b", 3, PARTNERS[method][0])
    assert second.tobytes() == logits(other, batch).tobytes(), "a left something behind"


@each()
@HALF
@given(st.data(), st.sampled_from(["a", "b", ("a", "b"), ("b", "a")]), st.sampled_from(["off", "plugged", "merged"]))
def test_law_8_a_name_means_that_attachment_on_all_rows_whatever_is_plugged(method, kind, dtype, data, names, state):
    case = data.draw(variants(method, kind, dtype))
    model, batch = with_three(case), case.batch()
    if method != "Selective" and state == "merged":  # c can be merged there alone
        state = "plugged"
    wanted = alone(model, names, lambda: logits(model, batch))
    said = alone(model, names, lambda: model.generate(batch["input_ids"], max_new_tokens=4))
    base = logits(model, batch)
    if state != "off":
        model.attachments["c"].plug()
    if state == "merged":
        model.attachments["c"].merge()
    plugged = logits(model, batch)
    assert logits(model, batch, adapter=names).tobytes() == wanted.tobytes()
    assert model.generate(batch["input_ids"], max_new_tokens=4, adapter=names).tolist() == said.tolist()
    assert logits(model, batch, adapter=[names] * len(batch["labels"])).tobytes() == wanted.tobytes()
    assert logits(model, batch, adapter=[None] * len(batch["labels"])).tobytes() == base.tobytes()
    assert logits(model, batch, adapter=None).tobytes() == plugged.tobytes()
    assert same_values(plugged, base) == (state == "off")


@each()
@HALF
@given(st.data(), st.lists(st.sampled_from(ENTRIES), min_size=2, max_size=3), st.booleans())
def test_law_8_each_row_of_a_mixed_batch_is_that_row_alone(method, kind, dtype, data, routing, plugged):
    """In logits, encoder states (what a prompt adds stands on their left), loss and all gradients."""
    case = data.draw(variants(method, kind, dtype))
    model, batch = with_three(case), case.batch(len(routing))
    if plugged:
        model.attachments["c"].plug()
    params = {**model.base_parameters, **model.attachments["a"].parameters, **model.attachments["b"].parameters}
    run = {"ids": batch["input_ids"], "mask": batch["attention_mask"]}
    mixed, states = logits(model, batch, adapter=routing), model.encode(*run.values(), adapter=routing).data
    loss, grads = minipeft.value_and_grad(lambda: model.loss(**batch, adapter=routing), params, "zeros")
    tokens, total, summed = 0, 0.0, {name: numpy.zeros_like(g) for name, g in grads.items()}
    rows_alone = []
    for i, entry in enumerate(routing):
        row = {key: value[i:i + 1] for key, value in batch.items()}
        rows_alone.append(logits(model, row, adapter=[entry]))
        state = model.encode(run["ids"][i:i + 1], run["mask"][i:i + 1], adapter=[entry]).data
        assert close(states[i:i + 1, -state.shape[1]:], state, case.u), f"encoder, row {i}"
        n = int((row["labels"] != -100).sum())
        row_loss, row_grads = minipeft.value_and_grad(lambda: model.loss(**row, adapter=[entry]), params, "zeros")
        tokens, total = tokens + n, total + n * row_loss
        for name, g in row_grads.items():
            summed[name] += n * g
    assert close(mixed, numpy.concatenate(rows_alone), case.u)
    assert abs(loss - total / tokens) <= 9007 * case.u * abs(loss)
    assert close_gradients(grads, {name: g / tokens for name, g in summed.items()}, case.u) is None


@each(dtypes=("float64",))
@HALF
@given(st.data(), st.lists(st.sampled_from(ENTRIES), min_size=2, max_size=3), st.booleans())
def test_law_8_each_row_of_a_mixed_batch_is_generated_as_if_alone(method, kind, dtype, data, routing, use_cache):
    """float64: the same ids, because no two tokens are within 1e-12 of each other."""
    case = data.draw(variants(method, kind, dtype))
    model, ids = with_three(case), case.batch(len(routing))["input_ids"]
    together = model.generate(ids, max_new_tokens=5, adapter=routing, use_cache=use_cache)
    for i, entry in enumerate(routing):
        row = model.generate(ids[i:i + 1], max_new_tokens=5, adapter=entry or [None], use_cache=use_cache)[0]
        assert together[i, :len(row)].tolist() == row.tolist() and not together[i, len(row):].any()


@each(dtypes=("float64",))
@HALF
@given(st.data(), st.permutations(range(4)))
def test_law_8_a_permuted_batch_is_the_batch_permuted_with_its_routing(method, kind, dtype, data, order):
    case = data.draw(variants(method, kind, dtype))
    model, batch, routing = with_three(case), case.batch(4), ["a", None, ("b", "a"), "b"]
    moved = {key: value[list(order)] for key, value in batch.items()}
    assert close(logits(model, moved, adapter=[routing[i] for i in order]),
                 logits(model, batch, adapter=routing)[list(order)], case.u)


@pytest.mark.parametrize("adapter, expected", [
    ("d", "'d' is not attached to this model; attached: a, b, c"), (["a", "d", None, None], "'d' is not attached"),
    (["a"], "lists 1 entries for a batch of 4 rows"), ([None] * 5, "lists 5 entries for a batch of 4 rows"),
    ([], "lists 0 entries"), (("a", "a"), "names one attachment twice"), ([("b", "b"), None, None, None], "twice")])
def test_a_bad_routing_raises_before_anything_is_computed_and_is_not_remembered(adapter, expected):
    model, batch = with_three(FEW), FEW.batch()
    ids, before = batch["input_ids"], bits({"base": logits(model, batch)})
    for call in (lambda: model(ids, ids, adapter=adapter), lambda: model.encode(ids, adapter=adapter),
                 lambda: model.loss(**batch, adapter=adapter), lambda: model.generate(ids, adapter=adapter)):
        computed: list[str] = []
        token = _observer.set(lambda forward, *_: computed.append(forward.__name__))
        try:
            with pytest.raises(ValueError, match=expected):
                call()
        finally:
            _observer.reset(token)
        assert _view.get() is None and not computed
    assert bits({"base": logits(model, batch)}) == before


def test_a_routing_ends_with_the_call_even_when_the_call_fails():
    model = with_three(dataclasses.replace(FEW, family="pre-LN"))
    with pytest.raises(ValueError, match="table of learned positions ends at 11"):
        model(numpy.ones((2, 3), int), numpy.ones((2, 13), int), adapter=["a", "b"])
    assert _view.get() is None


def test_a_removed_attachment_can_no_longer_be_routed_to():
    model = with_three(dataclasses.replace(FEW, family="post-LN"))
    model.attachments["b"].remove()
    with pytest.raises(ValueError, match="'b' is not attached to this model; attached: a, c"):
        model.encode([[1, 2]], adapter="b")


@each(dtypes=("float64",))
@share(20)
@given(st.data())
def test_only_what_the_rows_are_routed_to_has_a_gradient(method, kind, dtype, data):
    case = data.draw(variants(method, kind, dtype))
    model, batch = with_three(case), case.batch(2)
    model.attachments["c"].plug()
    params = {n: p for name in "abc" for n, p in model.attachments[name].parameters.items()}
    _, grads = minipeft.value_and_grad(lambda: model.loss(**batch, adapter=["a", None]), params, "zeros")
    assert {name.split("@")[1][0] for name, g in grads.items() if g.any()} == {"a"}
