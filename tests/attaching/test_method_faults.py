"""Faults that a review of the contract found: each has a test that it is gone."""
from __future__ import annotations

import dataclasses
from typing import Any

import numpy
import pytest

import minipeft
from minipeft import laws
from minipeft.engine.tensor import array_of
from minipeft.laws.models import bits, logits, model_of
from minipeft.nn.slot import Slot
from tests.models_under_test import Case

RNG, PLACE = numpy.random.default_rng, "encoder.0.attn.q.weight"
CASE = Case(("t5 v1.0", "q and v"), 1, 1, "float64", 0)


class Own(minipeft.Reparam):
    """A copy of the weight, trained in its place."""

    def dense(self):
        return self.W + 0 * self.base.dense()


class Scaled(minipeft.Reparam):
    def dense(self):
        return self.base.dense() * self.l


class CodeBook(minipeft.Reparam):
    """W0 + book[codes]: fixed codes choose one of four trained values."""

    def dense(self):
        rows = minipeft.ops.embedding(self.book, self.codes.data)
        return self.base.dense() + rows.reshape(*self.shape)


class Masked(minipeft.Reparam):
    """W0 with d added where the fixed mask is True."""

    def dense(self):
        at = numpy.flatnonzero(self.mask.data)
        return self.base.dense() + minipeft.ops.scatter(self.d, at, shape=self.shape)


class Sliced(Scaled):
    """A product of arrays: right in value, and it cuts the gradient."""

    def project(self, x, rng=None):
        return array_of(x) @ array_of(self.dense()).T


class Merges(Scaled):
    def merged(self):
        return self.dense().data[:2]


@minipeft.register
@dataclasses.dataclass(frozen=True)
class Faulty(minipeft.Method):
    piece: str = "Scaled"
    how: str = ""
    where: Any = f"^{PLACE}$"

    def arrays(self, name, slot, model):
        one, shape = minipeft.ones, (slot.shape[0], 1)
        if self.how == "crash":
            return {"l": minipeft.trained((slot.shape[7],))}
        return {
            "": {"l": minipeft.trained(shape, one)},
            "own": {"W": minipeft.trained(slot.shape, lambda *_: slot.fold().dense().data)},
            "tensor": {"W": minipeft.trained(slot.shape, lambda *_: slot.fold().dense())},
            "codes": {"book": minipeft.trained((4, 1)), "codes": minipeft.fixed(
                slot.shape, lambda shape, dtype, rng: rng.integers(0, 4, shape).astype(dtype), dtype="uint8")},
            "mask": {"d": minipeft.trained((5,)), "mask": minipeft.fixed(
                slot.shape, lambda shape, *_: numpy.arange(180).reshape(shape) < 5, dtype=bool)},
            "complex": {"l": minipeft.trained(shape, one), "z": minipeft.fixed((2,), one, dtype=complex)}}[self.how]

    def make(self, name, slot, arrays):
        return globals()[self.piece](**arrays)


def refused(method, error, message):
    model, rng = CASE.model(), RNG(0)
    now, state = model.host.now, rng.bit_generator.state
    with pytest.raises(error, match=message):
        minipeft.attach(model, method, rng)
    assert model.host.now is now and rng.bit_generator.state == state


def test_an_init_that_returns_the_base_does_not_let_training_write_into_it():
    model, batch = CASE.model(), CASE.batch()
    before, base = bits(model.base_parameters), logits(model, batch)
    attachment = minipeft.attach(model, Faulty("Own", "own"), RNG(0))
    for _ in range(3):
        grads = minipeft.value_and_grad(lambda: model.loss(**batch), attachment.parameters)[1]
        minipeft.AdamW(1e-2).step(attachment.parameters, grads)
    attachment.remove()
    assert bits(model.base_parameters) == before and logits(model, batch).tobytes() == base.tobytes()


def test_an_init_that_returns_a_tensor_is_refused():
    refused(Faulty("Own", "tensor"), ValueError, "gives Parameter; expected float64")


def test_a_product_that_is_no_tensor_is_refused_because_it_cuts_the_gradient():
    refused(Faulty("Sliced"), TypeError, r"project\(x\) gives ndarray; expected a Tensor")


def test_a_dtype_that_no_file_can_hold_is_refused():
    refused(Faulty(how="complex"), ValueError, "dtype complex128, which no file can hold; expected one of bool, int8")


def test_a_declaration_that_crashes_is_told_with_its_place():
    refused(Faulty(how="crash"), TypeError, rf"Faulty.arrays\(\) at {PLACE}: IndexError: tuple index out of range")


def test_a_merged_weight_that_does_not_fit_is_refused_before_anything_moves():
    model = CASE.model()
    attachment = minipeft.attach(model, Faulty("Merges"), RNG(0))
    with pytest.raises(ValueError, match=rf"at {PLACE}: merged\(\) gives ndarray; expected a weight"):
        attachment.merge()
    assert attachment.state == "plugged"


def test_a_fixed_mask_that_says_how_many_are_trained_is_tried_as_it_is():
    model = CASE.model()
    minipeft.attach(model, Faulty("Masked", "mask"), RNG(0))
    assert laws.check(Faulty("Masked", "mask"), CASE.model()).ok


def test_fixed_codes_that_choose_among_few_values_are_tried_as_they_were_drawn(tmp_path):
    model, batch = CASE.model(), CASE.batch()
    attachment = minipeft.attach(model, Faulty("CodeBook", "codes"), RNG(0))
    attachment.parameters[f"{PLACE}@faulty.book"].data += RNG(1).standard_normal((4, 1))
    wanted = logits(model, batch)
    attachment.save(tmp_path / "a")
    fresh = CASE.model()
    minipeft.load(fresh, tmp_path / "a")
    assert logits(fresh, batch).tobytes() == wanted.tobytes()
    assert laws.check(Faulty("CodeBook", "codes"), CASE.model()).ok


@pytest.mark.parametrize("kinds", ["linear", ("linaer",), (), ["linear"]])
def test_kinds_that_are_no_kinds_are_refused(kinds):
    odd = dataclasses.make_dataclass("OddKinds", [("where", str, "q")], bases=(Faulty,), frozen=True,
                                     namespace={"kinds": kinds})
    with pytest.raises(TypeError, match="OddKinds.kinds is .*; expected a tuple of some of linear, embedding"):
        minipeft.register(odd)


class Quantized:
    """scale * codes: a base that is no Parameter."""

    drops = False

    def __init__(self, W):
        self.scale = minipeft.Parameter(numpy.array(abs(W).max() / 127))
        self.codes = minipeft.Fixed(numpy.rint(W / self.scale.data))

    arrays = property(lambda self: {"codes": self.codes, "scale": self.scale})
    shape = property(lambda self: self.codes.shape)
    dtype = property(lambda self: self.codes.dtype)

    def dense(self):
        return self.codes * self.scale

    def project(self, x, rng=None):
        return minipeft.ops.linear(x, self.dense())

    def rows(self, ids):
        return minipeft.ops.embedding(self.dense(), ids)

    def vector(self):
        return self.dense()


def quantized(seed: int = 0) -> Any:
    """A model whose q is a base of codes and a scale."""
    model = model_of("t5 v1.0", "float64", seed)
    for name in (PLACE, "decoder.0.attn.q.weight"):
        slot = model.slots[name]
        slot.base = Quantized(slot.base.data)
    return model


def test_a_base_of_codes_is_counted_saved_and_moved_and_trained_scales_are_another_base(tmp_path):
    model, batch = quantized(), CASE.batch()
    assert f"{PLACE}.codes" in model.state() and minipeft.report(model).all == sum(
        a.size for a in model.state().values())
    lora = minipeft.attach(model, minipeft.LoRA(2), RNG(0))
    both = {**lora.parameters, **minipeft.select(model, r"\.scale$")}
    minipeft.AdamW(1e-2).step(both, minipeft.value_and_grad(lambda: model.loss(**batch), both)[1])
    lora.save(tmp_path / "a")
    with pytest.raises(ValueError, match="made for another base model"):
        minipeft.load(quantized(), tmp_path / "a")
    lora.merge()
    assert "weights" in str(minipeft.report(model))
    assert isinstance(model.slots[PLACE], Slot) and laws.check(minipeft.LoRA(2), quantized()).ok


def test_the_laws_refuse_a_model_that_has_attachments_or_too_few_positions():
    model = CASE.model()
    CASE.attach(model, "mine")
    with pytest.raises(ValueError, match=r"the model has attachments \(mine\); expected one without"):
        laws.check(minipeft.LoRA(2), model)
    config = minipeft.TransformerConfig(13, 12, 3, 17, 1, 1, positions="learned", max_length=7)
    with pytest.raises(ValueError, match="the model has 7 positions; the laws need 8"):
        laws.check(minipeft.LoRA(2), minipeft.Transformer(config, RNG(0)))


def test_a_rank_that_is_no_number_does_not_break_the_report():
    @minipeft.register
    @dataclasses.dataclass(frozen=True)
    class Ranked(Faulty):
        rank: Any = "auto"
    model = CASE.model()
    minipeft.attach(model, Ranked(), RNG(0))
    assert "LoRA of rank 8" in str(minipeft.report(model))


def test_integers_of_a_file_that_do_not_fit_their_dtype_are_refused(tmp_path):
    from tests.adapters import write_signed
    from minipeft.files import read_tensors
    model = CASE.model()
    minipeft.attach(model, Faulty("CodeBook", "codes"), RNG(0)).save(tmp_path / "a")
    tensors, metadata = read_tensors(tmp_path / "a")
    tensors[f"{PLACE}.codes"] = tensors[f"{PLACE}.codes"].astype("uint16") + 256
    write_signed(tmp_path / "b", tensors, metadata)
    with pytest.raises(ValueError, match="holds integers beyond uint8"):
        minipeft.load(CASE.model(), tmp_path / "b")
