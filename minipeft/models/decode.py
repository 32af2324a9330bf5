"""Greedy decoding: y_t = argmax p(y | y_1 .. y_t-1, x), until every row has produced eos.

With a cache, each step runs the decoder on the newest token alone. The keys and values of earlier tokens are kept, and
those of the encoder's output are projected once. Without a cache, each step runs it on the whole prefix. The ids are
the same, and the logits agree up to rounding.
"""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.backend import Array, to_device, to_host
from minipeft.checks import integer


def greedy(model: Any, ids: Array, mask: Array | None, max_new_tokens: int, use_cache: bool) -> numpy.ndarray:
    """Decode greedily (see `generate`): ids [batch, source], mask [batch, source] -> [batch, 1 + new tokens] on the
    host. Raises ValueError unless max_new_tokens is an integer >= 0."""
    max_new_tokens = integer("max_new_tokens", max_new_tokens)
    config = model.config
    encoded, mask = model.encoder(model.embed(ids), mask)
    cache = model.new_cache(max_new_tokens, encoded.shape[1]) if use_cache and max_new_tokens else None
    out = numpy.full((len(ids), 1 + max_new_tokens), config.pad_token_id, dtype=numpy.int64)
    out[:, 0] = config.decoder_start_token_id
    running = numpy.ones(len(ids), dtype=bool)
    for t in range(1, 1 + max_new_tokens):
        prefix = to_device(out[:, t - 1:t] if cache else out[:, :t])
        hidden, _ = model.decoder(model.embed(prefix), None, encoded, mask, cache=cache)
        chosen = to_host(model.logits(hidden[:, -1:]).data.argmax(axis=-1))[:, 0]
        out[:, t] = numpy.where(running, chosen, config.pad_token_id)
        running &= chosen != config.eos_token_id
        if not running.any():
            return out[:, :1 + t]
    return out
