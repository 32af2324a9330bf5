"""Teach a small pretrained model a British accent, with every method of parameter-efficient fine-tuning.

The base model reads English words aloud in American ("american: sweaty" -> "swˈɛɾi") and spells the words that it
hears. It has never seen "british: sweaty" -> "swˈɛti". After training on a thousand pairs, full fine-tuning and LoRA
say about one word in three exactly right, among words that no task has shown. A model trained from scratch on the same
pairs says far fewer. Full fine-tuning loses the American accent. An adapter can be unplugged, and then every American
answer is back, because training never changed the base.

    python examples/accents.py                                 six rows, a few minutes on two cores
    python examples/accents.py --all                           every method: more LoRAs, adapters, subsets, prompts
    python examples/accents.py --pairs 8000 --steps 1200 --only full "LoRA r=8" scratch
    python examples/accents.py --all --seeds 3                 the run behind the tables of examples/README.md
    python examples/accents.py --show                          no training: the tables of the recorded run

The program prints two tables and writes a picture of the five trade-offs (parameters, training time, inference time,
quality, memory) and results.json to examples/out/accents. It ends with checks that fail if the claims do not hold. The
learning rates are in lab/variants.py; lab/comparison.py says how each number is measured.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Callable

import numpy
from rich.console import Console

import minipeft
from lab.claims import Claim, failures, standard_error
from lab.comparison import BASE, BATCH, COPYING, Experiment, Row
from data.g2p import NEW_TASK, load_tasks
from lab.pictures import Panel, names_of, trade_offs
from lab.tables import Column, on_terminal
from lab.variants import HARD_PROMPT, NAMES, VARIANTS

HERE = Path(__file__).parent
CHECKPOINT = HERE / "data" / "checkpoints" / "g2p"
RECORDED = HERE / "recorded" / "accents.json"
PAIRS, STEPS = 1000, 300
# {(pairs, steps): {method: exact match}} of a prototype in PyTorch, on 500 words of misaki 0.9.4, with one seed. The
# mean of three seeds must come within 4 points of it. A single seed must come within three standard errors.
YARDSTICK_WORDS, BAR, SEEDS = 500, 4.0, 3
YARDSTICK = {(1000, 300): {"base": 4.0, "full": 37.8, "LoRA r=8": 36.4, "scratch": 13.6},
             (8000, 1200): {"base": 4.0, "full": 55.6, "LoRA r=8": 56.4, "scratch": 41.0}}
PLUS_MINUS = "{:.1f}±{:.1f}"
console = Console()


def with_margin(values: list[tuple[float, float, float]], axis: int = 0) -> tuple[float, float]:
    """The mean value, and half the mean width of the intervals, of several seeds' (value, low, high)."""
    value, low, high = numpy.mean(values, axis=axis)
    return value, (high - low) / 2


LEARNED = [
    Column("British", lambda r: (r.british, *r.british_interval), PLUS_MINUS, with_margin),
    Column("phoneme error", lambda r: (r.error, *r.error_interval), PLUS_MINUS, with_margin),
    Column("American", lambda r: r.american_on), Column("when off", lambda r: r.american_off),
    Column("off = base", lambda r: r.off_is_base), Column("merged gap", lambda r: r.merged_gap, "{:.0e}")]
COST = [
    Column("trained", lambda r: r.trainable, "{:,.0f}"), Column("%", lambda r: r.percent, "{:.2f}"),
    Column("file, kB", lambda r: r.file_bytes and r.file_bytes / 1e3, "{:,.1f}"),
    Column("train, s", lambda r: r.train_seconds, "{:.0f}", numpy.median),
    Column("memory, MiB", lambda r: r.peak_bytes and r.peak_bytes / 2 ** 20),
    Column("infer, µs", lambda r: r.inference, "{:.0f}", numpy.median),
    Column("merged", lambda r: r.inference_merged, "{:.0f}", numpy.median)]
TRADE_OFFS = [
    Panel("trainable parameters, %", lambda r: r.percent, "{:.2f}", log=True),
    Panel("training time, s of the processor", lambda r: r.train_seconds, "{:.0f}", reduce=numpy.median),
    Panel("inference, µs per word and step\n(diamond: merged)", lambda r: r.inference, "{:.0f}",
          mark=lambda r: r.inference_merged, reduce=numpy.median),
    Panel("quality: British, % right", lambda r: r.british, "{:.1f}", interval=lambda r: r.british_interval),
    Panel("memory of a training step, MiB", lambda r: r.peak_bytes and r.peak_bytes / 2 ** 20)]


def claims_about(rows: list[Row], words: int, side: int, pairs: int, steps: int) -> list[Claim]:
    """The claims, each with whether it holds.

    words, side: how many words were asked in British and in American. Two methods are compared with a margin of three
    standard errors of their difference. These errors are those of one seed, and of methods that are asked different
    words. Both make the margin wider than necessary."""
    names = names_of(rows)

    def of(name: str, value: Callable[[Row], float] = lambda r: r.british) -> float:
        return float(numpy.mean([value(row) for row in rows if row.method == name]))

    def beats(better: str, worse: str, value: Callable[[Row], float] = lambda r: r.british, asked: int = words,
              what: str = "") -> Claim:
        a, b = of(better, value), of(worse, value)
        margin = 3 * standard_error((a, b), asked)
        return f"{better} beats {worse}{what}: {a:.1f} > {b:.1f} + {margin:.1f}", a > b + margin

    checks: list[Claim] = []
    for name, there in YARDSTICK.get((pairs, steps), {}).items():
        if name in names:
            margin = 3 * math.hypot(standard_error([there], YARDSTICK_WORDS), standard_error([of(name)], words))
            if sum(row.method == name for row in rows) >= SEEDS:
                margin = BAR
            checks.append((f"{name} does as well as in the prototype: {of(name):.1f} >= {there} - {margin:.1f}",
                           of(name) >= there - margin))
    for name in ("full", "LoRA r=8", "Houlsby adapters"):
        checks += [beats(name, other) for other in (BASE, COPYING, "scratch", HARD_PROMPT)
                   if {name, other} <= set(names)]
    if {"LoRA r=8", "BitFit"} <= set(names):
        checks.append(beats("LoRA r=8", "BitFit"))
    if {"full", "LoRA r=8"} <= set(names):
        full, lora = of("full"), of("LoRA r=8")
        margin = max(4.0, 3 * standard_error((full, lora), words))
        checks.append((f"LoRA r=8 is within {margin:.1f} points of full: {lora:.1f}, {full:.1f}",
                       abs(full - lora) <= margin))
    if "full" in names:
        checks.append(beats(BASE, "full", lambda r: r.american_on, side, " in American, which full loses"))
    apart = [row for row in rows if row.off_is_base is not None]
    merged = [row for row in rows if row.merged_gap is not None]
    checks += [("unplugged, every American answer is the base's, id for id", all(row.off_is_base for row in apart)),
               ("merged = unmerged to 1e-5 of the largest logit (float32)",
                all((row.merged_gap or 0) <= 1e-5 for row in merged))]
    if {"full", "LoRA r=8"} <= set(names):
        checks += [
            ("a LoRA trains under 11 % of the numbers", of("LoRA r=8", lambda r: r.percent) < 11),
            ("a LoRA's file is under 1/8 of the model's",
             8 * of("LoRA r=8", lambda r: r.file_bytes or 0) < of("full", lambda r: r.file_bytes or 0)),
            ("training a LoRA takes less memory than training all",
             of("LoRA r=8", lambda r: r.peak_bytes or 0) < of("full", lambda r: r.peak_bytes or 0))]
    return checks


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--all", action="store_true", help="every method of lab/variants.py, and the best hard prompt")
    chosen.add_argument("--only", nargs="+", metavar="METHOD", choices=NAMES,
                        help=f"only these methods, of: {', '.join(map(repr, NAMES))}")
    chosen.add_argument("--show", nargs="*", type=Path, metavar="FILE", help="train nothing: print the tables and "
                        "checks of results.json files, put together if there are several (default: the recorded run)")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="British words to train on (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS,
                        help=f"optimizer steps of {BATCH} pairs (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first seed, so that several processes can share "
                        "the seeds (default: %(default)s)")
    parser.add_argument("--words", type=int, default=2000, help="test words asked in British; an interval shrinks with "
                        "their square root (default: %(default)s)")
    parser.add_argument("--side", type=int, default=500, help="how many of these words are also asked in American, "
                        "with a method on and off (default: %(default)s)")
    parser.add_argument("--base", type=Path, default=CHECKPOINT,
                        help="folder of the pretrained model (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "accents",
                        help="folder for the results (default: %(default)s)")
    args = parser.parse_args()
    if (args.seeds < 1 or args.first_seed < 0 or args.pairs < BATCH or args.steps < 1
            or not 1 <= args.side <= args.words):
        parser.error(f"expected --seeds >= 1, --first-seed >= 0, --steps >= 1, --pairs >= {BATCH} and "
                     f"1 <= --side <= --words")
    return args


def compare(args: argparse.Namespace) -> list[Row]:
    """Train and measure the methods that `args` ask for, one row after the other."""
    train, test = load_tasks()
    available = len(train[NEW_TASK]), len(test[NEW_TASK])
    if args.pairs > available[0] or args.words > available[1]:
        raise SystemExit(f"there are only {available[0]:,} training pairs and {available[1]:,} test words, too few for "
                         f"--pairs {args.pairs:,} --words {args.words:,}")
    experiment = Experiment(minipeft.Transformer.from_pretrained(args.base), train[NEW_TASK][:args.pairs],
                            test[NEW_TASK][:args.words], test["american"][:args.words], args.side, args.steps, args.out)
    console.print(f"base: {minipeft.report(experiment.base).all:,} parameters; {args.pairs:,} British words to train "
                  f"on; {args.words:,} test words that no task has shown; {args.steps} steps of {BATCH} pairs")
    names = args.only or [name for name in NAMES if args.all or (name in VARIANTS and VARIANTS[name].always)]
    rows = [experiment.base_row(), experiment.copying_row()]
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name in names:
            row = experiment.hard_prompt_row(seed) if name == HARD_PROMPT else experiment.trained_row(name, seed)
            rows.append(row)
            found = "" if row.text is None else f", with {row.text!r} in front of each word"
            console.print(f"  {name}, seed {seed}: {row.british:.1f} % right after {row.train_seconds:.0f} s{found}")
    return rows


def recorded(files: list[Path]) -> tuple[dict[str, int], list[Row]]:
    """({steps, pairs, words, side}, the rows in order) from results.json files, which must have the same settings.

    A row without a seed is taken once."""
    runs = [json.loads(file.read_text("utf-8")) for file in files]
    settings = [{key: value for key, value in run.items() if key != "rows"} for run in runs]
    for file, setting in zip(files, settings):
        if setting != settings[0]:
            raise SystemExit(f"{file} has other settings than {files[0]}: {setting}, expected {settings[0]}")
    rows = {(row["method"], row["seed"]): Row(**row) for run in runs for row in run["rows"]}
    order = (BASE, COPYING, *NAMES)
    return settings[0], sorted(rows.values(), key=lambda row: (order.index(row.method), row.seed or 0))


def main() -> int:
    args = arguments()
    minipeft.keep_heap()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.show is not None:
        setting, rows = recorded(args.show or [RECORDED])
    else:
        setting, rows = {key: getattr(args, key) for key in ("steps", "pairs", "words", "side")}, compare(args)
    console.print(on_terminal(f"{setting['words']:,} unseen words in British, {setting['side']} in American: % right\n"
                              f"(±: half of the 95 % bootstrap interval)", rows, LEARNED))
    console.print(on_terminal("costs\n(times: of the processor; inference: per word and decoding step)", rows, COST))
    trade_offs(rows, TRADE_OFFS, "British, % right, 200 test words", args.out / "accents.png")
    (args.out / "results.json").write_text(json.dumps(
        {**setting, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1))
    console.print(f"picture and figures: {args.out}/accents.png, {args.out}/results.json")
    return 1 if failures(claims_about(rows, **setting), console) else 0


if __name__ == "__main__":
    sys.exit(main())
