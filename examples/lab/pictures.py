"""Pictures of a comparison of methods: several trade-offs side by side, and learning curves."""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy


@dataclasses.dataclass(frozen=True)
class Panel:
    """One trade-off.

    value: of a row (None: no bar). form: how the number is written. interval: ends of an interval to draw. mark: a
    second value, drawn as a diamond. log: a logarithmic axis. reduce: turns the values of several seeds into one."""

    title: str
    value: Callable[[Any], float | None]
    form: str = "{:.1f}"
    interval: Callable[[Any], Sequence[float]] | None = None
    mark: Callable[[Any], float | None] | None = None
    log: bool = False
    reduce: Callable[..., Any] = numpy.mean


def names_of(rows: Sequence[Any]) -> list[str]:
    """The methods, in the order in which they first appear."""
    return list(dict.fromkeys(row.method for row in rows))


def reduced(rows: Sequence[Any], name: str, of: Callable[[Any], Any], reduce: Callable[..., Any] = numpy.mean) -> Any:
    """One value for all seeds of a method; None where it has no meaning."""
    values = [of(row) for row in rows if row.method == name]
    return None if any(value is None for value in values) else reduce(values, axis=0)


def trade_offs(rows: Sequence[Any], panels: Sequence[Panel], curves: str, path: Path) -> None:
    """Draw bar charts that share the methods, and the learning curves below them.

    curves: label of the axis of the learning curves. path: the file to write."""
    pyplot = off_screen()
    names = names_of(rows)
    figure = pyplot.figure(figsize=(2.6 * len(panels) + 1.5, 0.30 * len(names) + 4.6), layout="constrained")
    grid = figure.add_gridspec(2, len(panels), height_ratios=(0.30 * len(names) + 0.6, 3.4))
    first = None
    for i, panel in enumerate(panels):
        first = axis = figure.add_subplot(grid[0, i], sharey=first)
        _bars(axis, rows, names, panel)
        axis.tick_params(labelleft=i == 0)
    assert first is not None
    first.set_yticks(range(len(names)), names, fontsize=8)
    first.set_ylim(len(names) - 0.4, -0.6)
    learning_curves(figure.add_subplot(grid[1, :]), rows, curves)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(axis: Any, rows: Sequence[Any], names: list[str], panel: Panel) -> None:
    for y, name in enumerate(names):
        value = reduced(rows, name, panel.value, panel.reduce)
        if not value:
            continue
        ends = panel.interval and reduced(rows, name, panel.interval)
        error = None if ends is None else [[max(0.0, value - ends[0])], [max(0.0, ends[1] - value)]]
        axis.barh(y, value, 0.7, xerr=error, color=_color(names, name), error_kw={"elinewidth": 1})
        mark = panel.mark and reduced(rows, name, panel.mark, panel.reduce)
        if mark:
            axis.plot(mark, y, marker="D", color="black", markersize=4)
        end = value if ends is None else ends[1]
        axis.annotate(panel.form.format(value), (end, y), xytext=(3, 0), textcoords="offset points", va="center",
                      fontsize=7)
    axis.set_title(panel.title, fontsize=9)
    if panel.log:
        axis.set_xscale("log")
    axis.margins(x=0.3)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def learning_curves(axis: Any, rows: Sequence[Any], label: str) -> None:
    """Draw one line for each method, the mean of its seeds. label: of the vertical axis."""
    names = names_of(rows)
    for name in names:
        curves = [row.curve for row in rows if row.method == name and row.curve]
        if curves:
            steps, scores = zip(*numpy.mean(curves, axis=0))
            axis.plot(steps, scores, marker="o", markersize=3, label=name, color=_color(names, name))
    axis.set(xlabel="optimizer step", ylabel=label)
    axis.set_ylim(bottom=0)
    if axis.lines:
        axis.legend(fontsize=7, frameon=False, ncols=1, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.spines[["top", "right"]].set_visible(False)


def _color(names: list[str], name: str) -> Any:
    import matplotlib
    return matplotlib.colormaps["tab20"](names.index(name) % 20)


def off_screen() -> Any:
    """matplotlib's pyplot, set up to draw into files."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot
