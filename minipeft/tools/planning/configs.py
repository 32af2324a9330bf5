"""From a config.json to a model of hollow arrays. No weights are read, and none are made.

    read(path)                  a folder or a config.json of Hugging Face: T5 or the LLaMA family
    built(config, dtype)        the model, inside `use(Hollow(ledger))`
"""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Mapping

import numpy

from minipeft.backend import xp
from minipeft.checks import shown
from minipeft.files import read_json
from minipeft.models.folder import CONFIG, LIMIT, naming
from minipeft.models.t5 import T5, T5Config
from minipeft.nn.module import Model
from minipeft.tools.planning.decoder import KINDS, Decoder, DecoderConfig, hf_name

Config = T5Config | DecoderConfig
MOST_LAYERS = 1000  # of a stack; the largest models have fewer than 130


def read(config: Any) -> Config:
    """The configuration that `config` stands for: a path, the contents of a config.json as a mapping, or one of ours.

    Raises FileNotFoundError for a missing file, ValueError, naming it, for a wrong one and for a kind of model that the
    plan does not know, and TypeError for something else."""
    if isinstance(config, (T5Config, DecoderConfig)):
        return _sane(config)
    if isinstance(config, Mapping):
        return _sane(of_values(config))
    if not isinstance(config, (str, os.PathLike)):
        raise TypeError(f"config is {type(config).__name__}; expected the path of a config.json or of its folder, a "
                        f"mapping, or a T5Config")
    path = Path(config)
    file = path / CONFIG if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; expected a config.json of Hugging Face, or its folder")
    with naming(file):
        return _sane(of_values(read_json(file, LIMIT)))


def of_values(values: Mapping[str, Any]) -> Config:
    """The configuration in the `values` of a Hugging Face config.json. Raises ValueError for a model_type that is not
    known, and for wrong fields."""
    kind = values.get("model_type", "t5" if "d_kv" in values else None)
    if kind in ("t5", "mt5"):
        return T5Config.from_hf(values)
    if kind not in KINDS:
        raise ValueError(f"config: model_type is {shown(kind)}; expected one of t5, mt5, {', '.join(KINDS)}")
    return DecoderConfig.from_hf(values)


def _sane(config: Config) -> Config:
    for name in ("num_layers", "num_decoder_layers"):
        if getattr(config, name, 0) > MOST_LAYERS:
            raise ValueError(f"config: {name} is {getattr(config, name)}; expected at most {MOST_LAYERS}")
    return config


def built(config: Config, dtype: Any) -> Model:
    """A model of hollow arrays in this dtype, inside `use(Hollow(ledger))`."""
    model: Model = Decoder(config, dtype) if isinstance(config, DecoderConfig) else T5(config, None)
    for p in model.base_parameters.values():  # T5 itself computes in float32 or float64 alone
        p.data = xp.empty(p.shape, dtype)
    for site in model.sites.values():
        site.dtype = numpy.dtype(dtype)
    return model


def stacks(config: Config) -> int:
    """The number of stacks of blocks: two in a T5, one in a decoder."""
    return 1 if isinstance(config, DecoderConfig) else 2


def elsewhere(config: Config, name: str) -> str:
    """Hugging Face's name of the weight `name`; the name itself where there is none."""
    if isinstance(config, DecoderConfig):
        return hf_name(name) or name
    try:
        return T5.to_hf_name(name)
    except ValueError:
        return name
