"""Defects of other libraries in LoRA and in full copies of weights, which minipeft must not have.

D: PEFT 0.21.2. L: loralib 0.1.2. Each test has the number of its defect; `tests/planted/lora.py` plants it here."""
from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy
import pytest

import minipeft
from minipeft.files import read_tensors
from minipeft.laws.models import moved, outputs
from minipeft.methods.merged import MergedLowRank
from minipeft.methods.pissa import PrincipalLowRank
from tests.adapters import write_signed
from tests.models_under_test import Case, bits, logits, same_values

RNG = numpy.random.default_rng
TABLE = "embedding.weight"
ON_THE_TABLE = {"LoRA": minipeft.LoRA(3, 5, where="^embedding"),
                "PiSSA": minipeft.LoRA(3, 5, where="^embedding", init="pissa"),
                "full copy": minipeft.Selective(component="embedding")}
VARIANTS = {"rank by place": minipeft.LoRA(3, 5, rank_pattern={"decoder": 2}, scaling="alpha/sqrt(r)"),
            "pissa": minipeft.LoRA(3, -5, init="pissa"),
            "merged": minipeft.LoRA(2, 5, enable=(True, False, True))}


def case(family: str = "t5 v1.0", dtype: str = "float64") -> Case:
    return Case((family, "q and v"), 1, 1, dtype, 0)


def attached(method: Any, family: str = "t5 v1.0", dtype: str = "float64", name: str = "a") -> tuple[Any, Any, dict]:
    """(model, attachment with numbers as after training, batch)."""
    here = case(family, dtype)
    model = here.model()
    return model, moved(minipeft.attach(model, method, RNG(1), name), RNG(2)), here.batch()


def close(a: Any, b: Any, tolerance: float = 1e-12) -> bool:
    return a.shape == b.shape and abs(a - b).max() <= tolerance * abs(b).max()


def with_table(table: numpy.ndarray, family: str = "t5 v1.0") -> Any:
    """The same base with another shared table, and nothing attached."""
    model = case(family).model()
    model.load_state({**model.state(), TABLE: table})
    return model


@pytest.mark.parametrize("family", ["t5 v1.0", "post-LN"])
@pytest.mark.parametrize("method", ON_THE_TABLE.values(), ids=ON_THE_TABLE)
def test_D2_on_a_shared_table_it_acts_at_all_three_uses_gets_their_gradients_and_merges_to_the_same(method, family):
    """In peft it acts nowhere, gets no gradient, and merging changes the model. The reference here is a model without
    any attachment whose one table is the changed one."""
    model, attachment, batch = attached(method, family)
    slot = attachment.places[TABLE]
    plain = with_table(slot.fold().dense().data, family)
    found = logits(model, batch)
    assert not close(found, logits(case(family).model(), batch), 1e-2), "it acts"
    assert close(found, logits(plain, batch))
    assert close(model.encode(batch["input_ids"]).data, plain.encode(batch["input_ids"]).data)
    _, grads = minipeft.value_and_grad(lambda: model.loss(**batch), attachment.parameters)
    _, of_table = minipeft.value_and_grad(lambda: plain.loss(**batch), plain.base_parameters, unused="zeros")
    G, piece = of_table[TABLE], attachment.at[slot]
    wanted = {"d": G} if "d" in piece.arrays else {"A": 5 / 3 * piece.B.data.T @ G, "B": 5 / 3 * G @ piece.A.data.T}
    assert set(grads) == {f"{TABLE}@a.{leaf}" for leaf in wanted}
    assert all(close(grads[f"{TABLE}@a.{leaf}"], g, 1e-10) for leaf, g in wanted.items())
    attachment.merge()
    assert close(logits(model, batch), found)


@pytest.mark.parametrize("family", ["t5 v1.0", "post-LN"])
def test_D3_merging_an_untrained_adapter_on_a_model_with_a_tied_head_changes_no_logit(family):
    """In peft a merge beside a full copy of the head multiplies the logits of a T5 by sqrt(d_model)."""
    for method in (minipeft.LoRA(2, where=r"\.q\.weight$"), *ON_THE_TABLE.values()):
        model, batch = case(family).model(), case(family).batch()
        before = outputs(model, batch)
        attachment = minipeft.attach(model, method, RNG(0))
        attachment.merge()
        assert all(same_values(a, b) for a, b in zip(outputs(model, batch), before))


@pytest.mark.parametrize("family", ["t5 v1.0", "post-LN"])
def test_D4_a_tied_head_is_refused_by_name_and_the_callers_list_stays_as_it_was(family):
    """In peft the list becomes ["shared"], and the forward fails."""
    model, batch, asked = case(family).model(), case(family).batch(), ["head", "q"]
    before = logits(model, batch)
    for make in (lambda: minipeft.LoRA(2, where=asked), lambda: minipeft.Selective(where=asked)):
        with pytest.raises(ValueError, match="the head of this model is tied to the embedding: choose 'embedding'"):
            minipeft.attach(model, make(), RNG(0))
    with pytest.raises(ValueError, match="head"):
        minipeft.attach(model, minipeft.Selective(component="head"), RNG(0))
    assert asked == ["head", "q"] and not model.attachments and logits(model, batch).tobytes() == before.tobytes()
    chosen = ["embedding", "q"]
    minipeft.attach(model, minipeft.LoRA(2, where=chosen), RNG(0))
    assert chosen == ["embedding", "q"]


@pytest.mark.parametrize("family", ["post-LN", "pre-LN"])
def test_D17_switching_trained_biases_off_gives_back_every_bit(family):
    """In peft they stay as they were trained."""
    base = logits(case(family).model(), case(family).batch())
    model, attachment, batch = attached(minipeft.Selective(type="bias"), family)
    arrays = bits(model.state())
    assert not close(logits(model, batch), base, 1e-3)
    with attachment.off():
        assert logits(model, batch).tobytes() == base.tobytes() and bits(model.state()) == arrays
    attachment.unplug()
    assert logits(model, batch).tobytes() == base.tobytes()
    assert arrays == bits(case(family).model().state())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_D18_pissa_off_is_the_original_model_and_its_file_is_valid_on_it(dtype, tmp_path):
    """In peft the base itself is changed, so an adapter fits that base alone, and float64 is refused."""
    base, original = logits(case(dtype=dtype).model(), case().batch()), bits(case(dtype=dtype).model().state())
    model, attachment, batch = attached(VARIANTS["pissa"], dtype=dtype)
    assert bits(model.state()) == original
    trained = logits(model, batch)
    with attachment.off():
        assert logits(model, batch).tobytes() == base.tobytes()
    attachment.merge()
    attachment.save(tmp_path / "pissa")
    attachment.unmerge()
    attachment.unplug()
    assert logits(model, batch).tobytes() == base.tobytes() and bits(model.state()) == original
    fresh = case(dtype=dtype).model()
    minipeft.load(fresh, tmp_path / "pissa")
    assert logits(fresh, batch).tobytes() == trained.tobytes()


def test_D19_switching_off_and_on_does_not_change_what_is_trained():
    """In peft an adapter that was loaded for inference is trainable after `disable_adapter`."""
    model, attachment, batch = attached(VARIANTS["pissa"])
    own, chosen = dict(attachment.parameters), minipeft.select(model, "@a")
    fixed = set(attachment.arrays) - set(own)
    assert fixed and list(chosen) == list(own)
    with attachment.off():
        assert attachment.parameters == own
        with pytest.raises(ValueError, match="matches none"):
            minipeft.select(model, "@a")
    attachment.merge()
    assert attachment.parameters == own
    attachment.unmerge()
    assert attachment.parameters == own and minipeft.select(model, "@a") == chosen
    _, grads = minipeft.value_and_grad(lambda: model.loss(**batch), attachment.parameters)
    assert not set(grads) & (fixed | set(model.base_parameters))


def test_D20_of_a_tied_head_the_change_is_in_the_inputs_too_and_of_an_untied_one_it_is_not():
    """In peft the change of a tied head acts in the head alone, and after merging in the inputs, too."""
    model, attachment, batch = attached(ON_THE_TABLE["LoRA"])
    assert model.head.weight is model.embedding.weight, "one slot"
    hidden, ids = RNG(3).standard_normal((1, 2, 12)), batch["input_ids"]
    table = attachment.places[TABLE].fold().dense().data
    for _ in range(2):
        assert close(model.head(hidden).data, hidden @ table.T) and close(model.embedding(ids).data, table[ids])
        if attachment.state == "plugged":
            attachment.merge()
    model, attachment, batch = attached(minipeft.LoRA(3, 5, where="^head"), "t5 v1.1")
    plain = case("t5 v1.1").model()
    for _ in range(2):
        assert model.embedding(ids).data.tobytes() == plain.embedding(ids).data.tobytes()
        assert not close(model.head(hidden).data, plain.head(hidden).data, 1e-2)
        if attachment.state == "plugged":
            attachment.merge()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("method", [*VARIANTS.values(), minipeft.LoRA(2, init="kaiming", where="^embedding"),
                                    minipeft.LoRA(2, init="orthogonal"), minipeft.PromptTuning(2, "random")], ids=str)
def test_D23_every_array_has_the_dtype_of_its_place(method, dtype):
    """In peft a prompt on a float64 base stays float32."""
    model = case(dtype=dtype).model()
    attachment = minipeft.attach(model, method, RNG(0))
    assert {a.dtype for a in attachment.arrays.values()} == {numpy.dtype(dtype)}
    _, grads = minipeft.value_and_grad(lambda: model.loss(**case().batch()), attachment.parameters)
    assert {g.dtype for g in grads.values()} == {numpy.dtype(dtype)}


@pytest.mark.parametrize("name, drop", [
    ("pissa", ".A0"), ("pissa", ".B0"), ("pissa", ".A"), ("pissa", "init"), ("pissa", "alpha"),
    ("rank by place", "rank_pattern"), ("rank by place", "scaling"), ("merged", "enable"), ("merged", ".B")])
def test_D25_a_file_that_lacks_a_field_or_a_tensor_is_refused(name, drop, tmp_path):
    """In peft, fields that are missing take their defaults, with wrong outputs. Here a file whose texts were changed is
    refused for that. Signed again, it is refused where what is left does not fit; that a scaling was left out cannot
    be seen then, because a file without one means "alpha/r"."""
    model, attachment, _ = attached(VARIANTS[name])
    attachment.save(tmp_path / "a")
    tensors, metadata = read_tensors(tmp_path / "a")
    fields = json.loads(metadata["method"])
    if drop.startswith("."):
        kept = {key: array for key, array in tensors.items() if not key.endswith(drop)}
        assert len(kept) < len(tensors)
        write_signed(tmp_path / "b", kept, metadata)
        match = f"{drop}' is missing"
    else:
        assert drop in fields
        said = json.dumps({key: value for key, value in fields.items() if key != drop})
        minipeft.files.write_tensors(tmp_path / "b", tensors, {**metadata, "method": said})
        match = "is missing" if drop in ("init", "alpha") else "its metadata was changed after it was written"
    for signed in range(2):
        target = case().model()
        before = bits(target.state())
        with pytest.raises(ValueError, match=match):
            minipeft.load(target, tmp_path / "b")
        assert not target.attachments and bits(target.state()) == before
        if drop not in ("rank_pattern", "enable"):
            break
        write_signed(tmp_path / "b", tensors, {**metadata, "method": said})
        match = "has shape|does not fit"


@pytest.mark.parametrize("method", VARIANTS.values(), ids=VARIANTS)
def test_L1_saved_while_it_is_merged_and_loaded_into_a_fresh_model_it_acts_once(method, tmp_path):
    """In loralib a state that was saved in evaluation holds merged weights, and the next evaluation merges again."""
    model, attachment, batch = attached(method)
    plugged, state = logits(model, batch), bits(model.state())
    attachment.save(tmp_path / "plugged")
    attachment.merge()
    merged = logits(model, batch)
    assert bits(model.state()) == state, "the model's own arrays are those of the base"
    attachment.save(tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "plugged").read_bytes()
    fresh = case().model()
    fresh.load_state(model.state())
    loaded = minipeft.load(fresh, tmp_path / "merged")
    assert logits(fresh, batch).tobytes() == plugged.tobytes()
    loaded.merge()
    assert logits(fresh, batch).tobytes() == merged.tobytes() and close(merged, plugged)


@pytest.mark.parametrize("method", VARIANTS.values(), ids=VARIANTS)
def test_L2_a_merged_model_gives_the_same_bits_twice_and_what_loralib_chains_can_be_chained(method):
    """In loralib `layer.eval()` gives None. Here there is no such mode; moving and copying give a model."""
    model, attachment, batch = attached(method)
    attachment.merge()
    first = logits(model, batch)
    assert model.to("numpy") is model
    for again in (model, model.to("numpy"), model.clone(), model.clone().to("numpy")):
        assert logits(again, batch).tobytes() == first.tobytes()
    with pytest.raises(ValueError, match="it is merged"):
        attachment.merge()


@pytest.mark.parametrize("method, place", [
    (VARIANTS["rank by place"], "encoder.0.attn.q.weight"), (VARIANTS["pissa"], "encoder.0.attn.q.weight"),
    (VARIANTS["merged"], "decoder.0.cross.v.weight"), (ON_THE_TABLE["LoRA"], TABLE), (ON_THE_TABLE["PiSSA"], TABLE)],
    ids=["low rank", "pissa", "merged", "head", "pissa, head"])
def test_L3_dropout_drops_on_every_kind_of_slot_that_is_multiplied_by(method, place):
    """In loralib a convolution forgets it: two training passes are the same. E[training] is the evaluation, and the
    base sees no dropout."""
    model, attachment, batch = attached(dataclasses.replace(method, dropout=0.5))
    slot, x = attachment.places[place], RNG(5).standard_normal((2, 3, 12))
    one, again, other = (slot.project(x, RNG(seed)).data for seed in (1, 1, 2))
    assert one.tobytes() == again.tobytes() != other.tobytes()
    passes = numpy.stack([slot.project(x, RNG(seed)).data for seed in range(2000)])
    off = abs(passes.mean(axis=0) - slot.project(x).data)
    assert (off <= 6 * passes.std(axis=0) / 2000 ** 0.5 + 1e-12).all()
    assert logits(model, batch, rng=RNG(1)).tobytes() != logits(model, batch, rng=RNG(2)).tobytes()
    piece = attachment.at[slot]  # back at the start, there is no change left to drop
    piece.A.data, piece.B.data = (piece.A0.data, piece.B0.data) if method.init == "pissa" else (piece.A.data,
                                                                                                0 * piece.B.data)
    assert numpy.array_equal(slot.project(x, RNG(1)).data, slot.base.project(x).data)
    assert isinstance(piece, PrincipalLowRank) == (method.init == "pissa")
    assert isinstance(piece, MergedLowRank) == (method.enable is not None)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", [*VARIANTS.values(), ON_THE_TABLE["LoRA"]], ids=[*VARIANTS, "table"])
def test_L4_after_a_hundred_cycles_of_merge_and_unmerge_every_bit_is_as_before(method, dtype):
    model, attachment, batch = attached(method, dtype=dtype)
    before, state, own = logits(model, batch), bits(model.state()), bits(attachment.tensors)
    merged = None
    for _ in range(100):
        attachment.merge()
        dense = [slot.fold().dense().data.tobytes() for slot in attachment.places.values()]
        merged = merged or dense
        assert dense == merged
        attachment.unmerge()
    assert bits(model.state()) == state and bits(attachment.tensors) == own
    assert logits(model, batch).tobytes() == before.tobytes()
