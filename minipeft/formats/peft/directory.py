"""A directory of PEFT's, read as far as it can be without a model, and written.

    adapter_config.json             what the method is and where: the fields of a PeftConfig
    adapter_model.safetensors       its arrays

Both are untrusted: sizes are checked before anything is allocated, and a pickle (adapter_model.bin) is not opened.
"""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Collection, Mapping

import numpy

from minipeft.checks import shown
from minipeft.files import read_json, write_atomic, write_tensors
from minipeft.formats.folder import no_pointer, pickled, whole
from minipeft.formats.peft.beside import fields
from minipeft.formats.peft.codec import CODECS, HARMLESS, Codec, Config
from minipeft.formats.peft.others import refused

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_COMPUTED = ("use", "alpha", "scale", "scaling", "factor", "rank", "r", "gamma", "beta", "eps", "temperature")
_LIMIT = 2 ** 20           # bytes of a configuration


def read_config(directory: Path) -> Config:
    """The fields of adapter_config.json. Raises FileNotFoundError without one, and ValueError for a file that is no
    JSON object or a pointer of Git LFS."""
    path = directory / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{directory} holds no {CONFIG}: expected a folder with {CONFIG} and {WEIGHTS}")
    no_pointer(path)
    return read_json(path, _LIMIT)


def weights_of(directory: Path) -> Path:
    """The file of the tensors. Raises ValueError for a pickle alone and for a pointer of Git LFS, FileNotFoundError
    where there is none."""
    path = directory / WEIGHTS
    if not path.exists() and (directory / PICKLE).exists():
        raise ValueError(f"{directory}: {pickled(PICKLE, WEIGHTS)}")
    if not path.exists():
        raise FileNotFoundError(f"{directory} holds no {WEIGHTS}; expected it beside {CONFIG}")
    no_pointer(path)
    return path


def codec_for(config: Config) -> Codec:
    """The codec of the file's peft_type, whose fields are checked. Raises ValueError for a peft_type that is missing or
    not supported, a field that is needed and missing, and a field that changes what is computed and is not
    supported."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in CODECS:
        raise ValueError(refused(kind, sorted(CODECS)))
    check_fields(CODECS[kind], config, kind, fields(CODECS[kind]))
    return CODECS[kind]


def check_fields(codec: Codec, config: Config, kind: str, others: Collection[str] = ()) -> None:
    """Raises ValueError for a field of `config` that is needed and missing, or that changes what is computed and is not
    supported. kind: how an error calls what the codec reads. others: the names of fields that are read elsewhere."""
    for field in codec.needed:
        if config.get(field) is None:
            raise ValueError(f"{field} is {'null' if field in config else 'missing'}; expected it in a file of {kind}")
    for field, value in config.items():
        if field in HARMLESS or field in codec.used or field in codec.harmless or field in others:
            continue
        if field in codec.neutral:
            if not any(value == usual and type(value) is type(usual) for usual in codec.neutral[field]):
                raise ValueError(f"{field} is {shown(value)}, which changes what {kind} computes and is not supported; "
                                 f"expected {' or '.join(json.dumps(v) for v in codec.neutral[field])}")
        elif not _says_nothing(field, value):
            name = field if len(field) <= 100 else shown(field)
            raise ValueError(f"{name} is {shown(value)}, a field of {kind} that is not known and may change what is "
                             f"computed; if it does not, take it out of {CONFIG}")


def _says_nothing(field: str, value: Any) -> bool:
    """Whether an unknown field can be left alone: it is null, off, empty, or a note, as in {"trained_steps": 1000}. A
    text or a number is no note where the name says that something is used or multiplied, as in {"use_x": "full"} and
    {"x_scale": 2}."""
    noted = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    return not value or noted and not any(word in _COMPUTED for word in field.lower().split("_"))


def write_directory(path: str | os.PathLike, config: Mapping[str, Any], tensors: Mapping[str, numpy.ndarray],
                    dtype: str | None) -> None:
    """Write both files into a new or empty folder, which is put in place whole. config: the fields; tensors: {key:
    array}; dtype: as in `files.write_tensors`. Raises ValueError for a folder that is not empty, and FileNotFoundError
    where the folder around it is missing."""
    with whole(path) as beside:
        write_tensors(beside / WEIGHTS, tensors, {"format": "pt"}, dtype)
        write_atomic(beside / CONFIG, (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode())
