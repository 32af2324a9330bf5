"""Scores of models that read and write words: cross-entropy of each clause, greedy answers, and two scores of answers.

    WER = (insertions + deletions + substitutions) / words of the references, of the shortest edits, over all clauses
    F1 of new words = 2 |new in answer and in reference| / (|new in answer| + |new in reference|), over all clauses

A word is new where it occurs more often than in the source. A clause that is left as it is has a low word error rate
where most words stay, and no new word: the second score counts what the task is about. (It is the addition of SARI, Xu
et al., 2016, TACL 4:401, for single words, counted with their multiplicity, in one ratio for all clauses.)
"""
from __future__ import annotations

import collections
from typing import Any, Sequence

import numpy

import minipeft
from data.bible import EOS, PAD, Pair
from minipeft.train.data import pad

LONGEST_ANSWER = 20


def clause_nats(model: Any, pairs: Sequence[Pair], batch_size: int = 128) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(sum of -log p over the target's tokens, eos included; number of these tokens), both [pairs].

    The ratio of their sums is the training loss. Values for each clause give it a standard error."""
    nats, tokens = [], []
    for start in range(0, len(pairs), batch_size):
        batch = minipeft.batch_of(pairs[start:start + batch_size], PAD)
        labels = batch["labels"]
        logits = model(batch["input_ids"], model.shift_right(labels), batch["attention_mask"]).data
        logits = logits.astype(numpy.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        right = numpy.take_along_axis(logits, numpy.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        each = numpy.where(labels >= 0, numpy.log(numpy.exp(logits).sum(axis=-1)) - right, 0.0)
        nats.append(each.sum(axis=1))
        tokens.append((labels >= 0).sum(axis=1))
    return numpy.concatenate(nats), numpy.concatenate(tokens)


def mean_loss(model: Any, pairs: Sequence[Pair]) -> float:
    """Cross-entropy in nats per token."""
    nats, tokens = clause_nats(model, pairs)
    return float(nats.sum() / tokens.sum())


def answers(model: Any, pairs: Sequence[Pair], batch_size: int = 256) -> list[list[int]]:
    """The model's greedy answers to the sources: ids up to eos, without it."""
    rows = []
    for start in range(0, len(pairs), batch_size):
        sources = [source for source, _ in pairs[start:start + batch_size]]
        for row in model.generate(pad(sources, PAD), max_new_tokens=LONGEST_ANSWER)[:, 1:].tolist():
            rows.append(row[:row.index(EOS)] if EOS in row else row)
    return rows


def word_error_rate(found: Sequence[Sequence[int]], pairs: Sequence[Pair]) -> float:
    """The word error rate of answers to (source, target with eos) pairs, in percent. It may exceed 100.

    Raises ValueError if there are not as many answers as pairs."""
    errors = sum(edits(answer, target[:-1]) for answer, (_, target) in zip(found, pairs, strict=True))
    return 100 * errors / sum(len(target) - 1 for _, target in pairs)


def new_word_f1(found: Sequence[Sequence[int]], pairs: Sequence[Pair]) -> float:
    """The F1 of new words of answers to (source, target) pairs, both with eos, in percent; 0 if nothing is new.

    Raises ValueError if there are not as many answers as pairs."""
    right = total = 0
    for answer, (source, target) in zip(found, pairs, strict=True):
        made, asked = (collections.Counter(words) - collections.Counter(source[:-1]) for words in (answer, target[:-1]))
        right += (made & asked).total()
        total += made.total() + asked.total()
    return 200 * right / total if total else 0.0


def edits(a: Sequence[int], b: Sequence[int]) -> int:
    """The fewest insertions, deletions and substitutions that turn a into b (Levenshtein, 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j - 1] + (x != y), above[j] + 1, row[-1] + 1))
    return row[-1]
