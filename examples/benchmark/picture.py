"""The benchmark as a picture: ratios with their limits, memory, LoRA beside full, growth; quantized weights where a run
measured them. Needs matplotlib."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from bars import (
    DEQUANTIZING, FULL_STEP, GEMM_SHARE, GENERATION, LORA_MEMORY, LORA_STEP, OWN_MEMORY, OWN_TIME, QLORA_STEP,
    QLORA_TOGETHER, QLORA_WEIGHTS, QUANTIZING)
from figures import Figures, Value, scaled
from rounds import OURS
from sizes import CODINGS, GROWTH, MINIPEFT, SIZES
from tables import BASES

QUANTIZED = {"quantize", "qlora"}       # parts with panels of their own

COLORS = ("#2a6f97", "#89c2d9", "#e07a5f", "#f2cc8f")


def draw(run: dict[str, Any], file: Path) -> None:
    """Write `file`. Raises ImportError without matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figures, parts = Figures(run), set(run["settings"]["parts"])
    rows = [rows for rows, of in ((_of_steps, parts - QUANTIZED), (_of_quantized, parts & QUANTIZED)) if of]
    figure, axes = pyplot.subplots(2 * len(rows), 2, figsize=(13, 8.5 * len(rows)), layout="constrained")
    for i, panels in enumerate(rows):
        panels(axes[2 * i:2 * i + 2], figures)
    figure.suptitle(f"{run['machine']['cpu']}, {run['settings']['threads']} threads, {run['settings']['backend']}",
                    fontsize=9)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _of_steps(axes: Any, figures: Figures) -> None:
    """Steps and decoding beside torch + peft."""
    sizes = [name for name in SIZES if name in figures.run["sizes"]]
    _grouped(axes[0, 0], sizes, "ours / torch + peft: below 1 is faster or smaller (lines: the bars)", [
        ("LoRA step", [figures.time_ratio(s, "lora") for s in sizes], LORA_STEP),
        ("full step", [figures.time_ratio(s, "full") for s in sizes], FULL_STEP),
        ("generation", [figures.time_ratio(s, "generate") for s in sizes], GENERATION),
        ("LoRA memory", [figures.memory_ratio(s, "lora") for s in sizes], LORA_MEMORY)])
    axes[0, 0].axhline(1, color="black", linewidth=0.8)
    _grouped(axes[0, 1], sizes, "peak memory of a step above the loaded model, MiB (logarithmic)", [
        (f"{name}, {label}", [_mib(figures, s, name, kind) for s in sizes], None)
        for kind, label in (("lora", "LoRA"), ("full", "full")) for name in ("ours", "torch + peft")],
        form="{:.0f}", log=True)
    _grouped(axes[1, 0], sizes, "LoRA beside our own full step, and beside the matrix product "
             "(lines: the bars, at t5-small)", [
        ("time, LoRA / full", [figures.lora_of_full(s, OURS)[0] for s in sizes], OWN_TIME),
        ("memory, LoRA / full", [figures.lora_of_full(s, OURS)[1] for s in sizes], OWN_MEMORY),
        ("FLOPs / GEMM rate (above the line is good)", [figures.gemm_share(s, "lora") for s in sizes], GEMM_SHARE)],
        only="t5-small")
    _growth(axes[1, 1], figures)


def _of_quantized(axes: Any, figures: Figures) -> None:
    """Rates of quantizing and dequantizing, and steps on quantized bases."""
    for axis, what, unit, factor, bar in ((axes[0, 0], "encode", "quantizing, MB/s", 1e-6, QUANTIZING),
                                          (axes[0, 1], "decode", "dequantizing, GB/s", 1e-9, DEQUANTIZING)):
        ours = [scaled(figures.coding(name, MINIPEFT, what), factor) for name in CODINGS]
        theirs = [scaled(figures.peers_coding(name, what), factor) for name in CODINGS]
        series = [(label, values, None) for label, values in (
            (OURS, ours), ("bitsandbytes (nf4, fp4), gguf (q4_0 to q8_0)", theirs)) if any(values)]
        _grouped(axis, list(CODINGS), f"{unit} of float32 numbers on one core (line: the bar)", series,
                 form="{:.0f}" if what == "encode" else "{:.1f}")
        if series:
            axis.axhline(bar, color="#c1121f", linewidth=1)
        axis.tick_params(axis="x", labelrotation=30)
    sizes = list(figures.run.get("qlora", {}))
    _grouped(axes[1, 0], sizes, "a LoRA on an NF4 base / on the float32 base (lines: the bars, at t5-small)", [
        ("time of a step", [figures.qlora_time(s, OURS, "qlora") for s in sizes], QLORA_STEP),
        ("time of a step, weights kept", [figures.qlora_time(s, OURS, "kept") for s in sizes], None),
        ("weights", [figures.qlora_memory(s, OURS, "qlora")[0] for s in sizes], QLORA_WEIGHTS),
        ("weights and step", [figures.qlora_memory(s, OURS, "qlora")[1] for s in sizes], QLORA_TOGETHER)],
        only="t5-small")
    axes[1, 0].axhline(1, color="black", linewidth=0.8)
    _grouped(axes[1, 1], sizes, "MiB of the weights, and of a step above the loaded model (logarithmic)", [
        (f"{what}, {BASES[kind]}", [scaled(figures.qlora_bytes(s, OURS, kind)[i], 2 ** -20) for s in sizes], None)
        for i, what in enumerate(("weights", "step")) for kind in ("lora", "qlora")], form="{:.0f}", log=True)


def _mib(figures: Figures, size: str, name: str, kind: str) -> Value:
    value = (figures.memory(size, OURS, kind) if name == "ours"
             else figures.best(lambda side: figures.memory(size, side, kind)))
    return scaled(value, 2 ** -20)


def _grouped(axis: Any, sizes: list[str], title: str, series: list[tuple[str, list[Value], float | None]],
             form: str = "{:.2f}", log: bool = False, only: str | None = None) -> None:
    """Draw bars side by side for each size, with their numbers, and a line at each limit (`only`: at that size)."""
    width = 0.8 / max(1, len(series))
    for i, (label, values, bar) in enumerate(series):
        for x, (size, value) in enumerate(zip(sizes, values)):
            at = x + (i - (len(series) - 1) / 2) * width
            if value is not None:
                axis.bar(at, value, width * 0.92, color=COLORS[i], label=label)
                axis.annotate(form.format(value), (at, value), xytext=(0, 2), textcoords="offset points", ha="center",
                              fontsize=7)
                label = "_"
            if bar is not None and only in (None, size):
                axis.hlines(bar, at - width / 2, at + width / 2, color="#c1121f", linewidth=1.8)
    axis.set_xticks(range(len(sizes)), sizes)
    axis.set_title(title, fontsize=9)
    if log and axis.patches:
        axis.set_yscale("log")
        axis.set_ylim(bottom=min(patch.get_height() for patch in axis.patches) / 3)
    axis.margins(y=0.25)
    _finish(axis)


def _growth(axis: Any, figures: Figures) -> None:
    """Draw the time of a LoRA step over what it grows with, on logarithmic axes."""
    for i, what in enumerate(GROWTH):
        points = figures.growth(what)
        for side in dict.fromkeys(side for _, times, _ in points for side in times):
            xy = [(value / points[0][0], times[side]) for value, times, _ in points if side in times]
            axis.plot([x for x, _ in xy], [1e3 * y for _, y in xy], marker="o", ms=3, color=COLORS[(0, 2, 3)[i]],
                      linestyle="-" if side == OURS else "--", label=f"{what}, {side}")
    axis.set_title("milliseconds of a LoRA step that grows (dotted: proportional)", fontsize=9)
    if axis.lines:
        axis.set(xscale="log", yscale="log", xlabel="times the smallest (batch 4, length 16, depth 1)")
        ticks = [1, 2, 4, 8, 16]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        low = min(line.get_ydata()[0] for line in axis.lines)
        axis.plot(ticks, [low * tick for tick in ticks], color="grey", linestyle=":", linewidth=1)
    _finish(axis)


def _finish(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, frameon=False)
    else:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
