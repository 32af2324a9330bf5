"""Copies of AdapterHub's golden folders, changed for a test."""
from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any, Callable

import numpy

from minipeft import T5
from minipeft.files import read_tensors, write_tensors
from tests.methods.golden import FIXTURES

BOTTLENECKS = ("seq_bn", "double_seq_bn", "double_seq_bn_cross", "par_bn")
OTHERS = ("lora", "dora", "ia3", "prefix_flat", "prefix_mlp", "union")
FOLDERS = {name: FIXTURES / ("bottleneck" if name in BOTTLENECKS else "adapterhub") / name
           for name in (*BOTTLENECKS, *OTHERS)}


@functools.cache
def base(folder: str) -> T5:
    """The float32 model of a folder. What a test attaches, it removes."""
    with numpy.load(FOLDERS[folder] / "golden.npz") as g:
        return T5.from_pretrained(FIXTURES / str(g["base"]))


def copied(folder: str, target: Path, config: Callable[[dict], Any] = lambda outer: None,
           tensors: Callable[[dict], Any] = lambda arrays: None, head: bool = False) -> Path:
    """A copy at `target`, with the contents of its two files changed in place by `config` and `tensors`. head: whether
    the head is copied, too."""
    target.mkdir()
    outer, arrays = json.loads((FOLDERS[folder] / "adapter_config.json").read_text()), read_tensors(
        FOLDERS[folder] / "adapter.safetensors")[0]
    config(outer)
    tensors(arrays)
    (target / "adapter_config.json").write_text(json.dumps(outer))
    write_tensors(target / "adapter.safetensors", arrays, {"format": "pt"}, signed=False)
    if head:
        shutil.copy(FOLDERS[folder] / "model_head.safetensors", target)
    return target


def inner(**fields: Any) -> Callable[[dict], None]:
    """A change of the configuration: these fields of its "config" get these values."""
    return lambda outer: outer["config"].update(fields)


def without(*fields: str) -> Callable[[dict], None]:
    """A change of the configuration: its "config" loses these fields."""
    return lambda outer: [outer["config"].pop(field) for field in fields]
