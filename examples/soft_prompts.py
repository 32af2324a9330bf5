"""Prompt tuning: a frozen model learns a new task from a few vectors in front of its input.

The base models turn the King James Version into the American Standard Version, and mend and copy clauses of both. Two
instruction tokens tell them which (data/pretrain_bible.py). The way back, American Standard into King James, was in
none of their data. Here the way back is asked for without an instruction. Instead, P trained vectors of an embedding's
width stand in front of the clause, and everything else is frozen (Lester et al., 2021, arXiv:2104.08691). These are P d
numbers.

    python examples/soft_prompts.py                 the small base, P = 1 and 20: about two minutes on two cores
    python examples/soft_prompts.py --all --jobs 2  both bases, P = 1 to 100, four starts, two seeds: the recorded run

The test clauses come from verses that no training has seen, and differ between the versions. Three scores are measured:
cross-entropy per token, word error rate, and the F1 of the words that are not in the source (lab/word_scoring.py). The
prompts are compared with the unchanged clause, the base without a prompt, hard prompts, LoRA and full fine-tuning. The
hard prompts are instructions whose tokens the base knows in other combinations, words of the target version, and
worked examples.

The program prints tables and writes a picture and results.json to examples/out/soft_prompts. It ends with checks that
fail if the claims do not hold. How close prompts come to full fine-tuning is reported without a claim.
"""
from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import math
import multiprocessing
import sys
from pathlib import Path
from typing import Any, Iterable, Iterator

import numpy
from rich.console import Console
from rich.progress import track
from rich.table import Table

import minipeft
from data.bible import load_bible
from lab.claims import failures
from lab.prompt_runs import BATCH, NEIGHBORS, RATES, Job, Row, copied_clause, references, run, test_pairs
from lab.row_log import RowLog
from lab.tables import Column, on_terminal

HERE = Path(__file__).parent
SIZES = ("small", "large")
LENGTHS, MIDDLE = (1, 5, 20, 50, 100), 20
STARTS = ("vocabulary", "random", "instruction", "king words")
STEPS = 300
ERRORS = 4                        # a gain must be so many standard errors wide
console = Console()


def jobs_of(size: str, base: Path, everything: bool, seeds: int, steps: int, hard: tuple[int, ...]) -> list[Job]:
    """The runs of one base: all lengths from one start, all starts at one length, LoRA and full fine-tuning.

    everything: False leaves out most lengths and starts. hard: the ids of the best hard prompt."""
    prompts = [(length, "vocabulary") for length in (LENGTHS if everything else (1, MIDDLE))]
    prompts += [(MIDDLE, start) for start in (STARTS[1:] if everything else ())]
    kinds = [("prompt", length, start) for length, start in prompts] + [("LoRA r=4", 0, ""), ("full", 0, "")]
    return [Job(base, size, *kind, seed, steps, hard) for seed in range(seeds) for kind in kinds]


def run_all(jobs: list[Job], workers: int, log: RowLog[Row]) -> list[Row]:
    """The rows of all jobs, in their order. Rows that the log already holds are not made again."""
    missing = [job for job in jobs if (job.method, job.seed) not in log.found]
    for job, row in track(made(missing, workers), jobs[0].size, len(missing), console=console):
        log.row(lambda row=row, **_: row, method=job.method, seed=job.seed)
    return [log.found[job.method, job.seed] for job in jobs]


def made(jobs: list[Job], workers: int) -> Iterator[tuple[Job, Row]]:
    """Run the jobs and yield each row when it is finished; several workers run in processes of their own.

    A run depends on nothing but its job."""
    if workers == 1:
        yield from ((job, run(job)) for job in jobs)
        return
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, job): job for job in jobs}
        yield from ((futures[future], future.result()) for future in concurrent.futures.as_completed(futures))


def perplexity(row: Row) -> float | None:
    return None if row.loss is None else math.exp(row.loss)


SCORES = [
    Column("start", lambda r: r.start_loss, "{:.3f}"), Column("loss", lambda r: r.loss, "{:.3f}"),
    Column("range", lambda r: r.loss, "{:.3f}", numpy.ptp), Column("perpl.", perplexity, "{:.2f}"),
    Column("on hard", lambda r: r.hard_gain, "{:+.3f}"), Column("WER", lambda r: r.wer),
    Column("F1 new", lambda r: r.new_words)]
COST = [
    Column("trained", lambda r: r.trainable, "{:,.0f}"), Column("%", lambda r: r.percent, "{:.2f}"),
    Column("context", lambda r: r.context, "+{:.0f}"), Column("CPU", lambda r: r.seconds, "{:.0f} s", numpy.median)]
VECTORS = [
    Column("nearest", lambda r: r.nearest, "{:.2f}"), Column("moved", lambda r: 100 * r.moved, "{:.0f} %"),
    Column("tightness", lambda r: r.tightness, "{:.3f}"), Column("random", lambda r: r.random_tightness, "{:.3f}"),
    Column("purity", lambda r: 100 * r.purity, "{:.1f} %"),
    Column("of all", lambda r: 100 * r.vocabulary_purity, "{:.1f} %")]


def hard_table(tried: Iterable[dict[str, Any]]) -> Table:
    """The table of hard prompts, the best first."""
    table = Table(title="hard prompts: nats per token on the validation part")
    for heading in ("base", "prefix", "context", "loss"):
        table.add_column(heading, justify="left" if heading in ("base", "prefix") else "right")
    for entry in tried:
        table.add_row(entry["size"], entry["prefix"], f"+{entry['context']}", f"{entry['loss']:.3f}")
    return table


def against_full(rows: list[Row], size: str) -> dict[str, float]:
    """How far each kind is from full fine-tuning, as a mean over seeds. Of the prompts, the one with the least loss."""
    def mean(method: str, score: str) -> float:
        return mean_of((row for row in rows if row.method == method), score)

    methods = {row.method: row.kind for row in rows if row.size == size}
    prompt = min((m for m, kind in methods.items() if kind == "prompt"), key=lambda m: mean(m, "loss"))
    return {f"{score}, {kind}": mean(method, score) - mean(f"{size}: full", score)
            for method, kind in methods.items() if kind not in ("prompt", "full") or method == prompt
            for score in ("loss", "wer", "new_words")}


def picture(rows: list[Row], path: Path) -> None:
    """Draw loss and new words against the length of the prompt, and the losses of the starts, for each base."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = {row.size: f"{row.size} (d = {row.d_model})" for row in rows if row.size}
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.9), layout="constrained")
    for color, size in zip(("tab:blue", "tab:red"), sizes):
        mine = [row for row in rows if row.size == size]
        swept = sorted((row for row in mine if row.start == "vocabulary"), key=lambda row: row.length)
        lengths = sorted({row.length for row in swept})
        for axis, score in zip(axes, ("loss", "new_words")):
            axis.plot(lengths, [mean_of((r for r in swept if r.length == n), score) for n in lengths], "o-",
                      color=color, label=f"{sizes[size]}: prompt of P vectors")
            axis.plot([row.length for row in swept], [getattr(row, score) for row in swept], ".", color=color)
            for kind, style in (("best hard prompt", ":"), ("LoRA r=4", "-."), ("full", "--")):
                axis.axhline(mean_of((row for row in mine if row.kind == kind), score), color=color, linestyle=style,
                             label=f"{size}: {kind}")
        starts = list(dict.fromkeys(row.start for row in rows if row.length == MIDDLE))
        for nth, (label, score, alpha) in enumerate((("untrained", "start_loss", 0.35), ("trained", "loss", 1.0))):
            heights = [mean_of((r for r in mine if (r.start, r.length) == (start, MIDDLE)), score) for start in starts]
            bars = axes[2].bar(numpy.arange(len(starts)) + 0.4 * list(sizes).index(size) + 0.19 * nth, heights, 0.19,
                               color=color, alpha=alpha, label=f"{sizes[size]}, {label}")
            axes[2].bar_label(bars, fmt="%.2f", fontsize=7)
        axes[2].set_xticks(numpy.arange(len(starts)) + 0.2 * len(sizes) - 0.1, starts)
    axes[0].set(ylabel="nats per token, test clauses", title="cross-entropy and length of the prompt")
    axes[1].set(ylabel="F1 of new words, %, test clauses", title="words of the target version that are found")
    axes[2].set(ylabel="nats per token, test clauses", title=f"what a prompt of {MIDDLE} vectors starts from")
    for axis in axes[:2]:
        axis.set(xscale="log", xlabel="P")
        axis.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        axis.minorticks_off()
    axes[2].set_ylim(0, 1.25 * axes[2].get_ylim()[1])
    axes[2].legend(fontsize=7, frameon=False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def mean_of(rows: Iterable[Row], score: str) -> float:
    """The mean of one score over rows."""
    return float(numpy.mean([getattr(row, score) for row in rows]))


def check(rows: list[Row]) -> list[str]:
    """Print the claims and return those that fail.

    A gain is measured on the same clauses with and without the prompt, so its error is that of pairs."""
    prompts = [r for r in rows if r.kind == "prompt"]
    attached = [r for r in rows if r.base_kept is not None]
    checks = [
        ("a prompt of P vectors has P d numbers", all(r.trainable == r.length * r.d_model for r in prompts)),
        ("only the prompt changes: every array of the base is bit for bit what it was",
         all(r.base_kept for r in attached)),
        ("without the prompt every answer is the base's, id for id", all(r.off_is_base for r in attached)),
        ("no trained vector is a row of the table", all((r.nearest or 0) > 0 for r in prompts)),
        (f"every prompt beats the base without one, by {ERRORS} standard errors and more",
         all((r.gain or 0) > ERRORS * (r.gain_error or 0) for r in prompts)),
        (f"every prompt beats its own start, by {ERRORS} standard errors and more",
         all((r.own_gain or 0) > ERRORS * (r.own_gain_error or 0) for r in prompts))]
    return failures(checks, console)


def report(rows: list[Row], tried: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Print the tables, and return the distances to full fine-tuning for each base."""
    prompts = [r for r in rows if r.kind == "prompt"]
    console.print(hard_table(tried))
    console.print(on_terminal("American Standard -> King James, clauses of unseen verses: loss before and after\n"
                              "training, gain on the best hard prompt, word error rate, F1 of new words", rows, SCORES))
    console.print(on_terminal("costs: trained numbers, longer inputs, time", rows, COST))
    console.print(on_terminal(f"where the vectors lie: distance to the nearest token, {NEIGHBORS} nearest by cosine",
                              prompts, VECTORS))
    for row in prompts:
        if row.seed == 0 and row.length == MIDDLE:
            console.print(f"{row.method}: " + " | ".join(" ".join(line) for line in row.neighbors[:5]), markup=False)
    near = {size: against_full(rows, size) for size in dict.fromkeys(r.size for r in prompts)}
    for size, gaps in near.items():
        told = "; ".join(f"{kind} {gaps[f'loss, {kind}']:+.3f}, {gaps[f'wer, {kind}']:+.1f}, "
                         f"{gaps[f'new_words, {kind}']:+.1f}"
                         for kind in ("no prompt", "best hard prompt", "prompt", "LoRA r=4"))
        console.print(f"{size}, against full fine-tuning (loss, WER, new words): {told}", markup=False)
    return near


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all lengths and starts, for every base")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="bases (default: small; with --all both)")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 1; with --all 2)")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default: %(default)s)")
    parser.add_argument("--bases", type=Path, default=HERE / "data" / "checkpoints",
                        help="folder of bible_small and bible_large (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "soft_prompts",
                        help="folder for the results (default: %(default)s)")
    parser.add_argument("--go-on", action="store_true", help="keep the rows that an interrupted run left in --out")
    args = parser.parse_args()
    seeds = args.seeds if args.seeds is not None else (2 if args.all else 1)
    if seeds < 1 or args.steps < 1 or args.jobs < 1:
        parser.error("expected --seeds, --steps and --jobs >= 1")
    minipeft.keep_heap()
    args.out.mkdir(parents=True, exist_ok=True)
    console.print(f"{len(load_bible().train.different()):,} clauses to train on; {len(test_pairs())} test clauses of "
                  f"other verses; {args.steps} steps of {BATCH} clauses")
    rows, tried = [copied_clause()], []
    for size in args.sizes or (SIZES if args.all else SIZES[:1]):
        base = args.bases / f"bible_{size}"
        found, scores = references(base, size)
        digest = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
        log = RowLog(args.out / f"rows_{size}.jsonl", Row, ("method", "seed"),
                     {"base": digest, "steps": args.steps, "batch": BATCH, "rates": RATES}, args.go_on)
        jobs = jobs_of(size, base, args.all, seeds, args.steps, tuple(scores[0]["ids"]))
        rows += found + run_all(jobs, args.jobs, log)
        tried += scores
    near = report(rows, tried)
    picture(rows, args.out / "soft_prompts.png")
    (args.out / "results.json").write_text(json.dumps(
        {"steps": args.steps, "seeds": seeds, "test clauses": len(test_pairs()), "hard prompts": tried,
         "against full": near, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1))
    console.print(f"picture and figures: {args.out}/soft_prompts.png, {args.out}/results.json")
    return 1 if check(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
