"""Configurations: frozen dataclasses that check themselves. An error names the wrong field and what was expected."""
from __future__ import annotations

import dataclasses
import json
from typing import Any, Iterable, Mapping, Self

from minipeft.checks import integer, number, python, shown
from minipeft.nn.fingerprint import sha256
from minipeft.nn.layers import ACTIVATIONS

LARGEST = 2 ** 31 - 1  # the largest number that a configuration may hold
_NOT_COMPUTED = {"dropout_rate", "label_smoothing", "initializer_factor", "max_length", "pad_token_id", "eos_token_id",
                 "decoder_start_token_id", "eos_token_ids", "bos_token_id", "attention_dropout",
                 "max_position_embeddings"}


def checked_config(config: Any, kind: type) -> Any:
    """`config`, if it is a `kind`. Raises TypeError otherwise, saying how to make one."""
    if not isinstance(config, kind):
        raise TypeError(f"config is {type(config).__name__}; expected {kind.__name__}(...)")
    return config


def listed(names: Iterable[str]) -> str:
    """The first five of `names`, which come from a file, for an error message; long names are cut."""
    first = list(names)
    return ", ".join(name if len(name) <= 60 and name.isprintable() else f"{shown(name)[:60]}..."
                     for name in first[:5]) + (" ..." if first[5:] else "")


class Config:
    """Mixin for frozen dataclasses. Every int must be a size >= 1, or >= 0 if its name ends in _id; every float must be
    finite and >= 0; none may exceed 2^31 - 1. Raises ValueError naming a field that is wrong."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            what, value = f"config: {field.name}", python(getattr(self, field.name))
            if field.type == "bool":
                self._expect(field.name, type(value) is bool, "true or false")
            elif field.type == "int":
                value = integer(what, value, 0 if field.name.endswith("_id") else 1)
            elif field.type == "float":
                number(what, value, 0)
            elif field.type == "str":
                self._expect(field.name, isinstance(value, str), "a string")
            elif field.type == "tuple[int, ...]":
                self._expect(field.name, isinstance(value, (tuple, list)), "integers")
                value = tuple(integer(what, python(each), 0) for each in value)
            if not isinstance(value, (str, tuple)):
                self._expect(field.name, value <= LARGEST, f"at most {LARGEST}")
            object.__setattr__(self, field.name, value)
        self.check()
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.type == "float":  # a huge integer would overflow beside a float32 array
                object.__setattr__(self, field.name, float(getattr(self, field.name)))

    def check(self) -> None:
        """Check the rules beyond a field's type, such as those between fields; subclasses add their own. Raises
        ValueError naming the field."""
        vocab = getattr(self, "vocab_size")
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            self._expect(name, getattr(self, name, 0) < vocab, f"an id below vocab_size {vocab}")
        for name in ("dropout_rate", "label_smoothing", "attention_dropout"):
            self._expect(name, getattr(self, name, 0.0) < 1, "a number in [0, 1)")
        for name in ("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps"):
            self._expect(name, getattr(self, name, 1.0) > 0, "a number > 0")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"config: {name} is {shown(getattr(self, name))}; expected {expected}")

    def _expect_activation(self, name: str, known: str) -> None:
        """name: the field; known: the activation that its value means."""
        self._expect(name, known in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")

    def to_dict(self) -> dict[str, Any]:
        """{field: value}, as JSON can hold it."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def resolved(self) -> dict[str, Any]:
        """Every field, with one name for each meaning, so that configurations with the same meaning are equal here."""
        return self.to_dict()

    def computes(self) -> dict[str, Any]:
        """The kind of the model and every field that changes its outputs for given ids, resolved. Dropout, smoothing,
        initialization and special ids do not; the number of learned positions shows in their tensor."""
        kind = type(self).__name__.removesuffix("Config")
        return {"kind": kind, **{name: value for name, value in self.resolved().items() if name not in _NOT_COMPUTED}}

    def digest(self) -> str:
        """The SHA-256 of `resolved` as JSON, in hexadecimal."""
        return sha256([json.dumps(self.resolved(), sort_keys=True).encode()])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration in a JSON file of ours. Raises ValueError unless `values` has all fields and no others."""
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        missing, extra = [n for n in names if n not in values], [n for n in values if n not in names]
        if missing or extra:
            raise ValueError("config: " + "; ".join(
                f"{what} {listed(odd)}" for what, odd in (("missing", missing), ("unknown", extra)) if odd))
        return cls(**values)


def first_name(activation: str) -> str:
    """The first of several names of an activation: gelu_new for gelu_tanh, silu for swish."""
    return next(name for name, f in ACTIVATIONS.items() if f is ACTIVATIONS[activation])
