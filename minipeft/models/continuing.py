"""Continuing a text: from the ids of a prompt to the new ids that a decoder without an encoder writes behind it.

The searches are those of `decoding.py`. Here is the step that they call: the prompt once, then the newest token.

A soft prompt is put in front once, before the first step. Then each row is moved so that its last token is in the last
column, with its padding in front. So a new token stands in the same column in every row, one position behind the last.
"""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.backend import Array, to_device, xp
from minipeft.checks import integer
from minipeft.engine.ops import concat
from minipeft.engine.tensor import array_of
from minipeft.models.decoding import beam_search, checked_beams, checked_sampling, greedy, sampling
from minipeft.nn.attention import KeyValues
from minipeft.nn.causal import to_the_right
from minipeft.nn.inputs import host_ids
from minipeft.nn.routing import routed


class Continuation:
    """The `model`, called once for each new token.

    x [batch, time, d_model], mask [batch, time]: the embeddings of the prompt, each row's last token in the last
    column. adapter: as in a call of the model. cache: keys and values of every block, or None to compute those of
    earlier tokens again at each step."""

    def __init__(self, model: Any, x: Array, mask: Array, adapter: Any, cache: list[KeyValues] | None):
        self.model, self.x, self.mask, self.adapter, self.cache = model, x, mask, adapter, cache
        self.row = numpy.arange(len(x))  # the row of the batch that each prefix continues

    def __call__(self, prefixes: numpy.ndarray, parents: numpy.ndarray | None = None) -> Array:
        """prefixes [n, 1 + t], a number that is not read and the t new ids -> the logits of the next token [n, vocab].
        parents: as in `decoding.Steps`."""
        if parents is not None and not numpy.array_equal(parents, numpy.arange(len(self.row))):
            self._follow(parents)
        new = to_device(prefixes[:, 1:])
        seen = xp.concatenate([self.mask, xp.ones(new.shape, dtype=bool)], axis=1)
        with routed(self.model.host, self.adapter, len(prefixes)):
            if self.cache and self.cache[0].length:
                x = self.model.embed(new[:, -1:])
            else:
                x = concat(self.x, self.model.embed(new), axis=1) if new.shape[1] else self.x
            hidden = self.model.decoder(x, seen, cache=self.cache)
            return self.model.logits(hidden[:, -1:]).data[:, 0]

    def _follow(self, parents: numpy.ndarray) -> None:
        """Give each prefix what belongs to its parent: keys and values, and the prompt and the adapter of its row."""
        order = to_device(parents)
        for kept in self.cache or ():
            if kept.length:
                kept.k, kept.v = kept.k[order], kept.v[order]
        if not numpy.array_equal(self.row[parents], self.row):
            self.row, self.x, self.mask = self.row[parents], self.x[order], self.mask[order]
            self.adapter = [self.adapter[i] for i in parents] if isinstance(self.adapter, list) else self.adapter


def continued(model: Any, input_ids: Any, attention_mask: Any = None, max_new_tokens: int = 20, adapter: Any = None,
              use_cache: bool = True, num_beams: int = 1, length_penalty: float = 1.0,
              early_stopping: bool | str = False, temperature: float = 1.0, top_k: int | None = None,
              top_p: float = 1.0, rng: numpy.random.Generator | None = None, stop: Any = None
              ) -> tuple[numpy.ndarray, numpy.ndarray | None]:
    """The ids that `model.generate` gives, and the score of each row: (ids [batch, time + new tokens], scores [batch]).
    The scores are None without beam search.

    input_ids [batch, time], attention_mask, max_new_tokens, adapter, use_cache, num_beams, length_penalty,
    early_stopping, temperature, top_k, top_p, rng, stop: as in `Decoder.generate`. Raises ValueError and TypeError as
    that does."""
    c, tokens = model.config, integer("max_new_tokens", max_new_tokens)
    num_beams = integer("num_beams", num_beams, 1)
    length_penalty, early_stopping = checked_beams(num_beams, length_penalty, early_stopping, tokens)
    temperature, top_k, top_p = checked_sampling(num_beams, temperature, top_k, top_p, rng)
    ends = _checked_stop(c.eos_token_ids if stop is None else stop, c.vocab_size)
    host = host_ids(input_ids, "input_ids")
    pads = host == c.pad_token_id
    if attention_mask is None and c.pad_token_id not in ends and pads.any():
        attention_mask = ~pads
    ids, mask = model._checked(host, attention_mask)
    out = numpy.full((len(ids), 1 + tokens), c.pad_token_id, dtype=numpy.int64)  # column 0: where the prompt ends
    if not tokens:
        return host, None if num_beams == 1 else numpy.zeros(len(ids))
    with routed(model.host, adapter, len(ids)):
        x, mask = model.decoder.input(model.embed(ids), mask)
        x = array_of(x)
        x, mask = to_the_right(x, xp.ones(x.shape[:2], dtype=bool) if mask is None else mask)
        step = Continuation(model, x, mask, adapter, model.new_cache(x.shape[1] + tokens) if use_cache else None)
        scores = None
        if rng is not None:
            out = sampling(step, out, ends, rng, temperature, top_k, top_p)
        elif num_beams == 1:
            out = greedy(step, out, ends)
        else:
            found = beam_search(step, len(ids), c.pad_token_id, ends, tokens, num_beams, length_penalty, early_stopping)
            for row, (_, answer) in zip(out, found):
                row[:len(answer)] = answer
            out = out[:, :max(len(answer) for _, answer in found)]
            scores = numpy.array([score for score, _ in found])
    return numpy.concatenate([host.astype(numpy.int64), out[:, 1:]], axis=1), scores


def _checked_stop(stop: Any, vocab: int) -> tuple[int, ...]:
    """The ids that end a row. Raises ValueError for one that is not in the vocabulary."""
    ends = tuple(integer("stop", i, 0) for i in stop)
    for i in ends:
        if i >= vocab:
            raise ValueError(f"stop holds {i}; expected ids from 0 to {vocab - 1}")
    return ends
