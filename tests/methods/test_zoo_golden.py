"""VeRA, LoHa, LoKr, HiRA and OFT against peft's, on T5: the numbers in tests/fixtures/zoo.

The tolerances are the project's: float64 outputs to 1e-12 and gradients to 1e-10 of the tensor's largest entry."""
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minipeft import OFT, T5, HiRA, LoHa, LoKr, VeRA, attach, load, value_and_grad
from minipeft.files import read_tensors
from tests.methods.golden import close

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDERS = ["vera_t5", "loha_t5", "lokr_t5", "lokr_both_t5", "hira_t5", "oft_t5"]
SUBLAYERS = {"encoder": ("attn", "ff"), "decoder": ("attn", "cross", "ff")}
LEAVES = {"vera_lambda_b": "b", "vera_lambda_d": "d", "hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2",
          "hada_w2_b": "A2", "hira_A": "A", "hira_B": "B", "oft_R.weight": "q",
          **{f"lokr_{leaf}": leaf for leaf in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b")}}


def our_name(key: str) -> str:
    """base_model.model.decoder.block.0.layer.2.DenseReluDense.wo.hira_A -> decoder.0.ff.wo.weight@a.A"""
    if key.startswith("base_model.vera_"):
        return f"vera@a.{key[-1]}"
    found = re.fullmatch(r"base_model\.model\.(encoder|decoder)\.block\.(\d+)\.layer\.(\d)\.\w+\.(q|wo)\.(.+)", key)
    assert found, key
    stack, block, layer, matrix, leaf = found.groups()
    return f"{stack}.{block}.{SUBLAYERS[stack][int(layer)]}.{matrix}.weight@a.{LEAVES[leaf]}"


def method_of(config: dict) -> Any:
    """What peft's configuration says, in our fields."""
    where, r = r"\.(q|wo)\.weight$", config["r"]
    assert config["target_modules"] == ["q", "wo"]
    if config["peft_type"] == "VERA":
        return VeRA(r, config["d_initial"], where, key=config["projection_prng_key"])
    if config["peft_type"] == "LOHA":
        return LoHa(r, config["alpha"], where)
    if config["peft_type"] == "LOKR":
        factor = None if config["decompose_factor"] == -1 else config["decompose_factor"]
        return LoKr(r, config["alpha"], where, factor, config["decompose_both"], full="alpha / r")
    if config["peft_type"] == "HIRA":
        return HiRA(r, where)
    assert not config["coft"]
    cayley = "neumann" if config["use_cayley_neumann"] else "transposed"
    return OFT(config["oft_block_size"], where, config["block_share"], cayley, config["num_cayley_neumann_terms"])


@pytest.fixture(params=FOLDERS)
def case(request):
    """(model with peft's trained numbers in an attachment of ours, attachment, golden)."""
    folder = FIXTURES / "zoo" / request.param
    with np.load(folder / "golden.npz") as arrays:
        g = dict(arrays)
    model = T5.from_pretrained(FIXTURES / str(g["base"]), "float64")
    method = method_of(json.loads((folder / "adapter_config.json").read_text()))
    attachment = attach(model, method, np.random.default_rng(0), "a")
    theirs = {our_name(key): array for key, array in read_tensors(folder / "adapter_model.safetensors")[0].items()}
    assert set(theirs) == set(attachment.arrays), "their adapters and ours stand at the same places"
    for name, array in theirs.items():
        assert attachment.arrays[name].shape == array.shape, name
    for name, p in attachment.parameters.items():
        p.data = theirs[name].astype("float64")
    return model, attachment, g


def logits(model: T5, g: dict) -> np.ndarray:
    return model(g["input_ids"], g["decoder_input_ids"], g["attention_mask"]).data


def test_the_projections_that_a_key_gives_are_those_in_the_file():
    model = T5.from_pretrained(FIXTURES / "t5" / "v11", "float64")
    folder = FIXTURES / "zoo" / "vera_t5"
    method = method_of(json.loads((folder / "adapter_config.json").read_text()))
    arrays = attach(model, method, np.random.default_rng(0), "a").arrays
    theirs = read_tensors(folder / "adapter_model.safetensors")[0]
    for leaf in "AB":
        assert theirs[f"base_model.vera_{leaf}"].dtype == "float32"
        assert (arrays[f"vera@a.{leaf}"].data == theirs[f"base_model.vera_{leaf}"]).all()


def test_logits_plugged_merged_and_unplugged_are_those_of_peft(case):
    model, attachment, g = case
    with np.load(FIXTURES / str(g["base"]) / "golden.npz") as base:
        plain = base["logits"][:3]
    assert close(logits(model, g), g["logits"], 1e-12)
    assert not close(g["logits"], plain, 1e-2), "the adapter does something"
    attachment.merge()
    assert close(logits(model, g), g["logits_merged"], 1e-12)
    attachment.unmerge()
    attachment.unplug()
    assert close(logits(model, g), plain, 1e-12)


def test_loss_and_every_gradient_are_those_of_peft(case):
    model, attachment, g = case
    loss, grads = value_and_grad(lambda: model.loss(g["input_ids"], g["labels"], g["attention_mask"]),
                                 attachment.parameters)
    assert abs(loss - g["loss"]) <= 1e-12 * g["loss"]
    expected = {our_name(key.removeprefix("grad/")): value for key, value in g.items() if key.startswith("grad/")}
    trained = {name: value for name, value in expected.items() if name in attachment.parameters}
    assert set(trained) == set(grads)
    for name, value in trained.items():
        assert close(grads[name] * int(g["n_label_tokens"]), value, 1e-10), name


def test_what_was_read_from_peft_is_saved_and_loaded(case, tmp_path):
    model, attachment, g = case
    attachment.save(tmp_path / "adapter.safetensors")
    fresh = T5.from_pretrained(FIXTURES / str(g["base"]), "float64")
    assert load(fresh, tmp_path / "adapter.safetensors").method.fields() == attachment.method.fields()
    assert logits(fresh, g).tobytes() == logits(model, g).tobytes()
