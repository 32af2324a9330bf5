"""A LoRA that is made of given factors, and not drawn.

    W = W0 + s B A at each place, with its own rank and its own s: LoRA(scaling="alpha", alpha = s, ...) and patterns
"""
from __future__ import annotations

import collections
import re
from typing import Any, Mapping

from minipeft.attaching.attachment import Attachment
from minipeft.attaching.build import wanted
from minipeft.attaching.method import Declared, checked
from minipeft.attaching.trained_on import TrainedOn
from minipeft.attaching.trial import tried
from minipeft.backend import Array, to_device
from minipeft.methods.lora import LoRA
from minipeft.nn.module import Model
from minipeft.operations.change import Factors


def lora_of(model: Model, name: str, parts: Mapping[str, Factors], trained_on: TrainedOn | None,
            errors: Mapping[str, float]) -> Attachment:
    """A LoRA called `name` with the factors `parts`, {place: Factors}, not attached yet. trained_on, errors: of the
    attachment. Raises ValueError for a scale that is not finite in the dtype of the weights."""
    ranks = {place: part.rank for place, part in parts.items()}
    scales = {place: float(part.s) for place, part in parts.items()}
    rank, alpha = (collections.Counter(found.values()).most_common(1)[0][0] for found in (ranks, scales))
    method = checked(LoRA(int(rank), float(alpha), where=tuple(map(exactly, parts)), scaling="alpha",
                          rank_pattern={exactly(place): r for place, r in ranks.items() if r != rank},
                          alpha_pattern={exactly(place): s for place, s in scales.items() if s != alpha}))
    plan = tried(wanted(model, method))

    def fill(key: str, declared: Declared, dtype: Any) -> Array:
        place, _, leaf = key.rpartition(".")
        return to_device(getattr(parts[place], leaf).astype(dtype, copy=True))

    pieces, arrays = plan.built(fill)
    made = Attachment(model, name, method, tried(plan, pieces, arrays).places, pieces, arrays, trained_on)
    made.errors.update(errors)
    return made


def exactly(place: str) -> str:
    """The regular expression that matches the name of this `place` alone."""
    return f"^{re.escape(place)}$"
