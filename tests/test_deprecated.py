"""The names of version 0.1 work, warn, and mean what they meant."""
import dataclasses
import importlib
import subprocess
import sys

import pytest

import minipeft
from minipeft.engine import ops
from minipeft.engine.tensor import backward
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Fixed


@pytest.mark.parametrize("old, name, new", [
    ("minipeft.peft.lora", "LoRA", "minipeft.methods.lora"),
    ("minipeft.peft.attach", "attach", "minipeft.attaching.attach"),
    ("minipeft.peft.load", "load", "minipeft.attaching.load"),
    ("minipeft.autograd.tensor", "Tensor", "minipeft.engine.tensor"),
    ("minipeft.ops", "linear", "minipeft.engine.ops"), ("minipeft.ops.fused", "attention", "minipeft.engine.ops.fused"),
    ("minipeft.peft.selective", "Selective", "minipeft.methods.selective")])
def test_a_module_that_moved_is_found_under_its_old_name_with_a_warning(old, name, new):
    code = (f"import warnings; warnings.simplefilter('error'); import minipeft\n"
            f"warnings.simplefilter('always')\n"
            f"with warnings.catch_warnings(record=True) as seen:\n    from {old} import {name}\n"
            f"import {new} as new\n"
            f"assert {name} is new.{name}\n"
            f"print([str(w.message) for w in seen if w.category is DeprecationWarning][-1])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == f"{old} is called {new} since minipeft 0.2; the old name goes in 0.3\n"


def test_an_old_module_that_never_was_is_still_missing():
    with pytest.warns(DeprecationWarning), pytest.raises(ImportError):
        importlib.import_module("minipeft.peft.nothing_like_this")


@pytest.mark.parametrize("make, new", [
    (lambda: minipeft.LoRA(2, start="kaiming"), minipeft.LoRA(2, init="kaiming")),
    (lambda: minipeft.PromptTuning(3, start="random"), minipeft.PromptTuning(3, init="random")),
    (lambda: minipeft.Selective(type="norm scale"), minipeft.Selective(type="norm weight")),
    (lambda: minipeft.Selective(type=("bias", "norm scale")), minipeft.Selective(type=("bias", "norm weight")))])
def test_an_old_field_or_value_means_the_new_one(make, new):
    with pytest.warns(DeprecationWarning, match="since minipeft 0.2; the old name goes in 0.3"):
        assert make() == new


def test_an_old_field_is_read_under_its_old_name():
    with pytest.warns(DeprecationWarning, match="the field start of LoRA is called init"):
        assert minipeft.LoRA(init="kaiming").start == "kaiming"


@pytest.mark.parametrize("make", [lambda: minipeft.LoRA(2, init="uniform"),
                                  lambda: minipeft.LoRA(2, 16, 0.0, minipeft.LoRA.where, "uniform"),
                                  lambda: dataclasses.replace(minipeft.LoRA(2), init="uniform")])
def test_an_init_of_0_2_means_the_new_one_by_name_and_by_position(make):
    with pytest.warns(DeprecationWarning) as seen:
        assert make() == minipeft.LoRA(2, init="kaiming")
    assert [str(w.message) for w in seen] == [
        "'uniform' is called 'kaiming' since minipeft 0.3; the old name goes in 0.4"]


def test_old_names_of_functions_and_classes_are_the_new_ones():
    from minipeft.engine import tensor
    from minipeft.nn import weight
    with pytest.warns(DeprecationWarning):
        assert ops.swap is ops.matrix_transpose
    with pytest.warns(DeprecationWarning):
        assert tensor.pullback is backward
    with pytest.warns(DeprecationWarning):
        assert weight.Constant is Fixed
    with pytest.warns(DeprecationWarning):
        assert weight.Slot is Slot
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        ops.nothing


def test_the_new_names_warn_of_nothing():
    minipeft.LoRA(2, init="kaiming")
    minipeft.Selective(type="norm weight")
    assert ops.matrix_transpose and weight_has_slot()


def weight_has_slot():
    return Slot.__module__ == "minipeft.nn.slot"


def test_old_names_are_found_in_old_modules():
    code = ("import warnings; warnings.simplefilter('ignore')\n"
            "from minipeft.ops import swap\nfrom minipeft.ops.primitives import swap as again\n"
            "from minipeft.autograd.tensor import pullback\nimport minipeft\n"
            "from minipeft.engine.tensor import backward\n"
            "print(swap.__name__, again is swap, pullback is backward, minipeft.ops.linear.__name__)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "matrix_transpose True True linear\n"


def test_old_packages_are_attributes_as_they_were():
    code = ("import warnings; warnings.simplefilter('ignore')\nimport minipeft\n"
            "print(minipeft.peft.lora.LoRA is minipeft.LoRA, minipeft.autograd.tensor.Tensor is minipeft.Tensor)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "True True\n"
