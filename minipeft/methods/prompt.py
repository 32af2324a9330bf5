"""Prompt tuning: vectors in front of the input, trained; the model reads them as if they were tokens.

    encoder([P; E(x)])          P [p, d] trained, everything else frozen: p d numbers a task
    mask [1 .. 1; mask]         seen by the encoder and by cross-attention

Lester, Al-Rfou & Constant, 2021, arXiv:2104.08691, sec. 2. The prompt takes positions: a token at position i moves to
p + i (T5's relative distances between tokens stay). It lengthens every input by p at training and at inference, and it
is not a weight: nothing to merge.

The paper does not say where the prompt stands in a row that is padded on the left. As in PEFT it is left of the
padding, so that its distance to the text grows with that, and what comes out changes; with next_to_text it stands
between padding and text, and a T5 model gives what it gives without padding.

The prompt is exactly a table of p virtual tokens: with E extended by P and their p ids in front of x, the base model
computes the same.
"""
from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from minipeft.engine.tensor import Tensor, array_of
from minipeft.backend import Array, xp
from minipeft.nn import init
from minipeft.nn.inputs import check_ids
from minipeft.nn.positions import Learned
from minipeft.nn.site import Site
from minipeft.nn.weight import Parameter
from minipeft.nn.where import Where, matching
from minipeft.engine.ops import concat, embedding, reshape
from minipeft.attaching.fields import expect, integer, plain

INITS = ("vocabulary", "random", "tokens")


@dataclasses.dataclass(frozen=True)
class PromptTuning:
    """length: p. init (Lester et al., sec. 3.2): "vocabulary", embeddings of tokens drawn from the vocabulary without
    the special ones; "random", U(-1/2, 1/2); "tokens", embeddings of `tokens`, a text or class labels: ids, or tuples
    of ids, of which the mean is taken (a label of several tokens); what they leave of the length is drawn from the
    vocabulary. Departure from the paper: it draws from the 5,000 most common tokens, which only a tokenizer knows.
    next_to_text: where a row is padded on the left, behind the padding instead of in front of it.
    Raises ValueError for fields out of range, and for a prompt that learned positions leave no room for."""

    length: int = 20
    init: str = "vocabulary"
    tokens: tuple[int | tuple[int, ...], ...] = ()
    next_to_text: bool = False
    where: Where = r"^encoder\.input$"

    def __post_init__(self) -> None:
        plain(self)
        expect(self, "length", integer(self.length), "an integer >= 1")
        expect(self, "init", self.init in INITS, f"one of {', '.join(INITS)}")
        expect(self, "tokens", isinstance(self.tokens, tuple) and all(map(_word, self.tokens))
               and (self.init == "tokens") == bool(self.tokens) and len(self.tokens) <= self.length,
               f"1 to {self.length} ids, or tuples of ids, with init='tokens', and none without")
        expect(self, "next_to_text", isinstance(self.next_to_text, bool), "True or False")

    def places(self, model: Any) -> dict[str, Site]:
        """The encoder's input."""
        sites = {name: site for name, site in model.sites.items() if site.kind == "input"}
        for token in self.tokens:
            check_ids([token if isinstance(token, tuple) else (token,)], model.config.vocab_size, "tokens")
        if self.init != "random" and len(self.tokens) < self.length and not _words(model.config):
            raise ValueError("PromptTuning: the vocabulary has special tokens alone; expected others to draw from, or "
                             "init='random'")
        position = model.encoder.position if hasattr(model, "encoder") else None
        room = position.weight.base.shape[0] if isinstance(position, Learned) else None
        expect(self, "length", room is None or self.length < room,
               f"fewer than the {room} positions that the encoder has learned (config.max_length)")
        return {name: sites[name] for name in matching(sites, self.where, "input site")}

    def shapes(self, name: str, site: Site, model: Any) -> dict[str, tuple]:
        """Of P."""
        return {"P": (self.length, model.embedding.weight.base.shape[1])}

    def build(self, model: Any, places: dict[str, Site], rng: init.Rng) -> dict[str, "Prompt"]:
        """{site: its prompt}; draws P, or which tokens it starts as."""
        return {name: Prompt(self._vectors(self.shapes(name, site, model)["P"], model, rng), self.next_to_text)
                for name, site in places.items()}

    def _vectors(self, shape: tuple, model: Any, rng: init.Rng) -> Array:
        """[p, d]; zeros without rng, to be filled from a file."""
        if self.init == "random" or rng is None:
            return init.uniform(shape, 0.5, rng, model.embedding.weight.base.dtype)
        c = model.config
        words, missing = _words(c), self.length - len(self.tokens)
        drawn = rng.choice(words, missing, replace=len(words) < missing).tolist() if missing else []
        groups = [*self.tokens, *drawn]
        flat = [t if isinstance(t, tuple) else (t,) for t in groups]
        vectors = array_of(model.embed(check_ids([sum(flat, ())], c.vocab_size, "tokens")))[0]    # [ids, d], at once
        ends = list(itertools.accumulate(map(len, flat)))
        return xp.stack([vectors[end - len(group):end].mean(axis=0) for group, end in zip(flat, ends)])


def _words(c: Any) -> list[int]:
    """The vocabulary of a configuration without its special tokens."""
    return sorted(set(range(c.vocab_size)) - {c.pad_token_id, c.eos_token_id, c.decoder_start_token_id})


def _word(token: Any) -> bool:
    """An id, or a tuple of at least one."""
    return integer(token, 0) or isinstance(token, tuple) and bool(token) and all(integer(i, 0) for i in token)


class Prompt:
    """(embeddings [batch, time, d], mask [batch, time] or None) -> [batch, p + time, d], and the mask that fits."""

    def __init__(self, vectors: Array, next_to_text: bool):
        self.P, self.next_to_text = Parameter(vectors), next_to_text

    def __call__(self, x: Any, mask: Array | None) -> tuple[Tensor, Array | None]:
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


def _behind(padding: Array, p: int, n: int) -> Array:
    """[batch, n]: what stands in each column, of n of which the first p are the prompt: padding, prompt, text."""
    column = xp.arange(n)[None, :]
    return xp.where(column < padding, column + p, xp.where(column < padding + p, column - padding, column))


def _reordered(x: Tensor, order: Array) -> Tensor:
    """x [batch, n, d] with its columns in this order [batch, n]."""
    batch, n, d = x.shape
    return embedding(reshape(x, shape=(batch * n, d)), order + n * xp.arange(batch)[:, None])
