"""The tokens of the vocabulary that are nearest to each vector of a soft prompt.

    cosine(p, e) = p . e / (|p| |e|),   L2(p, e) = |p - e|,   e over the rows of E as the encoder reads them

Lester et al., 2021, arXiv:2104.08691, sec. 7, ask whether the neighbors of a vector form a tight cluster, and whether
those of random vectors do not. Here tightness is a number: the mean cosine over the pairs of the k neighbors.
"""
from __future__ import annotations

import dataclasses
from typing import Any

import numpy

from minipeft.engine.tensor import array_of
from minipeft.backend import to_host
from minipeft.nn.init import check_rng
from minipeft.nn.inputs import check_ids
from minipeft.attaching.fields import integer
from minipeft.methods.prompt import PromptTuning


@dataclasses.dataclass(frozen=True)
class Neighbors:
    """The k neighbors of p vectors, on the host, the nearest first.

    cosine_ids, l2_ids [p, k]: token ids. cosine, l2 [p, k]: their cosines and distances. nearest_distance [p]: L2 to
    the nearest token, 0 for a vector that is a row of the table. tightness [p]: of the neighbors by cosine (NaN for
    k = 1, where there is no pair). random_tightness [p]: the same for Gaussian vectors of the same lengths."""

    cosine_ids: numpy.ndarray
    cosine: numpy.ndarray
    l2_ids: numpy.ndarray
    l2: numpy.ndarray
    nearest_distance: numpy.ndarray
    tightness: numpy.ndarray
    random_tightness: numpy.ndarray


def nearest_tokens(attachment: Any, k: int, rng: numpy.random.Generator | None = None) -> Neighbors:
    """The k nearest tokens of every vector of a PromptTuning attachment. rng: draws the random vectors with which
    tightness is compared; by default the generator of seed 0.

    Raises TypeError for anything but a PromptTuning that is attached, ValueError for k out of range."""
    check_rng(rng)
    rng = numpy.random.default_rng(0) if rng is None else rng
    if not isinstance(getattr(attachment, "method", None), PromptTuning) or not attachment.places:
        raise TypeError(f"nearest_tokens: {attachment!r} is not a soft prompt on a model; expected a PromptTuning")
    model, (p,) = attachment.model, attachment.parameters.values()
    vocab = model.config.vocab_size
    if not (integer(k) and k <= vocab):
        raise ValueError(f"nearest_tokens: k is {k!r}; expected 1 to {vocab}, the size of the vocabulary")
    table = to_host(array_of(model.embed(check_ids([range(vocab)], vocab, "ids")))[0]).astype(numpy.float64)
    vectors = to_host(p.data).astype(numpy.float64)
    random = rng.standard_normal(vectors.shape)
    random *= numpy.linalg.norm(vectors, axis=1, keepdims=True) / numpy.linalg.norm(random, axis=1, keepdims=True)
    cosine_ids, cosine = _largest(_unit(vectors) @ _unit(table).T, k)
    squares = (vectors ** 2).sum(axis=1)[:, None] - 2 * vectors @ table.T + (table ** 2).sum(axis=1)
    l2_ids, _ = _largest(-squares, k)
    l2 = numpy.linalg.norm(vectors[:, None] - table[l2_ids], axis=-1)  # again: exactly 0 where a vector is a row
    return Neighbors(cosine_ids, cosine, l2_ids, l2, l2[:, 0], _tightness(table, cosine_ids),
                     _tightness(table, _largest(_unit(random) @ _unit(table).T, k)[0]))


def _unit(rows: numpy.ndarray) -> numpy.ndarray:
    """Each row divided by its length; zeros stay."""
    length = numpy.linalg.norm(rows, axis=1, keepdims=True)
    return rows / numpy.where(length > 0, length, 1)


def _largest(scores: numpy.ndarray, k: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Indices and values of the k largest of each row, the largest first."""
    ids = numpy.argsort(-scores, axis=1, kind="stable")[:, :k]
    return ids, numpy.take_along_axis(scores, ids, axis=1)


def _tightness(table: numpy.ndarray, ids: numpy.ndarray) -> numpy.ndarray:
    """[p, k] ids -> [p]: the mean cosine over the pairs of each row's tokens."""
    unit = _unit(table)[ids]                                                             # [p, k, d]
    k = ids.shape[1]
    pairs = (unit @ unit.swapaxes(-1, -2)).sum(axis=(-1, -2)) - (unit * unit).sum(axis=(-1, -2))
    return pairs / (k * (k - 1)) if k > 1 else numpy.full(len(ids), numpy.nan)
