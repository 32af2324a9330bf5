"""A law is a function of (method, model, seed) that returns if the law holds, and raises if it does not.

A law works on clones and leaves the model as it was. All its random numbers come from the seed.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Callable

import numpy

from minipeft.attaching.attach import attach
from minipeft.attaching.attachment import Attachment
from minipeft.attaching.method import Method
from minipeft.laws.models import batch_for, bits, is_causal, moved
from minipeft.methods.lora import LoRA
from minipeft.nn.module import Model

Law = Callable[[Method, Model, int], None]
LAWS: dict[str, Law] = {}  # by number and name: "3 merge"


class Broken(AssertionError):
    """A law does not hold; the message names the fault."""


class DoesNotApply(Exception):
    """A law says nothing about this method on this model; the message says why."""


def law(name: str) -> Callable[[Law], Law]:
    """Decorator: the function is the law with this number and name, such as "3 merge"."""
    def named(function: Law) -> Law:
        LAWS[name] = function
        return function
    return named


def holds(condition: Any, found: str) -> None:
    """Raises Broken with the message `found`, unless the condition is true."""
    if not condition:
        raise Broken(found)


@dataclasses.dataclass(frozen=True)
class Bench:
    """A clone of a model, an attachment on it with values as after training, and a batch for the model. u: the unit
    roundoff of the model's dtype."""

    model: Any
    attachment: Attachment
    batch: dict[str, numpy.ndarray]
    u: float

    @classmethod
    def of(cls, method: Method, model: Model, seed: int, rows: int = 4) -> "Bench":
        """A bench with the method attached as "a", every trained number moved, and a batch of `rows` sequences."""
        copy = model.clone()
        attachment = attach_moved(copy, method, seed, "a")
        holds(bits(copy.base_arrays) == bits(model.base_arrays), "moving its arrays moves the base")
        dtype = next(iter(copy.base_parameters.values())).dtype
        batch = batch_for(copy.config.vocab_size, seed, rows, is_causal(copy))  # type: ignore[attr-defined]
        return cls(copy, attachment, batch, float(numpy.finfo(dtype).eps) / 2)

    def partner(self, seed: int, name: str = "b", **fields: Any) -> Attachment:
        """A LoRA on the same model, attached under `name`, its numbers moved in the same way. fields: of the LoRA, by
        default rank 2 and alpha 3."""
        return attach_moved(self.model, LoRA(**{"rank": 2, "alpha": 3, **fields}), seed + 1, name)

    @property
    def on_weights(self) -> bool:
        """Whether every place of the method is a slot."""
        return all(hasattr(place, "fold") for place in self.attachment.places.values())


def attach_moved(model: Model, method: Method, seed: int, name: str) -> Attachment:
    """Attach the method under `name`, and move every trained number by N(0, 0.04)."""
    return moved(attach(model, method, numpy.random.default_rng([seed, 2]), name),
                 numpy.random.default_rng([seed, 3]))
