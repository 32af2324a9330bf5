"""Bottleneck adapters against AdapterHub's, on T5: the numbers in tests/fixtures/bottleneck.

The tolerances are the project's: float64 outputs to 1e-12 and gradients to 1e-10 of the tensor's largest entry."""
from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from minipeft import T5, Bottleneck, attach, value_and_grad
from minipeft.files import read_tensors
from tests.methods.golden import close

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDERS = ["seq_bn", "double_seq_bn", "double_seq_bn_cross", "par_bn"]
SUBLAYERS = {"encoder": ("attn", "ff"), "decoder": ("attn", "cross", "ff")}
LEAVES = {"adapter_down.0.weight": "D", "adapter_down.0.bias": "b_D", "adapter_up.weight": "U",
          "adapter_up.bias": "b_U"}


def our_name(key: str) -> str:
    """encoder.block.0.layer.1.adapters.a.adapter_up.bias -> encoder.0.ff.out@a.b_U"""
    found = re.fullmatch(r"(encoder|decoder)\.block\.(\d+)\.layer\.(\d)\.adapters\.a\.(.+)", key)
    assert found, key
    stack, block, layer, leaf = found.groups()
    return f"{stack}.{block}.{SUBLAYERS[stack][int(layer)]}.out@a.{LEAVES[leaf]}"


def method_of(folder: str, config: dict) -> Bottleneck:
    """By AdapterHub's name. What follows from it is left to the placement: h, s, f, and where the adapters stand."""
    return Bottleneck(folder.removesuffix("_cross"), config["reduction_factor"], cross=config["cross_adapter"],
                      init={"bert": "bert", "mam_adapter": "zeros"}[config["init_weights"]])


@pytest.fixture(params=FOLDERS)
def case(request):
    """(model with AdapterHub's numbers in an attachment of ours, attachment, golden, their configuration)."""
    folder = FIXTURES / "bottleneck" / request.param
    with np.load(folder / "golden.npz") as arrays:
        g = dict(arrays)
    config = json.loads((folder / "adapter_config.json").read_text())["config"]
    model = T5.from_pretrained(FIXTURES / str(g["base"]), "float64")
    attachment = attach(model, method_of(request.param, config), np.random.default_rng(0), "a")
    theirs = {our_name(key): array.astype("float64")
              for key, array in read_tensors(folder / "adapter.safetensors")[0].items()}
    assert set(theirs) == set(attachment.parameters), "their adapters and ours stand at the same places"
    for name, array in theirs.items():
        assert attachment.parameters[name].shape == array.shape, name
        attachment.parameters[name].data = array
    return model, attachment, g, config


def test_the_scale_and_the_activation_are_theirs(case):
    _, attachment, _, config = case
    assert all(place.attached["a"].scale == config["scaling"] for place in attachment.places.values())
    assert attachment.method.activation == config["non_linearity"]


def test_logits_plugged_and_unplugged_are_those_of_adapterhub(case):
    model, attachment, g, _ = case
    run = lambda: model(g["input_ids"], g["decoder_input_ids"], g["attention_mask"]).data  # noqa: E731
    assert close(run(), g["logits"], 1e-12)
    assert not close(g["logits"], g["logits_base"], 1e-2), "the adapter does something"
    attachment.unplug()
    assert close(run(), g["logits_base"], 1e-12)


def test_loss_and_every_gradient_are_those_of_adapterhub(case):
    model, attachment, g, _ = case
    loss, grads = value_and_grad(lambda: model.loss(g["input_ids"], g["labels"], g["attention_mask"]),
                                 attachment.parameters)
    assert abs(loss - g["loss"]) <= 1e-12 * g["loss"]
    expected = {our_name(key.removeprefix("grad/")): value for key, value in g.items() if key.startswith("grad/")}
    assert set(expected) == set(grads), "every golden gradient, and no other"
    for name, value in expected.items():
        assert close(grads[name] * int(g["n_label_tokens"]), value, 1e-10), name
