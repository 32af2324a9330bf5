"""T5 against transformers, LoRA on it against peft, LoRA alone against loralib: the numbers in tests/fixtures.

The tolerances are the project's: float64 outputs to 1e-12 and gradients to 1e-10 of the tensor's largest entry, AdamW
to 1e-11, float32 logits to 1e-5."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from minipeft import AdamW, LoRA, Parameter, T5, attach, select, value_and_grad
from minipeft.files import read_tensors
from minipeft.models.decoding import decode
from minipeft.nn.layers import Embedding, Linear
from minipeft.nn.module import Model
from minipeft.nn.positions import bucket

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDERS = ["v10", "v11", "deep", "bf16"]
BATCH = ("input_ids", "attention_mask", "labels", "decoder_input_ids")


def golden(*path: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES.joinpath(*path)) as arrays:
        return dict(arrays)


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    """Relative to the tensor's largest entry."""
    return found.shape == expected.shape and np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def gradients_of(g: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key.removeprefix("grad/"): value for key, value in g.items() if key.startswith("grad/")}


@pytest.fixture(params=FOLDERS)
def case(request) -> tuple[T5, dict[str, np.ndarray]]:
    return (T5.from_pretrained(FIXTURES / "t5" / request.param, "float64"),
            golden("t5", request.param, "golden.npz"))


def test_encoder_states_logits_and_loss_agree_to_1e_12(case):
    model, g = case
    ids, mask, labels, targets = (g[key] for key in BATCH)
    assert close(model.encode(ids, mask).data, g["encoder_last_hidden_state"], 1e-12)
    assert close(model(ids, targets, mask).data, g["logits"], 1e-12)
    assert close(model.loss(ids, labels, mask).data, g["loss"], 1e-12)


def test_labels_are_shifted_as_the_golden_decoder_input(case):
    model, g = case
    assert np.array_equal(model.shift_right(g["labels"]), g["decoder_input_ids"])


def test_every_gradient_agrees_to_1e_10_of_its_largest_entry(case):
    model, g = case
    loss, grads = value_and_grad(lambda: model.loss(g["input_ids"], g["labels"], g["attention_mask"]),
                                 select(model, ".*"))
    expected = gradients_of(g)
    assert {T5.to_hf_name(name) for name in grads} == set(expected), "every golden gradient, and no other"
    assert abs(loss - g["loss"]) <= 1e-12 * abs(g["loss"])
    for name, found in grads.items():
        assert close(found, expected[T5.to_hf_name(name)], 1e-10), name


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
    assert len(expected) == 3
    for key, value in expected.items():
        assert close(params[T5.from_hf_name(key)].data, value, 1e-11), key


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("folder", FOLDERS)
def test_greedy_ids_are_those_of_transformers_with_and_without_a_cache(folder, use_cache, dtype):
    model, g = T5.from_pretrained(FIXTURES / "t5" / folder, dtype), golden("t5", folder, "golden.npz")
    found = model.generate(g["input_ids"], g["attention_mask"], int(g["max_new_tokens"]), use_cache=use_cache)
    assert np.array_equal(found, g["greedy_ids"])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("folder", FOLDERS)
def test_beam_search_gives_the_ids_and_to_1e_5_the_scores_of_transformers(folder, use_cache, dtype):
    """transformers fills answers that ended with eos, and we with pad. Its logarithms of probabilities are float32."""
    model, g = T5.from_pretrained(FIXTURES / "t5" / folder, dtype), golden("t5", folder, "golden.npz")
    ids, scores = decode(model, g["input_ids"], g["attention_mask"], int(g["max_new_tokens"]), None, use_cache, 3)
    assert np.array_equal(filled_with_eos(ids, g["beam_ids"].shape), g["beam_ids"])
    assert np.abs(scores - g["beam_scores"]).max() <= 1e-5


@pytest.mark.parametrize("folder", FOLDERS)
def test_beam_search_is_that_of_transformers_for_every_length_penalty_and_early_stopping(folder):
    model, g = T5.from_pretrained(FIXTURES / "t5" / folder, "float64"), golden("t5", folder, "golden.npz")
    beams = golden("t5", "beams.npz")
    for i, (k, penalty, stopping) in enumerate(zip(*(beams[key].tolist() for key in (
            "num_beams", "length_penalty", "early_stopping")))):
        ids, scores = decode(model, g["input_ids"], g["attention_mask"], 12, num_beams=k, length_penalty=penalty,
                             early_stopping={"True": True, "False": False}.get(stopping, stopping))
        wanted, said = beams[f"{folder}/scores"][i], beams[f"{folder}/ids"][i]
        assert np.array_equal(filled_with_eos(ids, said.shape), said), (k, penalty, stopping)
        assert np.abs(scores / wanted - 1).max() <= 1e-5, (k, penalty, stopping)
    assert len({said.tobytes() for said in beams[f"{folder}/ids"]}) > 5, "the settings make a difference"


def filled_with_eos(ids: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """ids with eos (1) behind the end of every row, in place of pad (0)."""
    found = np.ones(shape, dtype=ids.dtype)
    for row, said in zip(found, ids):
        end = said.tolist().index(1) if 1 in said else len(said)
        row[:end] = said[:end]
        assert not said[end + 1:].any(), "pad"
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_float32_logits_agree_to_1e_5_of_the_largest(folder):
    model, g = T5.from_pretrained(FIXTURES / "t5" / folder), golden("t5", folder, "golden.npz")
    logits = model(g["input_ids"], g["decoder_input_ids"], g["attention_mask"])
    assert logits.dtype == np.float32 and close(logits.data, g["logits"], 1e-5)
    assert close(model.encode(g["input_ids"], g["attention_mask"]).data, g["encoder_last_hidden_state"], 1e-5)


BUCKETS = golden("t5", "buckets.npz")


@pytest.mark.parametrize("key", sorted(set(BUCKETS) - {"relative_position"}))
def test_relative_position_buckets_are_those_of_transformers(key):
    buckets, distance, kind = key.split("_")
    found = bucket(BUCKETS["relative_position"], int(buckets), int(distance), kind == "bidirectional")
    assert np.array_equal(found, BUCKETS[key])


def test_buckets_in_the_sheet_hold():
    """The published check values of T5's (32, 128) and of a small (8, 12)."""
    far = {-130: 15, -91: 15, -64: 14, -32: 12, -16: 10, -12: 9, -11: 8, -8: 8, -7: 7, -1: 1, 0: 0, 1: 17, 7: 23,
           8: 24, 16: 26, 127: 31, 128: 31}
    assert bucket(np.array(list(far)), 32, 128, True).tolist() == list(far.values())
    causal = {5: 0, 0: 0, -1: 1, -15: 15, -16: 16, -31: 21, -64: 26, -113: 31, -200: 31}
    assert bucket(np.array(list(causal)), 32, 128, False).tolist() == list(causal.values())
    assert "".join(map(str, bucket(np.arange(-14, 15), 8, 12, True))) == "3" * 10 + "222105666" + "7" * 10
    assert "".join(map(str, bucket(np.arange(-14, 3), 8, 12, False))) == "77777666544321000"


# ------------------------------------------------------------------------------------------------- peft's LoRA on T5

LORA = FIXTURES / "adapters" / "lora_qv"


def adapted() -> tuple:
    """(model with peft's A and B in an attachment of ours, attachment, golden, {peft's key: our name})."""
    values, g = json.loads((LORA / "adapter_config.json").read_text()), golden("adapters", "lora_qv", "golden.npz")
    model = T5.from_pretrained(FIXTURES / str(g["base"]), "float64")
    method = LoRA(values["r"], values["lora_alpha"], where=rf"\.({'|'.join(values['target_modules'])})\.weight$")
    attachment = attach(model, method, np.random.default_rng(0))
    names = {}
    for key, array in read_tensors(LORA / "adapter_model.safetensors")[0].items():
        module, leaf, _ = key.removeprefix("base_model.model.").rsplit(".", 2)
        names[key] = f"{T5.from_hf_name(module + '.weight')}@lora.{leaf.removeprefix('lora_')}"
        assert attachment.parameters[names[key]].shape == array.shape
        attachment.parameters[names[key]].data = array.astype("float64")
    assert set(names.values()) == set(attachment.parameters), "every one of our arrays is filled from the file"
    return model, attachment, g, names


def test_lora_logits_plugged_merged_and_unplugged_are_those_of_peft():
    model, attachment, g, _ = adapted()
    run = lambda: model(g["input_ids"], g["decoder_input_ids"], g["attention_mask"]).data  # noqa: E731
    plugged = run()
    assert close(plugged, g["logits"], 1e-12)
    assert not close(g["logits"], g["logits_base"], 1e-2), "the adapter does something"
    attachment.merge()
    assert close(run(), g["logits_merged"], 1e-12)
    attachment.unmerge()
    assert np.array_equal(run(), plugged)
    attachment.unplug()
    assert close(run(), g["logits_base"], 1e-12)


def test_lora_gradients_of_the_summed_loss_are_those_of_peft():
    model, attachment, g, names = adapted()
    loss, grads = value_and_grad(
        lambda: model.loss(g["input_ids"], g["labels"], g["attention_mask"]) * int(g["n_label_tokens"]),
        attachment.parameters)
    assert abs(loss - g["loss_sum"]) <= 1e-12 * g["loss_sum"]
    expected = gradients_of(g)
    assert set(expected) == set(names)
    for key, value in expected.items():
        assert close(grads[names[key]], value, 1e-10), key


# ------------------------------------------------------------------------------------------------------ loralib, alone

class Lone(Model):
    """A model of one layer."""

    def __init__(self, layer: Linear | Embedding):
        self.layer = layer


def with_lora(layer: Linear | Embedding, g: dict[str, np.ndarray], a: np.ndarray, b: np.ndarray):
    model = Lone(layer)
    attachment = attach(model, LoRA(int(g["r"]), int(g["lora_alpha"]), where="weight"), np.random.default_rng(0))
    for leaf, array in (("A", a), ("B", b)):
        assert attachment.parameters[f"layer.weight@lora.{leaf}"].shape == array.shape
        attachment.parameters[f"layer.weight@lora.{leaf}"].data = array
    return model, attachment


def test_a_linear_layer_with_lora_is_that_of_loralib():
    g = golden("loralib", "linear.npz")
    layer = Linear(g["param/weight"], g["param/bias"])
    model, attachment = with_lora(layer, g, g["param/lora_A"], g["param/lora_B"])
    x = Parameter(g["x"])
    assert close(layer(x).data, g["y"], 1e-12)
    _, grads = value_and_grad(lambda: (layer(x) * g["dy"]).sum(), {**select(model, "."), "x": x})
    ours = {"layer.weight@lora.A": "lora_A", "layer.weight@lora.B": "lora_B", "x": "x", "layer.weight": "weight",
            "layer.bias": "bias"}
    expected = gradients_of(g)
    assert set(expected) <= set(ours.values()) and {"lora_A", "lora_B", "x"} <= set(expected)
    for name, key in ours.items():
        if key in expected:
            assert close(grads[name], expected[key], 1e-10), name
    attachment.merge()
    assert close(layer.weight.fold().dense().data, g["merged_weight"], 1e-12)
    assert close(layer(x).data, g["y_merged"], 1e-12)
    attachment.unmerge()
    attachment.unplug()
    assert np.array_equal(layer.weight.fold().dense().data, g["param/weight"]), "here every bit comes back"


def test_an_embedding_with_lora_is_that_of_loralib_whose_a_and_b_change_places():
    """loralib: W + s (B A)^T with A [r, vocab], B [d, r].   Here: W + s B A with B [vocab, r], A [r, d]."""
    g = golden("loralib", "embedding.npz")
    layer = Embedding(g["param/weight"])
    model, attachment = with_lora(layer, g, g["param/lora_B"].T, g["param/lora_A"].T)
    assert close(layer(g["x"]).data, g["y"], 1e-12)
    _, grads = value_and_grad(lambda: (layer(g["x"]) * g["dy"]).sum(), attachment.parameters)
    expected = gradients_of(g)
    assert set(expected) == {"lora_A", "lora_B"}
    assert close(grads["layer.weight@lora.A"], expected["lora_B"].T, 1e-10)
    assert close(grads["layer.weight@lora.B"], expected["lora_A"].T, 1e-10)
    attachment.merge()
    assert close(layer.weight.fold().dense().data, g["merged_weight"], 1e-12)
    assert close(layer(g["x"]).data, g["y_merged"], 1e-12)
