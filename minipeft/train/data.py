"""Pairs of id sequences, padded into batches, in an order that depends only on (seed, epoch).

So two integers, the cursor, say where a run is in its data, and a resumed run sees the batches that an uninterrupted
run would have seen.
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
_ENDLESS = 2 ** 63  # no stream gets this far


def pad(rows: Sequence[Ids], value: int) -> numpy.ndarray:
    """Rows of different lengths as one array [batch, longest]; shorter rows are filled with `value` on the right.

    Raises ValueError for rows that do not hold integers: a fraction or a NaN is not an id."""
    out = numpy.full((len(rows), max(map(len, rows), default=0)), value, dtype=numpy.int64)
    for i, row in enumerate(rows):
        ids = numpy.asarray(row)
        if ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu"):
            raise ValueError(f"row {i} holds {ids.dtype} {list(ids.shape)}; expected a list of integers")
        out[i, :len(row)] = ids
    return out


def batch_of(pairs: Sequence[Pair], pad_token_id: int = 0, causal: bool = False) -> dict[str, numpy.ndarray]:
    """The (source, target) pairs as one batch, {input_ids, attention_mask, labels}, for `model.loss`.

    input_ids [batch, longest source] is padded with `pad_token_id`, attention_mask of this shape is 0 at padding, and
    labels [batch, longest target] is padded with -100. causal: for a Decoder, whose rows are source + target; the
    labels have this shape too, and are -100 at the source, so that the loss is on the target alone. Raises ValueError
    for no pairs, an empty source or target, and ids that are not integers; TypeError for anything but a list of
    (source, target)."""
    if not _length(pairs):
        raise ValueError("an empty batch: there are no pairs")
    _check_pairs(pairs)
    sources, targets = zip(*pairs)
    if causal:
        sources, targets = zip(*(([*s, *t], [IGNORE] * len(s) + list(t)) for s, t in pairs))
    ids = pad(sources, integer("pad_token_id", pad_token_id))
    lengths = numpy.array([len(s) for s in sources])
    return {"input_ids": ids, "attention_mask": (numpy.arange(ids.shape[1]) < lengths[:, None]).astype(numpy.int64),
            "labels": pad(targets, IGNORE)}


def _length(pairs: Any) -> int:
    if not hasattr(pairs, "__len__") or not hasattr(pairs, "__getitem__") or isinstance(pairs, (dict, str, bytes)):
        raise TypeError(f"pairs is a {type(pairs).__name__}; expected a list of (source ids, target ids): pass "
                        f"list(pairs) for a generator, list(pairs.items()) for a dict")
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
    """How many labels of a batch the loss counts (those that are not -100): the weight of a micro-batch."""
    return int((to_host(batch["labels"]) != IGNORE).sum())


class Batches:
    """An endless stream of batches. Each epoch has all pairs, shuffled by (seed, epoch); its last batch may be short.

    pairs: a list of (source ids, target ids); a target may begin with labels of -100, which the loss does not count.
    batch_size: pairs per batch; pad_token_id, causal: as in `batch_of`. Raises ValueError for no pairs, an empty source
    or target (naming the pair's index), and numbers out of range; TypeError for anything but a list of pairs and a
    causal that is not True or False."""

    def __init__(self, pairs: Sequence[Pair], batch_size: int, seed: int = 0, pad_token_id: int = 0,
                 causal: bool = False):
        if not _length(pairs) or not is_integer(batch_size, 1) or not is_integer(seed):
            raise ValueError(f"{len(pairs)} pairs in batches of {shown(batch_size)}, seed {shown(seed)}; expected at "
                             f"least 1 pair, an integer batch_size >= 1, and an integer seed >= 0")
        _check_pairs(pairs)
        self.pairs, self.batch_size, self.seed = pairs, integer("batch_size", batch_size), integer("seed", seed)
        if type(causal) is not bool:
            raise TypeError(f"causal is {shown(causal)}; expected True or False")
        self.pad_token_id, self.causal = integer("pad_token_id", pad_token_id), causal
        self.epoch, self.position = 0, 0
        self._order: numpy.ndarray | None = None

    def next(self) -> dict[str, numpy.ndarray]:
        """The next batch, as `batch_of` returns it. Moves the cursor."""
        if self._order is None:
            self._order = numpy.random.default_rng([self.seed, self.epoch]).permutation(len(self.pairs))
        chosen = self._order[self.position:self.position + self.batch_size]
        batch = batch_of([self.pairs[i] for i in chosen], self.pad_token_id, self.causal)
        self.position += self.batch_size
        if self.position >= len(self.pairs):
            self.epoch, self.position, self._order = self.epoch + 1, 0, None
        return batch

    def state(self) -> dict[str, int]:
        """The cursor, {epoch, position}, as JSON can hold it. position: how many pairs of the epoch are used up."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Continue from the cursor `state`. Raises ValueError for a cursor that this stream never reaches."""
        self.batches_before(state)
        self.epoch, self.position, self._order = state["epoch"], state["position"], None

    def batches_before(self, state: Mapping[str, int]) -> int:
        """How many batches come before the cursor `state`. Raises ValueError for one that this stream never reaches."""
        if not isinstance(state, Mapping) or set(state) != {"epoch", "position"} \
                or not all(type(n) is int and 0 <= n < _ENDLESS for n in state.values()) \
                or state["position"] >= len(self.pairs) or state["position"] % self.batch_size:
            raise ValueError(f"the cursor {shown(state)} is never reached by {len(self.pairs)} pairs in batches of "
                             f"{self.batch_size}")
        return state["epoch"] * -(-len(self.pairs) // self.batch_size) + state["position"] // self.batch_size

    def describe(self) -> dict[str, Any]:
        """Everything that the stream depends on, as JSON can hold it. A checkpoint of another stream is refused."""
        parts = (repr((list(map(int, source)), list(map(int, target)))).encode() for source, target in self.pairs)
        return {"pairs": len(self.pairs), "batch_size": self.batch_size, "seed": self.seed,
                "pad_token_id": self.pad_token_id, **({"causal": True} if self.causal else {}),
                "sha256": sha256(parts)}
