"""Reading a Hugging Face folder of a decoder: which tensors may be absent or are not read, and what decides tying.

The names and shapes in the headers of the files are checked against the configuration before any tensor is read.
"""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Callable

from minipeft.files import read_json, read_tensors
from minipeft.models.folder import CONFIG, LIMIT, WEIGHTS, check_saved_with
from minipeft.models.quantized import Stored, headers, same
from minipeft.models.shapes import check_layers, check_shapes, decoder_shapes
from minipeft.models.t5_files import files_of_weights
from minipeft.quant.origin import Origin, read_origin

_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"
_COMPUTED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"  # in old files; it follows from the configuration


def read_checkpoint(directory: Path, config_from: Callable[[dict], Any], name_from: Callable[[str], str], dtype: str
                    ) -> tuple[Any, dict[str, Any], Origin | None]:
    """(config, {our name: array or QuantizedWeight}, the origin of a quantized base or None).

    config_from: config.json's values -> config; name_from: key -> our name; dtype: in which quantized weights compute.
    config.json alone decides whether the head is tied, as in transformers. A tied head may be stored too, if it equals
    the table. Raises the exceptions of `Decoder.from_pretrained`."""
    values = read_json(directory / CONFIG, LIMIT)
    config = config_from(values)
    files = files_of_weights(directory, "AutoModelForCausalLM")
    found = {key: header for file in files for key, header in headers(directory / file).items()
             if not re.fullmatch(_COMPUTED, key)}
    stored = Stored(values, found)
    del values
    keys = stored.keys
    if not config.tie_word_embeddings and _HEAD not in keys:
        raise ValueError(f"{CONFIG} says that the head is not tied (tie_word_embeddings), but {_HEAD} is missing")
    check_layers(config, len(keys))
    wanted = decoder_shapes(config)
    if config.tie_word_embeddings and _HEAD in keys:
        wanted["head.weight"] = wanted["embedding.weight"]
    shapes = stored.shapes(lambda key: wanted.get(name_from(key)))
    check_shapes({name_from(key): shape for key, shape in shapes.items()}, wanted)
    tensors: dict[str, Any] = {}
    for file in files:
        read, metadata = read_tensors(directory / file, raw=stored.raw)
        tensors.update({key: array for key, array in read.items() if not re.fullmatch(_COMPUTED, key)})
    tensors = stored.weights(tensors, shapes, dtype)
    if config.tie_word_embeddings and _HEAD in tensors:
        if not same(tensors[_HEAD], tensors[_TABLE]):
            raise ValueError(f"{CONFIG} says that the head is tied (tie_word_embeddings), but {_HEAD} differs from "
                             f"{_TABLE}; set it to false to use the stored head")
        del tensors[_HEAD]
    origin = None
    if files == [WEIGHTS]:
        check_saved_with(config, metadata, stored.config)
        origin = read_origin(metadata)
    return config, {name_from(key): array for key, array in tensors.items()}, origin
