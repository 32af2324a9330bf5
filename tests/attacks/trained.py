"""Adapters and checkpoints as targets of `damaged_files.py`, and the damage that signs their texts again."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import numpy

import minipeft
from minipeft.files import read_tensors, write_tensors
from minipeft.attaching.adapter_file import SIGNED, signature
from tests.train import hostile, tiny

CONFIG = minipeft.T5Config(23, 12, 5, 3, 20, 1, 1, 8, 20)
METHODS = {"LoRA": minipeft.LoRA(2), "Bottleneck": minipeft.Bottleneck("pfeiffer", size=3),
           "Selective": minipeft.Selective(mask={"embedding.weight": [3, 20, 100]}),
           "PromptTuning": minipeft.PromptTuning(2), "PiSSA": minipeft.LoRA(2, init="pissa"),
           "VeRA": minipeft.VeRA(3), "PrefixTuning": minipeft.PrefixTuning(2, mlp=3)}


def bare() -> minipeft.T5:
    return minipeft.T5(CONFIG, numpy.random.default_rng(1))


def trained(*methods: str) -> minipeft.T5:
    """All of them trained in the same step."""
    model = bare()
    for i, method in enumerate(methods):
        minipeft.attach(model, METHODS[method], numpy.random.default_rng(i), method)
    params = {name: p for a in model.attachments.values() for name, p in a.parameters.items()}
    _, grads = minipeft.value_and_grad(lambda: model.loss([[5, 6, 1]], [[7, 8, 1]]), params)
    minipeft.AdamW(0.1).step(params, grads)
    return model


def save(*methods: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name, attachment in trained(*methods).attachments.items():
            attachment.save(folder / f"{name}.safetensors")
    return make


def load(*methods: str) -> Callable[[Path, Any], str]:
    def into(folder: Path, model: Any) -> str:
        paths = [folder / f"{name}.safetensors" for name in methods]
        loaded = minipeft.load(model, paths) if len(paths) > 1 else [minipeft.load(model, paths[0])]
        return repr(sorted(a.layer.content for a in loaded))
    return into


def seen(model: Any) -> str:
    """What a load that raises must leave alone."""
    return repr((list(model.attachments), model.plugged, {n: a.tobytes() for n, a in model.state().items()}))


def make_checkpoint(folder: Path) -> None:
    hostile.Victim(folder).stopped()


def resume(folder: Path, ready: Any) -> str:
    """The checkpoint's run, to its end. Numbers that were forged may well overflow in it, and it says so."""
    victim = hostile.Victim(folder)
    ready.append(victim)
    before = in_memory(victim)
    try:
        history = victim.fit()
    except FloatingPointError:
        return "a run that went on, and overflowed"
    except BaseException:
        ready[-1] = None if in_memory(victim) == before else "changed"
        raise
    return repr((history.step, in_memory(victim)))


def in_memory(victim: hostile.Victim) -> Any:
    """What a run that is refused must leave alone, besides files, which may be pipes by now."""
    return tiny.bits(victim.lora.parameters, victim.optimizer), victim.batches.state()


def forge_texts(folder: Path, rng: Any, spoiled: Callable, dumped: Callable) -> None:
    """Wild values in what an adapter or a checkpoint says, signed again."""
    files = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    path = files[rng.integers(len(files))]
    tensors, metadata = read_tensors(path)
    texts = [key for key in ("method", "places", "below", "together", "state", "run") if key in metadata]
    if not texts:
        return
    key = texts[rng.integers(len(texts))]
    spoilt = {"": json.loads(metadata[key])}
    metadata[key] = dumped(spoiled(spoilt, rng).get("", 0)).decode("utf-8", "surrogatepass")
    try:
        if metadata["format"] == "minipeft-adapter":
            write_tensors(path, tensors, {**metadata, "signature": signature({k: metadata[k] for k in SIGNED})})
        else:
            hostile.signed(path, tensors, metadata)
    except ValueError:
        pass  # such texts cannot be written
