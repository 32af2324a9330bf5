"""Greedy answers and what they are worth: exact match, error rate. Shared by the examples."""
from __future__ import annotations

from typing import Sequence

import numpy

from codec import PAD, Codec, Pair
from minipeft.train.data import pad

LONGEST_ANSWER = 20


def answers(model, prompts: Sequence[str], codec: Codec, batch_size: int = 250, adapter=None) -> list[numpy.ndarray]:
    """What the model generates, a row of ids per prompt (all of one length: padded to LONGEST_ANSWER)."""
    rows = []
    for start in range(0, len(prompts), batch_size):
        chunk = [codec.encode(prompt) for prompt in prompts[start:start + batch_size]]
        ids = model.generate(pad(chunk, PAD), max_new_tokens=LONGEST_ANSWER, adapter=adapter)
        rows.extend(numpy.pad(ids, ((0, 0), (0, LONGEST_ANSWER + 1 - ids.shape[1])), constant_values=PAD))
    return rows


def hits(rows: Sequence[numpy.ndarray], pairs: Sequence[Pair], codec: Codec) -> list[bool]:
    """Per row: does it spell the answer, character for character?"""
    return [codec.decode(row) == answer for row, (_, answer) in zip(rows, pairs)]


def exact_match(rows: Sequence[numpy.ndarray], pairs: Sequence[Pair], codec: Codec) -> float:
    """Percent of rows that spell the answer."""
    return 100 * float(numpy.mean(hits(rows, pairs, codec)))
