"""Decoder folders in both directions, and beam search, with transformers itself; skipped where it is not installed."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minipeft
from minipeft import Decoder
from tests.models.test_decoder import built, every_variant, ids_of

PROMPTS, MASK = ids_of(1), np.ones((3, 7), int)
MASK[2, :3] = 0
CLOSE = 1e-5  # of the largest logit, in float32: what other frameworks are allowed everywhere here


def loaded(folder: Any, dtype: str) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype),
                                                              attn_implementation="sdpa")  # eager: NaN in padding
    return model.train(False)


def their_logits(model: Any) -> np.ndarray:
    torch = pytest.importorskip("torch")
    return model(torch.tensor(PROMPTS), attention_mask=torch.tensor(MASK)).logits.detach().numpy()


def agree(a: np.ndarray, b: np.ndarray) -> bool:
    seen = MASK.astype(bool)
    return bool(np.abs(a - b)[seen].max() <= CLOSE * np.abs(b[seen]).max())


@every_variant
def test_transformers_reads_what_we_write_and_we_what_it_writes(fields, tmp_path):
    model = built(dtype="float32", **fields)
    model.save_pretrained(tmp_path / "ours")
    theirs = loaded(tmp_path / "ours", "float32")
    assert agree(model(PROMPTS, MASK).data, their_logits(theirs))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    again = Decoder.from_pretrained(tmp_path / "theirs")
    assert again.config == model.config
    assert np.array_equal(again(PROMPTS, MASK).data, model(PROMPTS, MASK).data)


@every_variant
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"num_beams": 4, "length_penalty": 2.0},
                                    {"num_beams": 3, "early_stopping": True}], ids=str)
def test_greedy_and_beam_search_give_the_ids_of_transformers(search, fields, tmp_path):
    """transformers fills the rows of a beam search that have ended with eos, and we with pad."""
    torch = pytest.importorskip("torch")
    model = built(dtype="float32", **fields)
    model.save_pretrained(tmp_path)
    wanted = loaded(tmp_path, "float64").generate(torch.tensor(PROMPTS), attention_mask=torch.tensor(MASK),
                                                  max_new_tokens=8, do_sample=False, **search).numpy()
    found = Decoder.from_pretrained(tmp_path, "float64").generate(PROMPTS, MASK, 8, **search)
    assert found.shape == wanted.shape
    for row, other in zip(found[:, 7:], wanted[:, 7:]):
        end = (*np.flatnonzero(row == 1), len(row))[0] + 1
        assert np.array_equal(row[:end], other[:end]) and set(other[end:]) <= {0, 1} and not row[end:].any()


def test_transformers_reads_four_bits_as_we_write_them(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = built(dtype="float32", hidden_size=64, intermediate_size=128, head_dim=16, num_attention_heads=4)
    minipeft.quantize(model, "nf4")
    model.save_pretrained(tmp_path)
    assert agree(model(PROMPTS, MASK).data, their_logits(loaded(tmp_path, "float32")))
