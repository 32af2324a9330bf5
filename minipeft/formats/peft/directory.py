"""A directory of PEFT's, as far as it can be read without a model.

    adapter_config.json             what the method is and where: the fields of a PeftConfig
    adapter_model.safetensors       its arrays

The codec of its peft_type knows the fields. What no codec knows is refused, unless it can change nothing.
"""
from __future__ import annotations

import json
from typing import Any, Collection

from minipeft.checks import shown
from minipeft.formats.folder import CONFIG, Names
from minipeft.formats.peft.beside import fields
from minipeft.formats.peft.codec import CODECS, HARMLESS, Codec, Config
from minipeft.formats.peft.others import refused

NAMES = Names("adapter_model.safetensors", "adapter_model.bin")
_COMPUTED = ("use", "alpha", "scale", "scaling", "factor", "rank", "r", "gamma", "beta", "eps", "temperature")


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
    """Whether an unknown field can be ignored: it is null, off or empty, or a note such as {"trained_steps": 1000}. A
    text or a number is not taken for a note if its name has one of the words of _COMPUTED, as in {"x_scale": 2}."""
    noted = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    return not value or noted and not any(word in _COMPUTED for word in field.lower().split("_"))
