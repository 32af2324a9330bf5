"""Greedy answers and their scores: exact match and error rate, with intervals.

    exact match   share of answers that are right in every character
    error rate    sum of edit distances / sum of lengths of the right answers. It is the phoneme error rate where a
                  character is a phoneme (Levenshtein, 1966: insertions, deletions, substitutions, each of cost 1)

For the intervals the test words are drawn again with replacement, 1,000 times (the percentile bootstrap, Efron, 1979).
"""
from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy

from data.codec import PAD, Codec, Pair
from minipeft.train.data import pad

LONGEST_ANSWER = 20
_RESAMPLES = 1000
Interval = tuple[float, float]


def answers(model, prompts: Sequence[str], codec: Codec, batch_size: int = 250, adapter=None) -> list[numpy.ndarray]:
    """The model's greedy answers: a row of ids for each prompt, all padded to 1 + LONGEST_ANSWER.

    adapter: as in a call of the model."""
    rows: list[numpy.ndarray] = []
    for start in range(0, len(prompts), batch_size):
        chunk = [codec.encode(prompt) for prompt in prompts[start:start + batch_size]]
        ids = model.generate(pad(chunk, PAD), max_new_tokens=LONGEST_ANSWER, adapter=adapter)
        rows.extend(numpy.pad(ids, ((0, 0), (0, LONGEST_ANSWER + 1 - ids.shape[1])), constant_values=PAD))
    return rows


def hits(rows: Sequence[numpy.ndarray], pairs: Sequence[Pair], codec: Codec) -> list[bool]:
    """For each row, whether it spells the answer, character for character."""
    return [codec.decode(row) == answer for row, (_, answer) in zip(rows, pairs)]


def exact_match(rows: Sequence[numpy.ndarray], pairs: Sequence[Pair], codec: Codec) -> float:
    """Percent of rows that spell the answer."""
    return 100 * float(numpy.mean(hits(rows, pairs, codec)))


@dataclasses.dataclass(frozen=True)
class Score:
    """Scores in percent, each with the interval that holds 95 % of the resamples."""

    exact: float
    exact_interval: Interval
    error: float
    error_interval: Interval


def judge(rows: Sequence[numpy.ndarray], pairs: Sequence[Pair], codec: Codec) -> Score:
    """Exact match and error rate of the rows, and how far they vary with the choice of test words."""
    right = [answer for _, answer in pairs]
    edits = [edit_distance(codec.decode(row), answer) for row, answer in zip(rows, right)]
    return Score(*share(hits(rows, pairs, codec), [1] * len(right)), *share(edits, [len(answer) for answer in right]))


def share(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, Interval]:
    """100 sum parts / sum wholes, and its 95 % bootstrap interval. The resamples are always the same."""
    part, whole = numpy.asarray(parts, float), numpy.asarray(wholes, float)
    drawn = numpy.random.default_rng(0).integers(len(part), size=(_RESAMPLES, len(part)))
    low, high = numpy.percentile(100 * part[drawn].sum(axis=1) / whole[drawn].sum(axis=1), (2.5, 97.5))
    return 100 * float(part.sum() / whole.sum()), (float(low), float(high))


def edit_distance(a: str, b: str) -> int:
    """The fewest insertions, deletions and substitutions of characters that turn a into b."""
    row = list(range(len(b) + 1))                          # distances from the current prefix of a to all prefixes of b
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
