"""Teach a British accent to a base of 4, 3 or 2 bits per weight, then merge: QLoRA and QA-LoRA, beside 16-bit LoRA.

    y = x W~^T + b + s x A^T B^T      W~: the dequantized weight       Dettmers et al., 2023, arXiv:2305.14314, eq. (5)
    W~ = a q + (b + k s B A)          QA-LoRA, merged into offsets     Xu et al., 2023, arXiv:2309.14717, Algorithm 1

The base and the task are those of accents.py. The linear weights of the base, all but the head, are replaced by
quantized ones: NF4, with and without double quantization; FP4; integers of 4, 3 and 2 bits in groups; and llama.cpp's
Q4_1. A LoRA is trained on each. Its base stays as it is, to the bit. "16 bit" is the base as it was stored: float16,
two bytes a number. All runs compute in float32, so they differ in the numbers of the base alone.

Then the adapter is merged. A LoRA on a quantized base has three ways: into a float weight, which has 16 bits again;
into a weight that is quantized anew; and into the weights from before quantization. A QA-LoRA has a better one: it adds
its change to the offsets of the quantized weights, so that no code and no scale moves.

    python examples/qlora.py --quick         four rows, few steps and few words: about half a minute on two cores
    python examples/qlora.py                 ten rows, one seed: a few minutes
    python examples/qlora.py --seeds 3       the run behind the tables of examples/README.md
    python examples/qlora.py --show          no training: the tables and checks of the recorded run

The program prints two tables and writes a picture and results.json to examples/out/qlora. It ends with checks that fail
if the claims do not hold. lab/quantized_bases.py says how each number is measured.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy
from rich.console import Console

import minipeft
from data.g2p import CODEC, NEW_TASK, load_tasks
from lab.claims import Claim, failures, standard_error
from lab.pictures import names_of, off_screen, reduced
from lab.quantized_bases import (
    BATCH, FLOAT, METHODS, OFFSETS, ORIGINAL, REFERENCE, REQUANTIZED, Experiment, Merged, Row, ask, loaded, paired)
from lab.scoring import exact_match
from lab.tables import Column, on_terminal

HERE = Path(__file__).parent
CHECKPOINT = HERE / "data" / "checkpoints" / "g2p"
RECORDED = HERE / "recorded" / "qlora.json"
LONG = {"pairs": 1000, "steps": 100, "words": 1000, "side": 250}
QUICK = {"pairs": 1000, "steps": 60, "words": 200, "side": 100}
QUICK_ROWS = (REFERENCE, "LoRA on NF4", "QA-LoRA on INT4", "QA-LoRA on Q4_1")
NF4 = ("LoRA on NF4", "LoRA on NF4, double")
SHARE = 0.30                    # NF4 weights may take this share of the bytes of float16
POINTS, SEEDS = 3.0, 3          # how far QLoRA may be from LoRA, as the mean of so many seeds
# max |W' - (W~ + d)| / (max |W~| + max |W'|) that rounding allows. INT4 here: a handful of roundings in float32, of
# 2^-24 each. Q4_1 stores the sum as float16, with one rounding of 2^-11.
ROUNDING = {"QA-LoRA on INT4": 2.0 ** -20, "QA-LoRA on Q4_1": 2.0 ** -11 + 2.0 ** -20}
SAME = 1e-5                     # of the largest logit: merged and unmerged in float32
console = Console()


@dataclasses.dataclass(frozen=True)
class Line:
    """One way to merge with one seed, as the second table has it: `row`, and the `merged` of its merges."""

    row: Row
    merged: Merged

    @property
    def method(self) -> str:
        """What the table calls it."""
        return f"{self.row.method} -> {self.merged.into}"


def bases(rows: list[Row], words: int) -> list[Column]:
    """The columns of the first table, for these rows. words: how many test words were asked."""
    full = next(row for row in rows if row.method == REFERENCE)
    behind = {name: behind_lora(rows, name, words) for name in names_of(rows)}
    return [
        Column("kB", lambda r: r.weight_bytes / 1e3, "{:,.0f}"),
        Column("share", lambda r: r.weight_bytes / full.weight_bytes, "{:.3f}"),
        Column("base", lambda r: r.base_bytes / 1e3, "{:,.0f}"),
        Column("error", lambda r: r.weight_error), Column("American", lambda r: r.american),
        Column("British", lambda r: (r.british, *r.british_interval), "{:.1f}±{:.1f}", with_margin),
        Column("behind", lambda r: None if r.method == REFERENCE else behind[r.method], "{:+.1f}±{:.1f}")]


def merges(rows: list[Row]) -> list[Column]:
    """The columns of the second table, for these rows."""
    full = next(row for row in rows if row.method == REFERENCE)
    return [
        Column("share", lambda x: x.merged.weight_bytes / full.weight_bytes, "{:.3f}"),
        Column("British", lambda x: x.merged.british), Column("others", lambda x: x.merged.changed),
        Column("lost", lambda x: x.merged.lost, "{:.2g}"), Column("logits", lambda x: x.merged.gap, "{:.0e}")]


def with_margin(values: list[tuple[float, float, float]], axis: int = 0) -> tuple[float, float]:
    """The mean value, and half the mean width of the intervals, of several seeds' (value, low, high)."""
    value, low, high = numpy.mean(values, axis=axis)
    return value, (high - low) / 2


def lines_of(rows: list[Row]) -> list[Line]:
    """The rows of the second table."""
    return [Line(row, merged) for row in rows for merged in row.merges]


def picture(rows: list[Row], path: Path) -> None:
    """Draw British against the bytes of the weights, and what each way to merge leaves of it."""
    pyplot = off_screen()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    names, full = names_of(rows), next(row for row in rows if row.method == REFERENCE)
    at, low, high = numpy.mean([(r.british, *r.british_interval) for r in rows if r.method == REFERENCE], axis=0)
    for axis in (left, right):
        axis.axhline(at, color="gray", linewidth=1, zorder=0)
        axis.axhspan(low, high, color="gray", alpha=0.15, zorder=0, linewidth=0)
        axis.spines[["top", "right"]].set_visible(False)
    for i, name in enumerate(names):
        y, ends = (reduced(rows, name, of) for of in (lambda r: r.british, lambda r: r.british_interval))
        left.errorbar(reduced(rows, name, lambda r: r.weight_bytes / full.weight_bytes), y,
                      yerr=[[y - ends[0]], [ends[1] - y]], fmt="s" if OFFSETS in merges_of(rows, name) else "o",
                      color=f"C{i}", label=name, elinewidth=1)
        right.plot([i - 0.4, i + 0.4], [y, y], color=f"C{i}", linewidth=2, zorder=1)
    marks = {FLOAT: ("D", "tab:blue"), REQUANTIZED: ("v", "tab:red"), ORIGINAL: ("^", "tab:orange"),
             OFFSETS: ("s", "tab:green")}
    for k, (into, (mark, color)) in enumerate(marks.items()):
        found = [(i, merges_of(rows, name)[into]) for i, name in enumerate(names) if into in merges_of(rows, name)]
        if found:
            right.plot([i + 0.15 * (k - 1) * (into != OFFSETS) for i, _ in found], [y for _, y in found], mark,
                       color=color, label=f"merged: {into}")
    left.set_xscale("log")
    left.set_xticks([0.25, 0.3, 0.4, 0.5, 0.7, 1], ["0.25", "0.3", "0.4", "0.5", "0.7", "1"], minor=False)
    left.minorticks_off()
    left.set(title="trained on a quantized base (gray: LoRA on 16 bit)", ylabel="British, % right",
             xlabel="bytes of the linear weights, relative to 16 bits")
    left.set_ylim(bottom=0)
    right.set(title="merged (bars: before)")
    right.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    for axis, corner in ((left, "lower right"), (right, "lower left")):
        axis.legend(fontsize=7, frameon=False, loc=corner)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def merges_of(rows: list[Row], name: str) -> dict[str, float]:
    """{way to merge: British after it, the mean of the seeds} of the method `name`."""
    found: dict[str, list[float]] = {}
    for merged in (merged for row in rows if row.method == name for merged in row.merges):
        found.setdefault(merged.into, []).append(merged.british)
    return {into: float(numpy.mean(values)) for into, values in found.items()}


def claims_about(rows: list[Row], words: int, base: float) -> list[Claim]:
    """The claims, each with whether it holds. words: how many were asked. base: British of the untrained base."""
    names, lora = names_of(rows), [row for row in rows if row.method == REFERENCE]
    learned = float(numpy.mean([row.british for row in lora]))
    margin = 3 * standard_error((learned, base), words)
    checks: list[Claim] = [
        (f"{REFERENCE} learns British: {learned:.1f} > {base:.1f} + {margin:.1f}", learned > base + margin),
        ("training changed no bit of a base", all(row.kept for row in rows))]
    for name in (name for name in NF4 if name in names):
        part = max(row.weight_bytes for row in rows if row.method == name) / lora[0].weight_bytes
        checks.append((f"{name}: its weights take {part:.3f} <= {SHARE:.2f} of the bytes of float16", part <= SHARE))
        behind, error = behind_lora(rows, name, words)
        several = sum(row.method == name for row in rows) >= SEEDS
        allowed = POINTS if several else max(POINTS, 3 * error)
        checks.append((f"{name} is within {allowed:.1f} points of LoRA in 16 bits: {behind:+.1f} behind it (standard "
                       f"error {error:.1f})", abs(behind) <= allowed))
    for name in (name for name in ROUNDING if name in names):
        checks += exact(name, [merged for row in rows if row.method == name for merged in row.merges], words)
    floats = [line.merged for line in lines_of(rows) if line.merged.into == FLOAT]
    checks.append((f"merged into 16 bits, a LoRA loses under 5 % of its change: {max(m.lost for m in floats):.2g} %",
                   all(m.lost < 5 for m in floats)))
    return checks


def exact(name: str, merged: list[Merged], words: int) -> list[Claim]:
    """The claims that a QA-LoRA was merged into the offsets alone, and that the merged model is the unmerged one.

    words: how many were asked."""
    offset = {"QA-LoRA on INT4": "offset", "QA-LoRA on Q4_1": "m"}[name]
    moved = sorted({leaf for m in merged for leaf in m.moved or ["the whole weight"]})
    gap, rounding, changed = (max(getattr(m, field) for m in merged) for field in ("gap", "rounding", "changed"))
    checks: list[Claim] = [
        (f"{name}: merging changes {' and '.join(moved)}; expected {offset} alone", moved == [offset]),
        (f"{name}: merged weights = unmerged ones up to rounding: {rounding:.1e} <= {ROUNDING[name]:.1e}",
         rounding <= ROUNDING[name])]
    if offset == "offset":
        checks += [
            (f"{name}: merged logits = unmerged ones to {SAME:g} of the largest (float32): {gap:.0e}", gap <= SAME),
            (f"{name}: at most one answer changes, where two characters are as likely: {changed:.1f} % do",
             changed <= 100 / words + 1e-9)]
    return checks


def behind_lora(rows: list[Row], name: str, words: int) -> tuple[float, float]:
    """(points that LoRA on the 16-bit base is ahead of the method `name`, the standard error), over all seeds.

    The error has two parts. All seeds are asked the same words, so more seeds do not reduce the error of the words. The
    spread of the seeds is in it from two seeds on."""
    lora = {row.seed: row.hits(words) for row in rows if row.method == REFERENCE}
    found = numpy.array([paired(lora[row.seed], row.hits(words)) for row in rows if row.method == name])
    seeds = float(numpy.std(found[:, 0], ddof=1)) / math.sqrt(len(found)) if len(found) > 1 else 0.0
    return float(found[:, 0].mean()), math.hypot(float(found[:, 1].mean()), seeds)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK_ROWS)}; {QUICK['steps']} steps "
                        f"and {QUICK['words']} words by default")
    chosen.add_argument("--only", nargs="+", metavar="ROW", choices=METHODS,
                        help=f"only these rows, after {REFERENCE!r}, of: {', '.join(map(repr, METHODS))}")
    chosen.add_argument("--show", nargs="*", type=Path, metavar="FILE", help="train nothing: print the tables and "
                        "checks of results.json files, put together if there are several (default: the recorded run)")
    for name, what in (("pairs", "British words to train on"), ("steps", f"optimizer steps of {BATCH} pairs"),
                       ("words", "test words asked in British"),
                       ("side", "how many of these words a base is asked in American, before training")):
        parser.add_argument(f"--{name}", type=int, help=f"{what} (default: {LONG[name]})")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first seed, so that several processes can share "
                        "the seeds (default: %(default)s)")
    parser.add_argument("--base", type=Path, default=CHECKPOINT,
                        help="folder of the pretrained model (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "qlora",
                        help="folder for the results (default: %(default)s)")
    args = parser.parse_args()
    for name, value in (QUICK if args.quick else LONG).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if (args.seeds < 1 or args.first_seed < 0 or args.pairs < BATCH or args.steps < 1
            or not 1 <= args.side <= args.words):
        parser.error(f"expected --seeds >= 1, --first-seed >= 0, --steps >= 1, --pairs >= {BATCH} and "
                     f"1 <= --side <= --words")
    return args


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure the rows that `args` ask for, one after the other: the settings, `base`, and `rows`."""
    train, test = load_tasks()
    if args.pairs > len(train[NEW_TASK]) or args.words > len(test[NEW_TASK]):
        raise SystemExit(f"there are only {len(train[NEW_TASK]):,} training pairs and {len(test[NEW_TASK]):,} test "
                         f"words, too few for --pairs {args.pairs:,} --words {args.words:,}")
    experiment = Experiment(loaded(args.base), train[NEW_TASK][:args.pairs], test[NEW_TASK][:args.words],
                            test["american"][:args.side], args.steps)
    asked = len(experiment.names)
    numbers = sum(math.prod(experiment.base.slots[name].shape) for name in experiment.names)
    everything = minipeft.report(experiment.base).all
    console.print(f"base: {everything:,} parameters in 16 bits; {numbers:,} of them, in {asked} linear weights, are "
                  f"quantized ({numbers / everything:.1%})\n{args.pairs:,} British words to train on; {args.words:,} "
                  f"test words that no task has shown; {args.steps} steps of {BATCH} pairs")
    base = exact_match(ask(experiment.base, experiment.british), experiment.british, CODEC)
    chosen = [REFERENCE, *args.only] if args.only else QUICK_ROWS if args.quick else METHODS
    run = {**{key: getattr(args, key) for key in LONG}, "base": base, "rows": []}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name in dict.fromkeys(chosen):
            row = experiment.row(name, seed)
            run["rows"].append(row)
            save(run, args.out)
            after = ", ".join(f"{m.into} {m.british:.1f}" for m in row.merges)
            console.print(f"  {name}, seed {seed}: {row.british:.1f} % right; merged: {after}")
    return run


def save(run: dict[str, Any], folder: Path) -> None:
    """Write results.json. It is written after every row, so that an interrupted run can be shown."""
    rows = [dataclasses.asdict(row) for row in run["rows"]]
    (folder / "results.json").write_text(json.dumps({**run, "rows": rows}, indent=1))


def recorded(files: list[Path]) -> dict[str, Any]:
    """The same from results.json files, which must have the same settings."""
    runs = [json.loads(file.read_text("utf-8")) for file in files]
    settings = [{key: value for key, value in run.items() if key != "rows"} for run in runs]
    for file, setting in zip(files, settings):
        if setting != settings[0]:
            raise SystemExit(f"{file} has other settings than {files[0]}: {setting}, expected {settings[0]}")
    rows = {(row["seed"], row["method"]): row_of(row) for run in runs for row in run["rows"]}.values()
    return {**settings[0], "rows": sorted(rows, key=lambda row: (row.seed, [*METHODS].index(row.method)))}


def row_of(found: dict[str, Any]) -> Row:
    """A row, from what json made of it."""
    return Row(**{**found, "merges": [Merged(**merged) for merged in found["merges"]]})


def main() -> int:
    args = arguments()
    minipeft.keep_heap()
    args.out.mkdir(parents=True, exist_ok=True)
    run = measured(args) if args.show is None else recorded(args.show or [RECORDED])
    rows = run["rows"]
    console.print(on_terminal(f"bytes of the linear weights, and of all; error of the linear weights, %\n"
                              f"{run['words']:,} unseen words in British after training, {run['side']} in American "
                              f"before, % right", rows, bases(rows, run["words"])))
    console.print(on_terminal("merged: bytes; British, % right; answers that changed, %; the change that is lost, %",
                              lines_of(rows), merges(rows)))
    picture(rows, args.out / "qlora.png")
    save(run, args.out)
    console.print(f"picture and figures: {args.out}/qlora.png, {args.out}/results.json")
    return 1 if failures(claims_about(rows, run["words"], run["base"]), console) else 0


if __name__ == "__main__":
    sys.exit(main())
