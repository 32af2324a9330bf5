"""The LoRAs of `fixtures/adapters/weighted` and `mixed_batch`, made by peft, attached to their T5."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy

import minipeft
from minipeft.files import read_tensors

FIXTURES = Path(__file__).parents[1] / "fixtures"


def golden(folder: str) -> dict[str, Any]:
    with numpy.load(FIXTURES / "adapters" / folder / "golden.npz") as arrays:
        return {key: arrays[key] for key in arrays}


def adapted(folder: str, dtype: str = "float64") -> tuple[Any, dict[str, Any]]:
    """(model with a and b plugged, golden numbers)."""
    g = golden(folder)
    model = minipeft.T5.from_pretrained(FIXTURES / str(g["base"]), dtype)
    for name in "ab":
        path = FIXTURES / "adapters" / folder / name
        values = json.loads((path / "adapter_config.json").read_text())
        where = rf"\.({'|'.join(values['target_modules'])})\.weight$"
        scaling = "alpha/sqrt(r)" if values["use_rslora"] else "alpha/r"
        method = minipeft.LoRA(values["r"], values["lora_alpha"], where=where, scaling=scaling)
        a = minipeft.attach(model, method, numpy.random.default_rng(0), name)
        tensors = read_tensors(path / "adapter_model.safetensors")[0]
        for key, array in tensors.items():
            module, leaf, _ = key.removeprefix("base_model.model.").rsplit(".", 2)
            a.parameters[f"{ours(module)}@{name}.{leaf.removeprefix('lora_')}"].data = array.astype(dtype)
        assert len(tensors) == len(a.parameters)
    return model, g


def ours(module: str) -> str:
    """Our name of the weight of a module of theirs."""
    return minipeft.T5.from_hf_name(f"{module}.weight")


def logits(model: Any, g: dict[str, Any], adapter: Any = None, rows: Any = slice(None)) -> numpy.ndarray:
    return model(g["input_ids"][rows], g["decoder_input_ids"][rows], g["attention_mask"][rows], adapter=adapter).data


def off(found: numpy.ndarray, wanted: numpy.ndarray) -> float:
    """The largest difference, relative to the largest entry."""
    return float(abs(found - wanted).max() / abs(wanted).max())
