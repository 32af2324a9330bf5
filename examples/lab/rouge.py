"""ROUGE of summaries, by the rouge-score package (Google's, which `evaluate` calls), with Porter's stemmer.

    rouge1, rouge2   F1 of the words, and of the pairs of neighboring words, that answer and reference share
    rougeL           F1 of the longest common subsequence of words
    rougeLsum        the same, sentence by sentence, where line breaks end sentences

Lin, 2004, aclanthology.org/W04-1013. Texts are put in lower case, and all but a-z and 0-9 separates words. So it is
a score for English. Here each is in percent, and a score of several dialogues is the mean over them. (`evaluate` gives
the median of 1,000 means over resampled dialogues, which varies a little from call to call.)

Two scores a and b are compared in two ways, which must not be mixed up: a - b in absolute points, and 100 (a / b - 1)
in percent of b. From 23.3 to 42.2 are 18.9 points, or 81 percent.
"""
from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy

from lab.scoring import Interval, share

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
Scores = dict[str, list[float]]             # {kind: F1 of each dialogue, in percent}


def scores(answers: Sequence[str], references: Sequence[str]) -> Scores:
    """The F1 of each answer against its reference. Raises ValueError if there are not as many of both."""
    from rouge_score import rouge_scorer
    scorer = rouge_scorer.RougeScorer(KINDS, use_stemmer=True)
    found = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {kind: [100 * score[kind].fmeasure for score in found] for kind in KINDS}


def mean(found: Scores) -> dict[str, float]:
    """{kind: the mean over the dialogues}."""
    return {kind: float(numpy.mean(values)) for kind, values in found.items()}


@dataclasses.dataclass(frozen=True)
class Difference:
    """a - b. points: absolute. interval: that holds 95 % of the points when the dialogues are drawn again (`scoring`).
    percent: relative to b; None where b is 0."""

    points: float
    interval: Interval
    percent: float | None


def differences(a: Scores, b: Scores) -> dict[str, Difference]:
    """{kind: a - b}, dialogue by dialogue. a, b: scores of the same dialogues."""
    found = {}
    for kind, (now, before) in {kind: (mean(a)[kind], mean(b)[kind]) for kind in KINDS}.items():
        _, interval = share([x - y for x, y in zip(a[kind], b[kind], strict=True)], [100] * len(a[kind]))
        found[kind] = Difference(now - before, interval, 100 * (now / before - 1) if before else None)
    return found
