"""extract: a LoRA out of two checkpoints of one model."""
from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy
import pytest

import minipeft
from minipeft import LoRA, attach, extract
from minipeft.laws.models import moved
from tests.models_under_test import Case, bits, logits

RNG = numpy.random.default_rng
CASE = Case(("t5 v1.0", "q and v"), 1, 1, "float64", 0)


def pair(family: str = "t5 v1.0", dtype: str = "float64", **changes: Any) -> tuple[Any, Any]:
    """A base, and a copy with numbers added to the tensors whose names are given (with _ for .)."""
    base = dataclasses.replace(CASE, place=(family, "q and v"), dtype=dtype).model()
    tuned = base.clone()
    for name, d in changes.items():
        p = tuned.base_parameters[name.replace("__", ".")]
        p.data = (p.data + d).astype(dtype)
    return base, tuned


def low(shape: tuple, rank: int, seed: int = 0) -> numpy.ndarray:
    rng = RNG(seed)
    return rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))


@pytest.mark.parametrize("family", ["t5 v1.0", "pre-LN"])
def test_a_lora_that_was_merged_into_the_weights_comes_back_as_its_change(family):
    """The tied table is one place."""
    base, tuned = pair(family)
    method = LoRA(3, 4, where=[r"\.q\.weight$", "^embedding"])
    a = moved(attach(tuned, method, RNG(0), "a"), RNG(1))
    wanted = logits(tuned, CASE.batch())
    merged = base.clone()
    for name, slot in tuned.slots.items():
        merged.slots[name].base.data = slot.fold().dense().data
    before = bits(base.state())
    e = extract(base, merged, 3)
    assert list(e.places) == [n for n in base.slots if n in a.places] and e.name == "extracted"
    assert max(e.errors.values()) < 1e-13 and set(e.errors) == set(e.places)
    assert abs(logits(base, CASE.batch()) - wanted).max() < 1e-12 * abs(wanted).max()
    e.unplug()
    assert bits(base.state()) == before and e.trained_on.below == ()
    assert extract(base, merged, 99, "more").method.rank == 3, "no more than the change has"


def test_the_errors_are_those_of_the_singular_values_that_are_left_out():
    base, tuned = pair(encoder__0__attn__q__weight=low((15, 12), 12), decoder__1__ff__wo__weight=low((12, 17), 2),
                       encoder__norm__weight=0.5, encoder__position__weight=0.25)
    e = extract(base, tuned, 4)
    d = tuned.state()["encoder.0.attn.q.weight"] - base.state()["encoder.0.attn.q.weight"]
    s = numpy.linalg.svd(d, compute_uv=False)
    assert abs(e.errors["encoder.0.attn.q.weight"] - math.sqrt((s[4:] ** 2).sum() / (s ** 2).sum())) < 1e-13
    assert e.errors["decoder.1.ff.wo.weight"] < 1e-13
    assert e.errors["encoder.norm.weight"] == e.errors["encoder.position.weight"] == 1.0 and len(e.errors) == 4
    assert {name: e.at[slot].A.shape[0] for name, slot in e.places.items()} == {
        "encoder.0.attn.q.weight": 4, "decoder.1.ff.wo.weight": 2}


def test_biases_are_lost_and_say_so_and_float32_rounds_once():
    base, tuned = pair("post-LN", "float32", encoder__0__attn__q__bias=1.0,
                       encoder__0__attn__q__weight=low((12, 12), 2))
    e = extract(base, tuned, 5)
    assert e.errors.pop("encoder.0.attn.q.bias") == 1.0
    assert list(e.errors) == ["encoder.0.attn.q.weight"] and 0 < e.errors["encoder.0.attn.q.weight"] < 1e-6
    W, T = (m.slots["encoder.0.attn.q.weight"].base.data.astype("float64") for m in (base, tuned))
    U, S, Vt = numpy.linalg.svd(T - W, full_matrices=False)
    wanted = {"A": Vt[:5].astype("float32"), "B": (U[:, :5] * S[:5]).astype("float32")}
    assert bits(e.tensors) == bits({f"encoder.0.attn.q.weight.{leaf}": array for leaf, array in wanted.items()})


def test_what_is_extracted_is_saved_and_loaded_for_this_base(tmp_path):
    base, tuned = pair(encoder__0__attn__q__weight=low((15, 12), 2))
    e = extract(base, tuned, 2)
    wanted = logits(base, CASE.batch())
    e.save(tmp_path / "e.safetensors")
    fresh = CASE.model()
    assert minipeft.load(fresh, tmp_path / "e.safetensors").errors == {}
    assert logits(fresh, CASE.batch()).tobytes() == wanted.tobytes()
    with pytest.raises(ValueError, match="made for another base model"):
        minipeft.load(tuned, tmp_path / "e.safetensors")


def other(**fields: Any) -> Any:
    model = CASE.model()
    return type(model)(dataclasses.replace(model.config, **fields), RNG(0), "float64")


@pytest.mark.parametrize("tuned, error, message", [
    (lambda: CASE.model(), ValueError, "no matrix of the two models differs: there is nothing to extract$"),
    (lambda: pair(encoder__norm__weight=1)[1], ValueError, "only encoder.norm.weight differ, which no LoRA can hold"),
    (lambda: pair(encoder__0__attn__q__weight=math.nan)[1], ValueError, "encoder.0.attn.q.weight holds NaN or inf"),
    (lambda: pair("pre-LN")[1], ValueError, "tuned is a Transformer; expected a T5"),
    (lambda: other(num_heads=5, d_kv=3), ValueError, "the configurations differ: d_kv of tuned is 3; expected 5"),
    (lambda: other(vocab_size=14), ValueError, "the configurations differ: vocab_size of tuned is 14; expected 13"),
    (lambda: CASE.model().encoder, TypeError, "Stack is not a whole model"),
    (lambda: adapted(), ValueError, "tuned has 'lora' plugged; expected the bare checkpoints")])
def test_what_cannot_be_extracted_is_refused_before_anything_changes(tuned, error, message):
    model, tuned = CASE.model(), tuned()
    state = model.host.now
    with pytest.raises(error, match=message):
        extract(model, tuned, 2)
    assert model.host.now is state


def adapted() -> Any:
    model = CASE.model()
    attach(model, LoRA(1), RNG(0))
    return model


def test_a_plugged_adapter_on_the_base_a_rank_and_a_name_are_checked():
    base, tuned = pair(encoder__0__attn__q__weight=low((15, 12), 2))
    for rank in (0, 1.5, True, None, "4"):
        with pytest.raises(ValueError, match="rank is .*; expected an integer >= 1"):
            extract(base, tuned, rank)
    with pytest.raises(ValueError, match="name is 'a b'"):
        extract(base, tuned, 1, "a b")
    with pytest.raises(ValueError, match="model has 'lora' plugged"):
        extract(adapted(), tuned, 1)
    with pytest.raises(TypeError, match="not a whole model"):
        extract(base.encoder, tuned, 1)
