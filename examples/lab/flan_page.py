"""The output of the FLAN-T5 lab: the answers side by side, tables of ROUGE and of its differences, and a picture."""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Sequence

import numpy
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lab import rouge
from lab.dialogues import Dialogue
from lab.flan_run import INSTRUCT, ORIGINAL, PEFT, Row
from lab.pictures import off_screen
from lab.tables import Column, on_terminal

PAIRS = ((INSTRUCT, ORIGINAL), (PEFT, ORIGINAL), (PEFT, INSTRUCT))
COLORS = {ORIGINAL: "tab:gray", INSTRUCT: "tab:orange", PEFT: "tab:blue"}
SCORES = [
    Column("trained", lambda r: r.trainable, "{:,.0f}"), Column("%", lambda r: r.percent, "{:.2f}"),
    Column("loss", lambda r: r.loss, "{:.3f}"),
    *(Column(kind, lambda r, kind=kind: rouge.mean(r.rouge)[kind], "{:.2f}") for kind in rouge.KINDS)]


def compared(rows: Sequence[Row]) -> dict[str, dict[str, rouge.Difference]]:
    """{"instruct - original": {kind: Difference}} of the models that there are."""
    by_name = {row.method: row for row in rows}
    return {f"{a} - {b}": rouge.differences(by_name[a].rouge, by_name[b].rouge)
            for a, b in PAIRS if a in by_name and b in by_name}


def tables(rows: Sequence[Row], asked: int) -> list[Table]:
    """ROUGE of the models, their differences in points, and the same differences relative to the second model."""
    pairs = [argparse.Namespace(method=name, **found) for name, found in compared(rows).items()]
    points = [Column(kind, lambda r, kind=kind: getattr(r, kind).points, "{:+.2f}") for kind in rouge.KINDS]
    points.append(Column("95 % of rouge1", lambda r: r.rouge1.interval, "{:+.1f} to {:+.1f}"))
    percents = [Column(kind, lambda r, kind=kind: getattr(r, kind).percent, "{:+.1f} %") for kind in rouge.KINDS]
    return [on_terminal(f"{asked} held-out dialogues: loss in nats per token, and ROUGE (mean F1 in percent)", rows,
                        SCORES),
            on_terminal("differences in absolute points, and an interval over the dialogues", pairs, points),
            on_terminal("the same differences in percent of the second model's score", pairs, percents)]


def side_by_side(dialogues: Sequence[Dialogue], rows: Sequence[Row], console: Console) -> None:
    """Print the summaries of the first dialogues: the person's, and each model's."""
    table = Table(title="the same dialogues, summarized", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0),
                  show_lines=True)
    for heading in ("dialogue", "a person", *(row.method for row in rows)):
        table.add_column(heading, ratio=1 if heading == "dialogue" else 3)
    for i, dialogue in enumerate(dialogues):
        table.add_row(Text(f"{dialogue.id} {dialogue.topic}".strip()), Text(dialogue.summary),
                      *(Text(row.answers[i]) for row in rows))
    console.print(table)


def picture(rows: Sequence[Row], path: Path) -> None:
    """Draw the losses of the training steps, and ROUGE of the models as bars."""
    pyplot = off_screen()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for row in rows:
        if row.losses:
            left.plot(range(1, len(row.losses) + 1), row.losses, label=row.method, color=COLORS[row.method],
                      marker="o" if len(row.losses) == 1 else None)
    left.set(xlabel="optimizer step", ylabel="loss of the step, nats per token", title="training")
    left.set_ylim(bottom=0)
    left.legend(fontsize=8, frameon=False)
    _bars(right, rows)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(axis: Any, rows: Sequence[Row]) -> None:
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        heights = list(rouge.mean(row.rouge).values())
        drawn = axis.bar(numpy.arange(len(heights)) + (i - (len(rows) - 1) / 2) * width, heights, width,
                         label=row.method, color=COLORS[row.method])
        axis.bar_label(drawn, [f"{height:.1f}" for height in heights], fontsize=7)
    axis.set_xticks(range(len(rouge.KINDS)), rouge.KINDS)
    axis.set(ylabel="mean F1, %", title="held-out dialogues")
    axis.margins(y=0.15)
    axis.legend(fontsize=8, frameon=False)
