"""Pairs of id sequences, padded into batches, in an order that depends on (seed, epoch) alone.

So the cursor of a run is two integers, and a resumed run sees the batches that an uninterrupted one would have seen.
"""
from __future__ import annotations

from typing import Any, Mapping, Sequence

import numpy

from minipeft.backend import to_host
from minipeft.nn.fingerprint import sha256

Ids = Sequence[int]
Pair = tuple[Ids, Ids]
IGNORE = -100


def pad(rows: Sequence[Ids], value: int) -> numpy.ndarray:
    """Rows of different length as one array [batch, longest], `value` at the right of shorter ones.

    Raises ValueError for rows that do not hold integers: a fraction or a NaN is no id."""
    out = numpy.full((len(rows), max(map(len, rows), default=0)), value, dtype=numpy.int64)
    for i, row in enumerate(rows):
        ids = numpy.asarray(row)
        if ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu"):
            raise ValueError(f"row {i} holds {ids.dtype} {list(ids.shape)}; expected a list of integers")
        out[i, :len(row)] = ids
    return out


def batch_of(pairs: Sequence[Pair], pad_token_id: int = 0) -> dict[str, numpy.ndarray]:
    """{input_ids, attention_mask, labels} of (source, target) pairs, labels padded with -100: what `model.loss` takes.

    Raises ValueError for no pairs, or an empty source or target."""
    if not pairs:
        raise ValueError("an empty batch: there are no pairs")
    _no_empty(pairs)
    sources, targets = zip(*pairs)
    ids = pad(sources, pad_token_id)
    lengths = numpy.array([len(s) for s in sources])
    return {"input_ids": ids, "attention_mask": (numpy.arange(ids.shape[1]) < lengths[:, None]).astype(numpy.int64),
            "labels": pad(targets, IGNORE)}


def _no_empty(pairs: Sequence[Pair]) -> None:
    for i, (source, target) in enumerate(pairs):
        if not len(source) or not len(target):
            raise ValueError(f"pair {i} has an empty {'source' if not len(source) else 'target'}")


def label_tokens(batch: Mapping[str, Any]) -> int:
    """How many labels are counted by the loss: the weight of a micro-batch."""
    return int((to_host(batch["labels"]) != IGNORE).sum())


class Batches:
    """An endless stream of batches: every epoch all pairs, shuffled by (seed, epoch), the last batch short.

    Raises ValueError for no pairs, a pair that is half empty (its index is named), and numbers out of range."""

    def __init__(self, pairs: Sequence[Pair], batch_size: int, seed: int = 0, pad_token_id: int = 0):
        if not pairs or batch_size < 1 or seed < 0:
            raise ValueError(f"{len(pairs)} pairs in batches of {batch_size}, seed {seed}; expected at least 1 pair in "
                             f"batches of at least 1, seed >= 0")
        _no_empty(pairs)
        self.pairs, self.batch_size, self.seed, self.pad_token_id = pairs, batch_size, seed, pad_token_id
        self.epoch, self.position = 0, 0
        self._order: numpy.ndarray | None = None

    def next(self) -> dict[str, numpy.ndarray]:
        """The next batch, as `batch_of` makes it. Moves the cursor."""
        if self._order is None:
            self._order = numpy.random.default_rng([self.seed, self.epoch]).permutation(len(self.pairs))
        chosen = self._order[self.position:self.position + self.batch_size]
        batch = batch_of([self.pairs[i] for i in chosen], self.pad_token_id)
        self.position += self.batch_size
        if self.position >= len(self.pairs):
            self.epoch, self.position, self._order = self.epoch + 1, 0, None
        return batch

    def state(self) -> dict[str, int]:
        """The cursor, as JSON can hold it: the epoch, and how many of its pairs are behind."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Continue from a cursor. Raises ValueError for one that this stream does not pass through."""
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or position not in range(0, len(self.pairs), self.batch_size):
            raise ValueError(f"a cursor at {dict(state)} is none of {len(self.pairs)} pairs in batches of "
                             f"{self.batch_size}")
        self.epoch, self.position, self._order = epoch, position, None

    def describe(self) -> dict[str, Any]:
        """What the stream depends on: a checkpoint of another stream is refused."""
        parts = (repr((list(map(int, source)), list(map(int, target)))).encode() for source, target in self.pairs)
        return {"pairs": len(self.pairs), "batch_size": self.batch_size, "seed": self.seed,
                "pad_token_id": self.pad_token_id, "sha256": sha256(parts)}
