"""A directory of AdapterHub's, read as far as it can be without a model.

    adapter_config.json             {"config": {...}, "name", "hidden_size", "model_type", "version", ...}
    adapter.safetensors             the arrays of the adapter, under keys that contain its name
    model_head.safetensors          the head of the model that it was saved with (`head.py`), and head_config.json

By default AdapterHub writes the last two as pickles, pytorch_adapter.bin and pytorch_model_head.bin, which are not
opened. Old files mean something else by the same words, as in AdapterHub's own reader: without "version" the activation
"gelu" is gelu_new, and below adapters.1.1.0 the alpha of a LoRA did nothing, which is as alpha = r.
"""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from minipeft.checks import shown
from minipeft.formats.folder import Names
from minipeft.formats.peft.codec import Config

NAMES = Names("adapter.safetensors", "pytorch_adapter.bin")
VERSION = "adapters.1.3.0"  # of the library whose files these are
_RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # activations in files without a version
_LORA_SCALED = (1, 1, 0)  # the first version whose LoRA is multiplied by alpha / r


def read_config(directory: Path, model: Any) -> tuple[Config, Config, list[str]]:
    """(the fields of adapter_config.json, those of its "config" as they are meant today, the changes in words). Raises
    FileNotFoundError without the file, and ValueError for one that is no JSON object, a pointer of Git LFS, or about
    another model than a T5 of this width."""
    outer = NAMES.read_config(directory)
    config, name = outer.get("config"), outer.get("name")
    if not isinstance(config, dict):
        raise ValueError(f"config is {shown(config)}; expected an object with the fields of the adapter")
    if not isinstance(name, str) or not re.fullmatch(r"[^.{}]{1,200}", name):
        raise ValueError(f"name is {shown(name)}; expected the name of the adapter, without a dot")
    if outer.get("model_type", "t5") not in ("t5", "mt5"):
        raise ValueError(f"model_type is {shown(outer['model_type'])}; expected 't5'")
    if outer.get("hidden_size", model.config.d_model) != model.config.d_model:
        raise ValueError(f"hidden_size is {shown(outer['hidden_size'])}; expected {model.config.d_model}, the d_model "
                         f"of this model")
    return outer, *_as_meant(config, outer.get("version", ""))


def _as_meant(config: Config, version: Any) -> tuple[Config, list[str]]:
    """(the fields of a file of this version, "" for none, as they are meant today; the changes in words)."""
    notes = []
    if version == "" and isinstance(said := config.get("non_linearity"), str) and said in _RENAMED:
        config = {**config, "non_linearity": _RENAMED[said]}
        notes.append(f"without a version, non_linearity {said!r} means {_RENAMED[said]!r}")
    if config.get("architecture") == "lora" and {"r", "alpha"} <= set(config) and config["alpha"] != config["r"] \
            and _is_before(version, _LORA_SCALED):
        notes.append(f"in files of {version}, alpha {shown(config['alpha'])} did nothing; it is read as "
                     f"{shown(config['r'])}")
        config = {**config, "alpha": config["r"]}
    return config, notes


def _is_before(version: Any, bound: tuple[int, ...]) -> bool:
    """Whether `version`, such as "adapters.1.0.1" or "adapters.1.1.0.dev0", lies before the release `bound`."""
    match = re.fullmatch(r"adapters\.(\d{1,6})\.(\d{1,6})\.(\d{1,6})(.*)", version if isinstance(version, str) else "")
    if match is None:
        return False
    release = tuple(int(match[n]) for n in (1, 2, 3))
    return release < bound or release == bound and re.match(r"\.?(dev|a|b|rc)\d*", match[4]) is not None
