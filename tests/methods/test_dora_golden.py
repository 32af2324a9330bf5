"""DoRA against PEFT's, on T5: the numbers in tests/fixtures/adapters/dora. PEFT's norm is a constant for the gradient,
and so is ours.

The tolerances are the project's: float64 outputs to 1e-12 and gradients to 1e-10 of the tensor's largest entry."""
from __future__ import annotations

import json

import numpy
import pytest

from minipeft import DoRA, value_and_grad
from tests.methods.golden import FIXTURES, Golden, as_it_is, close, our_layer, parts

LEAVES = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "m"}


def our_key(key: str) -> str:
    layer, leaf = parts(r"(.+?)\.(lora_.+)", key)
    return f"{our_layer(layer)}.weight@a.{LEAVES[leaf]}"


def golden(**fields) -> Golden:
    config = json.loads((FIXTURES / "adapters" / "dora" / "adapter_config.json").read_text())
    assert config["use_dora"] and config["target_modules"] == ["q", "v"]
    return Golden.of("dora", DoRA(config["r"], config["lora_alpha"], **fields), our_key, as_it_is)


@pytest.fixture
def case():
    return golden()


def test_logits_plugged_merged_and_unplugged_are_those_of_peft(case):
    case.check_outputs()


def test_loss_and_every_gradient_are_those_of_peft_whose_norm_is_detached(case):
    case.check_gradients()


def test_with_the_gradient_through_the_norm_the_outputs_are_the_same_and_the_gradients_of_a_and_b_are_not():
    case, g = golden(detach=False), golden().g
    case.check_outputs()
    grads = value_and_grad(lambda: case.model.loss(g["input_ids"], g["labels"], g["attention_mask"]),
                           case.attachment.parameters)[1]
    for name, value in case.expected.items():
        same = close(grads[name] * int(g["n_label_tokens"]), value.reshape(grads[name].shape), 1e-10)
        assert same == name.endswith(".m"), name


def test_the_stored_lengths_are_not_the_norms_of_v(case):
    """Or else a DoRA that forgets m would pass."""
    for place in case.attachment.places.values():
        piece = place.attached["a"]
        V = place.base.data + float(piece.scale) * piece.B.data @ piece.A.data
        assert abs(piece.m.data / numpy.linalg.norm(V, axis=1, keepdims=True) - 1).max() > 0.05
