"""A model, data and records small enough to train in a test."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

import numpy

import minipeft
from minipeft.engine.tensor import Leaf

VOCAB, BATCH = 12, 4


def model(seed: int = 0, dtype: str = "float32", dropout: float = 0.1) -> minipeft.Transformer:
    """One block in each stack, d_model 8."""
    config = minipeft.TransformerConfig(VOCAB, 8, 2, 16, 1, 1, dropout_rate=dropout, pre_norm=True, final_norm=True)
    return minipeft.Transformer(config, numpy.random.default_rng(seed), dtype)


def pairs(count: int = 10, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Copy: the target is the source, 2 to 5 ids, and the end token. Lengths differ, so masks and weights matter."""
    rng = numpy.random.default_rng(seed)
    sources = [rng.integers(3, VOCAB, rng.integers(2, 6)).tolist() for _ in range(count)]
    return [(source, source + [1]) for source in sources]


def batches(count: int = 10, size: int = BATCH, seed: int = 0) -> minipeft.Batches:
    """10 pairs in batches of 4: the last of every epoch is short."""
    return minipeft.Batches(pairs(count), size, seed)


def everything(of: Any) -> dict[str, Any]:
    """All parameters."""
    return minipeft.select(of, ".*")


def bits(params: Mapping[str, Leaf], optimizer: minipeft.AdamW | None = None) -> dict[str, Any]:
    """The bytes of parameters and moments, to be compared with ==."""
    moments = {} if optimizer is None else {
        "m": {n: a.tobytes() for n, a in optimizer.m.items()}, "v": {n: a.tobytes() for n, a in optimizer.v.items()},
        "steps": dict(optimizer.steps)}
    return {"params": {name: p.data.tobytes() for name, p in params.items()}, **moments}


def files(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, hidden ones included."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
