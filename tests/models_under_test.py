"""Tiny models, batches and LoRA cases for the laws: sizes pairwise distinct where the architecture allows it.

T5's q is rectangular [15, 12]; the Transformer's is square [12, 12], where a transposed merge would go unnoticed.
"""
from __future__ import annotations

import dataclasses
from typing import Any

import numpy
from hypothesis import strategies as st

import minipeft
from minipeft.laws.models import (  # noqa: F401  (for the tests that draw these models)
    BATCH, D_KV, D_MODEL, FAMILIES, HEADS, SOURCE, TARGET, VOCAB, batch_for, bits, logits, model_of, same_values)
from minipeft.nn.slot import Slot

TIED = ("t5 v1.0", "post-LN")
PATTERNS: dict[str, Any] = {
    "q and v": minipeft.LoRA().where,
    "every linear": r"\.(attn|cross|ff)\.\w+\.weight$",
    "embedding": "^embedding",
    "head": "^head",
    "mixture": ["^embedding", lambda name: name.endswith("ff.wo.weight"), r"decoder\.0\.cross\.(k|o)"]}
PLACES = [(f, p) for f in FAMILIES for p in PATTERNS if p != "head" or f not in TIED]


@dataclasses.dataclass(frozen=True)
class Case:
    """place: a model family and a pattern; LoRA's numbers; a dtype; the seed of everything drawn."""

    place: tuple[str, str]
    rank: int
    alpha: float
    dtype: str
    seed: int

    @property
    def family(self) -> str:
        return self.place[0]

    @property
    def pattern(self) -> str:
        return self.place[1]

    def model(self) -> Any:
        """The base: no array of it is all zeros or all ones, so that no bias and no norm weight can be forgotten."""
        model = model_of(self.family, self.dtype, self.seed)
        assert model.host.now.attached == {}
        return model

    @property
    def method(self) -> minipeft.LoRA:
        return minipeft.LoRA(self.rank, self.alpha, where=PATTERNS[self.pattern])

    def attach(self, model: Any, name: str = "lora", at: int = 2, where: Any = None) -> minipeft.Attachment:
        """This case's LoRA as it might be after training: B is not 0. `at` tells several of them apart."""
        rng = numpy.random.default_rng([self.seed, at])
        method = self.method if where is None else dataclasses.replace(self.method, where=where)
        return trained(minipeft.attach(model, method, rng, name), rng)

    def batch(self, rows: int = BATCH) -> dict[str, numpy.ndarray]:
        """Ids without pad, a mask with a hole on either side, labels with -100 among them."""
        return batch_for(VOCAB, self.seed, rows)

    @property
    def u(self) -> float:
        """The unit roundoff of the dtype."""
        return float(numpy.finfo(self.dtype).eps) / 2


def trained(attachment: minipeft.Attachment, rng: numpy.random.Generator, std: float = 0.2) -> minipeft.Attachment:
    """The attachment with B drawn from N(0, std^2)."""
    for name, p in attachment.parameters.items():
        if name.endswith(".B"):
            p.data = (std * rng.standard_normal(p.shape)).astype(p.dtype)
    return attachment


def cases(dtypes: tuple[str, ...] = ("float64", "float32"), places: Any = None) -> st.SearchStrategy[Case]:
    """Cases over families, patterns, ranks up to the largest (where A is square), alphas of both signs, some of which
    no rank divides, dtypes and seeds."""
    return st.builds(Case, st.sampled_from(places or PLACES), st.sampled_from([1, 2, 3, 7, D_MODEL]),
                     st.sampled_from([1, 5, 0.75, -3]), st.sampled_from(dtypes), st.integers(0, 999))


def slots_of(attachment: minipeft.Attachment) -> dict[str, Slot]:
    """The places of a LoRA, which are slots."""
    assert all(isinstance(place, Slot) for place in attachment.places.values())
    return dict(attachment.places)  # type: ignore[arg-type]
