"""Merging for storage: computed in float64, rounded once, and what is left of each change."""
from __future__ import annotations

import dataclasses
from typing import Any

import numpy
import pytest

import minipeft
from minipeft import LoRA, Selective, attach
from minipeft.files import read_tensors, round_bf16, widen_bf16
from minipeft.laws.models import moved
from minipeft.nn.merge_report import MergeReport
from tests.by_hand import Held
from tests.foreign_methods import ForeignDoRA, ForeignVeRA
from tests.models_under_test import Case, bits, logits, same_values

RNG = numpy.random.default_rng
CASE = Case(("pre-LN", "q and v"), 1, 1, "float32", 0)
Q = "encoder.0.attn.q.weight"
STACKS = {"LoRA": [LoRA(2, 3)], "two": [LoRA(2, 3), LoRA(1, -2, where=r"\.q\.weight$")], "DoRA": [ForeignDoRA()],
          "DoRA on a LoRA": [LoRA(2, 3, dropout=0.0), ForeignDoRA()], "VeRA": [ForeignVeRA()],
          "norms, biases, tables": [Selective()], "table": [LoRA(3, 5, where="^embedding")]}


def stacked(which: str, family: str = "pre-LN", dtype: str = "float32") -> Any:
    model = dataclasses.replace(CASE, place=(family, "q and v"), dtype=dtype).model()
    for i, method in enumerate(STACKS[which]):
        moved(attach(model, method, RNG(i), "abc"[i]), RNG([i, 1]))
    return model


def rounded(array: numpy.ndarray, dtype: str) -> numpy.ndarray:
    stored = widen_bf16(round_bf16(array)) if dtype == "bfloat16" else array.astype(dtype)
    return stored if dtype == "float64" else stored.astype("float32")


def in_float64(model: Any) -> Any:
    """The same model in float64 throughout, from the same numbers."""
    twin = type(model)(model.config, None, "float64")
    twin.load_state(model.state())
    for a in model.attachments.values():
        b = attach(twin, a.method, RNG(0), a.name)
        for (key, p), array in zip(b.arrays.items(), a.tensors.values()):
            p.data = array.astype(p.data.dtype)
    return twin


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", None])
@pytest.mark.parametrize("which, family", [(which, "pre-LN") for which in STACKS] + [("table", "t5 v1.0")])
def test_a_merged_file_is_the_equation_in_float64_rounded_once(tmp_path, which, family, dtype):
    model = stacked(which, family)
    before = bits({**model.state(), **{n: p.data for a in model.attachments.values() for n, p in a.arrays.items()}})
    state, out = model.host.now, logits(model, CASE.batch())
    report = model.save_pretrained(tmp_path, dtype, merged=True)
    found, twin = read_tensors(tmp_path / "model.safetensors")[0], in_float64(model)
    names = {model.to_hf_name(n) if family.startswith("t5") else n: n for n in model.slots}
    assert set(found) == set(names)
    for key, name in names.items():
        slot, stored = twin.slots[name], dtype or "float32"
        wanted = rounded(slot.fold().dense().data, stored)
        assert same_values(found[key], wanted), name
        assert (name in report.errors) == bool(slot.entries)
        if slot.entries:
            W, d = slot.base.data, slot.fold().dense().data - slot.base.data
            realized = wanted.astype("float64") - rounded(W, stored)
            error = numpy.linalg.norm(realized - d) / numpy.linalg.norm(d)
            assert abs(report.errors[name] - error) <= 1e-12 * error and report.dtypes[name] == stored
    assert bits({**model.state(), **{n: p.data for a in model.attachments.values() for n, p in a.arrays.items()}}) \
        == before and model.host.now is state and logits(model, CASE.batch()).tobytes() == out.tobytes()
    assert (report.worst < 1e-5) == (dtype not in ("bfloat16", "float16"))


def on_a_tie() -> tuple[Any, Any]:
    """A model whose merged weight is a little above the middle of two bfloat16 numbers, 1 and 1 + 2^-7. In float32 it
    is the middle, which would then go to 1, the even one."""
    model = stacked("LoRA")
    a = model.attachments["a"]
    model.slots[Q].base.data[:] = 1
    A, B = a.parameters[f"{Q}@a.A"].data, a.parameters[f"{Q}@a.B"].data
    A[:], B[:] = 0, 0
    A[0], B[:, 0] = 2.0 ** -8, 1 + 2.0 ** -20
    a.at[a.places[Q]].scale = 1
    return model, 1 + 2.0 ** -7


def test_there_is_no_float32_step_between_float64_and_the_file(tmp_path):
    model, above = on_a_tie()
    assert (model.slots[Q].fold().dense().data == numpy.float32(1 + 2.0 ** -8)).all(), "the middle, in float32"
    model.save_pretrained(tmp_path, "bfloat16", merged=True)
    assert (read_tensors(tmp_path / "model.safetensors")[0][Q] == above).all()


def test_a_report_is_a_table_and_one_of_nothing_says_so(tmp_path):
    model = stacked("LoRA")
    report = model.save_pretrained(tmp_path / "m", "bfloat16", merged=True)
    lines = str(report).splitlines()
    assert lines[0].split() == ["merged", "weight", "stored", "as", "error", "of", "its", "change"]
    assert lines[1].split() == [Q, "bfloat16", f"{report.errors[Q]:.2e}"] and len(lines) == 2 + len(report.errors)
    assert report.worst == max(report.errors.values())
    assert lines[-1] == f"the largest error is {report.worst:.2e}; at 1, as much is lost as by dropping the change"
    nothing = model.save_pretrained(tmp_path / "b", merged=False)
    assert nothing == MergeReport() and str(nothing) == "nothing was merged" and nothing.worst == 0.0
    model.attachments["a"].unplug()
    assert model.save_pretrained(tmp_path / "u", merged=True) == MergeReport()


def test_an_adapter_that_changes_nothing_loses_nothing(tmp_path):
    model = CASE.model()
    attach(model, LoRA(2), RNG(0))
    assert set(model.save_pretrained(tmp_path, "bfloat16", merged=True).errors.values()) == {0.0}


def test_overflow_and_an_unknown_dtype_are_refused_before_anything_is_written(tmp_path):
    model = stacked("LoRA")
    model.attachments["a"].parameters[f"{Q}@a.B"].data[:] = 1e6
    with pytest.raises(ValueError, match=f"{Q} reaches .* overflows to infinity in float16; store it as float32"):
        model.save_pretrained(tmp_path / "m", "float16", merged=True)
    for merged in (True, False):
        with pytest.raises(ValueError, match="dtype is 'int8'; expected one of float64, float32, float16, bfloat16"):
            model.save_pretrained(tmp_path / "m", "int8", merged=merged)
    model.attachments["a"].parameters[f"{Q}@a.B"].data[:] = numpy.inf
    with pytest.raises(ValueError, match=f"{Q} holds NaN or infinity"), numpy.errstate(all="ignore"):
        model.save_pretrained(tmp_path / "m", merged=True)
    assert not (tmp_path / "m").exists()


class Rounds(minipeft.Reparam):
    """A piece that merges in a way of its own: into whole numbers."""

    def dense(self) -> Any:
        return self.base.dense() + self.d

    def merged(self) -> Any:
        return minipeft.Parameter(self.dense().data.round())


def test_a_merged_entry_that_its_method_makes_in_a_way_of_its_own_is_what_is_written(tmp_path):
    model = CASE.model()
    slot = model.slots[Q]
    piece = Rounds(d=minipeft.Parameter(2 * RNG(0).standard_normal(slot.shape).astype("float32")))
    constant = piece.over(slot.base).merged()
    held = Held({slot: piece})
    held.state, held.places, held.name = "merged", {Q: slot}, "a"  # type: ignore[attr-defined]
    model.host.now = model.host.now.replace({"a": held}, {"a": {slot: constant}})
    model.save_pretrained(tmp_path, merged=True)
    assert (read_tensors(tmp_path / "model.safetensors")[0][Q] == constant.data).all()
