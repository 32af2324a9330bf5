"""How `rank_sweep.py` reads its rows: means and standard errors for each rank, the columns of its table and of the
published one, the findings, and the claims."""
from __future__ import annotations

import dataclasses
import math
from typing import Any, Sequence

import numpy

from lab.claims import Claim, standard_error
from lab.tables import Column

USUAL = 8                     # the rank that the settings suit, with which the others are compared
PLATEAU = 2.0                 # two ranks may differ by so many points and still be called equal
BREAK_EVEN = 64               # d d / (d + d), d = 128: beyond it B A has more numbers than the square W it is added to
MANY = 8000                   # with so many pairs or more, rank 1 is claimed to be too small
PUBLISHED = {                 # Table 18: val_loss, BLEU, NIST, METEOR, ROUGE_L, CIDEr
    1: (1.23, 68.72, 8.7215, .4565, .7052, 2.4329), 2: (1.21, 69.17, 8.7413, .4590, .7052, 2.4639),
    4: (1.18, 70.38, 8.8439, .4689, .7186, 2.5349), 8: (1.17, 69.57, 8.7457, .4636, .7196, 2.5196),
    16: (1.16, 69.61, 8.7483, .4629, .7177, 2.4985), 32: (1.16, 69.33, 8.7736, .4642, .7105, 2.5255),
    64: (1.16, 69.24, 8.7174, .4651, .7180, 2.5070), 128: (1.16, 68.73, 8.6718, .4628, .7127, 2.5030),
    256: (1.16, 68.92, 8.6982, .4629, .7128, 2.5012), 512: (1.16, 68.78, 8.6857, .4637, .7128, 2.5025),
    1024: (1.17, 69.37, 8.7495, .4659, .7149, 2.5090)}


@dataclasses.dataclass
class Row:
    """One rank at one data size with one seed, measured on the test words."""

    pairs: int
    steps: int
    rank: int
    seed: int
    trainable: int
    exact: float                    # percent
    error: float                    # phoneme error rate, percent
    loss: float                     # nats per character, eos included
    train_seconds: float
    curve: list                     # [(step, exact match on the first CURVE_WORDS test words)]


@dataclasses.dataclass
class Line:
    """One rank at one data size: means over its seeds, and the standard error of `exact`. None: not measured here."""

    rank: int
    trainable: Any = None
    exact: Any = None
    exact_error: Any = None
    error: Any = None
    loss: Any = None
    seconds: Any = None

    @property
    def method(self) -> str:
        """What the table calls it."""
        return f"r={self.rank}"


def published(index: int) -> Any:
    """A function that gives a Line the number in column `index` of Table 18."""
    return lambda line: PUBLISHED[line.rank][index] if line.rank in PUBLISHED else None


MEASURED = [
    Column("trainable", lambda x: x.trainable, "{:,.0f}"),
    Column("% right", lambda x: None if x.exact is None else (x.exact, x.exact_error), "{:.1f} ± {:.1f}"),
    Column("phoneme error", lambda x: x.error, "{:.1f} %"), Column("loss", lambda x: x.loss, "{:.3f}"),
    Column("training", lambda x: x.seconds, "{:.0f} s")]
TABLE_18 = [
    Column("loss", published(0), "{:.2f}"), Column("BLEU", published(1), "{:.2f}"),
    Column("NIST", published(2), "{:.4f}"), Column("METEOR", published(3), "{:.4f}"),
    Column("ROUGE-L", published(4), "{:.4f}"), Column("CIDEr", published(5), "{:.4f}")]


def seed_spread(rows: Sequence[Row]) -> float:
    """The standard deviation of exact match among the seeds of one rank, pooled over the ranks.

    This is sqrt(sum of squared deviations from each rank's mean / (rows - ranks)). With one seed it is 0, and standard
    errors are those of the words alone."""
    by_rank = [[row.exact for row in rows if row.rank == rank] for rank in {row.rank for row in rows}]
    squares = sum(len(exact) * float(numpy.var(exact)) for exact in by_rank)
    return math.sqrt(squares / max(1, len(rows) - len(by_rank)))


def lines_of(rows: Sequence[Row], words: int) -> list[Line]:
    """A line for each rank, from the rows of one data size.

    Its standard error has two independent parts. One is the choice of words, which more seeds do not reduce because all
    seeds are asked the same words. The other is the choice of seeds."""
    spread, lines = seed_spread(rows), []
    for rank in sorted({row.rank for row in rows}):
        of = [row for row in rows if row.rank == rank]
        exact, error, loss = (float(numpy.mean([getattr(r, f) for r in of])) for f in ("exact", "error", "loss"))
        lines.append(Line(rank, of[0].trainable, exact,
                          math.hypot(standard_error((exact,), words), spread / math.sqrt(len(of))),
                          error, loss, float(numpy.median([r.train_seconds for r in of]))))
    return lines


def margin(a: Line, b: Line) -> float:
    """Three standard errors of the difference of two ranks.

    It is computed as if they were asked different words, which makes it wider than necessary. The largest of seven
    differences exceeds three of its standard errors by chance in less than one sweep in a hundred."""
    return 3 * math.hypot(a.exact_error, b.exact_error)


def findings(lines: Sequence[Line]) -> list[str]:
    """What one data size shows about the ranks, in lines of text, whichever way it comes out."""
    best, least = max(lines, key=lambda x: x.exact), lines[0]
    apart = best.exact - least.exact > margin(best, least)
    worse = [x.method for x in lines if best.exact - x.exact > margin(best, x)]
    found = [f"best: {best.method}, {best.exact:.1f} %; {least.method}: {least.exact:.1f} %, "
             f"{'less' if apart else 'not less'} by three standard errors ({margin(best, least):.1f})",
             f"less than the best by three standard errors: {', '.join(worse) or 'none'}",
             f"lowest loss: {min(lines, key=lambda x: x.loss).method}"]
    usual = [line for line in lines if line.rank == USUAL]
    if usual:
        same = [x.method for x in lines if abs(x.exact - usual[0].exact) <= margin(x, usual[0])]
        found.append(f"not told apart from r={USUAL} by three standard errors: {', '.join(same)}")
    return found


def claims_about(rows: Sequence[Row], words: int, base: float, per_rank: int) -> list[Claim]:
    """The claims, each with whether it holds.

    words: how many test words were asked. base: the base's percent right. per_rank: trained numbers for each rank."""
    checks: list[Claim] = [(f"a LoRA trains r x {per_rank:,} numbers, exactly, at every rank",
                            all(row.trainable == row.rank * per_rank for row in rows))]
    for size in dict.fromkeys((row.pairs, row.steps) for row in rows):
        lines, name = lines_of([r for r in rows if (r.pairs, r.steps) == size], words), f"{size[0]:,} pairs: "
        for x in lines:
            limit = base + 3 * math.hypot(standard_error((base,), words), x.exact_error)
            checks.append((f"{name}{x.method} learns British: {x.exact:.1f} > {limit:.1f}", x.exact > limit))
        best, least = max(lines, key=lambda x: x.exact), lines[0]
        if size[0] >= MANY and least.rank == 1:
            checks.append((f"{name}a larger rank ({best.rank}) beats r=1: {best.exact:.1f} > {least.exact:.1f} + "
                           f"{margin(best, least):.1f}", best.exact > least.exact + margin(best, least)))
        for usual in [x for x in lines if x.rank == USUAL]:
            for x in (x for x in lines if USUAL < x.rank <= BREAK_EVEN):
                allowed = margin(x, usual) + PLATEAU
                checks.append((f"{name}plateau: {x.method} is within {allowed:.1f} of r={USUAL}: {x.exact:.1f}, "
                               f"{usual.exact:.1f}", abs(x.exact - usual.exact) <= allowed))
    return checks
