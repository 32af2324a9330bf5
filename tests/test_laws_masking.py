"""Law 5: what is selected is trained, and nothing else is computed, kept or moved.

Freezing is not computing: masking a gradient after the fact would pass the first test below and fail the third.
"""
from __future__ import annotations

import collections
import weakref
from typing import Any, Callable

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.engine.tensor import Node, _observer
from minipeft.nn.weight import Parameter
from tests.methods_under_test import HALF, Variant, each, variants
from tests.models_under_test import bits, cases

GROUPS = {"the attachment": r"@a\.", "one of its leaves": r"\.(A1?|D|b_U|d|P|K|l|b|q|w1(_a)?)$",
          "another": r"\.(B1?|U|b_D|d|P|V|l|b|q|w2(_a)?)$", "base biases and norms": r"(bias|norm\.weight)$",
          "the tables": r"^(embedding|head)\.weight$|position",
          "one matrix": r"^encoder\.0\.ff\.wo\.weight$", "all": "."}


def selections() -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(sorted(GROUPS)), min_size=1, max_size=2, unique=True)


def prepared(case: Variant, groups: list[str]) -> tuple[Any, dict, dict[str, Parameter]]:
    """The model with its attachment; everything; the selection (a T5 has no biases but norms; sinusoids are no
    table)."""
    model = case.model()
    case.attach(model)
    everything = minipeft.select(model, ".")
    return model, everything, minipeft.select(model, [GROUPS[g] for g in groups])


def step_of(model: Any, case: Variant) -> Callable:
    """The loss in training mode: the same masks at every call."""
    batch = case.batch()
    return lambda: model.loss(**batch, rng=numpy.random.default_rng(case.seed))


@each()
@HALF
@given(st.data(), selections())
def test_law_5_gradients_are_those_of_the_selection_and_bit_equal_to_the_full_ones(method, kind, dtype, data, groups):
    case = data.draw(variants(method, kind, dtype))
    model, everything, selected = prepared(case, groups)
    full_loss, full = minipeft.value_and_grad(step_of(model, case), everything)
    loss, grads = minipeft.value_and_grad(step_of(model, case), selected)
    assert list(grads) == list(selected) and loss == full_loss
    assert bits(grads) == bits({name: full[name] for name in selected})
    assert all(grads[name].shape == p.shape and grads[name].dtype == p.dtype for name, p in selected.items())


@each()
@HALF
@given(st.data(), selections(), st.integers(1, 3))
def test_law_5_steps_with_momentum_and_decay_move_the_selection_and_no_other_bit(method, kind, dtype, data, groups,
                                                                                 steps):
    case = data.draw(variants(method, kind, dtype))
    model, everything, selected = prepared(case, groups)
    before = bits(everything)
    optimizer = minipeft.AdamW(lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.step(selected, minipeft.value_and_grad(step_of(model, case), selected)[1])
    after = bits(everything)
    assert all(after[name] == before[name] for name in everything if name not in selected)
    assert all(after[name] != before[name] for name in selected)
    assert set(optimizer.m) == set(optimizer.v) == set(optimizer.steps) == set(selected)
    assert set(optimizer.steps.values()) == {steps}


@each()
@HALF
@given(st.data(), selections())
def test_law_5_a_gradient_is_evaluated_once_per_use_of_a_selected_parameter_and_never_otherwise(method, kind, dtype,
                                                                                                data, groups):
    """The VJPs of all other inputs are gone when the forward is over: they could not be evaluated if one tried."""
    case = data.draw(variants(method, kind, dtype))
    model, everything, selected = prepared(case, groups)
    by_id = {id(p): name for name, p in everything.items()}
    uses: collections.Counter = collections.Counter()
    evaluated: collections.Counter = collections.Counter()  # VJPs that gave a gradient to a leaf, by the leaf's name
    dropped: list[weakref.ref] = []

    def counted(parent: Node, vjp: Callable) -> Callable:
        def run(g: numpy.ndarray) -> numpy.ndarray:
            evaluated[parent.op] += 1
            return vjp(g)
        return vjp if parent.edges else run

    def observe(forward: Any, inputs: Any, out: Any, vjps: Any, node: Node | None) -> None:
        kept = {id(vjp) for _, vjp in node.edges} if node is not None else set()
        uses.update(by_id[id(x)] for x, vjp in zip(inputs, vjps) if id(x) in by_id and vjp is not None)
        dropped.extend(weakref.ref(vjp) for vjp in vjps if vjp is not None and id(vjp) not in kept)
        if node is not None:
            node.edges = [(parent, counted(parent, vjp)) for parent, vjp in node.edges]

    alive = []

    def step() -> Any:
        loss = step_of(model, case)()
        alive.extend(ref for ref in dropped if ref() is not None)
        return loss

    token = _observer.set(observe)
    try:
        minipeft.value_and_grad(step, selected)
    finally:
        _observer.reset(token)
    assert evaluated == {name: uses[name] for name in selected}
    assert all(uses[name] >= 1 for name in everything)
    assert not alive and (dropped or set(selected) == set(everything))


@given(cases(places=[("t5 v1.0", "embedding"), ("post-LN", "embedding")]))
def test_law_5_a_tied_table_is_used_three_times_and_has_three_gradients_summed_into_one(case):
    model = case.model()
    case.attach(model)
    selected = minipeft.select(model, GROUPS["the tables"])
    count: collections.Counter = collections.Counter()

    def observe(forward: Any, inputs: Any, out: Any, vjps: Any, node: Node | None) -> None:
        name = forward.__name__
        count[name] += any(x is model.embedding.weight.base for x in inputs)

    token = _observer.set(observe)
    try:
        _, grads = minipeft.value_and_grad(lambda: model.loss(**case.batch()), selected)
    finally:
        _observer.reset(token)
    assert +count == {"embedding": 2, "linear": 1}
    assert set(grads) == set(selected) and "head.weight" not in selected


@given(cases(), st.sampled_from(["base", "adapter"]))
def test_what_is_merged_cannot_be_selected_and_says_so(case, which):
    model = case.model()
    attachment = case.attach(model)
    attachment.merge()
    place = list(attachment.places)[0]
    with pytest.raises(ValueError, match=r"'lora' is merged: unmerge first"):
        minipeft.select(model, f"^{place}$" if which == "base" else f"^{place}@lora.A$")
    attachment.unmerge()
    assert list(minipeft.select(model, f"^{place}")) == [place, f"{place}@lora.A", f"{place}@lora.B"]
