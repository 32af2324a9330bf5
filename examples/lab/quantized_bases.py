"""The rows of `qlora.py`: a base in fewer bits, how much an adapter on it learns, and how much of that merging keeps.

A number that is not quantized counts two bytes. The base of the accents task was stored in float16, so these are the
bytes of its file. The library computes in float32, and with `keep=True` the dequantized numbers stay in memory: that
makes the runs of this example faster, and changes no bit of any result. The bytes are those of the codes and scales
alone.
"""
from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import numpy

import minipeft
from data.g2p import CODEC, ids_of
from lab.measure import logits, train
from lab.scoring import Interval, answers, exact_match, hits, share
from lab.variants import EVERY_LINEAR

BATCH = 64
GROUP = 32                                  # the group of INT4/3/2, of Q4_1, and so of QA-LoRA
LORA = minipeft.LoRA(rank=8, alpha=16, where=EVERY_LINEAR)
# Rank 4 is all that a change of one number per group can have: most weights here have 128 inputs, which is 4 groups.
QA_LORA = minipeft.QALoRA(rank=4, alpha=8, group=GROUP, where=EVERY_LINEAR)
BASES: dict[str, tuple[str, dict[str, Any]] | None] = {
    "16 bit": None,
    "NF4": ("nf4", {"blocksize": 64}),
    "NF4, double": ("nf4", {"blocksize": 64, "double": True}),
    "FP4": ("fp4", {"blocksize": 64}),
    "INT4": ("int4", {"group": GROUP}),
    "INT3": ("int3", {"group": GROUP}),
    "INT2": ("int2", {"group": GROUP}),
    "Q4_1": ("q4_1", {})}
# {name: (base, method, learning rate)}. The rates were fixed before any test word was asked. LoRA's is that of
# `variants.py`. QA-LoRA was tried on INT4 with 5e-3, 1e-2, 2e-2, 4e-2 and 8e-2: of 500 training words that no run here
# trains on, it got 26.2, 30.4, 32.4, 33.8 and 0.0 % right. 2e-2 is close to the best, and far from the one that fails.
METHODS: dict[str, tuple[str, Any, float]] = {
    **{f"LoRA on {base}": (base, LORA, 5e-3) for base in BASES},
    **{f"QA-LoRA on {base}": (base, QA_LORA, 2e-2) for base in ("INT4", "Q4_1")}}
REFERENCE = "LoRA on 16 bit"
FLOAT, REQUANTIZED, ORIGINAL, OFFSETS = "16 bit", "requantized", "original", "offsets"
Rows = list[numpy.ndarray]


@dataclasses.dataclass
class Merged:
    """One way to merge the trained adapter. Shares are in percent."""

    into: str
    weight_bytes: int           # of the merged weights
    british: float              # exact match on the test words
    changed: float              # of the answers, compared with the unmerged model
    gap: float                  # max |merged - unmerged| over logits, relative to the largest logit
    lost: float                 # |W' - (W~ + d)| / |d| over all weights together: how much of the change d is lost
    worst: float | None         # the largest such share of a single weight, before rounding to float16, as the library
    #                             reports it; None: it measures none for a base that is not quantized
    rounding: float             # max |W' - (W~ + d)| / (max |W~| + max |W'|), of the worst weight
    moved: list[str] | None     # the arrays of the quantized weights of which bits changed; None: no such arrays


@dataclasses.dataclass
class Row:
    """One method on one base with one seed. Shares are in percent."""

    method: str
    seed: int
    scheme: str                 # of the base, in words
    trainable: int
    weight_bytes: int           # of the weights that are quantized
    base_bytes: int             # of all weights
    weight_error: float         # |W~ - W| / |W| over all quantized weights together
    american: float             # exact match of this base in its old task, before training
    british: float              # exact match on the test words after training
    british_interval: Interval
    right: str                  # which words: a bit for each, in hexadecimal digits
    kept: bool                  # training changed no bit of the base
    merges: list[Merged]

    def hits(self, words: int) -> numpy.ndarray:
        """Whether each of the test words was right: [words] of bool."""
        return numpy.unpackbits(numpy.frombuffer(bytes.fromhex(self.right), "uint8"), count=words).astype(bool)


@dataclasses.dataclass
class Experiment:
    """A base in 16 bits, and the words of a run. pairs: British pairs to train on. british: test words. american: words
    asked in the old task. steps: of training."""

    base: minipeft.Transformer
    pairs: list
    british: list
    american: list
    steps: int
    names: list[str] = dataclasses.field(init=False)        # of the weights that `minipeft.quantize` quantizes

    def __post_init__(self) -> None:
        self.names = list(minipeft.quantize(self.base.clone(), "int8").after)

    def row(self, name: str, seed: int) -> Row:
        """Quantize a copy of the base, train the method `name` of METHODS on it, and merge it in every way."""
        kind, method, lr = METHODS[name]
        model, scheme, error = self.quantized(kind)
        before, weight_bytes = {n: a.copy() for n, a in model.state().items()}, stored_bytes(model, self.names)
        american = exact_match(ask(model, self.american), self.american, CODEC)
        trained = train(model, method, ids_of(self.pairs), lr=lr, steps=self.steps, batch_size=BATCH, seed=seed,
                        evaluate=lambda m: 0.0, label=f"{name}, seed {seed}")
        assert trained.attachment is not None
        said = ask(model, self.british)
        right = hits(said, self.british, CODEC)
        british, interval = share(right, [1] * len(right))
        return Row(name, seed, scheme, minipeft.report(model, trained.params).trainable, weight_bytes,
                   stored_bytes(model, list(model.slots)), error, american, british, interval,
                   numpy.packbits(right).tobytes().hex(), same_bits(before, model.state()),
                   self.merges(model, trained.attachment, said))

    def quantized(self, kind: str) -> tuple[Any, str, float]:
        """(a copy of the base in the form `kind` of BASES, the form in words, the error of its weights in percent)."""
        model, asked = self.base.clone(), BASES[kind]
        if asked is None:
            return model, "float16", 0.0
        found = minipeft.quantize(model, asked[0], keep=True, **asked[1])
        W, W_ = dense(self.base, self.names), dense(model, self.names)
        return model, found.scheme, 100 * norm(W_[n] - W[n] for n in W) / norm(W.values())

    def merges(self, model: Any, attachment: Any, said: Rows) -> list[Merged]:
        """Merge and unmerge it in every way that its base has. said: the unmerged model's answers."""
        if not quantized_weights(model):
            return [self.merged(FLOAT, model, attachment, said, attachment.merge)]
        if isinstance(attachment.method, minipeft.QALoRA):
            return [self.merged(OFFSETS, model, attachment, said, attachment.merge)]
        return [self.merged(FLOAT, model, attachment, said, attachment.merge),
                self.merged(REQUANTIZED, model, attachment, said, lambda: attachment.merge("requantized")),
                self.merged(ORIGINAL, model, attachment, said, lambda: attachment.merge(self.base))]

    def merged(self, into: str, model: Any, attachment: Any, said: Rows, merge: Callable[[], Any]) -> Merged:
        """Measure one merge, and undo it. What it leaves in floating-point numbers is rounded to float16, so that it
        takes the two bytes that it counts."""
        names, some = self.names, ids_of(self.british[:BATCH])
        below, wanted, codes = dense(model, names, bare=True), dense(model, names), quantized_arrays(model)
        unmerged = logits(model, some)
        report = merge()
        asked: Any = model
        folded = {name: model.slots[name].fold() for name in names}
        in_codes = all(isinstance(weight, minipeft.quant.QuantizedWeight) for weight in folded.values())
        moved = None
        if in_codes:
            moved = sorted({leaf for name in names for leaf, array in folded[name].arrays.items()
                            if array.data.tobytes() != codes[name][leaf].tobytes()})
            found = {name: weight.dense().data.astype("float64") for name, weight in folded.items()}
            size = sum(a.data.nbytes for weight in folded.values() for a in weight.arrays.values())
        else:
            asked, found = self.base.clone(), {}
            for name, weight in folded.items():
                asked.slots[name].base.data = in_16_bits(weight.dense().data, name)
                found[name] = asked.slots[name].base.data.astype("float64")
            size = stored_bytes(asked, names)
        again = ask(asked, self.british)
        gap = abs(logits(asked, some) - unmerged).max() / abs(unmerged).max()
        attachment.unmerge()
        change = norm(wanted[n] - below[n] for n in names)
        return Merged(
            into, size, exact_match(again, self.british, CODEC),
            100 * float(numpy.mean([not numpy.array_equal(a, b) for a, b in zip(said, again)])), float(gap),
            100 * norm(found[n] - wanted[n] for n in names) / change if change else 0.0,
            100 * report.worst if report.errors else None,
            max(abs(found[n] - wanted[n]).max() / (abs(below[n]).max() + abs(found[n]).max()) for n in names), moved)


def ask(model: Any, pairs: list) -> Rows:
    """The model's answers to the prompts of `pairs`."""
    return answers(model, [prompt for prompt, _ in pairs], CODEC)


def paired(first: Any, second: Any) -> tuple[float, float]:
    """(percent right of the first minus that of the second, its standard error), for answers to the same words, both
    [words] of bool.

    The words on which both agree say nothing about the difference. With d = 1, 0 or -1 for each word, this is the mean
    of d and sqrt(var(d) / n), in percent."""
    d = numpy.asarray(first, float) - numpy.asarray(second, float)
    return 100 * float(d.mean()), 100 * math.sqrt(float(d.var()) / len(d))


def loaded(folder: Path) -> minipeft.Transformer:
    """The model in `folder`, every number rounded to float16."""
    model = minipeft.Transformer.from_pretrained(folder)
    for name, p in model.base_parameters.items():
        p.data = in_16_bits(p.data, name)
    return model


def in_16_bits(array: numpy.ndarray, name: str) -> numpy.ndarray:
    """The array rounded to float16, in its own dtype. Raises SystemExit for numbers too large for float16."""
    with numpy.errstate(over="ignore"):
        rounded = array.astype("float16").astype(array.dtype)
    if not numpy.isfinite(rounded).all():
        raise SystemExit(f"{name} holds {abs(array).max():g}, which float16 cannot: its largest number is 65504")
    return rounded


def stored_bytes(model: Any, names: Sequence[str]) -> int:
    """Bytes of the bases of these slots: of codes and scales as they are, and two for every other number."""
    return sum(array.data.nbytes if name in quantized_weights(model) else 2 * array.data.size
               for name in names for array in model.slots[name].base.arrays.values())


def quantized_weights(model: Any) -> dict[str, Any]:
    """{name of a slot: its quantized base}."""
    return {name: slot.base for name, slot in model.slots.items()
            if isinstance(slot.base, minipeft.quant.QuantizedWeight)}


def quantized_arrays(model: Any) -> dict[str, dict[str, numpy.ndarray]]:
    """{name of a slot: {leaf: array}} of the quantized bases."""
    return {name: {leaf: array.data for leaf, array in weight.arrays.items()}
            for name, weight in quantized_weights(model).items()}


def dense(model: Any, names: Sequence[str], bare: bool = False) -> dict[str, numpy.ndarray]:
    """{name: the matrix of the slot, in float64}, with everything that is plugged or, bare, of the base alone."""
    return {name: (model.slots[name].base if bare else model.slots[name].fold()).dense().data.astype("float64")
            for name in names}


def norm(arrays: Any) -> float:
    """The Frobenius norm of several matrices together."""
    return math.sqrt(sum(float((array * array).sum()) for array in arrays))


def same_bits(before: Mapping[str, numpy.ndarray], after: Mapping[str, numpy.ndarray]) -> bool:
    """Whether both have the same names and, under each, the same bits."""
    return before.keys() == after.keys() and all(a.tobytes() == after[name].tobytes() for name, a in before.items())
