"""One base model, two tasks, two small files: swapped, mixed in one batch, and removed again.

    british    "british: sweaty" -> "swˈɛti"         says a word in British
    hearing    "spell: swˈɛti"   -> "sweaty"         spells a British pronunciation; the base spells American ones

Each task is a LoRA that is trained and saved by itself. Then both files are loaded onto one base, whose weights are
neither copied nor loaded again. The program checks three things:

    swapped    british, hearing, british: the third logits are the first, bit for bit
    mixed      rows of one batch go to british, to hearing, or to the base alone, in a forward pass, in the loss and in
               generation; each row gets the result of a batch of its own kind
    restored   after both are removed, the base has its old names, weights and logits, bit for bit

    python examples/swap_tasks.py          about a minute on two cores

The program prints a table and writes results.json to examples/out/swap_tasks. It ends with checks that fail if any of
this is false.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Sequence

import numpy
from rich.console import Console

import minipeft
from lab import measure
from lab.claims import Claim, failures, standard_error
from data.codec import PAD, Pair
from data.g2p import CODEC, ids_of, load_tasks, prompt_of
from lab.scoring import answers, exact_match
from lab.tables import Column, on_terminal
from lab.variants import EVERY_LINEAR

HERE = Path(__file__).parent
BATCH, LR = 64, 5e-3
LORA = minipeft.LoRA(rank=8, alpha=16, where=EVERY_LINEAR)
TASKS = ("british", "hearing")
ROUNDING = 1e-5         # of the largest logit: float32 sums of a few hundred terms; their order depends on the batch
console = Console()


def two_tasks(tasks: dict[str, list[Pair]]) -> dict[str, list[Pair]]:
    """{task: pairs} of both tasks, with the same words in the same order."""
    words = [answer for _, answer in tasks["spell"]]
    return {"british": tasks["british"],
            "hearing": [(prompt_of("spell", ipa), word) for (_, ipa), word in zip(tasks["british"], words)]}


def logits(model: Any, pairs: Sequence[Pair], adapter: Any = None) -> numpy.ndarray:
    """[batch, target, vocab], where the decoder reads the answers."""
    return measure.logits(model, ids_of(pairs), adapter)


def score(model: Any, pairs: Sequence[Pair], adapter: Any = None) -> float:
    """Exact match in percent."""
    return exact_match(answers(model, [prompt for prompt, _ in pairs], CODEC, adapter=adapter), pairs, CODEC)


def taught(base: Any, task: str, pairs: Sequence[Pair], steps: int, out: Path) -> Path:
    """Train a LoRA for one task, save it in `out`, and return its file."""
    trained = measure.train(base.clone(), LORA, ids_of(pairs), lr=LR, steps=steps, batch_size=BATCH, seed=0,
                            evaluate=lambda model: 0.0, label=task, name=task)
    file = out / f"{task}.safetensors"
    assert trained.attachment is not None
    trained.attachment.save(file)
    console.print(f"  {task}: {file.stat().st_size / 1e3:,.0f} kB after {trained.seconds:.0f} s")
    return file


def swapping(model: Any, shown: dict[str, list[Pair]], files: dict[str, Path]) -> list[Claim]:
    """Swap british, hearing, british by plugging and unplugging, then by a name in each call; return the claims."""
    before, british = logits(model, shown["british"]), minipeft.load(model, files["british"])
    first = logits(model, shown["british"])
    british.unplug()
    hearing = minipeft.load(model, files["hearing"])
    between = logits(model, shown["british"])
    hearing.unplug()
    off = logits(model, shown["british"])
    british.plug()
    again = logits(model, shown["british"])
    british.unplug()
    return [("british, hearing, british: the same logits, bit for bit",
             numpy.array_equal(first, again) and not numpy.array_equal(first, between)),
            ("the base between and after them: the same logits, bit for bit", numpy.array_equal(before, off)),
            ("a name in the call has the effect of plugging, bit for bit",
             numpy.array_equal(first, logits(model, shown["british"], "british"))
             and numpy.array_equal(between, logits(model, shown["british"], "hearing")))]


def mixing(model: Any, shown: dict[str, list[Pair]]) -> list[Claim]:
    """Mix british, hearing and the base alone in one batch; return the claims. The base gets british's question."""
    pairs, routing = [], []
    for british, hearing in zip(shown["british"], shown["hearing"]):
        pairs += [british, hearing, british]
        routing += ["british", "hearing", None]
    batch = minipeft.batch_of(ids_of(pairs), PAD)
    mixed = logits(model, pairs, routing)
    together = answers(model, [prompt for prompt, _ in pairs], CODEC, batch_size=len(pairs), adapter=routing)
    gap, tokens, losses, same = 0.0, 0, 0.0, True
    for start, name in enumerate(("british", "hearing", None)):
        rows = pairs[start::3]
        alone = logits(model, rows, [name] * len(rows))
        gap = max(gap, float(abs(mixed[start::3, :alone.shape[1]] - alone).max() / abs(alone).max()))
        own = minipeft.batch_of(ids_of(rows), PAD)
        count = int((own["labels"] != -100).sum())
        losses += count * float(model.loss(**own, adapter=[name] * len(rows)).data)
        tokens += count
        apart = answers(model, [prompt for prompt, _ in rows], CODEC, adapter=[name] * len(rows))
        same = same and all(numpy.array_equal(a, b) for a, b in zip(together[start::3], apart))
    loss = float(model.loss(**batch, adapter=routing).data)
    return [(f"mixed batch, forward: each row as in a batch of its task alone, to {ROUNDING:.0e} ({gap:.0e})",
             gap <= ROUNDING and not numpy.array_equal(mixed[0::3], mixed[2::3])),
            (f"mixed batch, loss: the mean of the tasks' losses over their tokens, {loss:.4f}",
             abs(loss - losses / tokens) <= ROUNDING * loss),
            (f"mixed batch, generate: the {len(pairs)} answers of the tasks alone, id for id", same)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps for each task (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=4000, help="words to train on (default: %(default)s)")
    parser.add_argument("--words", type=int, default=500, help="test words (default: %(default)s)")
    parser.add_argument("--base", type=Path, default=HERE / "data" / "checkpoints" / "g2p",
                        help="folder of the pretrained model (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "swap_tasks",
                        help="folder for the results (default: %(default)s)")
    args = parser.parse_args()
    if args.steps < 1 or args.pairs < BATCH or args.words < 64:
        parser.error(f"expected --steps >= 1, --pairs >= {BATCH} and --words >= 64")
    minipeft.keep_heap()
    args.out.mkdir(parents=True, exist_ok=True)
    base = minipeft.Transformer.from_pretrained(args.base)
    lessons, asked = ({task: pairs[:n] for task, pairs in two_tasks(tasks).items()}
                      for tasks, n in zip(load_tasks(), (args.pairs, args.words)))
    files = {task: taught(base, task, lessons[task], args.steps, args.out) for task in TASKS}

    names, weights = list(base.base_parameters), {name: p.data.copy() for name, p in base.base_parameters.items()}
    shown = {task: pairs[:64] for task, pairs in asked.items()}
    untouched = logits(base, shown["british"])
    claims = swapping(base, shown, files) + mixing(base, shown)
    right = {name or "base": {task: score(base, asked[task], name) for task in TASKS} for name in (None, *TASKS)}
    for attachment in list(base.attachments.values()):
        attachment.remove()
    claims.append(("removed: the names, the weights and the logits of the base, bit for bit", (
        list(base.base_parameters) == names and numpy.array_equal(untouched, logits(base, shown["british"]))
        and all(numpy.array_equal(p.data, weights[name]) for name, p in base.base_parameters.items()))))
    for task in TASKS:
        own, others = right[task][task], max(row[task] for name, row in right.items() if name != task)
        margin = 3 * standard_error((own, others), args.words)
        claims.append((f"{task} is best done with its own LoRA: {own:.1f} > {others:.1f} + {margin:.1f}",
                       own > others + margin))
    rows = [argparse.Namespace(method=name, **row) for name, row in right.items()]
    console.print(on_terminal(f"{args.words} unseen words, % right", rows, [
        Column("asked for British", lambda r: r.british), Column("asked to spell British", lambda r: r.hearing)]))
    (args.out / "results.json").write_text(json.dumps({"steps": args.steps, "rows": right}, indent=1))
    return 1 if failures(claims, console) else 0


if __name__ == "__main__":
    sys.exit(main())
