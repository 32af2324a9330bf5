"""How `forgetting.py` reads its rows: the old tasks at equal learning, whether the runs lie on one curve, the picture,
and the claims."""
from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Sequence

import numpy

from lab.claims import Claim, standard_error
from lab.pictures import off_screen
from lab.tables import Column

LEVELS = (10.0, 20.0)               # percent of British right at which the old tasks are compared
BRITISH, AMERICAN, SPELLING, OVERWRITTEN = 1, 2, 3, 4           # columns of a curve
OLD = {AMERICAN: "American", SPELLING: "spelling"}


@dataclasses.dataclass
class Row:
    """One method at one rate with one seed.

    curve: [(step, British, American, spelling, overwritten)] in percent, from the base (step 0) to the end, with the
    trained weights on. off_is_base: None if they cannot be unplugged."""

    name: str
    factor: float
    seed: int
    lr: float
    trainable: int
    train_seconds: float            # of the steps
    off_is_base: bool | None
    curve: list

    @property
    def method(self) -> str:
        """What the table calls it."""
        return f"{self.name}, {self.lr:g}"


def kept_at(row: Row, level: float, what: int) -> float | None:
    """Column `what` of the curve where British first reaches `level`, interpolated between the two moments around it.

    None if British never reaches the level."""
    for before, after in zip(row.curve, row.curve[1:]):
        if before[1] < level <= after[1]:
            share = (level - before[1]) / (after[1] - before[1])
            return before[what] + share * (after[what] - before[what])
    return None


def _end(what: int) -> Any:
    return lambda row: row.curve[-1][what]


def _kept(what: int, level: float) -> Any:
    return lambda row: kept_at(row, level, what)


COLUMNS = [
    Column("trainable", lambda r: r.trainable, "{:,.0f}"),
    Column("British", _end(BRITISH)), Column("American", _end(AMERICAN)), Column("spelling", _end(SPELLING)),
    Column("overwritten", _end(OVERWRITTEN)),
    *(Column(f"{task} at {level:g}", _kept(what, level)) for what, task in OLD.items() for level in LEVELS),
    Column("off = base", lambda r: r.off_is_base)]


def names_of(rows: Sequence[Row]) -> list[str]:
    """The methods without their rates, in the order in which they first appear."""
    return list(dict.fromkeys(row.name for row in rows))


def spread(values: Sequence[float], error: float) -> tuple[float, int]:
    """(chi squared, its degrees of freedom n - 1) of n shares against their mean, where `error` is the standard error.

    Chi squared is near n - 1 if all runs have the same true share and are asked different words. Runs that are asked
    the same words differ by less; seeds and the interpolation add a little. So far above n - 1 the runs do differ, and
    below it no difference is shown."""
    return sum((v - float(numpy.mean(values))) ** 2 for v in values) / error ** 2, len(values) - 1


def findings(rows: Sequence[Row], words: int) -> list[str]:
    """What the runs show about the frontier, in lines of text, whether it is one curve or not."""
    found = []
    for level in LEVELS:
        short = [row.method for row in rows if kept_at(row, level, AMERICAN) is None]
        found += [f"British never reaches {level:g} %: {'; '.join(short)}"] if short else []
        for what, task in OLD.items():
            kept = [(k, row) for row in rows if (k := kept_at(row, level, what)) is not None]
            if len(kept) < 2:
                continue
            (least, worst), (most, best) = (end(kept, key=lambda pair: pair[0]) for end in (min, max))
            by_method = {name: [k for k, row in kept if row.name == name] for name in names_of([r for _, r in kept])}
            error = standard_error((float(numpy.mean([k for k, _ in kept])),), words)
            chi, df = spread([k for k, _ in kept], error)
            within = [spread(values, error) for values in by_method.values()]
            verdict = "not one curve" if chi > df + 3 * math.sqrt(2 * df) else "one curve, as far as these words tell"
            rates = (f"; of it {sum(c for c, _ in within):.0f} on {df - len(by_method) + 1} among the runs of one "
                     f"method, that is from rates and seeds") if len(by_method) <= df else ""
            found += [
                f"{task}, where British is {level:g} %: from {least:.1f} ({worst.method}) to {most:.1f} "
                f"({best.method}), of the base's {rows[0].curve[0][what]:.1f}",
                f"    chi squared {chi:.0f} on {df} degrees of freedom: {verdict}{rates}",
                "    means: " + ", ".join(f"{name} {numpy.mean(v):.1f}" for name, v in by_method.items())]
    return found


def claims_about(rows: Sequence[Row], words: int) -> list[Claim]:
    """The claims, each with whether it holds."""
    checks: list[Claim] = []
    for name in names_of(rows):
        base = rows[0].curve[0][BRITISH]
        learned = max(row.curve[-1][BRITISH] for row in rows if row.name == name)
        limit = base + 3 * standard_error((base, learned), words)
        checks.append((f"{name} learns British at some rate: {learned:.1f} > {limit:.1f}", learned > limit))
    checks.append(("unplugged, every answer of every task is the base's, id for id",
                   all(row.off_is_base for row in rows if row.off_is_base is not None)))
    return checks


def picture(rows: Sequence[Row], words: int, path: Path) -> None:
    """Draw the frontiers of both old tasks, a line for each run, and the spelling that each run keeps."""
    pyplot = off_screen()
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 5), layout="constrained")
    names = names_of(rows)
    rates = sorted({row.factor for row in rows})
    widths = {factor: 0.8 + 0.8 * i for i, factor in enumerate(rates)}
    for axis, what, task in ((axes[0], AMERICAN, "American"), (axes[1], SPELLING, "spelling")):
        for row in rows:
            curve = numpy.array(row.curve)
            axis.plot(curve[:, BRITISH], curve[:, what], marker="o", markersize=2 + widths[row.factor],
                      linewidth=widths[row.factor], color=f"C{names.index(row.name)}",
                      label=row.name if row.factor == rates[-1] and row.seed == 0 else None)
        for level in LEVELS:
            axis.axvline(level, color="gray", linestyle=":")
        axis.set(xlabel="learned: British, % right", ylabel=f"not forgotten: {task}, % right")
        axis.set_ylim(bottom=0)
    axes[0].set_title("training goes from the upper left down; up and right is better", fontsize=9)
    axes[1].set_title(f"thin to thick: {', '.join(f'{rate:g}' for rate in rates)} x the usual rate", fontsize=9)
    axes[0].legend(fontsize=7, frameon=False)
    for row in rows:
        i, kept = names.index(row.name), kept_at(row, LEVELS[0], SPELLING)
        if kept is not None:
            axes[2].errorbar(kept, i + 0.2 * (rates.index(row.factor) - (len(rates) - 1) / 2), marker="o",
                             xerr=3 * standard_error((kept,), words), color=f"C{i}", capsize=2,
                             markersize=2 + 2 * widths[row.factor])
    axes[2].set_yticks(range(len(names)), names, fontsize=8)
    axes[2].set_ylim(len(names) - 0.4, -0.6)
    axes[2].set_xlim(left=0)
    axes[2].set(xlabel="spelling, % right")
    axes[2].set_title(f"kept where British first is {LEVELS[0]:g} % (bars: three standard errors)", fontsize=9)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
