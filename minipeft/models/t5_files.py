"""Reading a Hugging Face T5 folder: which tensors are aliases, which may be absent, what decides tying."""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Callable

import numpy

from minipeft.files import read_json, read_tensors

_INDEX = "model.safetensors.index.json"
_INPUT_NAMES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # in files of the first release


def read_checkpoint(directory: Path, config_from: Callable[[dict], Any]) -> tuple[Any, dict[str, numpy.ndarray]]:
    """(config, {Hugging Face key: array}) with the aliases resolved: shared.weight, and lm_head.weight if untied.

    Weights are tied if no head is stored, or one that equals the table, unless the config says tie_word_embeddings =
    false; then a missing head is an error."""
    values = read_json(directory / "config.json")
    config = config_from(values)
    tensors = _read_all(directory)
    tensors.pop(_UNUSED, None)
    tables = {name: tensors.pop(name) for name in _INPUT_NAMES if name in tensors}
    if not tables:
        raise ValueError(f"{directory}: no input embedding; expected one of {', '.join(_INPUT_NAMES)}")
    first, *others = tables
    for name in others:
        if not numpy.array_equal(tables[name], tables[first]):
            raise ValueError(f"{directory}: {first} and {name} differ; T5 has one table for both stacks")
    table = tensors["shared.weight"] = tables[first]
    head = tensors.get("lm_head.weight")
    says_untied = values.get("tie_word_embeddings") is False
    if head is None and says_untied:
        raise ValueError(f"{directory}: config.json says tie_word_embeddings = false, but lm_head.weight is missing")
    tied = head is None or (not says_untied and numpy.array_equal(head, table))
    if tied:
        tensors.pop("lm_head.weight", None)
    return dataclasses.replace(config, tie_word_embeddings=tied), tensors


def _read_all(directory: Path) -> dict[str, numpy.ndarray]:
    """Every tensor of the folder, from one file or from the shards that the index names."""
    if (directory / "model.safetensors").is_file():
        return read_tensors(directory / "model.safetensors")[0]
    if not (directory / _INDEX).is_file():
        raise _no_weights(directory)
    weight_map = read_json(directory / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{directory / _INDEX}: weight_map is not a map from key to file name")
    tensors: dict[str, numpy.ndarray] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise ValueError(f"{directory / _INDEX}: shard {shard!r} is not a plain file name in the same folder")
        if not (directory / shard).is_file():
            raise FileNotFoundError(f"{directory}: shard {shard} of {_INDEX} is missing")
        found = read_tensors(directory / shard)[0]
        listed = {key for key, file in weight_map.items() if file == shard}
        if set(found) != listed:
            odd = sorted(set(found) ^ listed)
            raise ValueError(f"{directory / shard}: its keys are not those that {_INDEX} lists; first: {odd[0]!r}")
        tensors.update(found)
    return tensors


def _no_weights(directory: Path) -> Exception:
    pickles = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pt"))
    if pickles:
        return ValueError(
            f"{directory}: {pickles[0]} is a pickle, which can run code when it is opened; minipeft reads safetensors "
            f"alone. Convert it once, where you trust it: in Python with torch and transformers, "
            f"T5ForConditionalGeneration.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)")
    return FileNotFoundError(f"{directory}: neither model.safetensors nor {_INDEX} is there")
