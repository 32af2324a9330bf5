"""Decoder against transformers: the numbers in tests/fixtures/decoder.

The tolerances are the project's: float64 outputs to 1e-12 and gradients to 1e-10 of the tensor's largest entry, AdamW
to 1e-11."""
from __future__ import annotations

import shutil

import numpy as np
import pytest

from minipeft import AdamW, Decoder, select, value_and_grad
from minipeft.engine.tensor import array_of
from minipeft.nn.rotary import Frequencies
from tests.models.test_t5_golden import FIXTURES, close, golden, gradients_of

FOLDERS = ["llama3", "qwen3", "bf16"]


@pytest.fixture(params=FOLDERS)
def case(request) -> tuple[Decoder, dict[str, np.ndarray]]:
    return (Decoder.from_pretrained(FIXTURES / "decoder" / request.param, "float64"),
            golden("decoder", request.param, "golden.npz"))


def seen(g: dict[str, np.ndarray]) -> np.ndarray:
    """[batch, time]: all but padding on the left, whose positions see no token."""
    return g["attention_mask"].cumsum(axis=1) > 0


def test_logits_and_loss_agree_to_1e_12_in_rows_padded_on_either_side(case):
    model, g = case
    mask = g["attention_mask"]
    assert (mask[:, 0] == 0).any() and (mask[:, -1] == 0).any()
    assert close(model(g["input_ids"], mask).data[seen(g)], g["logits"][seen(g)], 1e-12)
    assert close(model.loss(g["input_ids"], g["labels"], mask).data, g["loss"], 1e-12)


def test_hidden_states_of_every_layer_agree_to_1e_12():
    model, g = Decoder.from_pretrained(FIXTURES / "decoder" / "qwen3", "float64"), golden("decoder", "qwen3",
                                                                                          "golden.npz")
    states, stack = [], model.decoder
    x = model.embed(g["input_ids"])
    mask = g["attention_mask"].astype(bool)
    for count in range(len(stack.blocks) + 1):
        kept, stack.blocks = stack.blocks, stack.blocks[:max(count, 1)]
        norm, stack.norm = stack.norm, stack.norm if count == len(kept) else lambda x: x
        states.append(array_of(stack(x, mask)) if count else x.data)
        stack.blocks, stack.norm = kept, norm
    for i, found in enumerate(states):
        assert close(found[seen(g)], g[f"hidden_states/{i}"][seen(g)], 1e-12), i


def test_every_gradient_agrees_to_1e_10_of_its_largest_entry(case):
    model, g = case
    loss, grads = value_and_grad(lambda: model.loss(g["input_ids"], g["labels"], g["attention_mask"]),
                                 select(model, ".*"))
    expected = gradients_of(g)
    assert {Decoder.to_hf_name(name) for name in grads} == set(expected), "every golden gradient, and no other"
    assert abs(loss - g["loss"]) <= 1e-12 * abs(g["loss"])
    for name, found in grads.items():
        assert close(found, expected[Decoder.to_hf_name(name)], 1e-10), name


def test_three_adamw_steps_agree_to_1e_11(case):
    model, g = case
    params, optimizer, losses = select(model, ".*"), AdamW(1e-3, (0.9, 0.999), 1e-8, 0.01), []
    for _ in range(3):
        loss, grads = value_and_grad(lambda: model.loss(g["input_ids"], g["labels"], g["attention_mask"]), params)
        optimizer.step(params, grads)
        losses.append(loss)
    losses.append(model.loss(g["input_ids"], g["labels"], g["attention_mask"]).data.item())
    assert close(np.array(losses), g["adamw/losses"], 1e-11)
    expected = {key.removeprefix("adamw/param/"): value for key, value in g.items() if key.startswith("adamw/param/")}
    assert expected
    for key, value in expected.items():
        assert close(params[Decoder.from_hf_name(key)].data, value, 1e-11), key


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("folder", FOLDERS)
def test_greedy_ids_are_those_of_transformers_with_and_without_a_cache(folder, use_cache, dtype):
    model, g = Decoder.from_pretrained(FIXTURES / "decoder" / folder, dtype), golden("decoder", folder, "golden.npz")
    found = model.generate(g["gen_input_ids"], g["gen_attention_mask"], int(g["max_new_tokens"]), use_cache=use_cache)
    assert np.array_equal(found, g["greedy_ids"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_older_form_of_the_configuration_means_the_same(folder, tmp_path):
    source = FIXTURES / "decoder" / folder
    shutil.copy(source / "model.safetensors", tmp_path)
    shutil.copy(source / "config_v4.json", tmp_path / "config.json")
    assert Decoder.from_pretrained(tmp_path).config == Decoder.from_pretrained(source).config


def test_the_frequencies_are_those_of_transformers(case):
    model, g = case
    assert close(model.decoder.position.frequencies, g["inv_freq"], 4e-16), "two roundings of a power and a quotient"


def test_llama3_leaves_high_frequencies_divides_low_ones_and_blends_between():
    f = Frequencies(500000.0).of(64)
    scaled = Frequencies(500000.0, "llama3", 8.0, 1.0, 4.0, 8192).of(64)
    ratio = f / scaled
    assert ratio[0] == 1 and ratio[-1] == 8 and ((1 < ratio) & (ratio < 8)).any()
    assert (np.diff(ratio) >= 0).all()
    assert np.array_equal(Frequencies(10000.0, "linear", 4.0).of(8) * 4, Frequencies().of(8))
