"""The limits of the benchmark: each with its figure, and whether it holds.

A limit is "not measured" if its size or part was not asked for, if torch + peft are not installed, or if a process
failed. With `--check` only the last is a failure: everything that was asked for has to be measured.
"""
from __future__ import annotations

import dataclasses
import math
from typing import Any, Callable

from figures import Figures, Value, scaled
from rounds import OURS
from sizes import MATRIX, SIZES

LORA_STEP, FULL_STEP, GENERATION, LORA_MEMORY = 1.15, 1.3, 0.7, 1.0    # of torch + peft's, at every size
LORA_AIM = 1.0
OWN_TIME, OWN_MEMORY = 0.7, 0.45                                       # a LoRA step, of our own full step
GEMM_SHARE = 0.55
LOSS_GAP = 1e-5
QUANTIZING, DEQUANTIZING = 100, 1                                      # MB/s and GB/s of float32 numbers, on one core
QLORA_STEP, QLORA_WEIGHTS, QLORA_TOGETHER = 1.3, 0.4, 0.8              # of a LoRA on float32
LARGE = "t5-small"
HOLDS, FAILS, MISSING = "holds", "FAILS", "not measured"


@dataclasses.dataclass(frozen=True)
class Bar:
    """One limit: `figure` must be at most `limit`, or at least.

    what: its name. size, parts: what has to be run for it; no size if it depends on none. peer: torch + peft have to be
    run too. form: how the figure is written."""

    what: str
    limit: float
    figure: Callable[[Figures], Value]
    size: str | None
    parts: tuple[str, ...]
    peer: bool = True
    at_least: bool = False
    form: str = "{:.3f}"

    def verdict(self, value: Value) -> str:
        if value is None:
            return MISSING
        within = value >= self.limit if self.at_least else value <= self.limit
        return HOLDS if math.isfinite(value) and within else FAILS

    def asked(self, settings: dict[str, Any]) -> bool:
        """Whether a run with these settings should measure it. With dropout the losses differ by chance. A small matrix
        is only for a quick look at rates."""
        of_size = self.size in settings["sizes"] if self.size else settings.get("matrix", 0) >= MATRIX
        return (of_size and set(self.parts) <= set(settings["parts"])
                and not (settings["dropout"] and self.what.startswith("first losses")))


def _of_size(size: str) -> list[Bar]:
    return [
        Bar(f"LoRA step / torch + peft, {size} (aim: {LORA_AIM})", LORA_STEP, lambda f: f.time_ratio(size, "lora"),
            size, ("steps",)),
        Bar(f"full step / torch, {size}", FULL_STEP, lambda f: f.time_ratio(size, "full"), size, ("steps",)),
        Bar(f"generation / torch, {size}", GENERATION, lambda f: f.time_ratio(size, "generate"), size,
            ("generation",)),
        Bar(f"LoRA's peak memory / torch + peft, {size}", LORA_MEMORY, lambda f: f.memory_ratio(size, "lora"), size,
            ("memory",)),
        Bar(f"first losses differ by, relatively, {size}", LOSS_GAP, lambda f: f.loss_gap(size), size, ("steps",),
            form="{:.0e}")]


BARS = [bar for size in SIZES for bar in _of_size(size)] + [
    Bar(f"LoRA step / our full step, {LARGE}", OWN_TIME, lambda f: f.lora_of_full(LARGE, OURS)[0], LARGE, ("steps",),
        peer=False),
    Bar(f"LoRA's peak memory / our full step's, {LARGE}", OWN_MEMORY, lambda f: f.lora_of_full(LARGE, OURS)[1], LARGE,
        ("memory",), peer=False),
    Bar(f"LoRA step's FLOPs / GEMM rate, {LARGE}", GEMM_SHARE, lambda f: f.gemm_share(LARGE, "lora"), LARGE,
        ("steps",), peer=False, at_least=True),
    Bar("the slowest kind's quantizing, MB/s of float32 on one core", QUANTIZING,
        lambda f: scaled(f.slowest("encode"), 1e-6), None, ("quantize",), peer=False, at_least=True, form="{:.0f}"),
    Bar("the slowest kind's dequantizing, GB/s of float32 on one core", DEQUANTIZING,
        lambda f: scaled(f.slowest("decode"), 1e-9), None, ("quantize",), peer=False, at_least=True, form="{:.2f}"),
    Bar(f"QLoRA step / LoRA step, {LARGE}", QLORA_STEP, lambda f: f.qlora_time(LARGE, OURS, "qlora"), LARGE,
        ("qlora",), peer=False),
    Bar(f"QLoRA's weights / LoRA's, {LARGE}", QLORA_WEIGHTS, lambda f: f.qlora_memory(LARGE, OURS, "qlora")[0], LARGE,
        ("qlora",), peer=False),
    Bar(f"QLoRA's weights and step / LoRA's, {LARGE}", QLORA_TOGETHER,
        lambda f: f.qlora_memory(LARGE, OURS, "qlora")[1], LARGE, ("qlora",), peer=False)]


def judged(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Every limit with its figure: {what, limit, at_least, figure, verdict, excused: why a missing one is allowed}."""
    figures, rows = Figures(run), []
    for bar in BARS:
        value = bar.figure(figures)
        if not bar.asked(run["settings"]):
            excused = "not asked for"
        elif bar.peer and run["absent"]:
            excused = "torch + peft are not installed"
        else:
            excused = None
        rows.append({"what": bar.what, "limit": bar.limit, "at_least": bar.at_least, "figure": value,
                     "verdict": bar.verdict(value), "excused": excused})
    return rows


def missed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that fail with `--check`: limits that do not hold, or that were asked for and not measured."""
    return [row for row in rows if row["verdict"] == FAILS or (row["verdict"] == MISSING and not row["excused"])]


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Lines such as: holds  0.93 <= 1.15  LoRA step / torch + peft, d64"""
    out = []
    for bar, row in zip(BARS, rows, strict=True):
        sign = ">=" if row["at_least"] else "<="
        figure = "-" if row["figure"] is None else bar.form.format(row["figure"])
        why = f" ({row['excused']})" if row["verdict"] == MISSING and row["excused"] else ""
        out.append(f"  {row['verdict']:<12}  {figure:>5} {sign} {row['limit']:<5g}  {row['what']}{why}")
    return out
