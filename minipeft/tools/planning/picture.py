"""The picture of a plan: a bar for each method at the peak of its step, divided by the purposes of the memory."""
from __future__ import annotations

import os
from typing import Any

from minipeft.tools.planning.plan import Plan
from minipeft.tools.planning.report import head, unit
from minipeft.tools.planning.purposes import PURPOSES

COLORS = ("#22303c", "#f9c784", "#8c564b", "#b3261e", "#e377c2", "#4c78a8", "#72b7b2", "#9ecae9", "#bab0ac",
          "#c9d1d9")  # one for each purpose


def check(path: str | os.PathLike) -> None:
    """Raises ValueError unless a picture can be written to `path`: its folder is there, and the ending of its name is a
    format of matplotlib's; ImportError, saying what to install, where matplotlib is missing."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'minipeft[examples]'") from error
    folder, ending = os.path.dirname(path) or ".", os.path.splitext(path)[1].lower().removeprefix(".")
    if not os.path.isdir(folder):
        raise ValueError(f"the picture {str(path)!r} cannot be written: there is no folder {str(folder)!r}")
    known = FigureCanvasBase.get_supported_filetypes()
    if ending not in known:
        raise ValueError(f"the picture {str(path)!r} ends in {ending!r}; expected one of {', '.join(known)}")


def drawn(plan: Plan, path: str | os.PathLike) -> None:
    """Write the picture of `plan` to `path`; the ending of its name gives the format. Raises as `check` does."""
    check(path)
    from matplotlib.figure import Figure
    rows = list(plan.steps.items())[::-1]
    scale, name = unit(max(step.peak for _, step in rows))
    figure: Any = Figure(figsize=(9, 1.4 + 0.34 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    start = [0.0] * len(rows)
    for purpose, color in zip(PURPOSES, COLORS):
        sizes = [step.phases[step.training].get(purpose, 0) / scale for _, step in rows]
        if any(sizes):
            axes.barh(range(len(rows)), sizes, left=start, color=color, label=purpose)
            start = [a + b for a, b in zip(start, sizes)]
    axes.set_yticks(range(len(rows)), [("> " if row == plan.method else "") + row for row, _ in rows])
    axes.bar_label(axes.containers[-1], [f"{n:,.2f}" for n in start], padding=3, fontsize=8)
    axes.margins(x=0.1)
    axes.set_title("\n".join(head(plan).splitlines()[:2]), fontsize=9)
    if plan.budget is not None:
        axes.axvline(plan.budget.limit / scale, color="black", linestyle="--", label="budget")
    axes.set_xlabel(f"{name} at the peak of a step")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=120)
