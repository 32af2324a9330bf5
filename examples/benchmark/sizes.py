"""What the benchmark runs on: three T5 shapes, their weights in a folder that both libraries read, and a batch.

The weights and the ids are random: a matrix product takes the same time whatever its numbers are. Greedy decoding may
end early, so its time depends on the weights. Here it never ends early. The row of the end token in the table, which is
also the head, is 0, so its logit is always 0. The largest of the other logits is positive. So every decoding makes all
its steps in both libraries.
"""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy

import minipeft

RANK, ALPHA, TARGETS = 8, 16, ("q", "v")
RATE = 1e-5             # learning rate: so small that hundreds of timed steps barely change the weights
NEW_TOKENS = 32
MATRIX, LINKS = 2048, 2000     # the matrix product [2048, 2048]^2, and the chain of additions
FIRST_ID = 2            # 0 is padding and the start, 1 the end
KINDS = ("lora", "full")              # of training steps
QLORA = {"qlora": False, "kept": True}          # LoRAs on a quantized base: whether it keeps the dequantized weights
BASE: tuple[str, dict[str, Any]] = ("nf4", {"double": True})          # what that base is quantized to
MODELS = (*KINDS, "base")             # the models of a process; "base" stays as it was read


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes of a model and of its batch. layers: in each of the two stacks. source, target: tokens of a row."""

    name: str
    d_model: int
    d_kv: int
    num_heads: int
    d_ff: int
    layers: int
    vocab_size: int
    batch: int
    source: int
    target: int

    def config(self, dropout: float) -> minipeft.T5Config:
        return minipeft.T5Config(
            vocab_size=self.vocab_size, d_model=self.d_model, d_kv=self.d_kv, num_heads=self.num_heads, d_ff=self.d_ff,
            num_layers=self.layers, num_decoder_layers=self.layers, dropout_rate=dropout)

    def ids(self) -> dict[str, numpy.ndarray]:
        """input_ids [batch, source] and labels [batch, target], without padding and the same in every process."""
        rng = numpy.random.default_rng(1)
        return {name: rng.integers(FIRST_ID, self.vocab_size, (self.batch, length))
                for name, length in (("input_ids", self.source), ("labels", self.target))}

    def write_model(self, folder: Path, dropout: float) -> None:
        """Write a T5 of this shape as a Hugging Face folder."""
        model = minipeft.T5(self.config(dropout), numpy.random.default_rng(0))
        model.embedding.weight.base.data[model.config.eos_token_id] = 0
        model.save_pretrained(folder)

    def __str__(self) -> str:
        return (f"{self.name}: {self.layers}+{self.layers} layers of {self.d_model}, vocabulary {self.vocab_size:,}, "
                f"batch {self.batch}, {self.source}/{self.target} tokens")


SIZES = {size.name: size for size in (
    Size("d64", 64, 16, 4, 256, 2, 128, 32, 32, 32),
    Size("d256", 256, 64, 4, 1024, 4, 2048, 16, 64, 64),
    Size("t5-small", 512, 64, 8, 2048, 6, 32128, 8, 128, 64))}

# What a matrix [MATRIX, MATRIX] is quantized to: {name: (kind, options) of minipeft.quantize}.
CODINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("nf4", {}), "nf4, double": ("nf4", {"double": True}), "fp4": ("fp4", {}),
    **{kind: (kind, {}) for kind in ("int8", "int4", "int3", "int2", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")}}
MINIPEFT = "minipeft"
CODERS = {MINIPEFT: tuple(CODINGS), "bitsandbytes": ("nf4", "nf4, double", "fp4"),     # {library: what it has of these}
          "gguf": ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")}

# How step time grows: {what is varied: (its fields, their values, the shape that is varied)}.
_MIDDLE = SIZES["d256"]
GROWTH: dict[str, tuple[tuple[str, ...], tuple[int, ...], Size]] = {
    "batch": (("batch",), (4, 8, 16, 32), _MIDDLE),
    "length": (("source", "target"), (16, 32, 64, 128, 256), dataclasses.replace(_MIDDLE, batch=4)),
    "depth": (("layers",), (1, 2, 4, 8), _MIDDLE)}


def grown(what: str) -> list[tuple[int, Size]]:
    """(value, shape) of each point of GROWTH[what]."""
    fields, values, start = GROWTH[what]
    changes: list[dict[str, Any]] = [dict.fromkeys(fields, value) for value in values]
    return [(value, dataclasses.replace(start, name=f"{what} {value}", **change))
            for value, change in zip(values, changes)]
