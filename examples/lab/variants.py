"""The methods that `accents.py` compares. Their learning rates were fixed before any test word was asked.

The rates are the usual ones for a model of this size and Adam: 1e-3 where whole matrices move, 3e-3 to 1e-2 where few
numbers must do much, and 3e-2 for prompt vectors, which have the scale of embeddings. "scratch" has the rate of
pretraining. The rates of "embedding", "last layers" and "scratch" were chosen between 1e-3 and two to three times as
much, and those of "VeRA r=64", "(IA)^3" and "prefix" between 1e-2 and 3e-2, on 500 training words that no run here
trains on.
"""
from __future__ import annotations

import dataclasses
from typing import Any

import numpy

import minipeft

EVERY_LINEAR = r"\.(attn|cross|ff)\."       # q, k, v, o of self- and cross-attention, wi and wo; both stacks


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the comparison.

    method: the method that is attached; None trains all parameters. lr: the largest rate of the schedule. always: it is
    part of the default run. fresh: start from random weights instead of the pretrained ones. bare: ask the word without
    "british: " in front of it."""

    method: Any
    lr: float
    always: bool = False
    fresh: bool = False
    bare: bool = False


def _lora(where: str, rank: int = 8, always: bool = False) -> Variant:
    return Variant(minipeft.LoRA(rank=rank, alpha=2 * rank, where=where), 5e-3, always)


def from_scratch(config: minipeft.TransformerConfig, seed: int) -> minipeft.Transformer:
    """A model with random weights and a good start: positions as large as the embeddings that they are added to.

    `Transformer` makes them sqrt(d_model) times smaller. That costs nothing in a long pretraining, but from a thousand
    pairs a model then learns a third as many words."""
    model = minipeft.Transformer(config, numpy.random.default_rng(seed))
    for p in minipeft.select(model, r"\.position\.weight$").values():
        p.data *= numpy.float32(config.d_model ** 0.5)
    return model


VARIANTS = {
    "full": Variant(None, 1e-3, always=True),
    "LoRA r=8": _lora(EVERY_LINEAR, always=True),
    "LoRA r=4": _lora(EVERY_LINEAR, rank=4),
    "LoRA r=8, attn": _lora(r"\.attn\."),                   # q, k, v, o of self-attention, both stacks
    "LoRA r=8, ff": _lora(r"\.ff\."),                       # wi and wo, both stacks
    "LoRA r=8, attn+ff": _lora(r"\.(attn|ff)\."),           # all but cross-attention
    "DoRA r=8": Variant(minipeft.DoRA(rank=8, alpha=16, where=EVERY_LINEAR), 5e-3),
    "VeRA r=64": Variant(minipeft.VeRA(rank=64, where=EVERY_LINEAR), 3e-2),
    "(IA)^3": Variant(minipeft.IA3(), 3e-2),                # factors of all keys, values and hidden features
    "Houlsby adapters": Variant(minipeft.Bottleneck(placement="houlsby", size=16), 3e-3, always=True),
    "Pfeiffer adapters": Variant(minipeft.Bottleneck(placement="pfeiffer", size=16), 3e-3),
    "BitFit": Variant(minipeft.Selective(type="bias"), 1e-2, always=True),
    "norms": Variant(minipeft.Selective(component="norm"), 1e-2),
    "last layers": Variant(minipeft.Selective(last=1), 1e-3),                 # the last block of each stack
    "embedding": Variant(minipeft.Selective(component="embedding"), 3e-3),
    # Ten trained keys and values in every attention. They take no positions.
    "prefix": Variant(minipeft.PrefixTuning(length=10), 3e-2),
    # Prompt tuning. A prompt takes positions, and the base has only met words right behind "american: ". Moved by 20
    # positions, a word is unreadable to it, whatever the prompt is. Ten vectors in place of the ten characters of
    # "american: " leave the word where it was.
    "soft prompt": Variant(minipeft.PromptTuning(length=20), 3e-2),
    "soft prompt, bare": Variant(minipeft.PromptTuning(length=10), 3e-2, bare=True),
    "scratch": Variant(None, 2e-3, fresh=True),
}
HARD_PROMPT = "hard prompt"                 # not a method of minipeft: a text, found by `hard_prompt.search`
NAMES = (*VARIANTS, HARD_PROMPT)
