"""Pretrain the small character-level Transformer that `past_tense.py` adapts.

Five inflection tasks (plural, gerund, third person, comparative, superlative), one model, told apart by a prefix in
the text. The past tense is not among them. The result, config.json, model.safetensors (float16), vocab.json and
log.jsonl, is what `examples/checkpoints/inflection` holds.

    python examples/pretrain_inflection.py                   about a quarter of an hour on two cores
    python examples/pretrain_inflection.py --stop-after 50   the first 50 steps only, nothing is saved
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy

import minipeft
from inflection import CHARACTERS, EOS, OLD_TASKS, PAD, VOCAB_SIZE, ids_of, load_tasks
from scoring import answers, exact_match

STEPS, BATCH, LR, SEED = 2600, 128, 2e-3, 0
PAIRS_PER_TASK = 16000            # of 68,000 plurals; the other tasks have fewer
CONFIG = minipeft.TransformerConfig(
    vocab_size=VOCAB_SIZE, d_model=128, num_heads=4, d_ff=256, num_layers=2, num_decoder_layers=2, dropout_rate=0.0,
    activation="relu", pre_norm=True, final_norm=True, positions="learned", max_length=48)


def pretrain(out: Path, steps: int = STEPS, stop_after: int | None = None,
             checkpoint: Path | None = None) -> list[float]:
    """Train and save into `out`; return the losses of the steps made. stop_after: fewer steps, nothing saved."""
    train, test = load_tasks()
    pairs = ids_of([pair for task in OLD_TASKS for pair in train[task][:PAIRS_PER_TASK]])
    model = minipeft.Transformer(CONFIG, numpy.random.default_rng(SEED))

    def score() -> float:
        return float(numpy.mean([exact_match(answers(model, [p for p, _ in test[task][:200]]), test[task][:200])
                                 for task in OLD_TASKS]))

    out.mkdir(parents=True, exist_ok=True)
    log = None if stop_after else out / "log.jsonl"
    history = minipeft.fit(
        model, minipeft.select(model, ".*"), minipeft.Batches(pairs, BATCH, SEED), steps=stop_after or steps,
        optimizer=minipeft.AdamW(lr=LR), schedule=minipeft.cosine_decay(steps, warmup=100), clip=1.0, seed=SEED,
        evaluate=None if stop_after else score, eval_every=None if stop_after else 500, log=log,
        checkpoint=checkpoint, checkpoint_every=200, label="pretraining")
    if stop_after:
        return history.losses
    model.save_pretrained(out, dtype="float16")
    (out / "vocab.json").write_text(json.dumps({"pad": PAD, "eos": EOS, "characters": CHARACTERS}) + "\n")
    for task in OLD_TASKS:
        shown = test[task][:500]
        print(f"{task:>14}: {exact_match(answers(model, [p for p, _ in shown]), shown):5.1f} % exact match")
    assert log is not None
    thin_out(log)
    return history.losses


def thin_out(log: Path) -> None:
    """Keep of a log the first 50 steps, every 25th after them, and all evaluations."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    kept = [line for line in lines if "score" in line or line["step"] <= 50 or line["step"] % 25 == 0]
    log.write_text("".join(json.dumps(line) + "\n" for line in kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "inflection",
                        help="folder for the model and its log (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--stop-after", type=int, metavar="N", help="make only the first N steps, print their losses")
    parser.add_argument("--checkpoint", type=Path, help="file to resume from if the run is interrupted")
    args = parser.parse_args()
    minipeft.keep_heap()
    losses = pretrain(args.out, args.steps, args.stop_after, checkpoint=args.checkpoint)
    if args.stop_after:
        print("\n".join(f"{loss:.6f}" for loss in losses))


if __name__ == "__main__":
    main()
