"""The methods that `accents.py` compares, with learning rates that were fixed before any test word was asked.

The rates are the usual ones for a model of this size and Adam: 1e-3 where whole matrices move, 3e-3 to 1e-2 where few
numbers have to do much, 3e-2 for prompt vectors, which live on the scale of embeddings, and that of the pretraining
from scratch. Those of "embedding", "last layers" and "scratch" were chosen between 1e-3 and a two- to threefold, on 500
training words that no run here trains on.
"""
from __future__ import annotations

import dataclasses
from typing import Any

import numpy

import minipeft

EVERY_LINEAR = r"\.(attn|cross|ff)\."       # q, k, v, o of self- and cross-attention, wi and wo; both stacks


@dataclasses.dataclass(frozen=True)
class Variant:
    """method: what is attached, None to train all parameters. lr: the largest rate of the schedule. always: in the
    default run. fresh: from random weights, not from the pretrained ones. bare: the word is asked without "british: "
    in front of it."""

    method: Any
    lr: float
    always: bool = False
    fresh: bool = False
    bare: bool = False


def _lora(where: str, rank: int = 8, always: bool = False) -> Variant:
    return Variant(minipeft.LoRA(rank=rank, alpha=2 * rank, where=where), 5e-3, always)


def from_scratch(config: minipeft.TransformerConfig, seed: int) -> minipeft.Transformer:
    """A model that knows nothing, started as well as it can be: positions as large as the embeddings that they are
    added to. As `Transformer` starts them, sqrt(d_model) times smaller, they cost nothing in a long pretraining, but a
    thousand pairs then teach a model a third as many words."""
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
    "Houlsby adapters": Variant(minipeft.Bottleneck(placement="houlsby", size=16), 3e-3, always=True),
    "Pfeiffer adapters": Variant(minipeft.Bottleneck(placement="pfeiffer", size=16), 3e-3),
    "BitFit": Variant(minipeft.Selective(type="bias"), 1e-2, always=True),
    "norms": Variant(minipeft.Selective(component="norm"), 1e-2),
    "last layers": Variant(minipeft.Selective(last=1), 1e-3),                 # the last block of each stack
    "embedding": Variant(minipeft.Selective(component="embedding"), 3e-3),
    # Prompt tuning. A prompt takes positions, and the base has met words behind "american: " alone: moved on by 20, a
    # word is unreadable to it, whatever the prompt says. Ten vectors in place of the ten characters of "american: "
    # leave it where it was.
    "soft prompt": Variant(minipeft.PromptTuning(length=20), 3e-2),
    "soft prompt, bare": Variant(minipeft.PromptTuning(length=10), 3e-2, bare=True),
    "scratch": Variant(None, 2e-3, fresh=True),
}
HARD_PROMPT = "hard prompt"                 # no method of minipeft: a text, found by `hard_prompt.search`
NAMES = (*VARIANTS, HARD_PROMPT)
