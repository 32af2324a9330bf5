"""Greedy answers and exact match, shared by the examples."""
from __future__ import annotations

from typing import Sequence

import numpy

from inflection import PAD, Pair, decode, encode
from minipeft.train.data import pad

LONGEST_ANSWER = 20


def answers(model, prompts: Sequence[str], batch_size: int = 250, adapter=None) -> list[numpy.ndarray]:
    """What the model generates, a row of ids per prompt (all of one length: padded to LONGEST_ANSWER)."""
    rows = []
    for start in range(0, len(prompts), batch_size):
        chunk = [encode(prompt) for prompt in prompts[start:start + batch_size]]
        ids = model.generate(pad(chunk, PAD), max_new_tokens=LONGEST_ANSWER, adapter=adapter)
        rows.extend(numpy.pad(ids, ((0, 0), (0, LONGEST_ANSWER + 1 - ids.shape[1])), constant_values=PAD))
    return rows


def exact_match(rows: Sequence[numpy.ndarray], pairs: Sequence[Pair]) -> float:
    """Percent of rows that spell the answer, letter for letter."""
    return 100 * float(numpy.mean([decode(row) == answer for row, (_, answer) in zip(rows, pairs)]))
