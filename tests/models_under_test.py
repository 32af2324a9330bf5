"""Tiny models, batches and LoRA cases for the laws: sizes pairwise distinct where the architecture allows it.

T5's q is rectangular [15, 12]; the Transformer's is square [12, 12], where a transposed merge would go unnoticed.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Callable

import numpy
from hypothesis import strategies as st

import minipeft
from minipeft.engine.tensor import array_of
from minipeft.nn.slot import Slot

VOCAB, D_MODEL, HEADS, D_KV, BATCH, SOURCE, TARGET = 13, 12, 3, 5, 4, 6, 7


def t5_v10(rng: Any, dtype: str) -> minipeft.T5:
    """ReLU, one table for the encoder's input, the decoder's input and the head, scaled logits."""
    return minipeft.T5(minipeft.T5Config(VOCAB, D_MODEL, D_KV, HEADS, 17, 1, 2, 8, 20), rng, dtype)


def t5_v11(rng: Any, dtype: str) -> minipeft.T5:
    """Gated gelu, a head of its own."""
    config = minipeft.T5Config(VOCAB, D_MODEL, D_KV, HEADS, 17, 2, 1, 8, 20, feed_forward_proj="gated-gelu",
                               tie_word_embeddings=False, scale_decoder_outputs=False)
    return minipeft.T5(config, rng, dtype)


def post_norm(rng: Any, dtype: str) -> minipeft.Transformer:
    """The paper's: post-LN, ReLU, sinusoids, one table, label smoothing."""
    config = minipeft.TransformerConfig(VOCAB, D_MODEL, HEADS, 17, 2, 1, label_smoothing=0.1)
    return minipeft.Transformer(config, rng, dtype)


def pre_norm(rng: Any, dtype: str) -> minipeft.Transformer:
    """Pre-LN, final norms, gelu, learned positions, a head of its own."""
    config = minipeft.TransformerConfig(VOCAB, D_MODEL, HEADS, 17, 1, 2, activation="gelu", pre_norm=True,
                                        final_norm=True, positions="learned", max_length=12, tie_embeddings=False)
    return minipeft.Transformer(config, rng, dtype)


FAMILIES: dict[str, Callable] = {"t5 v1.0": t5_v10, "t5 v1.1": t5_v11, "post-LN": post_norm, "pre-LN": pre_norm}
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
        """The base: no array of it is all zeros or all ones, so that no bias and no norm scale can be forgotten."""
        rng = numpy.random.default_rng([self.seed, 1])
        model = FAMILIES[self.family](rng, self.dtype)
        for p in model.base_parameters.values():
            if p.ndim == 1:
                p.data += (0.2 * rng.standard_normal(p.shape)).astype(p.dtype)
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
        rng = numpy.random.default_rng([self.seed, 0])
        mask, labels = numpy.ones((rows, SOURCE), int), rng.integers(1, VOCAB, (rows, TARGET))
        mask[0, -2:], mask[-1, 0] = 0, 0
        labels[0, -3:], labels[-1, 2] = -100, -100
        return {"input_ids": rng.integers(1, VOCAB, (rows, SOURCE)), "attention_mask": mask, "labels": labels}

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


def logits(model: Any, batch: dict, **options: Any) -> numpy.ndarray:
    """Those of `model.loss` on this batch."""
    shifted = model.shift_right(batch["labels"])
    return model(batch["input_ids"], shifted, batch["attention_mask"], **options).data


def bits(arrays: Any) -> Any:
    """What must not change when nothing may: {name: (dtype, shape, bytes)} of arrays or Parameters."""
    return {name: (str(a.dtype), a.shape, array_of(a).tobytes()) for name, a in arrays.items()}


def same_values(a: numpy.ndarray, b: numpy.ndarray) -> bool:
    """Equal in dtype, shape and every bit, but for the sign of a zero. NaN equals nothing."""
    return a.dtype == b.dtype and numpy.array_equal(a, b)


def slots_of(attachment: minipeft.Attachment) -> dict[str, Slot]:
    """The places of a LoRA, which are slots."""
    assert all(isinstance(place, Slot) for place in attachment.places.values())
    return dict(attachment.places)  # type: ignore[arg-type]
