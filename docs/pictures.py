"""Draws the pictures of the pages into this folder.

    lora.svg       a training step of LoRA: the forward, and the gradients that are and are not computed     README.md
    slot.svg       a slot and its fold, before and after a merge                                     docs/glossary.md
    imports.svg    the imports between the folders of the package, in version 0.1 and now             CONTRIBUTING.md

    python docs/pictures.py [--out FOLDER]          needs matplotlib: pip install -e '.[examples]'

The arrows of imports.svg are read from the sources (those of 0.1 are listed below), so run the program again when a
folder imports another one for the first time; a test says when. The same sources and the same matplotlib give the same
bytes.
"""
from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import Any, Iterator

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "minipeft", "svg.fonttype": "path", "font.family": "DejaVu Sans",
                            "mathtext.fontset": "dejavusans", "font.size": 10})

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon  # noqa: E402

DOCS = Path(__file__).parent
INK, PALE, GRAY = "#22303c", "#c9d1d9", "#6b7885"
FROZEN, TRAINED, GRADIENT, MERGED = "#dde5ee", "#f9c784", "#b3261e", "#bfe3d0"
FOUNDATION = ("files", "atomic", "backend", "checks")  # single files below everything: drawn as one
LEFT_OUT = ("__init__", "__main__", "deprecated")      # they only pass names on

# {folder: the folders that it imports} at commit 92a8e9d, the last one before the folders were rearranged
BEFORE = {
    "autograd": {"files"}, "ops": {"autograd", "files"}, "nn": {"ops", "autograd", "files"},
    "peft": {"nn", "ops", "autograd", "files"}, "models": {"nn", "ops", "autograd", "files"},
    "train": {"nn", "autograd", "files"}, "conformance": {"peft", "train", "nn", "ops", "autograd", "files"},
    "files": set()}


def folder(module: str) -> str:
    """The node of the picture that a dotted module below minipeft belongs to."""
    first = "engine.ops" if module.startswith("engine.ops") else module.split(".")[0]
    return "files" if first in FOUNDATION else first


def imported(source: str) -> Iterator[str]:
    """The modules below minipeft that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("minipeft."))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "minipeft":
            origin = node.module.partition(".")[2]
            yield from (f"{origin}.{alias.name}".lstrip(".") for alias in node.names)


def edges(package: Path) -> dict[str, set[str]]:
    """{folder: the folders that it imports}, read from the sources."""
    found: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        a = folder(".".join(path.relative_to(package).with_suffix("").parts))
        if a not in LEFT_OUT:
            found.setdefault(a, set()).update(b for m in imported(path.read_text("utf-8")) if (b := folder(m)) != a)
    return found


def as_text(graph: dict[str, set[str]]) -> str:
    """The arrows in words; imports.svg carries them as its description."""
    return "; ".join(f"{a} imports {', '.join(sorted(graph[a]))}" for a in sorted(graph) if graph[a])


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """All folders that `start` imports, directly or through others."""
    return set().union(*({b} | reached(graph, b) for b in graph.get(start, ())))


def needed(graph: dict[str, set[str]], a: str) -> set[str]:
    """The imports of `a` that do not follow from its other imports."""
    return {b for b in graph[a] if not any(b in reached(graph, c) for c in graph[a] - {b})}


# ---- what the pictures are made of


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """A figure whose coordinates are tenths of an inch."""
    figure = plt.figure(figsize=(width / 10, height / 10), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes: Any, x: float, y: float, width: float, height: float, color: str, edge: str = INK, **style: Any) -> None:
    """A rounded rectangle around (x, y)."""
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, facecolor=color, edgecolor=edge,
                                  boxstyle="round,pad=0,rounding_size=0.8", **{"linewidth": 1, "zorder": 3, **style}))


def say(axes: Any, x: float, y: float, text: str, size: float = 10, color: str = INK, **style: Any) -> None:
    """Text around (x, y)."""
    axes.text(x, y, text, fontsize=size, color=color, **{"ha": "center", "va": "center", "zorder": 6, **style})


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], color: str = INK, width: float = 1.4,
          bend: float = 0, **style: Any) -> None:
    """An arrow, bent to one side by a share of its length."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>,head_length=5,head_width=2.4", color=color,
                                   linewidth=width, connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0,
                                   **{"zorder": 2, **style}))


def line(axes: Any, *points: tuple[float, float], color: str = INK, width: float = 1.4, **style: Any) -> None:
    """A line through the points."""
    axes.plot(*zip(*points), color=color, linewidth=width, **{"zorder": 2, "solid_joinstyle": "round", **style})


def save(figure: Any, path: Path, description: str) -> None:
    """Write the picture without a date, so that the same drawing has the same bytes."""
    figure.savefig(path, metadata={"Date": None, "Creator": "docs/pictures.py", "Description": description})
    plt.close(figure)


# ---- a step of LoRA


def layer(axes: Any, left: float, backward: bool) -> None:
    """W0 and, beside it, A and B, between x below and y above."""
    w, ab, mid, ink = left + 8.5, left + 29, left + 18.75, GRADIENT if backward else INK
    box(axes, w, 20, 16, 15, FROZEN)
    say(axes, w, 21.5, "$W_0$", 15)
    if backward:
        say(axes, w, 17.3, "never formed:", 8, GRAY)
        say(axes, w, 14.9, "$dW_0 = g^T x$", 10, GRAY)
    else:
        say(axes, w, 15.9, "[d_out, d_in]\nfrozen", 8, GRAY)
    for low, below, above, name, shape, gradient in (
            (12.5, 7, 2.6, "$A$", "[r, d_in]\ntrained", "$dA = s\\,(g B)^T x$"),
            (21.5, 2.6, 7, "$B$", "[d_out, r]\ntrained, starts at 0", "$dB = s\\,g^T (x A^T)$")):
        high, y = low + 6, low + 3
        axes.add_patch(Polygon([(ab - below, low), (ab + below, low), (ab + above, high), (ab - above, high)],
                               facecolor=TRAINED, edgecolor=INK, linewidth=1, zorder=3, joinstyle="round"))
        say(axes, ab, y, name, 13)
        if backward:
            arrow(axes, (ab + 5, y), (ab + 8.6, y), ink)
            say(axes, ab + 9.4, y, gradient, 10.5, ink, ha="left")
        else:
            say(axes, ab + 7.6, y, shape, 8, GRAY, ha="left")
    for y in (33, 7.2) if backward else (33,):
        axes.add_patch(Circle((mid, y), 1.5, facecolor="white", edgecolor=ink, linewidth=1.2, zorder=4))
        say(axes, mid, y, "+", 12, ink)
    way = -1 if backward else 1
    for x, side in ((w, -1), (ab, 1)):
        for points in (((x, 27.5), (x, 33), (mid + 1.5 * side, 33)),
                       ((mid + (1.5 * side if backward else 0), 7.2), (x, 7.2), (x, 12.5))):
            line(axes, *points[::way][:2], color=ink)
            arrow(axes, *points[::way][1:], ink)
    for points in (((ab, 18.5), (ab, 21.5)), ((mid, 3.6), (mid, 5.7 if backward else 7.2)), ((mid, 34.5), (mid, 37.8))):
        arrow(axes, *points[::way], ink)


def lora(out: Path) -> None:
    """The forward of a LoRA layer, and what its backward pass computes."""
    figure, axes = canvas(108, 46)
    say(axes, 20.75, 43.6, "forward", 12, weight="bold")
    layer(axes, 2, backward=False)
    say(axes, 20.75, 39.4, "$y = x\\,W_0^T + s\\,(x A^T) B^T$", 11)
    say(axes, 20.75, 1.9, "$x$", 13)
    say(axes, 32, 30.4, "$\\times\\,s$", 11, ha="left")
    line(axes, (54.5, 2), (54.5, 44), color=PALE, width=1)
    say(axes, 76.75, 43.6, "backward", 12, GRADIENT, weight="bold")
    layer(axes, 58, backward=True)
    say(axes, 76.75, 39.4, "$g$, the gradient at $y$", 10.5, GRADIENT)
    say(axes, 76.75, 1.9, "$dx = g\\,W_0 + s\\,(g B) A$", 11, GRADIENT)
    save(figure, out / "lora.svg", "The forward of a LoRA layer, y = x W0^T + s (x A^T) B^T, and its backward pass: "
         "dA, dB and dx are computed, dW0 = g^T x is never formed.")


# ---- a slot


def column(axes: Any, x: float, title: str, layers: list[tuple[str, str, str, str]]) -> None:
    """The layers of a slot from the bottom up: (name, note, colour, the weight so far)."""
    say(axes, x, 41.6, title, 11, weight="bold")
    box(axes, x, 20.5, 28, 33.5, "#f7f9fb", PALE, linewidth=1.2, zorder=1)
    for i, (name, note, color, weight) in enumerate(layers):
        y = 9.5 + 10.5 * i
        box(axes, x, y, 24, 7, color)
        say(axes, x, y + 1.1, name, 10)
        say(axes, x, y - 1.9, note, 8, GRAY)
        if i:
            arrow(axes, (x, y - 7), (x, y - 3.6))
        say(axes, x + 15.4, y, weight, 10.5, ha="left", weight="bold" if i == len(layers) - 1 else "normal")
    y = 9.5 + 10.5 * (len(layers) - 1)
    say(axes, x + 15.4, y - 2.6, "the fold: used\nby the layer", 8, GRAY, ha="left")


def slot(out: Path) -> None:
    """A slot with two entries, and the same slot after the lower one was merged."""
    figure, axes = canvas(101, 44)
    column(axes, 18, "a slot, with a and b plugged", [
        ("base", "the pretrained array", FROZEN, "$W_0$"),
        ("entry a", "such as LoRA: $W + s B A$", TRAINED, "$f_a(W_0)$"),
        ("entry b", "another method", TRAINED, "$f_b(f_a(W_0))$")])
    line(axes, (50.5, 2), (50.5, 43), color=PALE, width=1)
    column(axes, 69, "the same slot, with a merged", [
        ("base", "kept as it was", FROZEN, "$W_0$"),
        ("entry a, merged", "a constant, computed once", MERGED, "$C = f_a(W_0)$"),
        ("entry b", "another method", TRAINED, "$f_b(C)$")])
    save(figure, out / "slot.svg", "A slot holds a base and plugged entries; its weight is the fold f_b(f_a(W0)). "
         "After a merge, entry a is a constant, and the base is kept.")


# ---- the imports

LABELS = {"files": "files, backend", "engine.ops": "engine/ops"}
ACROSS = {"peft": -12.5, "attaching": -12.5, "methods": -12.5, "conformance": -12.5, "train": 12.5,
          "operations": 12.5, "laws": -25, "quant": 25, "tools": 25}  # others: 0


def height(graph: dict[str, set[str]], a: str) -> int:
    """How many folders lie one upon another below `a`."""
    return 1 + max((height(graph, b) for b in graph[a]), default=-1)


def layered(axes: Any, x: float, title: str, graph: dict[str, set[str]]) -> None:
    """The folders above those that they import. An import that follows from others is pale."""
    at = {a: (x + ACROSS.get(a, 0), 4 + 7.6 * height(graph, a)) for a in graph}
    say(axes, x, 55.2, title, 11, weight="bold")
    for a in graph:
        for b in sorted(graph[a]):
            (ax, ay), (bx, by) = at[a], at[b]
            if b in needed(graph, a):
                arrow(axes, (ax, ay - 2.1), (bx + (ax - bx) * 0.12, by + 2.3), width=1.3)
            else:
                side = 1 if ax > x or (ax == x and bx == x) else -1
                arrow(axes, (ax + side * 3, ay - 2.1), (bx + side * 5.2, by + 0.6), PALE, 1, -0.22 * side, zorder=1)
        box(axes, *at[a], 11, 4.2, "white" if a == "files" else FROZEN)
        say(axes, *at[a], LABELS.get(a, a), 9.5)


def imports(out: Path) -> None:
    """The folders of the package and their imports, in version 0.1 and in the sources as they are."""
    now = edges(DOCS.parent / "minipeft")
    figure, axes = canvas(124, 58)
    layered(axes, 26, "version 0.1", BEFORE)
    line(axes, (52, 2), (52, 56), color=PALE, width=1)
    layered(axes, 90, "now", now)
    save(figure, out / "imports.svg",
         f"Imports between folders. Version 0.1: {as_text(BEFORE)}. Now: {as_text(now)}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder to write to (default: that of the program)")
    folder_out = parser.parse_args().out
    for draw in (lora, slot, imports):
        draw(folder_out)
