"""Pretrain the small character-level Transformers that the examples adapt, and save them like the shipped bases.

A recipe makes one model with several tasks, which a prefix in the text tells apart. It writes config.json,
model.safetensors (float16), vocab.json and log.jsonl.
"""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Callable

import numpy

import minipeft
from data.codec import EOS, PAD, Codec, Pair
from lab.scoring import answers, exact_match

BATCH, LR, WARMUP, SEED = 128, 2e-3, 100, 0
Tasks = dict[str, list[Pair]]


def small_transformer(vocab_size: int, max_length: int) -> minipeft.TransformerConfig:
    """The encoder-decoder of both recipes: 2 + 2 layers, d_model 128, pre-LN, learned positions, one tied embedding."""
    return minipeft.TransformerConfig(
        vocab_size=vocab_size, d_model=128, num_heads=4, d_ff=256, num_layers=2, num_decoder_layers=2,
        dropout_rate=0.0, activation="relu", pre_norm=True, final_norm=True, positions="learned",
        max_length=max_length)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one base is made.

    name: of its folder. load_tasks: returns ({task: training pairs}, {task: test pairs}). tasks: those to pretrain on.
    steps: length of the whole run; the learning rates depend on it. pairs_per_task: at most so many pairs of a task."""

    name: str
    config: minipeft.TransformerConfig
    codec: Codec
    load_tasks: Callable[[], tuple[Tasks, Tasks]]
    tasks: tuple[str, ...]
    steps: int
    pairs_per_task: int | None = None

    def pretrain(self, out: Path, steps: int | None = None, stop_after: int | None = None,
                 checkpoint: Path | None = None) -> list[float]:
        """Train, save into the folder `out`, and return the loss of every step made.

        steps: if given, another length of the run. stop_after: make only so many steps and save nothing. checkpoint:
        file from which an interrupted run goes on."""
        train, test = self.load_tasks()
        pairs = self.codec.ids_of([pair for task in self.tasks for pair in train[task][:self.pairs_per_task]])
        model, steps = minipeft.Transformer(self.config, numpy.random.default_rng(SEED)), steps or self.steps

        def score(task: str, words: int) -> float:
            shown = test[task][:words]
            return exact_match(answers(model, [prompt for prompt, _ in shown], self.codec), shown, self.codec)

        logged: dict[str, Any] = {} if stop_after else {
            "log": out / "log.jsonl", "eval_every": 500,
            "evaluate": lambda: float(numpy.mean([score(task, 200) for task in self.tasks]))}
        out.mkdir(parents=True, exist_ok=True)
        history = minipeft.fit(
            model, minipeft.select(model, ".*"), minipeft.Batches(pairs, BATCH, SEED), steps=stop_after or steps,
            optimizer=minipeft.AdamW(lr=LR), schedule=minipeft.cosine_decay(steps, warmup=WARMUP), clip=1.0,
            seed=SEED, checkpoint=checkpoint, checkpoint_every=200, label="pretraining", **logged)
        if not stop_after:
            model.save_pretrained(out, dtype="float16")
            vocabulary = {"pad": PAD, "eos": EOS, "characters": self.codec.characters}
            (out / "vocab.json").write_text(json.dumps(vocabulary) + "\n")
            thin_out(out / "log.jsonl")
            for task in self.tasks:
                print(f"{task:>14}: {score(task, 500):5.1f} % exact match on {len(test[task][:500])} test words")
        return history.losses


def thin_out(log: Path) -> None:
    """Shorten a log to its first 50 steps, every 25th step after them, and all evaluations."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    kept = [line for line in lines if "score" in line or line["step"] <= 50 or line["step"] % 25 == 0]
    log.write_text("".join(json.dumps(line) + "\n" for line in kept))
