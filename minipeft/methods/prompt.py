"""Prompt tuning: trained vectors in front of the input, which the model reads as if they were tokens.

    encoder([P; E(x)])          Lester, Al-Rfou & Constant, 2021, arXiv:2104.08691, sec. 2
    mask [1 .. 1; mask]         the encoder and cross-attention see the prompt

    P [p, d] --------------------+
    ids [batch, time] -- E -- [batch, time, d] -- [batch, p + time, d] -- encoder       everything else is frozen

The input can tell a large model which task to do. Vectors can say it better than words, because training moves them
freely.

    adapter = attach(model, PromptTuning(20), numpy.random.default_rng(0))
    fit(model, adapter, batches, steps=300, optimizer=AdamW(0.3))
    model.generate(ids, attention_mask=mask)

On T5-small, p = 20: 10,240 parameters of 60,506,624.

The prompt takes positions: a token at position i moves to p + i (T5's relative distances between tokens stay). It
lengthens every input by p, in training and at inference. It is not a weight, so it cannot be merged. It acts exactly
like p virtual tokens, which the vocabulary lacks: with the rows of P appended to E, and their p ids in front of the
input, the base computes the same.

The paper does not say where the prompt stands in a row that is padded on the left. As in PEFT it is left of the
padding, so its distance to the text grows with the padding, and the output changes. With next_to_text it stands between
padding and text, and a T5 model gives the same output as without padding.
"""
from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from minipeft.attaching.fields import expect, integer
from minipeft.attaching.method import Declared, Method, register, setting, trained
from minipeft.backend import Array, xp
from minipeft.engine.ops import concat, embedding
from minipeft.engine.tensor import Tensor, array_of
from minipeft.nn.init import Rng, uniform
from minipeft.nn.inputs import check_ids
from minipeft.nn.place import Place
from minipeft.nn.positions import Learned
from minipeft.nn.site import Site
from minipeft.nn.weight import Parameter, Piece
from minipeft.nn.where import Where


class Prompt(Piece):
    """P [p, d] in front of the embeddings; next_to_text as in `PromptTuning`."""

    P: Parameter
    next_to_text: bool

    def __call__(self, x: Any, mask: Array | None) -> tuple[Tensor, Array | None]:
        """x [batch, time, d], mask [batch, time] or None -> [batch, p + time, d], [batch, p + time] or None."""
        ids = xp.tile(xp.arange(self.P.shape[0]), (x.shape[0], 1))                       # [batch, p] virtual tokens
        prompted = concat(embedding(self.P, ids), x, axis=1)
        if mask is None:
            return prompted, None
        padding = (xp.cumsum(mask, axis=1) == 0).sum(axis=1, keepdims=True)              # [batch, 1] on the left
        mask = xp.concatenate([xp.ones(ids.shape, dtype=bool), mask], axis=1)
        if not self.next_to_text or not padding.any():
            return prompted, mask
        order = _behind(padding, ids.shape[1], mask.shape[1])
        return _reordered(prompted, order), xp.take_along_axis(mask, order, axis=1)


INITS = ("vocabulary", "random", "tokens")
_ENCODER, _DECODER = r"^encoder\.input$", r"^decoder\.input$"


@register
@dataclasses.dataclass(frozen=True)
class PromptTuning(Method):
    """Prompt tuning. length: p. init (Lester et al., sec. 3.2): "vocabulary", embeddings of tokens drawn from the
    vocabulary without the special ones; "random", U(-1/2, 1/2); "tokens", embeddings of `tokens`, a text or class
    labels. tokens: ids, or tuples of ids, whose mean embedding is taken (a label of several tokens). If they are fewer
    than p, the others are drawn from the vocabulary. Departure: the paper draws from the 5,000 most common tokens,
    which only a tokenizer knows. next_to_text: in rows padded on the left, put the prompt between padding and text, not
    in front of both. where: the input sites, by default the encoder's, or the
    only one of a model without an encoder.

    Raises ValueError for fields out of range, and on a model for ids that it lacks and for a prompt that is too long
    for its learned positions."""

    kinds = ("input",)
    transparent = False
    length: int = setting(20, integer, "an integer >= 1")
    init: str = setting("vocabulary", lambda v: v in INITS, f"one of {', '.join(INITS)}")
    tokens: tuple[int | tuple[int, ...], ...] = ()
    next_to_text: bool = setting(False, lambda v: isinstance(v, bool), "True or False")
    where: Where = _ENCODER

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "tokens", isinstance(self.tokens, tuple) and all(map(_word, self.tokens))
               and (self.init == "tokens") == bool(self.tokens) and len(self.tokens) <= self.length,
               f"1 to {self.length} ids, or tuples of ids, with init='tokens', and none without")

    def places(self, model: Any) -> dict[str, Place]:
        for token in self.tokens:
            check_ids([token if isinstance(token, tuple) else (token,)], model.config.vocab_size, "tokens")
        if self.init != "random" and len(self.tokens) < self.length and not _words(model.config):
            raise ValueError("PromptTuning: the vocabulary has special tokens alone; expected others to draw from, or "
                             "init='random'")
        position = model.encoder.position if hasattr(model, "encoder") else None
        room = position.weight.shape[0] if isinstance(position, Learned) else None
        expect(self, "length", room is None or self.length < room,
               f"fewer than the {room} positions that the encoder has learned (config.max_length)")
        if self.where == _ENCODER and not hasattr(model, "encoder"):
            return dataclasses.replace(self, where=_DECODER).places(model)
        return super().places(model)

    def arrays(self, name: str, site: Site, model: Any) -> dict[str, Declared]:
        def of_tokens(shape: tuple, dtype: Any, rng: Rng) -> Array:
            return self._embedded(model, rng)

        return {"P": trained((self.length, site.width), uniform(0.5) if self.init == "random" else of_tokens)}

    def make(self, name: str, site: Site, arrays: Any) -> Prompt:
        return Prompt(**arrays, next_to_text=self.next_to_text)

    def _embedded(self, model: Any, rng: Any) -> Array:
        """[p, d]: the embeddings of `tokens`, then those of ids drawn from the vocabulary."""
        words, missing = _words(model.config), self.length - len(self.tokens)
        drawn = rng.choice(words, missing, replace=len(words) < missing).tolist() if missing else []
        groups = [t if isinstance(t, tuple) else (t,) for t in (*self.tokens, *drawn)]
        ids = check_ids([sum(groups, ())], model.config.vocab_size, "tokens")
        vectors = array_of(model.embed(ids))[0]                                           # [ids, d], at once
        ends = list(itertools.accumulate(map(len, groups)))
        return xp.stack([vectors[end - len(group):end].mean(axis=0) for group, end in zip(groups, ends)])


def _words(c: Any) -> list[int]:
    """The vocabulary of a configuration without its special tokens."""
    return sorted(set(range(c.vocab_size)) - _special(c))


def _special(c: Any) -> set[int]:
    """The ids of the special tokens of a configuration."""
    names = ("pad_token_id", "eos_token_id", "decoder_start_token_id", "bos_token_id")
    return {getattr(c, name) for name in names if hasattr(c, name)} | set(getattr(c, "eos_token_ids", ()))


def _word(token: Any) -> bool:
    """An id, or a tuple of at least one."""
    return integer(token, 0) or isinstance(token, tuple) and bool(token) and all(integer(i, 0) for i in token)


def _behind(padding: Array, p: int, n: int) -> Array:
    """[batch, n]: the columns in the order padding, prompt, text. Of the n given columns the first p are the prompt."""
    column = xp.arange(n)[None, :]
    return xp.where(column < padding, column + p, xp.where(column < padding + p, column - padding, column))


def _reordered(x: Tensor, order: Array) -> Tensor:
    """x [batch, n, d] with its columns in this order [batch, n]."""
    batch, n, d = x.shape
    return embedding(x.reshape(batch * n, d), order + n * xp.arange(batch)[:, None])


# Mistakes that people make, from the catalogue of `minipeft.conformance` (--list --method soft_prompt)
#
# * Padding is passed without a mask, so the output depends on it (huggingface/peft #54).
# * The prompt is left of the padding, so its distance to the text grows (huggingface/peft #1093). See next_to_text.
# * Switched off, the prompt is still there, in generation for instance (huggingface/peft #683 and #1501).
# * The parameter has 2 p rows on an encoder-decoder, of which p never reach the output (huggingface/peft #386).
#
# Next: `nn/site.py`, on the input site; `methods/neighbors.py`, on the tokens nearest to a trained prompt.
