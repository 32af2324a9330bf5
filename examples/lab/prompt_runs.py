"""One run of `soft_prompts.py`: train a method on a copy of a pretrained base, and measure the result.

The references without training are here too: the unchanged clause, the base without a prompt, and hard prompts. The
hard prompts are instructions, words of the target version, and worked examples; the best one on the validation part is
taken.
"""
from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any, Sequence

import numpy

import minipeft
from data.bible import KING, OLD_TASKS, PAD, RENDER, Bible, Pair, load_bible, new_pairs, preferred_words
from lab.word_scoring import answers, clause_nats, mean_loss, new_word_f1, word_error_rate

EVERY_LINEAR = r"\.(attn|cross|ff)\."
# prompt: the better of 0.1 and 0.3 on the validation part (P = 20, small base); the others are those of past_tense.py
RATES = {"prompt": 0.3, "LoRA r=4": 5e-3, "full": 1e-3}
BATCH, NEIGHBORS, LABEL_WORDS = 64, 5, 20
INSTRUCTION = f"{RENDER} {KING} write these words as they were written in the days of the king of old"
Nats = tuple[numpy.ndarray, numpy.ndarray]


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run.

    base: a folder. kind: "prompt" or another key of RATES. length, start: P and the start of a prompt; 0 and "" for
    other kinds. hard: the ids of the best hard prompt, to compare with."""

    base: Path
    size: str
    kind: str
    length: int
    start: str
    seed: int
    steps: int
    hard: tuple[int, ...] = ()

    @property
    def method(self) -> str:
        return f"{self.size}: P={self.length}, {self.start}" if self.length else f"{self.size}: {self.kind}"


@dataclasses.dataclass
class Row:
    """One run, or a reference without training. None where a number has no meaning.

    A gain is in nats per token of the test clauses. Its error is the standard error over clauses, each of which is
    compared with itself."""

    method: str
    size: str
    kind: str
    length: int
    start: str
    seed: int | None
    d_model: int
    trainable: int
    percent: float
    context: int                             # tokens or vectors that the input grows by
    loss: float | None                       # nats per token of the test clauses
    wer: float                               # word error rate in percent
    new_words: float                         # F1 of the words that are not in the source, in percent
    seconds: float | None = None             # of the processor, for training
    start_loss: float | None = None          # before training, with the prompt attached
    gain: float | None = None                # against the base without a prompt
    gain_error: float | None = None
    own_gain: float | None = None            # against the prompt before training
    own_gain_error: float | None = None
    hard_gain: float | None = None           # against the best hard prompt
    hard_gain_error: float | None = None
    base_kept: bool | None = None            # every array of the base is bit for bit what it was
    off_is_base: bool | None = None          # without the prompt every answer is the base's, id for id
    nearest: float | None = None             # the smallest distance of a vector to a row of the table
    moved: float | None = None               # share of vectors whose nearest token is no longer the one at the start
    tightness: float | None = None
    random_tightness: float | None = None
    purity: float | None = None              # share of the neighbors that are words which the target version prefers
    vocabulary_purity: float | None = None   # the same share of the whole vocabulary
    neighbors: list[list[str]] = dataclasses.field(default_factory=list)     # of the first vectors
    losses: list[float] = dataclasses.field(default_factory=list)            # every tenth


def load_base(folder: Path, bible: Bible) -> minipeft.T5:
    """Read a pretrained model. Raises SystemExit if its vocabulary is not that of the data."""
    if tuple(json.loads((folder / "vocab.json").read_text("utf-8"))) != bible.vocabulary.tokens:
        raise SystemExit(f"{folder}/vocab.json is not the vocabulary of the installed data; make a model that fits: "
                         f"python examples/pretrain.py {folder.name}")
    return minipeft.T5.from_pretrained(folder)


def test_pairs() -> list[Pair]:
    """The pairs of the new task from unseen verses."""
    bible = load_bible()
    return new_pairs(bible.test, bible.vocabulary)


@functools.cache
def of_base(folder: Path, prefix: tuple[int, ...]) -> tuple[Nats, list[list[int]]]:
    """A base's nats and answers on the test pairs, with the tokens `prefix` in front of every source."""
    model, pairs = load_base(folder, load_bible()), prefixed(prefix, test_pairs())
    return clause_nats(model, pairs), answers(model, pairs)


def prefixed(prefix: Sequence[int], pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with the same tokens in front of every source."""
    return [([*prefix, *source], target) for source, target in pairs]


def prompt_of(job: Job, bible: Bible) -> minipeft.PromptTuning:
    """The method of a job.

    The start "instruction" is a text that asks for the task. "king words" are the words that the King James Version
    prefers most; Lester et al., sec. 3.2, start from class labels. The rest of the length is drawn from the vocabulary.
    (Repeating the tokens would fail: equal vectors beyond the last bucket of distances have equal gradients and stay
    equal.)"""
    if job.start in ("random", "vocabulary"):
        return minipeft.PromptTuning(length=job.length, init=job.start)
    words = INSTRUCTION.split() if job.start == "instruction" else preferred_words(bible.train)
    return minipeft.PromptTuning(length=job.length, init="tokens",
                                 tokens=tuple(bible.vocabulary.ids(words[:job.length])))


def run(job: Job) -> Row:
    """Train on a copy of the job's base, and measure."""
    bible, test = load_bible(), test_pairs()
    model, rng = load_base(job.base, bible), numpy.random.default_rng(job.seed)
    before = {name: array.copy() for name, array in model.state().items()}
    methods: dict[str, Any] = {"prompt": lambda: prompt_of(job, bible), "full": lambda: None,
                               "LoRA r=4": lambda: minipeft.LoRA(rank=4, alpha=8, where=EVERY_LINEAR)}
    method = methods[job.kind]()
    attachment = minipeft.attach(model, method, rng) if method else None
    params = attachment.parameters if attachment else minipeft.select(model, ".*")
    start_nats = clause_nats(model, test)
    first = minipeft.nearest_tokens(attachment, 2, rng).l2_ids[:, 0] if job.length else None
    begun = time.process_time()
    history = minipeft.fit(
        model, params, minipeft.Batches(new_pairs(bible.train, bible.vocabulary), BATCH, job.seed, PAD),
        steps=job.steps, optimizer=minipeft.AdamW(lr=RATES[job.kind], weight_decay=0.0 if job.length else 0.01),
        schedule=minipeft.cosine_decay(job.steps, warmup=job.steps // 20), clip=1.0, seed=job.seed, progress=False)
    seconds, nats = time.process_time() - begun, clause_nats(model, test)
    counts = minipeft.report(model, params)
    row = scored(job, nats, answers(model, test), model.config.d_model, counts.trainable, counts.percent, job.length)
    row.seconds, row.start_loss = seconds, per_token(start_nats)
    row.losses = [round(loss, 4) for loss in history.losses[::10]]
    row.gain, row.gain_error = gain_of(nats, of_base(job.base, ())[0])
    row.own_gain, row.own_gain_error = gain_of(nats, start_nats)
    row.hard_gain, row.hard_gain_error = gain_of(nats, of_base(job.base, job.hard)[0])
    if attachment is not None:
        row.base_kept = all(numpy.array_equal(array, before[name]) for name, array in model.state().items())
        if first is not None:
            _look_around(row, attachment, first, bible)
        attachment.remove()
        row.off_is_base = answers(model, test) == of_base(job.base, ())[1]
    return row


def scored(job: Job, nats: Nats, found: list[list[int]], d_model: int, trainable: int, percent: float,
           context: int) -> Row:
    """A row with the scores that all rows of a base have."""
    test = test_pairs()
    return Row(job.method, job.size, job.kind, job.length, job.start, job.seed, d_model, trainable, percent, context,
               per_token(nats), word_error_rate(found, test), new_word_f1(found, test))


def per_token(nats: Nats) -> float:
    """The mean over all tokens: sum of nats / number of tokens."""
    return float(nats[0].sum() / nats[1].sum())


def gain_of(nats: Nats, worse: Nats) -> tuple[float, float]:
    """(nats per token by which `nats` is better than `worse`, the standard error of this)."""
    gaps = worse[0] - nats[0]
    return float(gaps.sum() / nats[1].sum()), float(gaps.std(ddof=1) * len(gaps) ** 0.5 / nats[1].sum())


def _look_around(row: Row, attachment: minipeft.Attachment, first: numpy.ndarray, bible: Bible) -> None:
    """Add to `row` where the trained vectors lie. first: the tokens nearest to them at the start."""
    near = minipeft.nearest_tokens(attachment, NEIGHBORS, numpy.random.default_rng(row.seed))
    names = [[bible.vocabulary.tokens[i] for i in ids] for ids in near.cosine_ids]
    preferred = set(preferred_words(bible.train))
    row.nearest, row.moved = float(near.nearest_distance.min()), float(numpy.mean(near.l2_ids[:, 0] != first))
    row.tightness, row.random_tightness = float(near.tightness.mean()), float(near.random_tightness.mean())
    row.purity = float(numpy.mean([name in preferred for line in names for name in line]))
    row.vocabulary_purity, row.neighbors = len(preferred) / len(bible.vocabulary), names[:10]


def copied_clause() -> Row:
    """The row of a clause that is left as it is."""
    test = test_pairs()
    found = [source[:-1] for source, _ in test]
    return Row("the clause as it is", "", "copy", 0, "", None, 0, 0, 0.0, 0, None, word_error_rate(found, test),
               new_word_f1(found, test))


def references(base: Path, size: str) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows of one base without training, and the validation losses of all hard prompts, the best first."""
    bible = load_bible()
    model, validation = load_base(base, bible), new_pairs(bible.validation, bible.vocabulary)
    tried: list[dict[str, Any]] = [
        {"size": size, "prefix": name, "ids": ids, "context": len(ids),
         "loss": mean_loss(model, prefixed(ids, validation))} for name, ids in hard_prompts(bible).items()]
    tried.sort(key=lambda entry: entry["loss"])
    rows = []
    for kind, prefix in (("no prompt", ()), ("best hard prompt", tuple(tried[0]["ids"]))):
        rows.append(scored(Job(base, size, kind, 0, "", 0, 0), *of_base(base, prefix), model.config.d_model, 0, 0.0,
                           len(prefix)))
        rows[-1].seed = None
    return rows, tried


def hard_prompts(bible: Bible) -> dict[str, list[int]]:
    """{text: ids}. The worked examples are the shortest training pairs, each a source followed by its answer."""
    ids = bible.vocabulary.ids
    texts: list[tuple[str, ...]] = list(itertools.product(*(dict.fromkeys(tokens) for tokens in zip(*OLD_TASKS))))
    texts += [(token,) for token in dict.fromkeys(token for task in OLD_TASKS for token in task)]
    found = {" ".join(text): ids(text) for text in texts}
    words = preferred_words(bible.train)[:LABEL_WORDS]
    found[INSTRUCTION] = ids(INSTRUCTION.split())
    found |= {f"the {n} words that King James prefers most": ids(words[:n]) for n in (4, LABEL_WORDS)}
    shown = sorted(bible.train.different(), key=lambda pair: len(pair[0]) + len(pair[1]))[:2]
    for n in (1, 2):
        found[f"<render> <king> and {n} worked example{'s' * (n > 1)}"] = ids(
            [RENDER, KING] + [token for king, american in shown[:n] for token in (*american, ",", *king, ",")])
    return found
