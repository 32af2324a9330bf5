"""What is learned against what is forgotten, along training, for seven ways to fine-tune at three learning rates each.

A model that says words in American and spells them learns British ("british: sweaty" -> "swˈɛti") from a thousand
pairs, and sees nothing else. At a dozen moments of the training it is asked test words of all three tasks:

    learned      percent right in British                       climbs
    forgotten    percent right in American, and in spelling     falls, with the trained weights on
    overwritten  of the American questions whose two answers differ, percent answered exactly as in British

A single number of each at the end of training (as in `accents.py`) compares methods that have learned unequally much.
Drawn against each other, the numbers form the frontier of Biderman et al., 2024, arXiv:2405.09673. They ask whether
LoRA forgets less than full fine-tuning because it learns less. Here the question is: do the methods lie on one curve,
or is one of them above it? The table compares them at equal learning, where each run first gets 10, and 20, percent of
British right.

Every method runs at its usual rate (lab/variants.py), at a quarter of it and at four times it. A rate should only be a
speed along the frontier; if it moves the frontier, the frontier does not belong to the method. No rate was tuned.

The checks at the end are not about the frontier. They test what an adapter has and full fine-tuning lacks: unplugged,
it leaves every answer as the base's, id for id. They also test that each method learned something.

    python examples/forgetting.py                     four methods at their usual rates: under three minutes
    python examples/forgetting.py --all               the grid of 21 runs: under half an hour on one core
    python examples/forgetting.py --all --go-on       the same, continuing an interrupted run
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy
from rich.console import Console

import minipeft
from lab.claims import failures
from lab.frontier import COLUMNS, LEVELS, Row, claims_about, findings, picture
from data.g2p import CODEC, NEW_TASK, OLD_TASKS, ids_of, load_tasks
from minipeft.nn.fingerprint import fingerprint
from lab.row_log import RowLog
from lab.scoring import answers, exact_match
from lab.tables import on_terminal
from lab.variants import EVERY_LINEAR, Variant

HERE = Path(__file__).parent
BASE = HERE / "data" / "checkpoints" / "g2p"
BATCH, PAIRS, STEPS = 64, 1000, 300
POINTS, FIRST_POINT = 12, 6         # how often the tasks are asked, and the first step: a geometric progression
FACTORS = (0.25, 1, 4)              # times the usual learning rate
METHODS = {
    "full": Variant(None, 1e-3),
    **{f"LoRA r={rank}": Variant(minipeft.LoRA(rank=rank, alpha=2 * rank, where=EVERY_LINEAR), 5e-3)
       for rank in (1, 8, 64)},
    "Houlsby adapters": Variant(minipeft.Bottleneck(placement="houlsby", size=16), 3e-3),
    "BitFit": Variant(minipeft.Selective(type="bias"), 1e-2),
    "norms": Variant(minipeft.Selective(component="norm"), 1e-2)}
FEW = ("full", "LoRA r=8", "Houlsby adapters", "BitFit")
TASKS = (NEW_TASK, *OLD_TASKS)
Answers = dict[str, list[numpy.ndarray]]
console = Console()


@dataclasses.dataclass
class Experiment:
    """A base model, the pairs that it is taught, and `asked`: {task: pairs of the same words in the same order}."""

    base: minipeft.Transformer
    pairs: list
    asked: dict[str, list]
    steps: int
    base_answers: Answers = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.base_answers = self.answers(self.base)

    def row(self, name: str, factor: float, seed: int) -> Row:
        """Train the method `name` at `factor` times its usual rate, and ask the tasks along the way."""
        variant, model = METHODS[name], self.base.clone()
        attachment = (minipeft.attach(model, variant.method, numpy.random.default_rng(seed)) if variant.method
                      else None)
        params = attachment.parameters if attachment else minipeft.select(model, ".*")
        moments, curve = set(points(self.steps)), [(0, *self.scores(self.base_answers))]
        lr, step, asking = factor * variant.lr, 0, 0.0

        def watch() -> float:
            """Ask at the chosen steps; called after every step. The result is shown on the progress line."""
            nonlocal step, asking
            step += 1
            if step in moments:
                begun = time.perf_counter()
                curve.append((step, *self.scores(self.answers(model))))
                asking += time.perf_counter() - begun
            return curve[-1][1]

        history = minipeft.fit(
            model, params, minipeft.Batches(ids_of(self.pairs), BATCH, seed), steps=self.steps,
            optimizer=minipeft.AdamW(lr=lr), schedule=minipeft.cosine_decay(self.steps, warmup=self.steps // 20),
            clip=1.0, seed=seed, evaluate=watch, eval_every=1, label=f"{name}, {lr:g}, seed {seed}")
        return Row(name, factor, seed, lr, sum(p.data.size for p in params.values()), history.seconds - asking,
                   self.off_is_base(model, attachment) if attachment else None, curve)

    def answers(self, model: Any) -> Answers:
        """The model's answers to every question."""
        return {task: answers(model, [prompt for prompt, _ in pairs], CODEC) for task, pairs in self.asked.items()}

    def scores(self, said: Answers) -> tuple[float, ...]:
        """Percent right in each of TASKS, then percent overwritten."""
        right = [exact_match(said[task], self.asked[task], CODEC) for task in TASKS]
        differ = [i for i, (_, answer) in enumerate(self.asked["american"]) if answer != self.asked[NEW_TASK][i][1]]
        overwritten = exact_match([said["american"][i] for i in differ], [self.asked[NEW_TASK][i] for i in differ],
                                  CODEC) if differ else 0.0
        return *right, overwritten

    def off_is_base(self, model: Any, attachment: minipeft.Attachment) -> bool:
        """Unplug it, and tell whether every answer in every task is then the base's, id for id."""
        attachment.unplug()
        off = self.answers(model)
        return all(numpy.array_equal(a, b) for task in TASKS for a, b in zip(off[task], self.base_answers[task]))


def points(steps: int) -> list[int]:
    """The steps after which the tasks are asked: dense where forgetting is fast, and always including the last one."""
    return sorted({round(x) for x in numpy.geomspace(min(FIRST_POINT, steps), steps, POINTS)})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--all", action="store_true", help=f"every method, at {FACTORS} times its usual rate")
    chosen.add_argument("--only", nargs="+", metavar="METHOD", choices=METHODS,
                        help=f"only these methods, at their usual rates, of: {', '.join(METHODS)}")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="British words to train on (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS,
                        help=f"optimizer steps of {BATCH} pairs (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default: %(default)s)")
    parser.add_argument("--words", type=int, help="test words, each asked in all three tasks (default: 250; with --all "
                        "500)")
    parser.add_argument("--base", type=Path, default=BASE, help="folder of the pretrained model (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "forgetting",
                        help="folder for the results (default: %(default)s)")
    parser.add_argument("--go-on", action="store_true", help="keep the rows that an interrupted run left in --out")
    args = parser.parse_args()
    args.words = (500 if args.all else 250) if args.words is None else args.words
    if args.seeds < 1 or args.pairs < BATCH or args.steps < 1 or args.words < 1:
        parser.error(f"expected --seeds >= 1, --steps >= 1, --words >= 1 and --pairs >= {BATCH}")
    return args


def main() -> int:
    args = arguments()
    minipeft.keep_heap()
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = load_tasks()
    if args.pairs > len(train[NEW_TASK]) or args.words > len(test[NEW_TASK]):
        raise SystemExit(f"there are only {len(train[NEW_TASK]):,} training pairs and {len(test[NEW_TASK]):,} test "
                         f"words, too few for --pairs {args.pairs:,} --words {args.words:,}")
    experiment = Experiment(minipeft.Transformer.from_pretrained(args.base), train[NEW_TASK][:args.pairs],
                            {task: test[task][:args.words] for task in TASKS}, args.steps)
    base = experiment.scores(experiment.base_answers)
    log = RowLog(args.out / "rows.jsonl", Row, ("name", "factor", "seed"),
                 {"pairs": args.pairs, "steps": args.steps, "words": args.words,
                  "base": fingerprint(experiment.base.state())}, args.go_on)
    console.print(f"the base says {base[0]:.1f} % of {args.words:,} words right in British, {base[1]:.1f} % in "
                  f"American, and spells {base[2]:.1f} % right; no task has shown these words")
    rows = []
    for seed in range(args.seeds):
        for name in args.only or (METHODS if args.all else FEW):
            for factor in FACTORS if args.all else (1,):
                rows.append(row := log.row(experiment.row, name=name, factor=factor, seed=seed))
                console.print(f"  {row.method}, seed {seed}: British {row.curve[-1][1]:.1f} %, American "
                              f"{row.curve[-1][2]:.1f} % after {row.train_seconds:.0f} s")
    console.print(on_terminal(f"percent of {args.words:,} words, at the end and where British first is 10 and 20",
                              rows, COLUMNS))
    for found in findings(rows, args.words):
        console.print(f"  {found}")
    picture(rows, args.words, args.out / "forgetting.png")
    (args.out / "results.json").write_text(json.dumps(
        {"steps": args.steps, "pairs": args.pairs, "words": args.words, "levels": LEVELS,
         "rows": [{"method": row.method, **dataclasses.asdict(row)} for row in rows]}, indent=1))
    console.print(f"picture and figures: {args.out}/forgetting.png, {args.out}/results.json")
    return 1 if failures(claims_about(rows, args.words), console) else 0


if __name__ == "__main__":
    sys.exit(main())
