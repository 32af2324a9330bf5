"""Configurations are frozen dataclasses that check themselves: a wrong field is named with what was expected."""
from __future__ import annotations

import dataclasses
import math
from typing import Any, Mapping, Self

import numpy

from minipeft.nn.layers import ACTIVATIONS


def checked_config(config: Any, kind: type) -> Any:
    """`config`, if it is of that kind; TypeError that says how to make one."""
    if not isinstance(config, kind):
        raise TypeError(f"config is {type(config).__name__}; expected {kind.__name__}(...)")
    return config


class Config:
    """Mixin for frozen dataclasses. Every int is a size >= 1 unless its name ends in _id; every float is finite."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, numpy.generic):
                value = value.item()
                object.__setattr__(self, field.name, value)
            if field.type == "bool":
                self._expect(field.name, type(value) is bool, "true or false")
            elif field.type == "int":
                least = 0 if field.name.endswith("_id") else 1
                self._expect(field.name, type(value) is int and value >= least, f"an integer >= {least}")
            elif field.type == "float":
                number = type(value) in (int, float) and math.isfinite(value)
                self._expect(field.name, number and value >= 0, "a finite number >= 0")
            elif field.type == "str":
                self._expect(field.name, isinstance(value, str), "a string")
        self.check()

    def check(self) -> None:
        """What one field cannot say alone; subclasses add to it."""
        vocab = getattr(self, "vocab_size")
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            self._expect(name, getattr(self, name) < vocab, f"an id below vocab_size {vocab}")
        for name in ("dropout_rate", "label_smoothing"):
            self._expect(name, getattr(self, name, 0.0) < 1, "a number in [0, 1)")
        for name in ("layer_norm_eps", "layer_norm_epsilon"):
            self._expect(name, getattr(self, name, 1.0) > 0, "a number > 0")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"config: {name} is {getattr(self, name)!r}; expected {expected}")

    def _expect_activation(self, name: str) -> None:
        self._expect(name, getattr(self, name) in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that a JSON file holds. Raises ValueError for missing and unknown fields."""
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        needed = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
        missing, extra = [n for n in needed if n not in values], [n for n in values if n not in fields]
        if missing or extra:
            raise ValueError("config: " + "; ".join(
                f"{what} {', '.join(names)}" for what, names in (("missing", missing), ("unknown", extra)) if names))
        return cls(**values)
