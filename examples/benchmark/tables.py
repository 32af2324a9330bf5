"""The tables that the benchmark prints for a recorded run: plain text, 100 columns wide."""
from __future__ import annotations

from typing import Any, Sequence

from bars import judged
from bars import lines as bar_lines
from figures import Figures, Value, middle
from machine import described
from rounds import OURS
from sizes import CODERS, CODINGS, GROWTH, KINDS, LINKS, MINIPEFT, NEW_TOKENS, SIZES

NAMES = {"lora": "LoRA step", "full": "full step", "generate": "token"}
BASES = {"lora": "float32", "qlora": "NF4", "kept": "NF4, kept"}        # of a LoRA
LEGEND = """\
ratio: ours / torch + peft. Below 1, ours is faster or takes less. Where torch runs in two settings of the allocator,
each ratio compares with the better one. Times are medians of {rounds} rounds, in each of which all libraries are
measured in turn. A ratio of times is the median of the ratios of the rounds, half of which lie within the range at the
right. Where that range is wide, other programs used the machine, and the figures say little."""


def report(run: dict[str, Any]) -> str:
    """All that is printed."""
    figures = Figures(run)
    sizes = [name for name in SIZES if name in run["sizes"]]
    blocks = [described(run), LEGEND.format(rounds=run["settings"]["rounds"]),
              *(table(figures, sizes) for table in (_times, _memory, _shares, _gemm)), _engine(figures),
              _same(figures, sizes), *(_growth(figures, what) for what in GROWTH), _coding(figures), _qlora(figures),
              _install(run), _failures(run),
              "\n".join(["limits", *bar_lines(judged(run))])]
    return "\n\n".join(block for block in blocks if block)


def aligned(title: str, rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table in plain text. The first row is the heading; the first `left` columns are flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
            for row in rows]
    return "\n".join([title, *("  " + line.rstrip() for line in text)])


def written(value: Value, factor: float = 1.0, digits: int | None = None) -> str:
    """factor * value with three digits, or with `digits` after the point; - for a missing value."""
    if value is None:
        return "-"
    value *= factor
    if digits is None:
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def _times(figures: Figures, sizes: list[str]) -> str:
    sides = [OURS, *figures.peers]
    rows = [[size, NAMES[measure], *(written(figures.seconds(size, side, measure), 1e3) for side in sides),
             written(figures.time_ratio(size, measure)), _spread(figures.quartiles(size, measure))]
            for size in sizes for measure in NAMES]
    if all(cell == "-" for row in rows for cell in row[2:]):
        return ""
    return aligned(f"milliseconds: a training step; a token of {NEW_TOKENS} of greedy decoding, of the whole batch",
                   [["size", "", *sides, "ratio", "half of the rounds"], *rows], left=2)


def _spread(ends: tuple[float, float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.2f} .. {ends[1]:.2f}"


def _memory(figures: Figures, sizes: list[str]) -> str:
    sides = [OURS, *figures.peers]
    rows = [[size, NAMES[kind], *(written(figures.memory(size, side, kind), 2 ** -20, 1) for side in sides),
             written(figures.memory_ratio(size, kind))] for size in sizes for kind in KINDS]
    if all(cell == "-" for row in rows for cell in row[2:]):
        return ""
    return aligned("MiB: the peak of a step above the loaded model, optimizer included",
                   [["size", "", *sides, "ratio"], *rows], left=2)


def _shares(figures: Figures, sizes: list[str]) -> str:
    sides = [OURS, *figures.peers]
    rows = []
    for size in sizes:
        pairs = [figures.lora_of_full(size, side) for side in sides]
        rows.append([size, *(written(time) for time, _ in pairs), *(written(memory) for _, memory in pairs)])
    if all(cell == "-" for row in rows for cell in row[1:]):
        return ""
    heads = [*(f"time, {side}" for side in sides), *(f"memory, {side}" for side in sides)]
    return aligned("a LoRA step as a fraction of a full step of the same library", [["size", *heads], *rows])


def _gemm(figures: Figures, sizes: list[str]) -> str:
    rows = [[size, written(figures.rate(size, OURS), 1e-9), written(_peer_rate(figures, size), 1e-9),
             *(written(figures.flops(size, kind), 1e-9) for kind in KINDS),
             *(written(figures.gemm_share(size, kind), 100, 0) for kind in KINDS)] for size in sizes]
    if all(cell == "-" for row in rows for cell in row[1:]):
        return ""
    return aligned("the matrix product's rate, in GFLOP/s, and what share of ours a whole step of ours reaches",
                   [["size", "GEMM, ours", "GEMM, torch", "LoRA, GFLOP", "full, GFLOP", "LoRA, %", "full, %"], *rows])


def _peer_rate(figures: Figures, size: str) -> Value:
    return max((rate for side in figures.peers if (rate := figures.rate(size, side)) is not None), default=None)


def _engine(figures: Figures) -> str:
    rows = []
    for side in (OURS, *figures.peers):
        whole, over = figures.per_node(side)
        rows.append([side, written(whole, 1e6), written(over, 1e6)])
    if all(cell == "-" for row in rows for cell in row[1:]):
        return ""
    return aligned(f"microseconds per node of a chain of {LINKS:,} additions of one number, forward and backward",
                   [["", "in all", "above a bare NumPy addition"], *rows])


def _same(figures: Figures, sizes: list[str]) -> str:
    rows = [[size, "-" if gap is None else f"{gap:.0e}", written(equal, 100, 1)] for size in sizes
            for gap, equal in [(figures.loss_gap(size), figures.ids_equal(size))]]
    if all(cell == "-" for row in rows for cell in row[1:]):
        return ""
    return aligned("whether both do the same: first losses, relatively, and decoded ids",
                   [["size", "losses differ by", "ids equal, %"], *rows])


def _coding(figures: Figures) -> str:
    """Rates of quantizing and dequantizing."""
    libraries = [library for library in CODERS if any(figures.coding(c, library, "decode") for c in CODINGS)]
    if not libraries:
        return ""
    rows = [[name, *(written(figures.coding(name, library, "encode"), 1e-6) for library in libraries),
             *(written(figures.coding(name, library, "decode"), 1e-9) for library in libraries),
             written(figures.of_copy(name, "decode"), 100, 0)] for name in CODINGS]
    heads = [f"{unit}, ours" if library == MINIPEFT else library for unit in ("MB/s", "GB/s") for library in libraries]
    copying = middle([rate for c in CODINGS if (rate := figures.coding(c, MINIPEFT, "copy")) is not None])
    return aligned(f"quantizing (MB/s) and dequantizing (GB/s) float32 numbers on one core; NumPy copies them at "
                   f"{written(copying, 1e-9)} GB/s", [["", *heads, "of a copy, %"], *rows])


def _qlora(figures: Figures) -> str:
    """Steps on quantized bases beside those on the float32 base."""
    rows = []
    for size in figures.run.get("qlora", {}):
        for side, kind in ((s, k) for s in (OURS, *figures.peers) for k in BASES):
            times, (weights, step) = figures.qlora_rounds(size, side, kind), figures.qlora_bytes(size, side, kind)
            if times or weights:
                gap = figures.qlora_gap(size, side, kind)
                of_weights, together = figures.qlora_memory(size, side, kind)
                rows.append([size, side, BASES[kind], written(middle(times), 1e3),
                             written(figures.qlora_time(size, side, kind)),
                             written(weights, 2 ** -20, 1), written(step, 2 ** -20, 1), written(of_weights),
                             written(together), "-" if gap is None else f"{gap:.0e}"])
    if not rows:
        return ""
    title = """\
a LoRA step on a quantized base: milliseconds, and MiB of the weights and of a step above the loaded model. Ratios are
to the float32 base of the same library; the last is of weights and step together. loss: how far the first one is from
ours, relatively (kept: from that of NF4)"""
    return aligned(title, [["size", "", "base", "step, ms", "ratio", "weights", "step", "ratio", "together", "loss"],
                           *rows], left=3)


def _growth(figures: Figures, what: str) -> str:
    points = figures.growth(what)
    if not any(times for _, times, _ in points):
        return ""
    peer = next((side for side in figures.peers if any(side in times for _, times, _ in points)), None)
    sides = [OURS, *([peer] if peer else [])]
    first = {side: next(((value, times[side]) for value, times, _ in points if side in times), None) for side in sides}
    rows = []
    for value, times, found in points:
        relative = []
        for side in sides:
            start = first[side]
            relative.append(None if side not in times or start is None
                            else times[side] / start[1] / (value / start[0]))
        rows.append([str(value), *(written(times.get(side), 1e3) for side in sides), *map(written, relative),
                     *([written(found)] if peer else [])])
    origin = GROWTH[what][2]
    shape = f"length {origin.source}" if what == "batch" else f"batch {origin.batch}"
    heads = [what, *(f"{side}, ms" for side in sides), *(f"{side}, / proportional" for side in sides),
             *(["ratio"] if peer else [])]
    return aligned(f"growth of a LoRA step with {what}, from the shape of d256 with {shape}", [heads, *rows])


def _install(run: dict[str, Any]) -> str:
    found = run.get("install")
    if not found:
        return ""
    rows = [[name, written(f.get("install_seconds")), written(f.get("step_seconds")),
             written(f.get("seconds")), written(f.get("bytes"), 1e-6, 1)] for name, f in found["sides"].items()]
    return aligned(f"from nothing to a first LoRA step, seconds ({found['how']})",
                   [["", "pip install", "first step", "in all", "installed, MB"], *rows])


def _failures(run: dict[str, Any]) -> str:
    out = []
    absent = {**run.get("quantize", {}).get("absent", {}),
              **{f"{side}, QLoRA, {size}": why for size, found in run.get("qlora", {}).items()
                 for side, why in found["absent"].items()}}
    out += [f"{side} was not measured: {why} (pip install 'minipeft[peers]')" for side, why in absent.items()]
    if run["absent"]:
        out.append(f"torch + peft were not measured: {run['absent']} (pip install 'minipeft[peers]')")
    for failure in run["failures"]:
        out += [f"{failure['side']} failed at {failure['doing']}: {failure['what']}",
                *(f"    {line}" for line in failure["stderr"])]
    return "\n".join(out)
