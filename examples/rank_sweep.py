"""How large must a LoRA's rank be? A sweep over r = 1, 2, 4, ..., 128 at two data sizes, beside the published one.

    W = W0 + (alpha / r) B A      B [d_out, r], A [r, d_in]: r (d_in + d_out) trained numbers, linear in r

A LoRA on every linear layer of the small American pronunciation model learns British: "british: sweaty" -> "swˈɛti".
alpha = 2 r, so alpha / r = 2 is the same for all ranks. The learning rate (5e-3, as in `accents.py`), the schedule and
the batches are the same too. None of them was tuned for any rank. Equal settings do not mean equal training: Adam
moves every number of B by about the learning rate, so after a few steps B A is larger for larger r. The sweep shows how
a rank does with the settings that suit r = 8.

The published sweep is Table 18 of Hu et al., 2021, arXiv:2106.09685: GPT-2 Medium on the E2E challenge, 26,000 steps,
without standard errors. Two questions can be compared: from which rank on nothing is gained, and whether more data
raises this rank. The checks claim that rank 1 is too small with 8,000 words, and that r = 8 to 64 form a plateau within
three standard errors and 2 points. r = 128 is reported without a claim: there A and B have twice as many numbers as the
128 x 128 matrices that they are added to.

    python examples/rank_sweep.py                      r = 1, 8, 64 on 1,000 words, one seed: under three minutes
    python examples/rank_sweep.py --all                every rank, 1,000 and 8,000 words, three seeds: about an hour
    python examples/rank_sweep.py --all --go-on        the same, continuing an interrupted run
    python examples/rank_sweep.py --ranks 128 --sizes 8000:600:1 --lr 1.25e-3      is it the rank, or its rate?

The program prints a table for each data size and writes a picture and results.json to examples/out/rank_sweep. It ends
with checks that fail if the claims do not hold.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from rich.columns import Columns
from rich.console import Console

import minipeft
from lab.claims import failures
from data.codec import PAD
from data.g2p import CODEC, NEW_TASK, ids_of, load_tasks
from lab.measure import Ids, train
from minipeft.nn.fingerprint import fingerprint
from minipeft.train.data import label_tokens
from lab.pictures import off_screen
from lab.rank_lines import MEASURED, PUBLISHED, TABLE_18, Line, Row, claims_about, findings, lines_of
from lab.row_log import RowLog
from lab.scoring import answers, exact_match, judge
from lab.tables import on_terminal

HERE = Path(__file__).parent
BASE = HERE / "data" / "checkpoints" / "g2p"
EVERY_LINEAR = r"\.(attn|cross|ff)\."
BATCH, LR, ALPHA_PER_RANK = 64, 5e-3, 2
RANKS, FEW_RANKS = (1, 2, 4, 8, 16, 32, 64, 128), (1, 8, 64)
CURVE_WORDS = 200
console = Console()


class Size(NamedTuple):
    """One data size: training pairs, optimizer steps, and the number of seeds (0, 1, ...)."""

    pairs: int
    steps: int
    seeds: int


SHORT, ALL = [Size(1000, 300, 1)], [Size(1000, 300, 3), Size(8000, 600, 3)]


@dataclasses.dataclass
class Sweep:
    """A base model, all British pairs to learn from, and the test words."""

    base: minipeft.Transformer
    train: list
    test: list
    lr: float = LR

    def row(self, pairs: int, steps: int, rank: int, seed: int) -> Row:
        """Train a LoRA of this rank on the first `pairs` pairs, and ask it the test words."""
        model, shown = self.base.clone(), self.test[:CURVE_WORDS]
        lora = minipeft.LoRA(rank=rank, alpha=ALPHA_PER_RANK * rank, where=EVERY_LINEAR)
        trained = train(model, lora, ids_of(self.train[:pairs]), lr=self.lr, steps=steps, batch_size=BATCH, seed=seed,
                        evaluate=lambda m: exact_match(self.ask(m, shown), shown, CODEC),
                        label=f"r={rank}, {pairs:,} pairs, seed {seed}")
        score = judge(self.ask(model, self.test), self.test, CODEC)
        return Row(pairs, steps, rank, seed, minipeft.report(model, trained.params).trainable, score.exact,
                   score.error, mean_loss(model, ids_of(self.test)), trained.seconds, trained.curve)

    def ask(self, model: Any, pairs: list) -> list[numpy.ndarray]:
        """The model's answers to the prompts of `pairs`."""
        return answers(model, [prompt for prompt, _ in pairs], CODEC)


def mean_loss(model: Any, pairs: Ids, batch_size: int = 250) -> float:
    """The training loss over all pairs: cross-entropy in nats per target id."""
    total = tokens = 0.0
    for start in range(0, len(pairs), batch_size):
        batch = minipeft.batch_of(pairs[start:start + batch_size], PAD)
        total += float(model.loss(**batch).data) * label_tokens(batch)
        tokens += label_tokens(batch)
    return total / tokens


def numbers_per_rank(model: minipeft.Transformer) -> int:
    """The sum of d_out + d_in over the matrices of all linear layers, read from the base's own arrays."""
    return sum(sum(array.shape) for name, array in model.state().items()
               if re.search(EVERY_LINEAR, name) and array.ndim == 2)


def picture(sizes: dict[Size, list[Line]], base: float, path: Path) -> None:
    """Draw quality and loss against rank, here (bars: three standard errors) and as published."""
    pyplot = off_screen()
    figure, ((right, bleu), (loss, published_loss)) = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained",
                                                                      sharex="col")
    for size, lines in sizes.items():
        ranks, label = [x.rank for x in lines], f"{size.pairs:,} words, {size.steps} steps, {size.seeds} seeds"
        right.errorbar(ranks, [x.exact for x in lines], [3 * x.exact_error for x in lines], marker="o", capsize=3,
                       label=label)
        loss.plot(ranks, [x.loss for x in lines], marker="o", label=label)
    right.axhline(base, color="gray", linestyle=":", label="base")
    right.set(title="here: British pronunciation", ylabel="exact match, %")
    loss.set(ylabel="loss on test words, nats per character", xlabel="rank")
    for axis in (right, loss):
        axis.margins(y=0.15)
        axis.set_ylim(bottom=0)
    bleu.plot([*PUBLISHED], [row[1] for row in PUBLISHED.values()], marker="s", color="black")
    bleu.set(title="published: GPT-2 Medium on E2E\n(LoRA, Table 18; axes do not start at 0)", ylabel="BLEU")
    published_loss.plot([*PUBLISHED], [row[0] for row in PUBLISHED.values()], marker="s", color="black")
    published_loss.set(ylabel="validation loss", xlabel="rank")
    for axis, ranks in ((right, [*RANKS]), (loss, [*RANKS]), (bleu, [*PUBLISHED]), (published_loss, [*PUBLISHED])):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ranks, [str(rank) for rank in ranks])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (right, loss):
        axis.legend(fontsize=8, frameon=False, loc=(0.02, 0.12))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def size_of(text: str) -> Size:
    """The Size written as PAIRS:STEPS:SEEDS. Raises ValueError for other text and for numbers out of range."""
    size = Size(*map(int, text.split(":")))
    if size.pairs < BATCH or size.steps < 1 or size.seeds < 1:
        raise ValueError(text)
    return size


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every rank, two data sizes, three seeds")
    parser.add_argument("--ranks", type=int, nargs="+", choices=RANKS, metavar="R",
                        help=f"ranks, of {RANKS} (default: {FEW_RANKS})")
    parser.add_argument("--sizes", type=size_of, nargs="+", metavar="PAIRS:STEPS:SEEDS",
                        help=f"1000:300:3 means 1,000 pairs, 300 optimizer steps of {BATCH} pairs, seeds 0, 1 and 2; "
                        f"at least {BATCH} pairs (default: {':'.join(map(str, SHORT[0]))})")
    parser.add_argument("--lr", type=float, default=LR, help="one learning rate for all ranks (default: %(default)s)")
    parser.add_argument("--words", type=int, default=2000, help="test words (default: %(default)s)")
    parser.add_argument("--base", type=Path, default=BASE, help="folder of the pretrained model (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "rank_sweep",
                        help="folder for the results (default: %(default)s)")
    parser.add_argument("--go-on", action="store_true", help="keep the rows that an interrupted run left in --out")
    args = parser.parse_args()
    args.ranks = args.ranks or (RANKS if args.all else FEW_RANKS)
    args.sizes = args.sizes or (ALL if args.all else SHORT)
    if args.words < 1 or not args.lr > 0:
        parser.error("expected --words >= 1 and --lr > 0")
    return args


def main() -> int:
    args = arguments()
    minipeft.keep_heap()
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = load_tasks()
    if max(size.pairs for size in args.sizes) > len(train[NEW_TASK]) or args.words > len(test[NEW_TASK]):
        raise SystemExit(f"there are only {len(train[NEW_TASK]):,} training pairs and {len(test[NEW_TASK]):,} test "
                         f"words, too few for --sizes or --words {args.words:,}")
    base = minipeft.Transformer.from_pretrained(args.base)
    sweep = Sweep(base, train[NEW_TASK], test[NEW_TASK][:args.words], args.lr)
    known = exact_match(sweep.ask(base, sweep.test), sweep.test, CODEC)
    log = RowLog(args.out / "rows.jsonl", Row, ("pairs", "steps", "rank", "seed"),
                 {"words": args.words, "lr": args.lr, "base": fingerprint(base.state())}, args.go_on)
    console.print(f"base: {minipeft.report(base).all:,} parameters, {known:.1f} % right in British; {args.words:,} "
                  f"test words that no task has shown")
    rows: list[Row] = []
    for size in args.sizes:
        for seed in range(size.seeds):
            for rank in args.ranks:
                rows.append(log.row(sweep.row, pairs=size.pairs, steps=size.steps, rank=rank, seed=seed))
                console.print(f"  {size.pairs:,} pairs, r={rank}, seed {seed}: {rows[-1].exact:.1f} % after "
                              f"{rows[-1].train_seconds:.0f} s")
    sizes = {size: lines_of([row for row in rows if (row.pairs, row.steps) == size[:2]], args.words)
             for size in args.sizes}
    for size, lines in sizes.items():
        every = lines + [Line(rank) for rank in PUBLISHED if rank not in {x.rank for x in lines}]
        every.sort(key=lambda x: x.rank)
        console.print(Columns([
            on_terminal(f"{size.pairs:,} British words, {size.steps} steps, {size.seeds} seeds; ±: standard error",
                        every, MEASURED),
            on_terminal("published: GPT-2 Medium on E2E (LoRA, Table 18)", every, TABLE_18)]))
        for found in findings(lines):
            console.print(f"  {found}")
    picture(sizes, known, args.out / "rank_sweep.png")
    (args.out / "results.json").write_text(json.dumps(
        {"words": args.words, "lr": args.lr, "alpha_per_rank": ALPHA_PER_RANK, "base": known,
         "numbers_per_rank": numbers_per_rank(base), "rows": [dataclasses.asdict(row) for row in rows],
         "published": PUBLISHED}, indent=1))
    console.print(f"picture and figures: {args.out}/rank_sweep.png, {args.out}/results.json")
    claims = claims_about(rows, args.words, known, numbers_per_rank(base))
    return 1 if failures(claims, console) else 0


if __name__ == "__main__":
    sys.exit(main())
