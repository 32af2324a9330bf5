"""Padding changes nothing: a row gives the logits that it gives alone, wherever in a wider batch it stands.

    positions of a row start at its first real token; padding on the left takes none, a hole in the mask keeps its place

Padded keys have a probability of exactly 0, so only the order of sums may differ: the bound is that of a whole model
(`minipeft.laws.bounds`). The one exception is stated: a prompt in front of the padding, as PEFT has it.
"""
from __future__ import annotations

import dataclasses
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.laws.bounds import close
from tests.methods_under_test import Variant, share
from tests.models_under_test import FAMILIES, VOCAB, Case

WIDEST = 9  # with a prompt of two in front, still within the twelve learned positions
ATTACHED: dict[str, tuple[str, str] | None] = {
    "nothing": None, "LoRA": ("LoRA", "mixture"), "Bottleneck": ("Bottleneck", "houlsby, cross"),
    "Selective": ("Selective", "attention, last layer"), "PromptTuning": ("PromptTuning", "2 next to the text"),
    "PrefixTuning": ("PrefixTuning", "2 earlier")}
every_model = pytest.mark.parametrize("attached, family, dtype", [
    pytest.param(attached, family, dtype, id=f"{attached}-{family}-{dtype}")
    for attached in ATTACHED for family in FAMILIES for dtype in ("float64", "float32")])


def built(attached: str, family: str, dtype: str, seed: int) -> Any:
    """The model, with what is attached as it might be after training."""
    chosen = ATTACHED[attached]
    if chosen is None:
        return Case((family, "q and v"), 1, 1, dtype, seed).model()
    variant = Variant(*chosen, family, dtype, seed)
    model = variant.model()
    variant.attach(model)
    return model


@dataclasses.dataclass
class Rows:
    """Sequences of different lengths, and where each stands in a rectangle: its first column."""

    rows: list[numpy.ndarray]
    width: int
    starts: list[int]

    def padded(self, rng: numpy.random.Generator) -> tuple[numpy.ndarray, numpy.ndarray]:
        """ids [batch, width], any tokens where nothing is; mask."""
        ids, mask = rng.integers(0, VOCAB, (len(self.rows), self.width)), numpy.zeros((len(self.rows), self.width), int)
        for i, (row, start) in enumerate(zip(self.rows, self.starts)):
            ids[i, start:start + len(row)], mask[i, start:start + len(row)] = row, 1
        return ids, mask

    def of(self, i: int) -> slice:
        return slice(self.starts[i], self.starts[i] + len(self.rows[i]))


@st.composite
def rows_of(draw: Any, count: int, rng: numpy.random.Generator) -> Rows:
    lengths = draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    width = draw(st.integers(max(lengths), WIDEST))
    return Rows([rng.integers(1, VOCAB, n) for n in lengths], width,
                [draw(st.integers(0, width - n)) for n in lengths])


@every_model
@share(30)
@given(data=st.data(), seed=st.integers(0, 999))
def test_a_row_gives_the_logits_that_it_gives_alone_wherever_it_stands_in_encoder_and_decoder(
        attached, family, dtype, data, seed):
    model, rng = built(attached, family, dtype, seed), numpy.random.default_rng(seed)
    count = data.draw(st.integers(1, 3))
    source, target = data.draw(rows_of(count, rng)), data.draw(rows_of(count, rng))
    (ids, mask), (target_ids, target_mask) = source.padded(rng), target.padded(rng)
    found = model(ids, target_ids, mask, target_mask).data
    for i in range(count):
        alone = model(source.rows[i][None], target.rows[i][None]).data
        assert close(found[i, target.of(i)][None], alone, numpy.finfo(dtype).eps / 2)


@pytest.mark.parametrize("attached", ATTACHED)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_generated_does_not_depend_on_where_a_row_stands(attached, family):
    model, rng = built(attached, family, "float64", 5), numpy.random.default_rng(5)
    source = Rows([rng.integers(2, VOCAB, n) for n in (3, 5, 1)], 7, [4, 1, 2])
    ids, mask = source.padded(rng)
    for use_cache in (True, False):
        found = model.generate(ids, mask, 5, use_cache=use_cache)
        for i, row in enumerate(source.rows):
            alone = model.generate(row[None], numpy.ones((1, len(row)), int), 5, use_cache=use_cache)
            assert found[i, :alone.shape[1]].tolist() == alone[0].tolist()


@every_model
@given(seed=st.integers(0, 999))
@share(10)
def test_a_hole_in_the_mask_keeps_its_place_with_padding_in_front_and_without(attached, family, dtype, seed):
    """What stands in the hole does not matter, and the tokens behind it do not move up."""
    model, rng, u = built(attached, family, dtype, seed), numpy.random.default_rng(seed), numpy.finfo(dtype).eps / 2
    ids, target = rng.integers(1, VOCAB, (1, 6)), rng.integers(1, VOCAB, (1, 4))
    mask = numpy.array([[1, 1, 0, 0, 1, 1]])
    wanted = model(ids, target, mask).data
    other = numpy.where(mask, ids, rng.integers(1, VOCAB, (1, 6)))
    assert close(model(other, target, mask).data, wanted, u)
    padded = [numpy.pad(x, ((0, 0), (3, 0))) for x in (ids, mask)]
    assert close(model(padded[0], target, padded[1]).data, wanted, u)
    without = model(ids[:, mask[0] == 1], target).data
    assert abs(without - wanted).max() > 100 * u * abs(wanted).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_front_of_the_padding_is_the_exception_and_on_the_right_it_is_none(family):
    """PromptTuning(next_to_text=False), PEFT's way: its distance to the text grows with the padding."""
    model = Case((family, "q and v"), 1, 1, "float64", 3).model()
    minipeft.attach(model, minipeft.PromptTuning(2), numpy.random.default_rng(1))
    ids, target = numpy.array([[5, 6, 7, 2]]), numpy.array([[0, 7, 4]])
    wanted = model(ids, target).data
    sides = {side: model(numpy.pad(ids, ((0, 0), pads)), target, numpy.pad(numpy.ones_like(ids), ((0, 0), pads))).data
             for side, pads in {"right": (0, 3), "left": (3, 0)}.items()}
    assert close(sides["right"], wanted, 2 ** -53)
    assert abs(sides["left"] - wanted).max() > 1e-3 * abs(wanted).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_mixed_batch_that_are_filled_up_for_longer_prompts_are_themselves(family):
    """The filling is padding on the left like any other, before and behind padding of their own."""
    model = Case((family, "q and v"), 1, 1, "float64", 3).model()
    minipeft.attach(model, minipeft.PromptTuning(3, next_to_text=True), numpy.random.default_rng(1), "p")
    ids, mask = numpy.array([[0, 0, 5, 6], [3, 4, 0, 0], [0, 7, 8, 0]]), numpy.array(
        [[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]])
    target = numpy.array([[0, 7], [0, 4], [0, 9]])
    adapters = [None, "p", None]
    found = model(ids, target, mask, adapter=adapters).data
    for i, name in enumerate(adapters):
        alone = model(ids[i][mask[i] == 1][None], target[i:i + 1], adapter=() if name is None else name).data
        assert close(found[i:i + 1], alone, 2 ** -53)
