"""Prompt tuning and P-tuning against peft's, on T5: the numbers in tests/fixtures/adapters.

Of P-tuning peft saves the rows that its prompt encoder computes, without the encoder. They are a prompt like any other.

The tolerances are the project's: float64 outputs to 1e-12 and gradients to 1e-10 of the tensor's largest entry."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from minipeft import T5, PromptTuning, attach, value_and_grad
from minipeft.files import read_tensors
from tests.methods.golden import close

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(params=["prompt_tuning", "prompt_tuning_tied", "p_tuning", "p_tuning_lstm"])
def case(request):
    """(model with peft's first P rows as our prompt, attachment, golden, the rows of its file, its configuration)."""
    folder = FIXTURES / "adapters" / request.param
    with np.load(folder / "golden.npz") as arrays:
        g = dict(arrays)
    config = json.loads((folder / "adapter_config.json").read_text())
    model = T5.from_pretrained(FIXTURES / str(g["base"]), "float64")
    length = config["num_virtual_tokens"]
    assert length == g["num_virtual_tokens"]
    attachment = attach(model, PromptTuning(length), np.random.default_rng(0), "prompt")
    rows = read_tensors(folder / "adapter_model.safetensors")[0]["prompt_embeddings"].astype("float64")
    (p,) = attachment.parameters.values()
    assert p.shape == rows[:length].shape
    p.data = rows[:length].copy()
    return model, attachment, g, rows, config


def test_the_file_has_p_rows_for_every_submodule_of_which_only_the_first_p_have_a_gradient(case):
    """On an encoder-decoder model peft makes two submodules by default, and trains one: half of the rows are dead."""
    _, _, g, rows, config = case
    length = config["num_virtual_tokens"]
    assert len(rows) == length * config["num_transformer_submodules"]
    assert g["grad/prompt_embeddings"][:length].all() and not g["grad/prompt_embeddings"][length:].any()


def test_logits_plugged_and_unplugged_are_those_of_peft(case):
    model, attachment, g, _, _ = case
    run = lambda: model(g["input_ids"], g["decoder_input_ids"], g["attention_mask"]).data  # noqa: E731
    assert close(run(), g["logits"], 1e-12)
    assert not close(g["logits"], g["logits_base"], 1e-2), "the prompt does something"
    attachment.unplug()
    assert close(run(), g["logits_base"], 1e-12)


def test_loss_and_gradient_are_those_of_peft(case):
    model, attachment, g, _, config = case
    loss, grads = value_and_grad(lambda: model.loss(g["input_ids"], g["labels"], g["attention_mask"]),
                                 attachment.parameters)
    assert abs(loss - g["loss"]) <= 1e-12 * g["loss"]
    assert list(grads) == ["encoder.input@prompt.P"]
    expected = g["grad/prompt_embeddings"][:config["num_virtual_tokens"]]
    assert close(grads["encoder.input@prompt.P"] * int(g["n_label_tokens"]), expected, 1e-10)
