"""Where a prompt stands in a row that is padded on the left: in front of the padding, or next to the text."""
import dataclasses
import json

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.files import read_tensors, write_tensors
from minipeft.nn.fingerprint import fingerprint
from tests.adapters import write_signed
from minipeft.laws.bounds import close, close_gradients
from tests.models_under_test import FAMILIES, VOCAB, bits, logits, same_values
from tests.methods.test_prompt import NAME, RNG, U, case_of, longer, loss_of_logits, padded, vectors

every_family = pytest.mark.parametrize("family", FAMILIES)


def prompted(model, length, next_to_text=True, name="prompt"):
    method = minipeft.PromptTuning(length, "random", next_to_text=next_to_text)
    attachment = minipeft.attach(model, method, RNG(0), name)
    vectors(attachment)[:] = RNG(length).standard_normal(vectors(attachment).shape)
    return attachment


def between(batch, length):
    """The batch with the new ids between padding and text, row by row."""
    ids, mask = [], []
    for row, seen in zip(batch["input_ids"], batch["attention_mask"]):
        first = int(numpy.flatnonzero(seen)[0])
        ids.append([*row[:first], *range(VOCAB, VOCAB + length), *row[first:]])
        mask.append([*seen[:first], *[1] * length, *seen[first:]])
    return {**batch, "input_ids": numpy.array(ids), "attention_mask": numpy.array(mask)}


@given(st.sampled_from(list(FAMILIES)), st.integers(0, 99), st.sampled_from([1, 2, 3]),
       st.sampled_from(["left", "right"]))
def test_it_is_the_base_on_a_longer_vocabulary_with_the_prompt_between_padding_and_text(family, seed, length, side):
    case = case_of(family, seed)
    model, batch = case.model(), padded(case, side)
    twin, _ = longer(model, vectors(prompted(model, length)))
    extended = between(batch, length)
    assert close(logits(model, batch), logits(twin, extended)[..., :VOCAB], U)
    found, wanted = (m.encode(b["input_ids"], b["attention_mask"]).data
                     for m, b in ((model, batch), (twin, extended)))
    assert close(found, wanted, U)


@every_family
def test_its_gradient_is_that_of_the_longer_tables_rows_and_of_central_differences(family):
    case = case_of(family)
    model, batch, length = case.model(), padded(case, "left"), 3
    attachment = prompted(model, length)
    twin, factor = longer(model, vectors(attachment))
    g = RNG(1).standard_normal((4, 7, VOCAB))
    _, found = minipeft.value_and_grad(lambda: loss_of_logits(model, batch, g), attachment.parameters)
    _, wanted = minipeft.value_and_grad(lambda: loss_of_logits(twin, between(batch, length), g),
                                        minipeft.select(twin, "^embedding"))
    assert close_gradients(found, {NAME: wanted["embedding.weight"][VOCAB:] / factor}, U) is None
    params = attachment.parameters | minipeft.select(model, "^embedding")
    assert minipeft.check_gradients(lambda: model.loss(**batch), params, RNG(0)) <= 1


@pytest.mark.parametrize("family", ["t5 v1.0", "t5 v1.1"])
def test_with_relative_positions_the_side_of_the_padding_changes_nothing(family):
    """Which is what it is for: in front of the padding, the default and PEFT's place, it does change the result."""
    case = case_of(family)
    right, left = padded(case, "right"), padded(case, "left")
    for i, n in enumerate((6, 4, 1, 3)):
        left["input_ids"][i, 6 - n:] = right["input_ids"][i, :n]
    for next_to_text in (True, False):
        model = case.model()
        prompted(model, 2, next_to_text)
        assert close(logits(model, left), logits(model, right), U) == next_to_text


@every_family
@pytest.mark.parametrize("side", ["right", "none", "no mask"])
def test_without_padding_on_the_left_both_places_are_one_bit_for_bit(family, side):
    case = case_of(family)
    batch = padded(case, "right")
    batch |= {} if side == "right" else {"attention_mask": None if side == "no mask" else numpy.ones((4, 6), int)}
    seen = []
    for next_to_text in (True, False):
        model = case.model()
        attachment = prompted(model, 2, next_to_text)
        _, grads = minipeft.value_and_grad(lambda: model.loss(**batch), attachment.parameters)
        seen.append((logits(model, batch).tobytes(), bits(grads)))
    assert seen[0] == seen[1]


@every_family
def test_two_prompts_stand_in_order_and_rows_of_one_batch_see_their_own(family):
    case = case_of(family)
    model, batch, rows = case.model(), padded(case, "left"), [("a", "b"), None, "a", "b"]
    both = numpy.concatenate([vectors(prompted(model, n, name=name)) for n, name in ((1, "a"), (2, "b"))][::-1])
    assert close(logits(model, batch, adapter=rows), numpy.concatenate([
        logits(model, {k: v[i:i + 1] for k, v in batch.items()}, adapter=[row]) for i, row in enumerate(rows)]), U)
    stacked = logits(model, batch, adapter=("a", "b"))
    for name in "ab":
        model.attachments[name].remove()
    vectors(prompted(model, 3))[:] = both
    assert close(stacked, logits(model, batch), U)


def test_a_file_keeps_the_place_and_one_of_version_1_from_before_there_was_a_choice_means_the_default(tmp_path):
    case = case_of("t5 v1.1", dtype="float32")
    model, batch = case.model(), padded(case, "left")
    attachment = prompted(model, 2)
    wanted = logits(model, batch)
    attachment.save(tmp_path / "new")
    attachment.remove()
    minipeft.load(model, tmp_path / "new")
    assert same_values(logits(model, batch), wanted)
    model.attachments["prompt"].remove()

    tensors, metadata = read_tensors(tmp_path / "new")
    method = json.loads(metadata["method"])
    assert method.pop("next_to_text") is True
    write_signed(tmp_path / "less", tensors, {**metadata, "method": json.dumps(method)})
    with pytest.raises(ValueError, match="PromptTuning: the field 'next_to_text' is missing"):
        minipeft.load(model, tmp_path / "less")
    method["start"] = method.pop("init")
    write_tensors(tmp_path / "old", tensors, {
        **metadata, "version": "1", "method": json.dumps(method), "base": fingerprint(model.state()), "below": "{}"})
    with pytest.warns(UserWarning, match="adapter file of version 1"):
        old = minipeft.load(model, tmp_path / "old")
    default = minipeft.PromptTuning(2, "random")
    assert dataclasses.replace(old.method, where=default.where) == default
