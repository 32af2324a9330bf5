"""The three models of the FLAN-T5 lab: the original, the fully tuned "instruct", and "peft", which has a LoRA.

Each is a Row: what it trained, how its loss fell, what it answers to the test dialogues, and their ROUGE.
"""
from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any, Sequence

import numpy

import minipeft
from lab import rouge
from lab.dialogues import read, split
from lab.prompts import Prompts
from minipeft.formats.folder import no_pointer
from minipeft.nn.fingerprint import fingerprint
from minipeft.train.data import label_tokens
from minipeft.train.progress import progress_bar

ORIGINAL, INSTRUCT, PEFT = "original", "instruct", "peft"
TARGETS, DROPOUT = ("q", "v"), 0.05         # of the lab's LoRA
Pairs = Sequence[tuple[list[int], list[int]]]


@dataclasses.dataclass
class Row:
    """One model. percent: of its parameters that are trained. seconds: of the training. losses: of its steps. loss: on
    the test dialogues, in nats per token. answers: to them, as ids and as texts. rouge: of each."""

    method: str
    trainable: int
    percent: float
    seconds: float | None
    losses: list[float]
    loss: float
    ids: list[list[int]]
    answers: list[str]
    rouge: rouge.Scores


class Lab:
    """The model, the tokenizer and the dialogues that the arguments name, and what the original does with them.

    args: those of `flan_t5_lab.py`. Raises ValueError and FileNotFoundError for files that do not fit."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        rows = read(args.data, args.columns)
        test = read(args.test, args.columns) if isinstance(args.test, Path) else args.test
        self.train, self.test = split(rows, test, args.train, args.seed)
        for file in args.model.glob("*.safetensors"):
            no_pointer(file)
        self.base = minipeft.T5.from_pretrained(args.model, args.dtype)
        minipeft.attach(self.base, lora_of(args), numpy.random.default_rng(0)).remove()     # raises if it does not fit
        self.prompts = Prompts(args.model, self.base.config, args.max_source, args.max_target)
        self.train_pairs, self.test_pairs = self.prompts.pairs(self.train), self.prompts.pairs(self.test)
        self.steps = args.steps or -(-len(self.train) // args.batch)
        self.full_steps = self.steps if args.full_steps is None else args.full_steps
        self.weights, self.logits = fingerprint(self.base.state()), self.first_logits(self.base)

    def original(self) -> Row:
        return self._row(ORIGINAL, self.base, {}, None, [])

    def instruct(self) -> tuple[Row, minipeft.T5]:
        """A copy of the original with all of its weights trained, so that the original stays the original."""
        model = self.base.clone()
        params = minipeft.select(model, ".*")
        return self._tuned(INSTRUCT, model, params, self.full_steps, self.args.full_lr, 0.01), model

    def peft(self) -> tuple[Row, minipeft.Attachment]:
        """The original with a LoRA, which stays plugged. Training it writes to nothing but A and B."""
        lora = minipeft.attach(self.base, lora_of(self.args), numpy.random.default_rng(self.args.seed), PEFT)
        return self._tuned(PEFT, self.base, lora.parameters, self.steps, self.args.lr, 0.0), lora

    def ids(self, model: Any) -> list[list[int]]:
        """The model's answers to the test dialogues, with the mask of the padding passed."""
        found: list[list[int]] = []
        batches = self._batches(self.test_pairs)
        with progress_bar(len(batches), 0, "answering", True) as show:
            for i, batch in enumerate(batches, 1):
                ids = model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=self.args.max_new,
                                     num_beams=self.args.beams)
                found += ids[:, 1:].tolist()
                show(i, "")
        return found

    def loss(self, model: Any) -> float:
        """The mean cross-entropy of the test summaries' tokens, in nats."""
        batches = self._batches(self.test_pairs)
        tokens = [label_tokens(batch) for batch in batches]
        return sum(n * float(model.loss(**batch).data) for n, batch in zip(tokens, batches)) / sum(tokens)

    def first_logits(self, model: Any) -> numpy.ndarray:
        """[batch, target, vocab] of the first test dialogues, where the decoder reads their summaries."""
        batch = self._batches(self.test_pairs)[0]
        return model(batch["input_ids"], model.shift_right(batch["labels"]), batch["attention_mask"]).data

    def padding_gap(self) -> float:
        """|the loss of a padded batch - the mean of its rows' own losses over their tokens|, relative to it.

        0, up to rounding, if padding is masked and its labels do not count. The batch holds the shortest and the
        longest of all rows, so that one of them is padded."""
        pairs = sorted([*self.train_pairs, *self.test_pairs], key=lambda pair: (len(pair[0]), len(pair[1])))
        few = [pairs[0], pairs[-1], min(pairs, key=lambda pair: len(pair[1]))]
        together = float(self.base.loss(**self._batch(few)).data)
        tokens = [len(target) for _, target in few]
        apart = sum(n * float(self.base.loss(**self._batch([pair])).data) for n, pair in zip(tokens, few)) / sum(tokens)
        return abs(together - apart) / together

    def _batch(self, pairs: Pairs) -> dict[str, numpy.ndarray]:
        return minipeft.batch_of(pairs, self.base.config.pad_token_id)

    def _batches(self, pairs: Pairs) -> list[dict[str, numpy.ndarray]]:
        return [self._batch(pairs[i:i + self.args.batch]) for i in range(0, len(pairs), self.args.batch)]

    def _tuned(self, name: str, model: Any, params: Any, steps: int, lr: float, decay: float) -> Row:
        """The row of a model whose `params` are trained first, as the lab does it: AdamW with a linear decay."""
        begun = time.perf_counter()
        history = minipeft.fit(
            model, params, minipeft.Batches(self.train_pairs, self.args.batch, self.args.seed,
                                            model.config.pad_token_id),
            steps=steps, optimizer=minipeft.AdamW(lr=lr, weight_decay=decay), schedule=minipeft.linear_decay(steps),
            seed=self.args.seed, label=name)
        return self._row(name, model, params, time.perf_counter() - begun, history.losses)

    def _row(self, name: str, model: Any, params: Any, seconds: float | None, losses: list[float]) -> Row:
        counts, ids = minipeft.report(model, params), self.ids(model)
        answers = [self.prompts.text(row) for row in ids]
        return Row(name, counts.trainable, counts.percent, seconds, losses, self.loss(model), ids, answers,
                   rouge.scores(answers, [row.summary for row in self.test]))


def lora_of(args: argparse.Namespace) -> minipeft.LoRA:
    """The lab's LoRA: on q and v of every attention, with A started as PEFT starts it."""
    return minipeft.LoRA(rank=args.rank, alpha=args.alpha, dropout=DROPOUT, where=list(TARGETS), init="kaiming")


def lora_numbers(model: Any, args: argparse.Namespace) -> int:
    """How many numbers that LoRA has: r (d_in + d_out) at each place, by the shapes of the model."""
    return sum(args.rank * sum(slot.shape) for slot in lora_of(args).places(model).values())


def reloaded(lab: Lab, path: Path, logits: numpy.ndarray, ids: list[list[int]]) -> tuple[Any, bool]:
    """(a model that is read from the folder anew, with the adapter of `path`, ours or PEFT's; whether it gives these
    logits, bit for bit, and these answers, id for id)."""
    fresh = minipeft.T5.from_pretrained(lab.args.model, lab.args.dtype)
    minipeft.load(fresh, path)
    return fresh, numpy.array_equal(lab.first_logits(fresh), logits) and lab.ids(fresh) == ids
