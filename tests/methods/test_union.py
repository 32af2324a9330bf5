"""Union: its parts keep their places, arrays and starts; overlaps are refused; one file has all parts."""
from __future__ import annotations

import copy
import dataclasses
import gc
import json
import pickle
import weakref

import numpy
import pytest

import minipeft
from minipeft import (AddedBias, Bottleneck, DoRA, IA3, LoRA, PrefixTuning, PromptTuning, Selective, Union, VeRA)
from minipeft.attaching.method import METHODS
from minipeft.files import read_tensors
from minipeft.laws.models import batch_for, bits, logits, model_of, moved
from tests.adapters import write_signed

RNG = numpy.random.default_rng
BATCH = batch_for(13, 0)
MAM = Union(PrefixTuning(2, mlp=3), Bottleneck("parallel", size=2, input="norm"))
LORA_NORMS = Union(LoRA(2, 3), Selective(component="norm"))
MASKED = "decoder.0.cross.k.weight"


def masks() -> list[Selective]:
    """Two parts that a file describes in part by arrays, and one that chooses by a condition."""
    return [Selective(mask={"embedding.weight": [3, 5, 8], "decoder.0.attn.k.weight": [4]}),
            Selective(mask={MASKED: [1, 2], "encoder.0.attn.o.weight": [7]}, where="cross"),
            Selective(component="norm")]


def attached(method, family="t5 v1.1", name="a"):
    model = model_of(family, "float64", 0)
    return model, moved(minipeft.attach(model, method, RNG(1), name), RNG(2))


# ---- fields


def test_parts_are_given_one_by_one_or_as_a_list():
    parts = (LoRA(2), Selective(component="norm"))
    assert Union(*parts) == Union(parts=list(parts)) == Union(parts[0], parts=parts[1:]) != Union(parts[0])
    assert Union(*parts).parts == parts and hash(Union(*parts)) == hash(Union(parts=parts))
    assert dataclasses.replace(Union(*parts), where="^encoder") == Union(*parts, where="^encoder")
    assert eval(repr(Union(*parts)), vars(minipeft)) == Union(*parts)


@pytest.mark.parametrize("parts, error, message", [
    ((), ValueError, "Union: it has no part; expected methods"),
    ((LoRA,), TypeError, r"method is .*; expected an object of it, LoRA\(\.\.\.\)"), ((3,), TypeError, "method is 3"),
    ((LoRA(2), Union(IA3())), ValueError, r"one of its parts is a Union; expected the parts of that one"),
    ((LoRA(2), Selective(where=lambda name: "norm" in name)), ValueError,
     r"Union: the `where` of part 2 \(Selective\) is <function .*; expected a pattern or a list of patterns, because"),
    ((LoRA(2, where=["q", str.islower]),), ValueError, r"the `where` of part 1 \(LoRA\) is \('q', <method")])
def test_parts_that_no_file_can_hold_are_refused(parts, error, message):
    with pytest.raises(error, match=message):
        Union(*parts)


def test_kinds_and_transparency_are_those_of_the_parts():
    assert Union(LoRA(2), AddedBias()).kinds == ("linear", "embedding", "absent bias")
    assert MAM.kinds == ("sublayer", "keys_values") and not MAM.transparent and LORA_NORMS.transparent
    assert not Union(LoRA(2), PromptTuning(2)).transparent


# ---- on a model


@pytest.mark.parametrize("method", [MAM, LORA_NORMS, Union(VeRA(3), Selective(component="norm"), where="^decoder")],
                         ids=["MAM", "LoRA, norms", "shared arrays"])
def test_the_laws_hold(method):
    minipeft.laws.check(method, model_of("t5 v1.1", "float64", 0)).raise_for_failures()


def test_each_part_has_the_arrays_and_the_start_that_it_would_have_alone():
    parts, model = (DoRA(2), VeRA(3, where=r"\.o\.weight$"), Bottleneck(size=2)), model_of("t5 v1.0", "float64", 0)
    whole, rng, alone = minipeft.attach(model, Union(*parts), RNG(1)), RNG(1), {}
    for i, part in enumerate(parts):
        alone |= bits(minipeft.attach(model, part, rng, f"part{i}").tensors)
    assert bits(whole.tensors) == alone and list(whole.tensors) == list(alone)
    assert [type(piece) for piece in whole.at.values()] == [
        type(piece) for i in range(3) for piece in model.attachments[f"part{i}"].at.values()]


def test_it_computes_what_its_parts_compute_beside_each_other():
    for method in (MAM, LORA_NORMS, Union(*masks())):
        model, whole = attached(method)
        found = logits(model, BATCH)
        whole.unplug()
        for i, part in enumerate(method.parts):
            other = minipeft.attach(model, part, RNG(1), f"part{i}")
            for key, p in zip(other.tensors, other.arrays.values()):
                p.data = whole.tensors[key]
        assert logits(model, BATCH).tobytes() == found.tobytes()


def test_two_parts_at_one_place_are_refused_by_name():
    for parts, place in (((LoRA(2), LoRA(3, where="decoder")), "decoder.0.attn.q.weight"),
                         ((Selective(component="norm"), Selective(where="ff_norm")), "encoder.0.ff_norm.weight"),
                         ((PrefixTuning(2), PrefixTuning(2, "encoder")), "encoder.0.attn.keys_values")):
        model = model_of("t5 v1.1", "float64", 0)
        with pytest.raises(ValueError, match=rf"Union: part 1 \(\w+\) and part 2 \(\w+\) both choose {place}"):
            minipeft.attach(model, Union(*parts), RNG(0))
        assert not model.attachments


def test_two_parts_with_a_shared_array_of_one_name_are_refused():
    """Both are random projections of their own, and as one array the second would be the first."""
    model = model_of("t5 v1.1", "float64", 0)
    with pytest.raises(ValueError, match=r"part 1 \(VeRA\) and part 3 \(VeRA\) both have an array called vera\.A,"):
        minipeft.attach(model, Union(VeRA(3, where=["q"]), IA3(), VeRA(3, where=["o"], key=1)), RNG(0))
    assert not model.attachments


def test_where_narrows_all_parts_and_leaves_none_without_a_place():
    model, attachment = attached(Union(LoRA(2), Selective(component="norm"), where=r"^decoder"))
    assert list(attachment.places) == [name for part in attachment.method.parts for name in part.places(model)
                                       if name.startswith("decoder")]
    for where, part in (("norm", r"part 1 \(LoRA\)"), ([r"\.q\."], r"part 2 \(Selective\)")):
        with pytest.raises(ValueError, match=f"Union: where=.* leaves no place to {part}"):
            minipeft.attach(model, dataclasses.replace(attachment.method, where=where), RNG(0), "b")
    with pytest.raises(ValueError, match="where='nowhere' matches none of the 17 place names"):
        minipeft.attach(model, dataclasses.replace(attachment.method, where="nowhere"), RNG(0), "b")


def test_arrays_of_a_place_can_be_asked_for_first():
    model = model_of("t5 v1.1", "float64", 0)
    name = "encoder.norm.weight"
    assert list(dataclasses.replace(LORA_NORMS).arrays(name, model.slots[name], model)) == ["d"]


def test_one_method_on_two_models_finds_the_parts_of_each_and_keeps_neither_alive():
    """The last block of one model is not that of the other."""
    method = Union(LoRA(2, where="^encoder.0"), Selective(component="norm", last=1))
    models = [model_of(family, "float64", 0) for family in ("t5 v1.0", "t5 v1.1")]
    chosen = [set(minipeft.attach(model, method, RNG(0)).places) for model in models]
    assert chosen[0] - chosen[1] and chosen[1] - chosen[0]
    for twin in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert twin == method and set(twin.places(models[0])) == chosen[0]
    seen = weakref.ref(models[0].slots["encoder.norm.weight"])
    del models[0]
    gc.collect()
    assert seen() is None


def test_all_parts_merge_or_none_does():
    model, attachment = attached(Union(LoRA(2), Bottleneck(size=2)))
    before = logits(model, BATCH)
    with pytest.raises(ValueError, match="'a' cannot be merged: at encoder.0.attn.out it acts on hidden states"):
        attachment.merge()
    assert attachment.state == "plugged" and logits(model, BATCH).tobytes() == before.tobytes()


def test_the_report_shows_the_ranks_of_the_loras_inside():
    model, _ = attached(Union(LoRA(2), LoRA(5, where="^head"), Selective(component="norm")))
    assert minipeft.report(model).ranks == (2, 5)


# ---- files


def test_masks_of_several_parts_come_back_to_the_parts_that_they_belong_to(tmp_path):
    model, attachment = attached(Union(*masks()))
    assert MASKED in attachment.places and "encoder.0.attn.o.weight" not in attachment.places
    attachment.save(tmp_path / "a")
    again = minipeft.load(model_of("t5 v1.1", "float64", 0), tmp_path / "a")
    assert bits(again.tensors) == bits(attachment.tensors)
    assert again.method.fields() == attachment.method.fields() and again.method.parts == attachment.method.parts
    first, second, norms = again.method.parts
    assert set(first.mask) == {"embedding.weight", "decoder.0.attn.k.weight"} and list(second.mask) == [MASKED]
    assert norms.mask is None and logits(again.model, BATCH).tobytes() == logits(model, BATCH).tobytes()


def test_a_file_says_kind_where_and_fields_of_each_part(tmp_path):
    _, attachment = attached(LORA_NORMS)
    attachment.save(tmp_path / "a")
    method = json.loads(read_tensors(tmp_path / "a")[1]["method"])
    assert method == {"kind": "Union", "parts": [
        ["LoRA", r"\.(q|v)\.weight$", [["rank", 2], ["alpha", 3], ["dropout", 0.0], ["init", "gaussian"]]],
        ["Selective", "", [[name, ["norm"] if name == "component" else None] for name in (
            "component", "layers", "first", "last", "type", "rows")]]]}


@pytest.mark.parametrize("parts, message", [
    (3, r"parts holds 3; expected \[\[kind, where, \[\[field, value\], \.\.\.\]\], \.\.\.\]"), ([], "it has no part"),
    ([["LoRA", ""]], r"parts holds \['LoRA', ''\]"), ([["LoRA", "", {"rank": 2}]], "parts holds {'rank': 2}"),
    ([["LoRA", "", [["rank"]]]], r"parts holds \['rank'\]"), ([["LoRA", 3, []]], "parts holds 3"),
    ([["Nothing", "", []]], "method 'Nothing' is not known; known are "), ([[3, "", []]], "method 3 is not known"),
    ([["LoRA", "", [["rank", 2]]]], "LoRA: the field 'alpha' is missing"),
    ([["IA3", "", [["placement", "after"], ["rank", 2]]]], "IA3: the field 'rank' is unknown; expected inputs"),
    ([["IA3", "", [["placement", "nowhere"]]]], "IA3: placement is 'nowhere'"),
    ([["IA3", [3], [["placement", "after"]]]], r"part 1 \(IA3\) is \(3,\); expected a pattern"),
    ([["Union", "", [["parts", [["IA3", "", [["placement", "after"]]]]]]]], "one of its parts is a Union"),
    ([["IA3", "^nowhere$", [["placement", "after"]]]], "where='\\^nowhere\\$' matches none")])
def test_a_file_with_malformed_parts_is_refused_by_name(parts, message, tmp_path):
    _, attachment = attached(Union(IA3()))
    attachment.save(tmp_path / "a")
    tensors, metadata = read_tensors(tmp_path / "a")
    write_signed(tmp_path / "b", tensors, {**metadata, "method": json.dumps({"kind": "Union", "parts": parts})})
    model = model_of("t5 v1.1", "float64", 0)
    with pytest.raises(ValueError, match=f"{tmp_path / 'b'}: does not fit this model: .*(?:{message})"):
        minipeft.load(model, tmp_path / "b")
    assert not model.attachments


def test_a_file_of_another_number_of_places_than_its_parts_choose_is_refused(tmp_path):
    _, attachment = attached(LORA_NORMS)
    attachment.save(tmp_path / "a")
    tensors, metadata = read_tensors(tmp_path / "a")
    metadata["places"] = json.dumps(json.loads(metadata["places"])[:-1])
    write_signed(tmp_path / "b", tensors, metadata)
    with pytest.raises(ValueError, match="b: 'decoder.norm.weight.d' is not expected"):
        minipeft.load(model_of("t5 v1.1", "float64", 0), tmp_path / "b")


def test_a_method_of_somebody_else_can_be_a_part(tmp_path):
    before = dict(METHODS)
    try:
        @minipeft.register
        @dataclasses.dataclass(frozen=True)
        class Rescale(minipeft.Method):
            where: minipeft.Where = r"\.k\.weight$"

            def arrays(self, name, slot, model):
                return {"l": minipeft.trained((slot.shape[0], 1), minipeft.ones)}

            def make(self, name, slot, arrays):
                return _Rescaled(**arrays)

        model, attachment = attached(Union(Rescale(), LoRA(2)))
        attachment.save(tmp_path / "a")
        again = minipeft.load(model_of("t5 v1.1", "float64", 0), tmp_path / "a")
        assert bits(again.tensors) == bits(attachment.tensors) and isinstance(again.method.parts[0], Rescale)
    finally:
        METHODS.clear()
        METHODS.update(before)


class _Rescaled(minipeft.Reparam):
    def dense(self):
        return self.base.dense() * self.l


def test_a_run_can_be_stopped_and_resumed_and_knows_the_parts(tmp_path):
    batches = [([3, 4, 5], [6, 1]), ([7, 8], [9, 1])]

    def train(method, steps):
        model, attachment = attached(method)
        minipeft.fit(model, attachment, minipeft.Batches(batches, 2), steps=steps, checkpoint=tmp_path / "c",
                     progress=False)
        return bits(attachment.tensors)

    train(LORA_NORMS, 1)
    resumed = train(LORA_NORMS, 2)
    (tmp_path / "c").unlink()
    assert train(LORA_NORMS, 2) == resumed
    with pytest.raises(ValueError, match="alpha"):
        train(Union(LoRA(2, 4), Selective(component="norm")), 3)
