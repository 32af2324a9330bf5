"""Pretrain the two small word-level T5s that `soft_prompts.py` puts prompts in front of.

Five tasks, one model, told apart by two instruction tokens in front of a clause: King James into American Standard,
mending and copying in both versions (see bible.py). American Standard into King James is not among them, and no verse
of the validation and test parts is in any. The results, config.json, model.safetensors (float16), vocab.json and
log.jsonl, are what `examples/checkpoints/bible_small` and `bible_large` hold.

    python examples/pretrain_bible.py --size small         d_model 64: about 7 minutes on a free core
    python examples/pretrain_bible.py --size large         d_model 128: about a quarter of an hour
    python examples/pretrain_bible.py --stop-after 50      the first 50 steps only, nothing is saved

Why T5: its positions are distances between tokens, so a prompt in front of a clause moves no token of it; with absolute
positions a prompt of 100 vectors would push the clause to places that pretraining never saw. Distances from 12 tokens
on share a bucket, which the clauses of pretraining reach: the base knows all of its buckets, however long the prompt.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy

import minipeft
from bible import EOS, OLD_TASKS, PAD, SPECIALS, WORDS, Bible, Part, load_bible, old_pairs
from pretraining import thin_out
from word_scoring import mean_loss

STEPS, BATCH, WARMUP, SEED = 6000, 64, 200, 0
WIDTHS = {"small": 64, "large": 128}
RATE = 0.192                        # over d_model: hidden layers take steps that shrink with their width


def config_of(size: str, vocab_size: int = len(SPECIALS) + WORDS) -> minipeft.T5Config:
    """2 + 2 layers of 4 heads, one tied embedding."""
    d = WIDTHS[size]
    return minipeft.T5Config(
        vocab_size=vocab_size, d_model=d, d_kv=d // 4, num_heads=4, d_ff=4 * d, num_layers=2, num_decoder_layers=2,
        relative_attention_num_buckets=16, relative_attention_max_distance=16, dropout_rate=0.0,
        pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD)


def old_tasks(part: Part, bible: Bible) -> dict[str, list]:
    """{"render american": pairs of ids, ...}; what is damaged depends on SEED alone."""
    rng = numpy.random.default_rng(SEED)
    return {" ".join(task).replace("<", "").replace(">", ""): old_pairs(task, part, bible.vocabulary, rng)
            for task in OLD_TASKS}


def pretrain(size: str, out: Path, steps: int = STEPS, stop_after: int | None = None,
             checkpoint: Path | None = None) -> list[float]:
    """Train and save into `out`; return the losses of the steps made. stop_after: fewer steps, nothing saved."""
    bible = load_bible()
    pairs = [pair for task in old_tasks(bible.train, bible).values() for pair in task]
    shown = {task: found[:200] for task, found in old_tasks(bible.validation, bible).items()}
    model = minipeft.T5(config_of(size, len(bible.vocabulary)), numpy.random.default_rng(SEED))

    def score() -> float:
        return -float(numpy.mean([mean_loss(model, found) for found in shown.values()]))

    out.mkdir(parents=True, exist_ok=True)
    log = None if stop_after else out / "log.jsonl"
    history = minipeft.fit(
        model, minipeft.select(model, ".*"), minipeft.Batches(pairs, BATCH, SEED), steps=stop_after or steps,
        optimizer=minipeft.AdamW(lr=RATE / WIDTHS[size]), schedule=minipeft.cosine_decay(steps, warmup=WARMUP),
        clip=1.0, seed=SEED, evaluate=None if stop_after else score, eval_every=None if stop_after else 500, log=log,
        checkpoint=checkpoint, checkpoint_every=500, label=f"pretraining {size}")
    if stop_after:
        return history.losses
    model.save_pretrained(out, dtype="float16")
    (out / "vocab.json").write_text(json.dumps(bible.vocabulary.tokens) + "\n")
    for task, found in shown.items():
        print(f"{task:>16}: {mean_loss(model, found):.3f} nats per token on {len(found)} validation clauses")
    assert log is not None
    thin_out(log)
    return history.losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(WIDTHS), default="small", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the model and its log (default: examples/out/bible_SIZE)")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--stop-after", type=int, metavar="N", help="make only the first N steps, print their losses")
    parser.add_argument("--checkpoint", type=Path, help="file to resume from if the run is interrupted")
    args = parser.parse_args()
    minipeft.keep_heap()
    out = args.out or Path(__file__).parent / "out" / f"bible_{args.size}"
    losses = pretrain(args.size, out, args.steps, args.stop_after, args.checkpoint)
    if args.stop_after:
        print("\n".join(f"{loss:.6f}" for loss in losses))


if __name__ == "__main__":
    main()
