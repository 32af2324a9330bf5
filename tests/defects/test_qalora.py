"""Defects of PEFT's QA-LoRA, which minipeft must not have. `tests/planted/qalora.py` plants them here.

D: PEFT 0.21.2.
"""
from __future__ import annotations

from fractions import Fraction

import numpy
import pytest

import minipeft
from minipeft import QALoRA
from minipeft.laws.models import model_of
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Parameter
from minipeft.quant import QuantizedWeight, scheme

RNG = numpy.random.default_rng
D_IN, D_OUT, G, R = 64, 24, 16, 4  # so L = 4


def changes():
    """{pooling: the change of y} for one x and the same A and B."""
    rng, slot = RNG(0), Slot("linear", numpy.zeros((D_OUT, D_IN)))
    A, B, x = (rng.standard_normal(shape) for shape in ((R, D_IN // G), (D_OUT, R), (5, D_IN)))
    found = {}
    for pooling in (None, "sum", "mean", "mean * groups"):
        method = QALoRA(R, 8, G) if pooling is None else QALoRA(R, 8, G, pooling=pooling)
        piece = method.make("a", slot, {"A": Parameter(A), "B": Parameter(B)}).over(slot.base)
        found[pooling] = piece.project(x).data
    grouped = x.reshape(5, D_IN // G, G)
    return found, {"sum": grouped.sum(-1) @ A.T @ B.T * 2, "mean": grouped.mean(-1) @ A.T @ B.T * 2}


def relative(a, b):
    return numpy.linalg.norm(a - b) / numpy.linalg.norm(b)


def test_D22_the_default_is_the_sum_of_the_paper_and_the_factor_of_peft_has_a_name_of_its_own():
    """PEFT's differs from the sum by 0.75 of it here, and from the mean of the authors' code by 3 times the mean."""
    found, wanted = changes()
    assert relative(found[None], wanted["sum"]) < 1e-14 and (found[None] == found["sum"]).all()
    assert relative(found["mean"], wanted["mean"]) < 1e-14
    assert abs(relative(found["mean * groups"], wanted["mean"]) - 3.0) < 1e-13
    assert abs(relative(found["mean * groups"], wanted["sum"]) - 0.75) < 1e-13


@pytest.mark.parametrize("pooling", ["sum", "mean", "mean * groups"])
def test_D22_it_can_be_merged_under_every_pooling(pooling):
    """PEFT raises NotImplementedError."""
    slot = Slot("linear", RNG(1).standard_normal((D_OUT, D_IN)))
    slot.base = QuantizedWeight.of(slot.base.data, scheme("int4", group=G))
    A, B = RNG(2).standard_normal((R, D_IN // G)), RNG(3).standard_normal((D_OUT, R))
    method = QALoRA(R, 8, G, pooling=pooling)
    merged = method.make("a", slot, {"A": Parameter(A), "B": Parameter(B)}).over(slot.base).merged()
    k = {"sum": Fraction(1), "mean": Fraction(1, G), "mean * groups": Fraction(D_IN // G, G)}[pooling]
    change = merged.dense().data - slot.base.dense().data
    assert isinstance(merged, QuantizedWeight)
    assert relative(change, numpy.repeat(float(2 * k) * (B @ A), G, axis=1)) < 1e-13


def test_D22_a_is_drawn_for_its_own_columns_from_the_generator_that_was_given():
    """PEFT replaces A after it was initialized: by numbers of torch's global generator, whatever init_lora_weights
    says."""
    drawn = []
    for seed in (0, 0, 1):
        model = model_of("t5 v1.1", "float64", 0)
        attachment = minipeft.attach(model, QALoRA(2, group=3), RNG(seed), "a")
        drawn.append(attachment.parameters["encoder.0.attn.q.weight@a.A"].data)
    assert drawn[0].shape == (2, 4) and abs(drawn[0]).max() <= 12 ** -0.5
    assert (drawn[0] == drawn[1]).all() and not (drawn[0] == drawn[2]).any()


def test_D22_a_file_says_which_pooling_it_is_for(tmp_path):
    model = model_of("t5 v1.1", "float64", 0)
    for pooling in ("sum", "mean", "mean * groups"):
        attachment = minipeft.attach(model, QALoRA(2, group=3, pooling=pooling), RNG(0), "a")
        attachment.save(tmp_path / "file")
        attachment.remove()
        again = minipeft.load(model, tmp_path / "file", name="b")
        assert again.method.pooling == pooling and again.method.group == 3
        again.remove()
