"""Tiny models and batches for the laws. Sizes are pairwise distinct where the architecture allows it, so that no two
axes can be exchanged unnoticed.

T5's q is rectangular [15, 12], and the Transformer's is square [12, 12]: a transposed merge would have the right shape
only at a square one.
"""
from __future__ import annotations

from typing import Any, Callable

import numpy

from minipeft.backend import to_device
from minipeft.engine.tensor import array_of
from minipeft.models.t5 import T5, T5Config
from minipeft.models.transformer import Transformer, TransformerConfig

VOCAB, D_MODEL, HEADS, D_KV, BATCH, SOURCE, TARGET = 13, 12, 3, 5, 4, 6, 7


def t5_v10(rng: Any, dtype: str) -> T5:
    """A T5 v1.0: ReLU, one table for the encoder's input, the decoder's input and the head, scaled logits."""
    return T5(T5Config(VOCAB, D_MODEL, D_KV, HEADS, 17, 1, 2, 8, 20), rng, dtype)


def t5_v11(rng: Any, dtype: str) -> T5:
    """A T5 v1.1: gated gelu, a head of its own."""
    config = T5Config(VOCAB, D_MODEL, D_KV, HEADS, 17, 2, 1, 8, 20, feed_forward_proj="gated-gelu",
                      tie_word_embeddings=False, scale_decoder_outputs=False)
    return T5(config, rng, dtype)


def post_norm(rng: Any, dtype: str) -> Transformer:
    """The Transformer of the paper: post-LN, ReLU, sinusoids, one table, label smoothing."""
    config = TransformerConfig(VOCAB, D_MODEL, HEADS, 17, 2, 1, label_smoothing=0.1)
    return Transformer(config, rng, dtype)


def pre_norm(rng: Any, dtype: str) -> Transformer:
    """A pre-LN Transformer: final norms, gelu, learned positions, a head of its own."""
    config = TransformerConfig(VOCAB, D_MODEL, HEADS, 17, 1, 2, activation="gelu", pre_norm=True, final_norm=True,
                               positions="learned", max_length=12, tie_embeddings=False)
    return Transformer(config, rng, dtype)


FAMILIES: dict[str, Callable] = {"t5 v1.0": t5_v10, "t5 v1.1": t5_v11, "post-LN": post_norm, "pre-LN": pre_norm}


def model_of(family: str, dtype: str, seed: int) -> Any:
    """A model of a `family` of FAMILIES. None of its arrays is all zeros or all ones, so that a forgotten bias or norm
    weight is noticed."""
    rng = numpy.random.default_rng([seed, 1])
    model = FAMILIES[family](rng, dtype)
    for p in model.base_parameters.values():
        if p.ndim == 1:
            p.data += (0.2 * rng.standard_normal(p.shape)).astype(p.dtype)
    return model


def batch_for(vocab: int, seed: int, rows: int = BATCH, causal: bool = False) -> dict[str, numpy.ndarray]:
    """The arguments of `model.loss` for a vocabulary of the size `vocab`: ids without pad [rows, source], a mask with 0
    at the right of the first row and at the left of the last, labels [rows, target], some of them -100. causal: for a
    model without an encoder, whose labels have the shape of the ids; none is at padding,
    or where no token stands before it."""
    rng = numpy.random.default_rng([seed, 0])
    mask, labels = numpy.ones((rows, SOURCE), int), rng.integers(1, vocab, (rows, TARGET))
    mask[0, -2:], mask[-1, 0] = 0, 0
    labels[0, -3:], labels[-1, 2] = -100, -100
    if causal:
        labels = labels[:, :SOURCE]
        labels[:, 0] = labels[-1, 1] = -100
    return {"input_ids": rng.integers(1, vocab, (rows, SOURCE)), "attention_mask": mask, "labels": labels}


def is_causal(model: Any) -> bool:
    """Whether the model has no encoder."""
    return not hasattr(model, "encoder")


def logits(model: Any, batch: dict, **options: Any) -> numpy.ndarray:
    """The logits of `model.loss` on this batch, [rows, target, vocab]. options: of the model's call (adapter, rng)."""
    if is_causal(model):
        return model(batch["input_ids"], batch["attention_mask"], **options).data
    shifted = model.shift_right(batch["labels"])
    return model(batch["input_ids"], shifted, batch["attention_mask"], **options).data


def outputs(model: Any, batch: dict) -> list[Any]:
    """All outputs of a model for a batch: logits, loss, the encoder's output (logits without a mask, where there is no
    encoder), generated ids."""
    ids = batch["input_ids"]
    encoded = model(ids) if is_causal(model) else model.encode(ids)
    return [logits(model, batch), model.loss(**batch).data, encoded.data, model.generate(ids, max_new_tokens=3)]


def bits(arrays: Any) -> Any:
    """{name: (dtype, shape, bytes)} of arrays or Parameters: equal if and only if no bit changed."""
    return {name: (str(a.dtype), a.shape, array_of(a).tobytes()) for name, a in arrays.items()}


def same_values(a: Any, b: Any) -> bool:
    """Whether a and b are equal in dtype, shape and every bit, except the sign of a zero. NaN equals nothing."""
    return a.dtype == b.dtype and numpy.array_equal(a, b)


def moved(attachment: Any, rng: numpy.random.Generator, std: float = 0.2) -> Any:
    """The attachment as it might be after training: every trained number moved by N(0, std^2), so that no factor is
    still 0."""
    for p in attachment.parameters.values():
        p.data += to_device(numpy.asarray(std * rng.standard_normal(p.shape)).astype(p.dtype))
    return attachment
