"""The tables of a plan, and what it leaves out."""
from __future__ import annotations

from typing import Any, Sequence

from minipeft.tools.planning.decoder import DecoderConfig
from minipeft.tools.planning.methods import FULL
from minipeft.tools.planning.purposes import GRADIENTS, PURPOSES, STATE, WEIGHTS

LEFT_OUT = """\
left out: the program itself (Python and its libraries; on a GPU, also the memory of its driver), gaps in the heap
(glibc: up to a sixth of a step in docs/memory.md), scratch of matrix products, masks of padding, data, generation."""
WIDTH = 120
_SHORT = {"activations": "activ.", "temporaries": "temp.", "optimizer": "optim.", "gradients": "grad.",
          "master copies": "master"}


def text(plan: Any) -> str:
    """The report of a `plan`, a Plan of `planning/plan.py`."""
    parts = [head(plan), _phases(plan), _methods(plan)]
    if plan.absent:
        parts.append("\n".join(_wrapped(f"not on this model: {name}: {why}") for name, why in plan.absent.items()))
    if plan.budget is not None:
        parts.append(_budget(plan))
    return "\n\n".join([*parts, _per_parameter(plan), LEFT_OUT])


def unit(largest: int) -> tuple[int, str]:
    """(bytes, name) of the unit in which `largest` has at most five digits before the point."""
    return next(((2 ** p, name) for p, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")) if largest >= 4 * 2 ** p),
                (1, "B"))


def size(n: int) -> str:
    """`n` bytes, in the unit of its size: 1.5 GiB."""
    scale, name = unit(n)
    return f"{n / scale:,.{1 if scale > 1 else 0}f} {name}"


def head(plan: Any) -> str:
    """The model of a `plan`, and the step that is planned, in two lines or three."""
    s, c = plan.settings, plan.config
    kind = c.kind if isinstance(c, DecoderConfig) else "t5"
    tokens = (f"{s.source + s.target} tokens a row ({s.source} + {s.target})" if isinstance(c, DecoderConfig)
              else f"{s.source} and {s.target} tokens a row")
    parts = [f"batch {s.batch}, {tokens}", s.dtype, {"adamw": "AdamW", "adamw8bit": "8-bit AdamW", "sgd": "SGD"}[
        s.optimizer]]
    parts += [f"{s.quantize}{' with double quantization' if s.double else ''}"] if s.quantize else []
    parts += ["quantized as it is read"] if s.streaming else []
    parts += ["checkpointing"] if s.checkpointing else []
    parts += ["float32 master copies"] if s.master else []
    lines = [f"{kind}: {plan.step.base:,} parameters", "; ".join(parts)]
    if s.quantize and FULL in plan.steps:
        lines.append("full fine-tuning is planned without quantization, because it trains every weight")
    return "\n".join(lines)


def _phases(plan: Any) -> str:
    step = plan.step
    scale, name = unit(step.peak)
    used = [purpose for purpose in PURPOSES if any(parts.get(purpose) for parts in step.phases.values())]
    rows = [[f"{plan.method}, {name}", *step.phases]]
    rows += [[purpose, *(_number(parts.get(purpose, 0), scale) for parts in step.phases.values())] for purpose in used]
    rows.append(["together", *(_number(n, scale) for n in step.totals.values())])
    return _table(rows) + f"\nthe peak is {size(step.peak)}, in the phase {step.at!r}"


def _methods(plan: Any) -> str:
    largest = max(step.peak for step in plan.steps.values())
    scale, name = unit(largest)
    digits = 1 if largest >= 1000 * scale else 2
    used = [p for p in PURPOSES if any(step.phases[step.training].get(p) for step in plan.steps.values())]
    rows = [[f"in the step, {name}", "trained", "file", *(_SHORT.get(p, p) for p in used), "step", "peak in"]]
    for row, step in plan.steps.items():
        parts = step.phases[step.training]
        before = "" if step.at == step.training else f" ({_number(step.peak, scale, digits)})"
        rows.append([("> " if row == plan.method else "  ") + row, f"{step.trained:,}", size(step.file),
                     *(_number(parts.get(p, 0), scale, digits) for p in used),
                     _number(step.totals[step.training], scale, digits), step.at + before])
    return _table(rows, left=(0, len(rows[0]) - 1))


def _budget(plan: Any) -> str:
    b, s = plan.budget, plan.settings
    assert b is not None
    peak = plan.step.peak
    room = b.limit - peak
    lines = [f"budget {b.limit / 1e9:,.1f} GB ({size(b.limit)}): {'fits' if b.fits else 'does not fit'}, "
             f"{size(abs(room))} {'to spare' if room >= 0 else 'too much'}",
             f"largest batch that fits: {b.batch or 'none'} (asked for: {s.batch})"]
    lines += [f"the phase {phase!r} alone is too large, whatever the batch is: {size(n)}"
              for phase, n in plan.step.totals.items() if phase in ("load", "quantize") and n > b.limit]
    if s.quantize is not None and not s.streaming and plan.step.totals[plan.step.training] <= b.limit < peak:
        lines.append("the step itself fits: with --streaming, each tensor is quantized as it is read")
    if b.rank is not None:
        lines.append(f"largest rank that fits at batch {s.batch}: {b.rank or 'none'}"
                     + (" (no matrix here has a larger one)" if b.rank_is_bound else ""))
    return "\n".join(lines)


def _per_parameter(plan: Any) -> str:
    """Bytes for each parameter in this plan, and the claim of 12 to 20."""
    lines = []
    for row in dict.fromkeys((next(iter(plan.steps)), plan.method)):
        step = plan.steps[row]
        parts = step.phases[step.training]
        weights, beside = parts[WEIGHTS], sum(parts.values()) - parts[WEIGHTS]
        state = parts.get(STATE, 0) + step.phases["optimizer"].get(GRADIENTS, 0)
        lines.append(f"{row}: for each parameter, {weights / step.base:.2f} bytes of weights, and "
                     f"{beside / step.base:.2f} beside them in a step, {beside / weights:.2f} times the weights. "
                     f"Gradients and optimizer are {state / step.base:.2f} bytes.")
    lines.append("(The often quoted 12 to 20 \"times the weights\" are bytes for each parameter: gradients 4, AdamW 8, "
                 "activations 0 to 8. See docs/memory.md.)")
    return "\n".join(_wrapped(line) for line in lines)


def _number(n: int, scale: int, digits: int = 2) -> str:
    return "-" if n == 0 else f"{n / scale:,.{digits}f}" if scale > 1 else f"{n:,}"


def _table(rows: Sequence[Sequence[str]], left: tuple[int, ...] = (0,)) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:{'<' if i in left else '>'}{width}}" for i, (cell, width) in enumerate(
        zip(row, widths))).rstrip() for row in rows)


def _wrapped(line: str) -> str:
    import textwrap  # here, for the one kind of line that needs it
    return textwrap.fill(line, WIDTH, subsequent_indent="  ")
