"""The settings of a plan: the batch, the precision, the optimizer. Each has the default of this library."""
from __future__ import annotations

import dataclasses
from typing import Any

from minipeft.checks import boolean, integer, number, shown
from minipeft.tools.planning.quantized import kind_of

DTYPES = ("float32", "bfloat16", "float16")
MOST_TOKENS = 2 ** 30  # of a batch, source and target together
STATES = {"adamw": 8.0, "adamw8bit": 2 + 2 * 4 / 256, "sgd": 0.0}  # bytes for each trained number


@dataclasses.dataclass(frozen=True)
class Settings:
    """batch: rows. source, target: tokens of a row; a decoder reads both, one after the other.

    dtype: of weights and activations; this library computes in float32, and the others describe other libraries.
    optimizer: "adamw", two float32 moments for each trained number; "adamw8bit", two moments of 8 bits and a float32
    for each 256; "sgd", nothing. master: a float32 copy of what is trained, where it is in half precision.
    checkpointing: keep only the input of each block, and run its forward again in the backward pass.
    quantize, double: the kind of the frozen matrices (`quantized.KINDS`), and whether its scales are quantized, too.
    quantize_where: which matrices; by default all but the head. cast_rest: what is not quantized is cast to float32.
    streaming: each tensor is quantized as it is read, so that the float model is never whole. This library reads the
    whole model first, and other libraries do not; so by default it is on where the dtype is a half precision.
    dropout: the model's rate; None means that of the configuration. It matters only whether it is 0.
    Raises ValueError for a value that is none of these."""

    batch: int = 8
    source: int = 512
    target: int = 128
    dtype: str = "float32"
    optimizer: str = "adamw"
    master: bool = False
    checkpointing: bool = False
    quantize: str | None = None
    double: bool = False
    quantize_where: Any = None
    cast_rest: bool = False
    streaming: bool | None = None
    dropout: float | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "source", "target"):
            object.__setattr__(self, name, integer(name, getattr(self, name), 1))
        if self.batch * self.tokens > MOST_TOKENS:
            raise ValueError(f"batch is {shown(self.batch)} with source {shown(self.source)} and target "
                             f"{shown(self.target)}; expected at most {MOST_TOKENS:,} tokens in all")
        if self.streaming is None:
            object.__setattr__(self, "streaming", self.quantize is not None and self.dtype != "float32")
        for name in ("master", "checkpointing", "double", "cast_rest", "streaming"):
            object.__setattr__(self, name, boolean(name, getattr(self, name)))
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise ValueError(f"dtype is {shown(self.dtype)}; expected one of {', '.join(DTYPES)}")
        if not isinstance(self.optimizer, str) or self.optimizer not in STATES:
            raise ValueError(f"optimizer is {shown(self.optimizer)}; expected one of {', '.join(STATES)}")
        if self.quantize is not None:
            kind_of(self.quantize, self.double)
        elif given := next((name for name in ("double", "cast_rest", "streaming", "quantize_where")
                            if getattr(self, name) not in (False, None)), None):
            raise ValueError(f"{given} says how to quantize, and nothing is quantized; expected quantize, such as "
                             f"'nf4', beside it")
        if self.dropout is not None and not 0 <= number("dropout", self.dropout) < 1:
            raise ValueError(f"dropout is {self.dropout}; expected a number in [0, 1)")

    @property
    def tokens(self) -> int:
        """Source and target of one row."""
        return self.source + self.target

    @property
    def array_dtype(self) -> str:
        """The dtype of the arrays that stand for this one: NumPy has no bfloat16, and float16 is as large."""
        return "float32" if self.dtype == "float32" else "float16"
