"""Reading a Hugging Face T5 folder: which tensors are aliases, which may be absent, and what decides tying.

The names and shapes in the headers of the files are checked against the configuration before any tensor is read.
"""
from __future__ import annotations

import dataclasses
import operator
import os
from pathlib import Path
from typing import Any, Callable

from minipeft.checks import shown
from minipeft.files import read_json, read_shapes, read_tensors
from minipeft.models.folder import CONFIG, LIMIT, WEIGHTS, check_saved_with
from minipeft.models.quantized import Stored, headers, same
from minipeft.models.shapes import check_layers, check_shapes, t5_shapes
from minipeft.quant.origin import Origin, read_origin

_INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"
_TABLE = "shared.weight"
_INPUT_NAMES = (_TABLE, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # in files of the first release


def read_checkpoint(directory: Path, config_from: Callable[[dict], Any], name_from: Callable[[str], str], dtype: str
                    ) -> tuple[Any, dict[str, Any], Origin | None]:
    """(config, {our name: array or QuantizedWeight}, the origin of a quantized base or None) with the aliases resolved:
    one table, and a head if it is untied.

    config_from: config.json's values -> config; name_from: key -> our name; dtype: in which quantized weights compute.
    Weights are tied if no head is stored, or one that equals the table. But if the config says tie_word_embeddings =
    false, they are not tied, and a missing head is an error. Raises the exceptions of `T5.from_pretrained`."""
    values = read_json(directory / CONFIG, LIMIT)
    config, says_untied = config_from(values), values.get("tie_word_embeddings") is False
    files = files_of_weights(directory, "T5ForConditionalGeneration")
    stored = Stored(values, {key: header for file in files for key, header in headers(directory / file).items()})
    del values  # 1 MiB of JSON takes 50 MiB when it is parsed; free it before the next file is read
    keys = _one_table({key: key for key in stored.keys}, lambda a, b: True)
    if says_untied and _HEAD not in keys:
        raise ValueError(f"{CONFIG} says tie_word_embeddings = false, but {_HEAD} is missing")
    check_layers(config, len(keys))
    tied, untied = (dataclasses.replace(config, tie_word_embeddings=tie) for tie in (True, False))
    wanted = t5_shapes(untied if _HEAD in keys else tied)
    shapes = stored.shapes(lambda key: wanted.get(name_from(key)))
    check_shapes({name_from(key): shape for key, shape in _one_table(shapes, operator.eq).items()}, wanted)
    tensors: dict[str, Any] = {}
    for file in files:
        found, metadata = read_tensors(directory / file, raw=stored.raw)
        tensors.update(found)
    tensors = _one_table(stored.weights(tensors, shapes, dtype), same)
    if _HEAD in tensors and not says_untied and same(tensors[_HEAD], tensors[_TABLE]):
        del tensors[_HEAD]
    config = untied if _HEAD in tensors else tied
    origin = None
    if files == [WEIGHTS]:
        check_saved_with(config, metadata, stored.config)
        origin = read_origin(metadata)
    return config, {name_from(key): array for key, array in tensors.items()}, origin


def _one_table(stored: dict[str, Any], equal: Callable[[Any, Any], bool]) -> dict[str, Any]:
    """{key: shape or array}, with the input embedding once, under its first name, and without the unused key. Raises
    ValueError if there is no input embedding, or several that are not equal."""
    tables = [name for name in _INPUT_NAMES if name in stored]
    if not tables:
        raise ValueError(f"no input embedding; expected one of {', '.join(_INPUT_NAMES)}")
    for name in tables[1:]:
        if not equal(stored[name], stored[tables[0]]):
            raise ValueError(f"{tables[0]} and {name} differ; T5 has one table for both stacks")
    kept = {key: value for key, value in stored.items() if key not in (*tables, _UNUSED)}
    return {**kept, _TABLE: stored[tables[0]]}


def files_of_weights(directory: Path, architecture: str) -> list[str]:
    """The one file of weights in `directory`, or the shards in the index, each holding exactly the keys that the index
    lists. architecture: the class of transformers that converts a pickle. Raises ValueError for a pickle, an index that
    is damaged, and shards that do not fit it; FileNotFoundError for missing files."""
    if (directory / WEIGHTS).exists():
        return [WEIGHTS]
    if not (directory / _INDEX).exists():
        raise _no_weights(directory, architecture)
    listed: dict[str, set[str]] = {}
    weight_map = read_json(directory / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{directory / _INDEX}: weight_map is not a map from key to file name")
    for key, shard in weight_map.items():
        listed.setdefault(shard, set()).add(key)
    for shard in sorted(listed):
        if not _plain(shard):
            raise ValueError(f"{directory / _INDEX}: shard {shown(shard)} is not a plain file name in the same folder")
        if not (directory / shard).exists():
            raise FileNotFoundError(f"{directory}: shard {shown(shard)} of {_INDEX} is missing")
    for shard, keys in sorted(listed.items()):
        odd = sorted(set(read_shapes(directory / shard)) ^ keys)
        if odd:
            raise ValueError(f"{directory}: shard {shown(shard)}: its keys are not those that {_INDEX} lists; first: "
                             f"{shown(odd[0])}")
    return sorted(listed)


def _plain(shard: str) -> bool:
    """Whether this can be the name of a file in the folder itself, on any system."""
    try:
        fits = len(os.fsencode(shard)) <= 255
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return fits and shard not in ("", ".", "..") and not any(c in shard for c in "/\\\0")


def _no_weights(directory: Path, architecture: str) -> Exception:
    pickles = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pt"))
    if pickles:
        return ValueError(
            f"{directory}: {pickles[0]} is a pickle, which can run code when it is opened; minipeft reads only "
            f"safetensors. If you trust it, convert it once, in Python with torch and transformers: "
            f"{architecture}.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)")
    return FileNotFoundError(f"{directory} holds neither {WEIGHTS} nor {_INDEX}")
