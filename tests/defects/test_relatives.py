"""Defects of other libraries in DoRA, (IA)^3 and biases: D11, D12, D17, D24, A2, A3."""
from __future__ import annotations

import numpy
import pytest

import minipeft
from minipeft.engine.tensor import value_and_grad
from minipeft.laws.bounds import close, close_gradients
from minipeft.laws.models import bits, logits, model_of, moved
from tests.models_under_test import Case

RNG = numpy.random.default_rng
PLACE = "encoder.0.attn.q.weight"
BATCH = Case(("t5 v1.0", "q and v"), 1, 1, "float64", 0).batch()
U = 2.0 ** -53


def attached(model, method, name="a", seed=1, std=0.2):
    return moved(minipeft.attach(model, method, RNG(seed), name), RNG(seed + 10), std)


# ---- D11, A2: DoRA


def test_D11_two_doras_have_an_order_and_merge_into_what_they_compute():
    model = model_of("post-LN", "float64", 0)
    lower, upper = (attached(model, minipeft.DoRA(2, 3), name, seed) for name, seed in (("a", 1), ("b", 2)))
    slot = model.slots[PLACE]
    V = slot.base.data
    for attachment in (lower, upper):
        piece = attachment.at[slot]
        V = V + 1.5 * piece.B.data @ piece.A.data
        V = piece.m.data * V / numpy.linalg.norm(V, axis=1, keepdims=True)
    assert abs(slot.fold().dense().data - V).max() < 1e-14, "bottom first, each on the weight that lies below it"
    both, other = (logits(model, BATCH, adapter=order) for order in (("a", "b"), ("b", "a")))
    assert abs(both - other).max() > 1e-3, "the order makes a difference"
    assert both.tobytes() == logits(model, BATCH).tobytes(), "and is that of attaching"
    lower.merge()
    upper.merge()
    assert close(logits(model, BATCH), both, U)


def test_D11_dropout_leaves_the_frozen_path_alone():
    """With B = 0, training and evaluation compute the same, bit for bit, however far m is from the norm."""
    model = model_of("t5 v1.0", "float64", 0)
    attachment = minipeft.attach(model, minipeft.DoRA(2, 3, dropout=0.5, where=f"^{PLACE}$"), RNG(0))
    slot = model.slots[PLACE]
    piece = attachment.at[slot]
    piece.m.data = 1.5 * piece.m.data
    x = RNG(1).standard_normal((3, 5, 12))
    evaluated = slot.project(x).data
    assert slot.project(x, RNG(2)).data.tobytes() == evaluated.tobytes()
    assert numpy.allclose(evaluated, 1.5 * x @ slot.base.data.T, rtol=1e-13)
    piece.B.data = RNG(3).standard_normal(piece.B.shape)
    assert abs(slot.project(x, RNG(2)).data - slot.project(x).data).max() > 0.1, "the low-rank path is dropped"


@pytest.mark.parametrize("norm", ["output", "input"])
def test_D11_a_length_of_0_is_merged_and_unmerged_without_a_trace(norm):
    model = model_of("t5 v1.1", "float32", 0)
    base, before = bits(model.state()), logits(model, BATCH).tobytes()
    attachment = attached(model, minipeft.DoRA(2, 3, norm=norm))
    for p in attachment.parameters.values():
        if 1 in p.shape:
            p.data.reshape(-1)[2:5] = 0
    plugged = logits(model, BATCH)
    attachment.merge()
    assert numpy.isfinite(plugged).all() and close(logits(model, BATCH), plugged, 2.0 ** -24)
    attachment.unmerge()
    assert logits(model, BATCH).tobytes() == plugged.tobytes()
    attachment.unplug()
    assert bits(model.state()) == base and logits(model, BATCH).tobytes() == before


def test_A2_merging_a_dora_honours_alpha_over_r_and_taking_it_off_gives_back_the_weight():
    model = model_of("t5 v1.0", "float64", 0)
    base, before = bits(model.state()), logits(model, BATCH)
    attachment = attached(model, minipeft.DoRA(4, 8, where=f"^{PLACE}$"))
    slot = model.slots[PLACE]
    piece = attachment.at[slot]
    V = slot.base.data + 2 * piece.B.data @ piece.A.data
    plugged = logits(model, BATCH)
    attachment.merge()
    merged = slot.merged[0].merged.data
    assert abs(merged - piece.m.data * V / numpy.linalg.norm(V, axis=1, keepdims=True)).max() < 1e-14
    assert close(logits(model, BATCH), plugged, U)
    attachment.unmerge()
    assert logits(model, BATCH).tobytes() == plugged.tobytes() != before.tobytes()
    attachment.remove()
    assert bits(model.state()) == base and logits(model, BATCH).tobytes() == before.tobytes()


# ---- D12, A3: (IA)^3


@pytest.mark.parametrize("family", ["t5 v1.0", "pre-LN"])
def test_D12_a_hundred_merges_and_a_factor_of_0_leave_every_bit_as_it_was(family):
    model = model_of(family, "float64", 0)
    base, before = bits(model.state()), logits(model, BATCH).tobytes()
    attachment = attached(model, minipeft.IA3(), std=0.3)
    for p in attachment.parameters.values():
        p.data[3] = 0
    own, plugged, merged = bits(attachment.tensors), logits(model, BATCH), set()
    for _ in range(100):
        attachment.merge()
        merged.add(model.slots["decoder.0.cross.k.weight"].merged[0].merged.data.tobytes())
        attachment.unmerge()
    assert len(merged) == 1 and logits(model, BATCH).tobytes() == plugged.tobytes()
    attachment.merge()
    assert close(logits(model, BATCH), plugged, U), "the bias of a key and of a value counts, too"
    attachment.unmerge()
    assert bits(attachment.tensors) == own
    attachment.unplug()
    assert bits(model.state()) == base and logits(model, BATCH).tobytes() == before


def test_A3_a_negative_factor_multiplies_after_the_activation_as_in_the_paper():
    """Before a relu the same factor gives another function; with l > 0 alone the two would agree."""
    x, outputs = RNG(0).standard_normal((2, 6, 12)), {}
    for placement, layer in (("after", "wo"), ("before", "wi")):
        for sign in (1, -1):
            model = model_of("t5 v1.0", "float64", 0)
            attachment = minipeft.attach(model, minipeft.IA3(placement), RNG(0))
            l = sign * (0.5 + RNG(1).random(17))  # noqa: E741
            attachment.parameters[f"encoder.0.ff.{layer}@ia3.l"].data = l
            ff = model.encoder.blocks[0].ff
            outputs[placement, sign] = ff(x).data
            if placement == "after":
                by_hand = (l * numpy.maximum(x @ ff.wi.weight.base.data.T, 0)) @ ff.wo.weight.base.data.T
                assert abs(ff(x).data - by_hand).max() < 1e-13 * abs(by_hand).max()
    assert abs(outputs["after", 1] - outputs["before", 1]).max() < 1e-13
    assert abs(outputs["after", -1] - outputs["before", -1]).max() > 0.1 * abs(outputs["after", -1]).max()


# ---- D17: biases


@pytest.mark.parametrize("way", ["unplug", "off", "route"])
def test_D17_with_its_trained_biases_off_the_model_is_the_base_again_bit_for_bit(way):
    model = model_of("t5 v1.1", "float64", 0)
    base, before = bits(model.state()), logits(model, BATCH).tobytes()
    attachment = minipeft.attach(model, minipeft.AddedBias(), RNG(0), "a")
    optimizer = minipeft.AdamW(1e-2)
    for _ in range(2):
        optimizer.step(attachment.parameters, value_and_grad(lambda: model.loss(**BATCH), attachment.parameters)[1])
    assert logits(model, BATCH).tobytes() != before
    if way == "route":
        found = logits(model, BATCH, adapter=[None] * 4)
    elif way == "off":
        with attachment.off():
            found = logits(model, BATCH)
    else:
        attachment.unplug()
        found = logits(model, BATCH)
    assert found.tobytes() == before and bits(model.state()) == base


# ---- D24: mixed batches


@pytest.mark.parametrize("method", [minipeft.DoRA(2, 3), minipeft.IA3(), minipeft.AddedBias()],
                         ids=lambda method: type(method).__name__)
def test_D24_rows_of_one_batch_may_use_different_adapters_in_evaluation_and_in_training(method):
    """Each row gives its own logits and gradients, also beside merged weights; and a training step trains both."""
    model = model_of("t5 v1.0", "float64", 0)
    below = attached(model, minipeft.LoRA(2, where=r"\.o\.weight$"), "below", 5)
    below.merge()
    one, two = (attached(model, method, name, seed) for name, seed in (("a", 1), ("b", 2)))
    routing = [("below", "a"), ("below", "b"), ("below",), ("below", "a", "b")]
    params = {**one.parameters, **two.parameters}
    mixed = logits(model, BATCH, adapter=routing)
    loss, grads = value_and_grad(lambda: model.loss(**BATCH, adapter=routing), params)
    tokens, summed = 0, {name: numpy.zeros_like(g) for name, g in grads.items()}
    for i, names in enumerate(routing):
        row = {key: value[i:i + 1] for key, value in BATCH.items()}
        assert close(mixed[i:i + 1], logits(model, row, adapter=[names]), U), names
        n = int((row["labels"] != -100).sum())
        if len(names) > 1:
            used = {name: p for name, p in params.items() if name.partition("@")[2][0] in names}
            for name, g in value_and_grad(lambda: model.loss(**row, adapter=[names]), used)[1].items():
                summed[name] += n * g
        tokens += n
    assert close_gradients(grads, {name: g / tokens for name, g in summed.items()}, U) is None
    trained, _ = value_and_grad(lambda: model.loss(**BATCH, adapter=routing, rng=RNG(0)), params)
    assert numpy.isfinite(trained) and trained != loss, "with dropout"
