"""The bases of `soft_prompts.py`: two small word-level T5s that render, mend and copy clauses of two English Bibles.

One model has five tasks: King James into American Standard, and mending and copying in both versions (see bible.py).
Two instruction tokens in front of a clause tell them apart. American Standard into King James is not among the tasks.
No task contains a verse of the validation and test parts.

    python examples/pretrain.py bible_small            d_model 64: about 7 minutes on a free core
    python examples/pretrain.py bible_large            d_model 128: about a quarter of an hour

Why T5: its positions are distances between tokens, so a prompt in front of a clause moves none of the clause's tokens.
With absolute positions, a prompt of 100 vectors would push the clause to positions that pretraining never reached.
Distances of 12 tokens and more share a bucket, and the clauses of pretraining reach it: the base knows all of its
buckets, however long the prompt is.
"""
from __future__ import annotations

import json
from pathlib import Path

import numpy

import minipeft
from data.bible import EOS, OLD_TASKS, PAD, SPECIALS, WORDS, Bible, Part, load_bible, old_pairs
from data.pretraining import thin_out
from lab.word_scoring import mean_loss

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
    """{"render american": pairs of ids, ...}; the damage depends on SEED alone."""
    rng = numpy.random.default_rng(SEED)
    return {" ".join(task).replace("<", "").replace(">", ""): old_pairs(task, part, bible.vocabulary, rng)
            for task in OLD_TASKS}


def pretrain(size: str, out: Path, steps: int | None = None, stop_after: int | None = None,
             checkpoint: Path | None = None) -> list[float]:
    """Train, save into the folder `out`, and return the loss of every step made.

    steps: if given, another length of the run. stop_after: make only so many steps and save nothing. checkpoint: file
    from which an interrupted run goes on."""
    bible, steps = load_bible(), steps or STEPS
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
