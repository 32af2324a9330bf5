"""The rows of `accents.py`: how much British each method learns, what happens to American, and what it costs."""
from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy

import minipeft
from data.g2p import CODEC, NEW_TASK, OLD_TASKS, ids_of, prompt_of
from lab.hard_prompt import search
from lab.measure import Trained, generation_time, merged_gap, step_peak, train
from lab.scoring import Interval, answers, exact_match, judge
from lab.variants import HARD_PROMPT, VARIANTS, Variant, from_scratch

BATCH = 64
CURVE_WORDS = 200                 # asked after every fifth of the steps
TIMED_WORDS = 250                 # in one batch, which is generated several times
SEARCH_PAIRS = 64                 # training pairs that a hard prompt is scored on
BASE, COPYING = "base", "copy American"                 # rows without training
Rows = list[numpy.ndarray]


@dataclasses.dataclass
class Row:
    """One method with one seed. Shares are in percent, sizes in bytes; None where a number has no meaning."""

    method: str
    seed: int | None
    trainable: int
    percent: float
    file_bytes: int | None
    train_seconds: float | None          # of the processor, for the steps alone (or the search)
    peak_bytes: int | None               # of a training step, above the loaded model
    british: float                       # exact match on the test words
    british_interval: Interval
    error: float                         # phoneme error rate
    error_interval: Interval
    american_on: float                   # exact match in the old task, with the trained weights on
    american_off: float | None           # the same, unplugged; None if it cannot be unplugged
    off_is_base: bool | None             # unplugged, every answer is the base's, id for id
    inference: float | None              # microseconds of the processor per word and decoding step, in one batch
    inference_merged: float | None
    merged_gap: float | None             # max |merged - unmerged| over logits, relative to the largest logit
    curve: list[tuple[int, float]]
    text: str | None = None              # the text that a hard prompt puts in front of a word


@dataclasses.dataclass
class Experiment:
    """A base model, British training pairs, test words, and the base's American answers to them.

    british, american: the same test words in the same order. side: how many of them are asked in American with every
    method, on and off. steps: of training. out: folder for saved models."""

    base: minipeft.Transformer
    pairs: list
    british: list
    american: list
    side: int
    steps: int
    out: Path
    base_american: Rows = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.base_american = ask(self.base, self.american)

    def base_row(self) -> Row:
        """The row of the base model, which is asked for British and has never seen it."""
        return self._row(BASE, None, self.base, self.base_american[:self.side],
                         american_off=self._base_score, off_is_base=True)

    def copying_row(self) -> Row:
        """The row that counts the base's answers to "american:" as British."""
        score = judge(self.base_american, self.british, CODEC)
        return dataclasses.replace(
            self.base_row(), method=COPYING, british=score.exact, british_interval=score.exact_interval,
            error=score.error, error_interval=score.error_interval)

    def trained_row(self, name: str, seed: int) -> Row:
        """Train the method `name` of VARIANTS, and measure it."""
        variant: Variant = VARIANTS[name]
        model = from_scratch(self.base.config, seed) if variant.fresh else self.base.clone()
        pairs, asked = (bare(self.pairs), bare(self.british)) if variant.bare else (self.pairs, self.british)
        shown = asked[:CURVE_WORDS]
        trained = train(model, variant.method, ids_of(pairs), lr=variant.lr, steps=self.steps, batch_size=BATCH,
                        seed=seed, evaluate=lambda m: exact_match(ask(m, shown), shown, CODEC),
                        label=f"{name}, seed {seed}")
        counts = minipeft.report(model, trained.params)
        row = self._row(name, seed, model, ask(model, self.american[:self.side]), british=asked,
                        trainable=counts.trainable, percent=counts.percent, train_seconds=trained.cpu_seconds,
                        curve=trained.curve, peak_bytes=step_peak(model, trained.params, trained.batches))
        return dataclasses.replace(row, **self._apart(trained, self.out / name.replace(" ", "_").replace(",", "")))

    def hard_prompt_row(self, seed: int) -> Row:
        """Search the best text to put in front of a word. `seed` chooses the training pairs that score a text."""
        begun = time.process_time()
        drawn = numpy.random.default_rng(seed).permutation(len(self.pairs))[:SEARCH_PAIRS]
        pairs = bare([self.pairs[i] for i in drawn])
        starts = [prompt_of(task, "") for task in (NEW_TASK, *OLD_TASKS)]
        text, _ = search(self.base, pairs, CODEC, starts)
        seconds = time.process_time() - begun
        asked = [(text + word, answer) for word, answer in bare(self.british)]
        return self._row(HARD_PROMPT, seed, self.base, self.base_american[:self.side], british=asked, text=text,
                         american_off=self._base_score, off_is_base=True, file_bytes=len(text.encode()),
                         train_seconds=seconds)

    def _row(self, name: str, seed: int | None, model: Any, american: Rows, british: list | None = None,
             **found: Any) -> Row:
        """A row: the scores that every row has, and `found`, the numbers that only some rows have."""
        pairs = self.british if british is None else british
        score = judge(ask(model, pairs), pairs, CODEC)
        costs: dict[str, Any] = {
            "trainable": 0, "percent": 0.0, "curve": [], **dict.fromkeys((
                "file_bytes", "train_seconds", "peak_bytes", "american_off", "off_is_base", "inference_merged",
                "merged_gap")), **found}
        return Row(name, seed, british=score.exact, british_interval=score.exact_interval, error=score.error,
                   error_interval=score.error_interval,
                   american_on=exact_match(american, self.american[:self.side], CODEC),
                   inference=self._inference(model, pairs), **costs)

    def _apart(self, trained: Trained, path: Path) -> dict[str, Any]:
        """Save, merge and unplug the trained attachment; return the file's size and the measurements on the way."""
        model, attachment = trained.model, trained.attachment
        if attachment is None:
            model.save_pretrained(path)
            return {"file_bytes": (path / "model.safetensors").stat().st_size}
        file = path.with_suffix(".safetensors")
        attachment.save(file)
        found: dict[str, Any] = {"file_bytes": file.stat().st_size}
        if can_merge(attachment):
            found["merged_gap"] = merged_gap(model, attachment, ids_of(self.british[:BATCH]))
            attachment.merge()
            found["inference_merged"] = self._inference(model, self.british)
            attachment.unmerge()
        attachment.unplug()
        off = ask(model, self.american[:self.side])
        return {**found, "american_off": exact_match(off, self.american[:self.side], CODEC),
                "off_is_base": all(numpy.array_equal(a, b) for a, b in zip(off, self.base_american))}

    def _inference(self, model: Any, pairs: list) -> float:
        return 1e6 * generation_time(model, [CODEC.encode(prompt) for prompt, _ in pairs[:TIMED_WORDS]])

    @property
    def _base_score(self) -> float:
        return exact_match(self.base_american[:self.side], self.american[:self.side], CODEC)


def ask(model: Any, pairs: list) -> Rows:
    """The model's answers to the prompts of `pairs`."""
    return answers(model, [prompt for prompt, _ in pairs], CODEC)


def bare(pairs: list) -> list:
    """The same pairs, without the task's name in the prompt."""
    return [(prompt.removeprefix(prompt_of(NEW_TASK, "")), answer) for prompt, answer in pairs]


def can_merge(attachment: minipeft.Attachment) -> bool:
    """Whether it can be merged. It is left as it was."""
    try:
        attachment.merge()
    except ValueError:
        return False
    attachment.unmerge()
    return True
