"""Folders of peft on a decoder: the numbers of peft itself, and what cannot mean the same here is refused."""
from __future__ import annotations

import json
import re
import shutil
from typing import Any

import numpy as np
import pytest

import minipeft
from minipeft import Decoder, PrefixTuning, PromptTuning, attach, value_and_grad
from minipeft.files import read_tensors, write_tensors
from minipeft.formats import peft
from tests.models.test_decoder import built
from tests.models.test_t5_golden import FIXTURES, close, golden, gradients_of

CASES = {"lora_qv": "qwen3", "lora_all_names": "llama3"}


@pytest.fixture(params=CASES)
def case(request) -> tuple[Any, dict[str, np.ndarray], Any]:
    model = Decoder.from_pretrained(FIXTURES / "decoder" / CASES[request.param], "float64")
    folder = FIXTURES / "decoder_adapters" / request.param
    return minipeft.load(model, folder), golden("decoder_adapters", request.param, "golden.npz"), folder


def test_logits_plugged_and_merged_and_the_loss_agree_to_1e_12(case):
    attachment, g, _ = case
    model, seen = attachment.model, g["attention_mask"].astype(bool)
    for key, then in (("logits", attachment.merge), ("logits_merged", attachment.unmerge)):
        assert close(model(g["input_ids"], g["attention_mask"]).data[seen], g[key][seen], 1e-12), key
        then()
    assert close(model.loss(g["input_ids"], g["labels"], g["attention_mask"]).data, g["loss"], 1e-12)


def test_gradients_agree_to_1e_10_under_the_keys_of_peft(case):
    attachment, g, _ = case
    _, grads = value_and_grad(lambda: attachment.model.loss(g["input_ids"], g["labels"], g["attention_mask"])
                              * int(g["n_label_tokens"]), attachment.parameters)
    found, expected = peft.to_peft(attachment, grads, gradients=True), gradients_of(g)
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert close(found[key], value, 1e-10), key


def test_a_folder_is_written_as_it_was_read_with_the_task_of_a_causal_model(case, tmp_path):
    attachment, _, folder = case
    peft.save(attachment, tmp_path)
    theirs, ours = (read_tensors(f / "adapter_model.safetensors")[0] for f in (folder, tmp_path))
    assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[key], ours[key]) for key in theirs)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_a_tied_table_that_peft_would_untie_is_refused(tmp_path):
    """PEFT trains a copy of the table alone, and the head keeps the old one. Here they are one weight."""
    shutil.copytree(FIXTURES / "decoder_adapters" / "lora_qv", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["modules_to_save"] = ["embed_tokens"]
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    tensors, _ = read_tensors(tmp_path / "a" / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = np.zeros((43, 20), "float32")
    write_tensors(tmp_path / "a" / "adapter_model.safetensors", tensors, {})
    base = Decoder.from_pretrained(FIXTURES / "decoder" / "qwen3", "float64")
    with pytest.raises(ValueError, match=re.escape("chooses model.embed_tokens, but not lm_head")):
        minipeft.load(base, tmp_path / "a")
    assert not base.attachments


@pytest.mark.parametrize("method", [PrefixTuning(2), PromptTuning(2, init="random")], ids=["prefix", "prompt"])
def test_soft_prompts_of_a_decoder_are_not_written(method, tmp_path):
    attachment = attach(built(), method, np.random.default_rng(0))
    with pytest.raises(ValueError, match="PEFT"):
        peft.save(attachment, tmp_path / "a")
    assert not (tmp_path / "a").exists()
