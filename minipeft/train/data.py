"""Pairs of id sequences, padded into batches, in an order that depends on (seed, epoch) alone.

So the cursor of a run is two integers, and a resumed run sees the batches that an uninterrupted one would have seen.
"""
from __future__ import annotations

from typing import Any, Mapping, Sequence

import numpy

from minipeft.backend import to_host
from minipeft.checks import integer, is_integer, shown
from minipeft.nn.fingerprint import sha256

Ids = Sequence[int]
Pair = tuple[Ids, Ids]
IGNORE = -100
_ENDLESS = 2 ** 63  # no stream gets there


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

    Raises ValueError for no pairs, an empty source or target, and ids that are not integers; TypeError for pairs that
    are no list of (source, target)."""
    if not _length(pairs):
        raise ValueError("an empty batch: there are no pairs")
    _check_pairs(pairs)
    sources, targets = zip(*pairs)
    ids = pad(sources, integer("pad_token_id", pad_token_id))
    lengths = numpy.array([len(s) for s in sources])
    return {"input_ids": ids, "attention_mask": (numpy.arange(ids.shape[1]) < lengths[:, None]).astype(numpy.int64),
            "labels": pad(targets, IGNORE)}


def _length(pairs: Any) -> int:
    if not hasattr(pairs, "__len__") or not hasattr(pairs, "__getitem__") or isinstance(pairs, (dict, str, bytes)):
        raise TypeError(f"pairs is a {type(pairs).__name__}; expected a list of (source ids, target ids): list(pairs) "
                        f"makes one of a generator, list(pairs.items()) of a dict")
    return len(pairs)


def _check_pairs(pairs: Sequence[Pair]) -> None:
    for i in range(len(pairs)):
        try:
            source, target = pairs[i]
            lengths = len(source), len(target)
        except (TypeError, ValueError):
            raise TypeError(f"pair {i} is {shown(pairs[i])}; expected (source ids, target ids), two lists") from None
        if not all(lengths):
            raise ValueError(f"pair {i} has an empty {'source' if not lengths[0] else 'target'}")


def label_tokens(batch: Mapping[str, Any]) -> int:
    """How many labels are counted by the loss: the weight of a micro-batch."""
    return int((to_host(batch["labels"]) != IGNORE).sum())


class Batches:
    """An endless stream of batches: every epoch all pairs, shuffled by (seed, epoch), the last batch short.

    pairs: a list of (source ids, target ids); a target may begin with labels of -100, which the loss does not count.
    Raises ValueError for no pairs, a pair that is half empty (its index is named), and numbers out of range; TypeError
    for a generator, or anything else that is no list of pairs."""

    def __init__(self, pairs: Sequence[Pair], batch_size: int, seed: int = 0, pad_token_id: int = 0):
        if not _length(pairs) or not is_integer(batch_size, 1) or not is_integer(seed):
            raise ValueError(f"{len(pairs)} pairs in batches of {shown(batch_size)}, seed {shown(seed)}; expected at "
                             f"least 1 pair in batches of an integer of at least 1, and an integer seed >= 0")
        _check_pairs(pairs)
        self.pairs, self.batch_size, self.seed = pairs, integer("batch_size", batch_size), integer("seed", seed)
        self.pad_token_id = integer("pad_token_id", pad_token_id)
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
        self.batches_before(state)
        self.epoch, self.position, self._order = state["epoch"], state["position"], None

    def batches_before(self, state: Mapping[str, int]) -> int:
        """How many batches lie before a cursor. Raises ValueError for one that this stream does not pass through."""
        if not isinstance(state, Mapping) or set(state) != {"epoch", "position"} \
                or not all(type(n) is int and 0 <= n < _ENDLESS for n in state.values()) \
                or state["position"] >= len(self.pairs) or state["position"] % self.batch_size:
            raise ValueError(f"a cursor at {shown(state)} is none of {len(self.pairs)} pairs in batches of "
                             f"{self.batch_size}")
        return state["epoch"] * -(-len(self.pairs) // self.batch_size) + state["position"] // self.batch_size

    def describe(self) -> dict[str, Any]:
        """What the stream depends on: a checkpoint of another stream is refused."""
        parts = (repr((list(map(int, source)), list(map(int, target)))).encode() for source, target in self.pairs)
        return {"pairs": len(self.pairs), "batch_size": self.batch_size, "seed": self.seed,
                "pad_token_id": self.pad_token_id, "sha256": sha256(parts)}
