"""The result of `xray`: the ops of one step as plain numbers, and their table, which fits a page.

A short step is printed op by op, in order. Ops that repeat, as those of a model's layers do, are folded: `6 times:`,
then the ops once. A longer step is grouped: a row for all ops of one name that keep the same VJPs, with their number
and sums; then the ops that keep most. `XRay.tape()` is the folded tape at any length. The data always has every op.
"""
from __future__ import annotations

import dataclasses
from typing import Iterable, Mapping, Sequence

from minipeft.engine.flops import has_rule

_ROWS, _GROUPS, _KEEPERS = 40, 28, 10  # of a page of 60 lines
_COLUMNS = ("op", "output", "kept", "forward", "backward", "VJPs")
_LEGEND = """\
kept: bytes that kept VJPs hold, each buffer at the first op that keeps it; forward, backward: FLOPs
dw: the VJP of input w is kept.   -dw-: it is not, because no selected parameter lies below that input"""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One op, called `op`. shape: of its output. vjps: (input, whether its VJP was kept) for every input that has one.
    kept_bytes: the bytes that it is the first to keep. forward_flops, backward_flops: of the op, and of its kept VJPs.
    trains: the names of the selected parameters among its inputs."""

    op: str
    shape: tuple[int, ...]
    vjps: tuple[tuple[str, bool], ...]
    kept_bytes: int
    forward_flops: int
    backward_flops: int
    trains: tuple[str, ...]

    @property
    def kept(self) -> tuple[str, ...]:
        """The inputs whose VJPs were kept."""
        return tuple(name for name, kept in self.vjps if kept)

    @property
    def struck(self) -> tuple[str, ...]:
        """The inputs whose VJPs were not kept."""
        return tuple(name for name, kept in self.vjps if not kept)


@dataclasses.dataclass(frozen=True)
class XRay:
    """The cost of one step. entries: its ops. loss: its value. trained: how many numbers are trained. peak_bytes: the
    most bytes alive at once. peak_at: the pass and the op in which that was."""

    entries: tuple[Entry, ...]
    loss: float
    trained: int
    peak_bytes: int
    peak_at: str

    @property
    def kept_bytes(self) -> int:
        """The bytes that all kept VJPs hold."""
        return sum(e.kept_bytes for e in self.entries)

    @property
    def forward_flops(self) -> int:
        """The FLOPs of all forwards."""
        return sum(e.forward_flops for e in self.entries)

    @property
    def backward_flops(self) -> int:
        """The FLOPs of all kept VJPs."""
        return sum(e.backward_flops for e in self.entries)

    @property
    def without_rule(self) -> tuple[str, ...]:
        """The ops whose FLOPs were counted as 1 per element, because `flops.py` has no rule for them."""
        return tuple(sorted({e.op for e in self.entries if not has_rule(e.op)}))

    def tape(self) -> str:
        """The table op by op, with repeats folded."""
        return "\n".join(_tape(self.entries))

    def __str__(self) -> str:
        rows = _tape(self.entries)
        body = rows if len(rows) <= _ROWS else [*_grouped(self.entries), "", "the largest keepers",
                                                *_largest(self.entries)]
        vjps = [kept for e in self.entries for _, kept in e.vjps]
        totals = [f"{self.trained:,} numbers trained; {len(self.entries)} ops, {sum(vjps)} of {len(vjps)} VJPs kept",
                  f"kept {size(self.kept_bytes)}, peak {size(self.peak_bytes)} in the {self.peak_at}",
                  f"FLOPs: forward {count(self.forward_flops)}, backward {count(self.backward_flops)}"]
        if self.without_rule:
            totals.append(f"without a rule, counted as 1 FLOP per element: {', '.join(self.without_rule)}")
        return "\n".join([*body, "", *totals, "", _LEGEND])


def compare(xrays: Mapping[str, XRay]) -> str:
    """A table of the totals of several steps, a row for each; xrays: {"full": x1, "LoRA": x2}."""
    head = ("", "trained", "kept", "peak", "forward", "backward", "VJPs kept")
    rows = [(name, f"{x.trained:,}", size(x.kept_bytes), size(x.peak_bytes), count(x.forward_flops),
             count(x.backward_flops), f"{sum(len(e.kept) for e in x.entries)} of {sum(len(e.vjps) for e in x.entries)}")
            for name, x in xrays.items()]
    return "\n".join(_aligned([head, *rows], left=(0,)))


def struck_out(vjps: Iterable[tuple[str, bool]]) -> str:
    """The `vjps` of an entry by the names of their inputs; those that were not kept are struck out: dx -dw-."""
    return " ".join(f"d{name}" if kept else f"-d{name}-" for name, kept in vjps)


def size(n: int) -> str:
    """`n` bytes in the largest binary unit that they fill: 1.50 KiB."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if n >= 0.999995 * 2 ** power:  # from here on, the smaller unit would be printed as 1024.00
            return f"{n / 2 ** power:.2f} {unit}"
    return f"{n} B" if n else "-"


def count(n: int) -> str:
    """`n` FLOPs with three digits: 1.07 G."""
    for power, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if n >= 0.9995 * 10 ** power:   # from here on, the smaller unit would be printed as 1.00e+03
            return f"{n / 10 ** power:#.3g} {unit}".replace(". ", " ")
    return str(n) if n else "-"


def folded(rows: Sequence) -> list[tuple[int, Sequence]]:
    """[a, b, c, b, c, d] -> [(1, [a]), (2, [b, c]), (1, [d])]: the same rows, with consecutive repeats named once."""
    found: list[tuple[int, Sequence]] = []
    at = 0
    while at < len(rows):
        best = (0, 1, 1)                                   # rows saved, times, length
        for length in range(1, (len(rows) - at) // 2 + 1):
            block, times = rows[at:at + length], 1
            while rows[at + times * length:at + (times + 1) * length] == block:
                times += 1
            if (times - 1) * length > best[0]:
                best = ((times - 1) * length, times, length)
        _, times, length = best
        found.append((times, rows[at:at + length]))
        at += times * length
    return found


def _tape(entries: Sequence[Entry]) -> list[str]:
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for times, block in folded([_row(e.op, str(list(e.shape)), [e], struck_out(e.vjps)) for e in entries]):
        indent = "  " if times > 1 else ""
        rows += [(f"{times} times:", *[""] * 5)] * (times > 1) + [(indent + op, *rest) for op, *rest in block]
    return _aligned(rows, left=(0, 1, 5))


def _grouped(entries: Sequence[Entry]) -> list[str]:
    groups: dict[tuple[str, str], list[Entry]] = {}
    for e in entries:
        groups.setdefault((e.op, struck_out(e.vjps)), []).append(e)
    order = sorted(groups.items(), key=lambda item: -sum(e.kept_bytes for e in item[1]))
    rows = [_row(op, str(len(group)), group, vjps) for (op, vjps), group in order[:_GROUPS]]
    rest = [e for _, group in order[_GROUPS:] for e in group]
    if rest:
        rows.append(_row("others", str(len(rest)), rest, ""))
    return _aligned([("op", "times", *_COLUMNS[2:]), *rows], left=(0, 5))


def _row(op: str, what: str, entries: Sequence[Entry], vjps: str) -> tuple[str, ...]:
    """The cells of a row, with the sums over some entries."""
    return (op, what, size(sum(e.kept_bytes for e in entries)), count(sum(e.forward_flops for e in entries)),
            count(sum(e.backward_flops for e in entries)), vjps)


def _largest(entries: Sequence[Entry]) -> list[str]:
    """Rows for the ops that keep most. Equal ops share a row, which names a selected parameter of the first."""
    alike: dict[tuple, list[Entry]] = {}
    for e in entries:
        alike.setdefault((e.op, e.shape, e.kept_bytes, e.vjps), []).append(e)
    largest = sorted((group for group in alike.values() if group[0].kept_bytes), key=lambda g: -g[0].kept_bytes)
    rows = [(e.op, str(list(e.shape)), f"{1 + len(others)} x", size(e.kept_bytes), struck_out(e.vjps),
             *(e.trains[:1] or ("",))) for e, *others in largest[:_KEEPERS]]
    return _aligned(rows, left=(0, 1, 4, 5))


def _aligned(rows: Sequence[tuple[str, ...]], left: Sequence[int]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    return ["  ".join(cell.ljust(w) if i in left else cell.rjust(w)
                      for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows]
