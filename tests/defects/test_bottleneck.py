"""Defects of other libraries in bottleneck adapters."""
from __future__ import annotations

import numpy
import pytest

import minipeft
from minipeft.laws.bounds import close
from minipeft.methods.bottleneck import PLACEMENTS
from tests.methods.test_bottleneck import model_of, trained
from tests.models_under_test import FAMILIES, logits, same_values

U, RNG = 2.0 ** -53, numpy.random.default_rng


def batch_of(rows: int, source: int, target: int) -> dict[str, numpy.ndarray]:
    rng = RNG([rows, source, target])
    mask = numpy.ones((rows, source), int)
    mask[0, 1:2] = 0
    return {"input_ids": rng.integers(2, 13, (rows, source)), "attention_mask": mask,
            "labels": rng.integers(2, 13, (rows, target))}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_A4_attaching_is_the_identity_by_default(family, placement):
    """Of every bit of the logits. AdapterHub's default, init="bert", is not, and says so."""
    model, batch = model_of(family), batch_of(3, 6, 4)
    before = logits(model, batch)
    attachment = minipeft.attach(model, minipeft.Bottleneck(placement, cross=True), RNG(0))
    assert attachment.method.transparent and same_values(logits(model, batch), before)
    attachment.remove()
    theirs = minipeft.attach(model, minipeft.Bottleneck(placement, init="bert"), RNG(0))
    assert not theirs.method.transparent and not same_values(logits(model, batch), before)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_A4_cross_puts_an_adapter_after_every_cross_attention_and_trains_it(placement):
    model, batch = model_of("t5 v1.1"), batch_of(3, 6, 4)
    places = minipeft.Bottleneck(placement, cross=True).places(model)
    added = [name for name in places if name not in minipeft.Bottleneck(placement).places(model)]
    assert added == [f"decoder.{i}.cross.out" for i in range(model.config.num_decoder_layers)]
    attachment = trained(model, minipeft.Bottleneck(placement, size=5, cross=True))
    _, grads = minipeft.value_and_grad(lambda: model.loss(**batch), attachment.parameters)
    assert all(g.any() for name, g in grads.items() if ".cross." in name)


@pytest.mark.parametrize("rows, source, target", [(1, 1, 1), (1, 7, 2), (2, 3, 9), (5, 6, 4)])
def test_A5_a_parallel_adapter_works_beside_a_lora_on_t5_in_every_shape_and_for_every_row(rows, source, target):
    """Plugged together in either order, trained together, and chosen row by row; in a forward and in generation."""
    model, batch = model_of("t5 v1.1"), batch_of(rows, source, target)
    base = logits(model, batch)
    trained(model, minipeft.LoRA(2, where=r"\.(q|v|wo)\.weight$"), "lora", 1)
    trained(model, minipeft.Bottleneck("par_bn", cross=True), "par", 2)
    both = logits(model, batch)
    assert both.shape == (rows, target, 13) and not close(both, base, 2.0 ** -30)
    assert close(logits(model, batch, adapter=("par", "lora")), both, U), "one acts on weights, one on the stream"
    params = model.attachments["lora"].parameters | model.attachments["par"].parameters
    _, grads = minipeft.value_and_grad(lambda: model.loss(**batch), params)
    assert set(grads) == set(params) and all(g.shape == params[name].shape for name, g in grads.items())
    routing = [("lora", "par"), "par", None, "lora", "par"][:rows]
    mixed = logits(model, batch, adapter=routing)
    said = model.generate(batch["input_ids"], batch["attention_mask"], 4, routing, num_beams=2)
    for i, entry in enumerate(routing):
        row = {key: value[i:i + 1] for key, value in batch.items()}
        assert close(mixed[i:i + 1], logits(model, row, adapter=[entry]), U)
        alone = model.generate(row["input_ids"], row["attention_mask"], 4, [entry], num_beams=2)[0]
        assert numpy.array_equal(said[i, :len(alone)], alone)
