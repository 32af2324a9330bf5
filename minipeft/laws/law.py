"""What a law is: a function of (method, model, seed) that returns if the law holds, and raises if it does not.

The model is left as it was: a law works on clones. Random numbers come from the seed alone.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Callable

import numpy

from minipeft.attaching.attach import attach
from minipeft.attaching.attachment import Attachment
from minipeft.attaching.method import Method
from minipeft.laws.models import batch_for, moved
from minipeft.methods.lora import LoRA
from minipeft.nn.module import Model

Law = Callable[[Method, Model, int], None]
LAWS: dict[str, Law] = {}  # by number and name: "3 merge"


class Broken(AssertionError):
    """A law does not hold; the message says what was found."""


class DoesNotApply(Exception):
    """A law says nothing about this method on this model; the message says why."""


def law(name: str) -> Callable[[Law], Law]:
    """Decorator: the function is the law of that number and name."""
    def named(function: Law) -> Law:
        LAWS[name] = function
        return function
    return named


def holds(condition: Any, found: str) -> None:
    """Raises Broken, with what was found, unless the condition is true."""
    if not condition:
        raise Broken(found)


@dataclasses.dataclass(frozen=True)
class Bench:
    """A clone of a model with the method attached as it might be after training, and a batch for it."""

    model: Any
    attachment: Attachment
    batch: dict[str, numpy.ndarray]
    u: float  # the unit roundoff of the model's dtype

    @classmethod
    def of(cls, method: Method, model: Model, seed: int, rows: int = 4) -> "Bench":
        """Attached as "a", with every trained number moved."""
        copy = model.clone()
        attachment = attach_moved(copy, method, seed, "a")
        dtype = next(iter(copy.base_parameters.values())).dtype
        return cls(copy, attachment, batch_for(copy.config.vocab_size, seed, rows),  # type: ignore[attr-defined]
                   float(numpy.finfo(dtype).eps) / 2)

    def partner(self, seed: int, name: str = "b", **fields: Any) -> Attachment:
        """A LoRA beside it, on q and v, moved likewise."""
        return attach_moved(self.model, LoRA(**{"rank": 2, "alpha": 3, **fields}), seed + 1, name)

    @property
    def on_weights(self) -> bool:
        """Whether every place of the method is a slot."""
        return all(hasattr(place, "fold") for place in self.attachment.places.values())


def attach_moved(model: Model, method: Method, seed: int, name: str) -> Attachment:
    """Attach the method, and move every trained number by N(0, 0.04)."""
    return moved(attach(model, method, numpy.random.default_rng([seed, 2]), name),
                 numpy.random.default_rng([seed, 3]))
