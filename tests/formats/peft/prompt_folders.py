"""Directories of PEFT's with prompts and prefixes, changed, or made for a tiny T5."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy

from minipeft import T5, T5Config
from minipeft.files import read_tensors, write_tensors
from tests.methods.golden import FIXTURES

RNG, KEY, TASK = numpy.random.default_rng, "prompt_embeddings", {"task_type": "SEQ_2_SEQ_LM"}


def t5(layers: int = 2, decoder_layers: int = 2, **fields: Any) -> T5:
    """A T5 whose heads * d_kv is d_model, as PEFT's defaults have it."""
    sizes = {"d_model": 12, "d_kv": 4, "num_heads": 3, **fields}
    config = T5Config(23, d_ff=7, num_layers=layers, num_decoder_layers=decoder_layers,
                      relative_attention_num_buckets=8, relative_attention_max_distance=20, **sizes)
    return T5(config, RNG(0), "float64")


def batch() -> dict[str, numpy.ndarray]:
    ids = RNG(4).integers(2, 23, (2, 3, 6))
    return {"input_ids": ids[0], "attention_mask": numpy.ones_like(ids[0]), "labels": ids[1]}


def folder(path: Path, config: dict, tensors: dict) -> Path:
    """A directory with these fields and arrays."""
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    write_tensors(path / "adapter_model.safetensors", tensors, {"format": "pt"}, None)
    return path


def fields(path: Path) -> dict:
    return json.loads((path / "adapter_config.json").read_text())


def stored(path: Path) -> numpy.ndarray:
    return read_tensors(path / "adapter_model.safetensors")[0][KEY]


def changed(source: str, path: Path, drop: tuple = (), tensor: Any = None, **values: Any) -> Path:
    """A directory of the fixtures without the fields `drop`, with these values, and with `tensor` as its array."""
    config = {**fields(FIXTURES / "adapters" / source), **values}
    array = stored(FIXTURES / "adapters" / source) if tensor is None else tensor
    return folder(path, {key: v for key, v in config.items() if key not in drop}, {KEY: array})


def prefix_folder(path: Path, layers: int, p: int = 2, d: int = 12, **values: Any) -> Path:
    """A prefix of p tokens in 2 * layers slices of d numbers."""
    return folder(path, {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": p, **TASK, **values},
                  {KEY: RNG(5).standard_normal((p, 2 * layers * d))})
