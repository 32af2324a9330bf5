"""Prefix tuning against peft's, on T5: the numbers in tests/fixtures/adapters/prefix_tuning.

peft gives a prefix to the decoder's self-attention alone, as earlier tokens. It cuts its parameters into slices, and
two layers of the decoder share a slice: our layers have a K and a V of their own, filled with the same numbers.

The tolerances are the project's: float64 outputs to 1e-12 and gradients to 1e-10 of the tensor's largest entry."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from minipeft import T5, PrefixTuning, attach, value_and_grad
from minipeft.files import read_tensors
from tests.methods.golden import close

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDER = FIXTURES / "adapters" / "prefix_tuning"


@pytest.fixture
def case():
    """(model with peft's slices as our prefix, attachment, golden)."""
    with np.load(FOLDER / "golden.npz") as arrays:
        g = dict(arrays)
    model = T5.from_pretrained(FIXTURES / str(g["base"]), "float64")
    p, c = int(g["num_virtual_tokens"]), model.config
    attachment = attach(model, PrefixTuning(p, "decoder", "earlier"), np.random.default_rng(0), "prefix")
    rows = read_tensors(FOLDER / "adapter_model.safetensors")[0]["prompt_embeddings"].astype("float64")
    slices = rows.reshape(p, 2 * c.num_layers, c.d_model)
    for layer, pair in enumerate(g["layer_slices"]):
        for leaf, at in zip("KV", pair):
            attachment.parameters[f"decoder.{layer}.attn.keys_values@prefix.{leaf}"].data = slices[:, at].copy()
    return model, attachment, g


def test_logits_plugged_and_unplugged_are_those_of_peft(case):
    model, attachment, g = case
    run = lambda: model(g["input_ids"], g["decoder_input_ids"], g["attention_mask"]).data  # noqa: E731
    assert close(run(), g["logits"], 1e-12)
    assert not close(g["logits"], g["logits_base"], 1e-2), "the prefix does something"
    attachment.unplug()
    assert close(run(), g["logits_base"], 1e-12)


def test_the_gradient_of_a_slice_is_the_sum_of_ours_over_the_layers_that_use_it(case):
    """And nothing of the slices that no layer uses."""
    model, attachment, g = case
    loss, grads = value_and_grad(lambda: model.loss(g["input_ids"], g["labels"], g["attention_mask"]),
                                 attachment.parameters)
    assert abs(loss - g["loss"]) <= 1e-12 * g["loss"]
    expected = g["grad/prompt_embeddings"]
    found = np.zeros((len(expected), len(g["slice_has_grad"]), model.config.d_model))
    for layer, pair in enumerate(g["layer_slices"]):
        for leaf, at in zip("KV", pair):
            found[:, at] += grads[f"decoder.{layer}.attn.keys_values@prefix.{leaf}"] * int(g["n_label_tokens"])
    assert close(found.reshape(expected.shape), expected, 1e-10)
    assert found.any(axis=(0, 2)).tolist() == g["slice_has_grad"].tolist()
