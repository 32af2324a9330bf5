"""The head that AdapterHub saves beside an adapter: it must be that of the model, or be left alone on request."""
from __future__ import annotations

import pickle
import re

import numpy
import pytest

import minipeft
from minipeft.files import read_tensors, write_tensors
from minipeft.formats import adapterhub
from tests.formats.adapterhub.folders import base, copied
from tests.models_under_test import bits

WAY_OUT = re.escape("minipeft.formats.adapterhub.load(model, directory, with_head=False)")
HEADS = {
    "one number": (lambda t: t["lm_head.weight"].__setitem__((3, 4), 7), "lm_head.weight in .* differs from the head"),
    "another vocabulary": (lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:-1]}), r"shape \[40, 12\]; exp"),
    "a classifier": (lambda t: t.update({"heads.a.1.weight": numpy.ones((2, 12), "float32")}), "'heads.a.1.weight' of"),
    "another array": (lambda t: t.update({"shared.weight": t["lm_head.weight"]}), "has 'shared.weight' of shape"),
    "NaN": (lambda t: t["lm_head.weight"].__setitem__((3, 4), numpy.nan), "differs from the head")}


@pytest.mark.parametrize("case", HEADS)
def test_another_head_than_that_of_the_model_is_refused_and_can_be_left_alone(case, tmp_path):
    (change, message), model = HEADS[case], base("ia3")
    path = copied("ia3", tmp_path / "a", head=True)
    head = read_tensors(path / "model_head.safetensors")[0]
    change(head)
    write_tensors(path / "model_head.safetensors", head, signed=False)
    before = bits(model.base_parameters)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{message}.*{WAY_OUT}"):
        minipeft.load(model, path)
    assert not model.attachments
    adapterhub.load(model, path, with_head=False).remove()
    assert bits(model.base_parameters) == before


def test_the_head_of_the_model_is_accepted_under_both_names_and_in_any_precision_that_holds_it(tmp_path):
    for n, name in enumerate(("lm_head.weight", "heads.a.0.weight")):
        path = copied("ia3", tmp_path / f"{n}", head=True)
        head = read_tensors(path / "model_head.safetensors")[0]
        write_tensors(path / "model_head.safetensors", {name: head["lm_head.weight"].astype("float64")}, signed=False)
        minipeft.load(base("ia3"), path).remove()


def test_the_head_of_a_tied_model_is_its_table(tmp_path):
    model, path = base("double_seq_bn"), copied("double_seq_bn", tmp_path / "a")
    table = model.slots["embedding.weight"].base.data
    write_tensors(path / "model_head.safetensors", {"lm_head.weight": table}, signed=False)
    minipeft.load(model, path).remove()
    write_tensors(path / "model_head.safetensors", {"lm_head.weight": -table}, signed=False)
    with pytest.raises(ValueError, match="differs from the head of this model"):
        minipeft.load(model, path)


def test_a_head_in_a_pickle_is_not_passed_over_in_silence(tmp_path):
    model, path = base("ia3"), copied("ia3", tmp_path / "a")
    (path / "pytorch_model_head.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match=f"pytorch_model_head.bin is a pickle.*'model_head.safetensors'.*{WAY_OUT}"):
        minipeft.load(model, path)
    adapterhub.load(model, path, with_head=False).remove()


def test_the_head_may_repeat_the_arrays_of_a_prefix_and_no_others(tmp_path):
    model, path = base("prefix_flat"), copied("prefix_flat", tmp_path / "a", head=True)
    adapterhub.load(model, path, as_adapterhub=True).remove()
    head = read_tensors(path / "model_head.safetensors")[0]
    assert len(head) == 4
    head["prefix_tuning.prefix_tunings.a.self_prefix.control_trans"][5] += 1
    write_tensors(path / "model_head.safetensors", head, signed=False)
    with pytest.raises(ValueError, match="self_prefix.control_trans in model_head.safetensors differs"):
        adapterhub.load(model, path, as_adapterhub=True)
