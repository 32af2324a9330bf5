"""Decoding: writing an answer token by token, with a model that gives the logits of each next token.

    greedy        y_t = argmax p(y | y_1 .. y_t-1)
    sampling      y_t drawn from p(y | y_1 .. y_t-1), after temperature, top_k and top_p
    beam search   the num_beams most probable beginnings go on; the result is the answer that ended with the largest
                  log p(y_1 .. y_t) / t^length_penalty

Sources: top_k, Fan et al., 2018, arXiv:1805.04833; top_p, Holtzman et al., 2019, arXiv:1904.09751; beam search by the
rules of transformers 4.57 (`beam_search`). Logits move to the host for sampling and beam search, which compute there in
float64. So all backends decide by the same numbers, up to the rounding of their logits.
"""
from __future__ import annotations

import math
from typing import Any, Callable, NamedTuple

import numpy

from minipeft.backend import Array, to_device, to_host
from minipeft.checks import integer, is_number, number, python, shown
from minipeft.engine.tensor import array_of
from minipeft.nn.attention import KeyValues
from minipeft.nn.init import check_rng
from minipeft.nn.inputs import host_ids
from minipeft.nn.routing import routed

Step = Callable[..., Array]  # step(prefixes, parents) -> logits, as `Steps` is called
Stops = int | tuple[int, ...]  # the id, or ids, that end a row


class Steps:
    """The decoder of `model`, called once for each new token.

    encoded [batch, source, d_model], mask [batch, source] or None: the encoder's output. adapter: as in a call of the
    model. cache: keys and values of every block, or None to compute those of earlier tokens again at each step."""

    def __init__(self, model: Any, encoded: Array, mask: Array | None, adapter: Any,
                 cache: list[tuple[KeyValues, KeyValues]] | None):
        self.model, self.encoded, self.mask, self.adapter, self.cache = model, encoded, mask, adapter, cache
        self.row = numpy.arange(len(encoded))  # the row of the batch that each prefix answers

    def __call__(self, prefixes: numpy.ndarray, parents: numpy.ndarray | None = None) -> Array:
        """prefixes [n, t], the ids so far -> the logits of the next token [n, vocab].

        parents [n]: the number of the prefix, in the call before, that each one continues (in the first call: its row
        of the batch). None: each continues the one of its own number. A prefix may have several continuations, or
        none, so the number of prefixes may change."""
        if parents is not None and not numpy.array_equal(parents, numpy.arange(len(self.row))):
            self._follow(parents)
        newest = to_device(prefixes[:, -1:] if self.cache else prefixes)
        with routed(self.model.host, self.adapter, len(prefixes)):
            hidden, _ = self.model.decoder(self.model.embed(newest), None, self.encoded, self.mask, cache=self.cache)
            return self.model.logits(hidden[:, -1:]).data[:, 0]

    def _follow(self, parents: numpy.ndarray) -> None:
        """Give each prefix what belongs to its parent: keys and values and, if it answers another row than the prefix
        that had its number, the encoder's output and the row's adapter."""
        order, same_rows = to_device(parents), numpy.array_equal(self.row[parents], self.row)
        for own, of_encoded in self.cache or ():
            for kept in (own,) if same_rows else (own, of_encoded):
                kept.k, kept.v = kept.k[order], kept.v[order]
        if not same_rows:
            self.row, self.encoded = self.row[parents], self.encoded[order]
            self.mask = None if self.mask is None else self.mask[order]
            self.adapter = [self.adapter[i] for i in parents] if isinstance(self.adapter, list) else self.adapter


# ---- greedy search and sampling: every row goes its own way


def greedy(step: Step, out: numpy.ndarray, eos: Stops) -> numpy.ndarray:
    """The most probable token at each step; of equal ones the smallest id.

    out [batch, 1 + tokens]: the start token in column 0, pad elsewhere; it is written to. eos: the id that ends a row,
    or several. Returns out without the columns after the last row's end."""
    return _written(step, out, eos, lambda logits, t: to_host(logits.argmax(axis=-1)))


def sampling(step: Step, out: numpy.ndarray, eos: Stops, rng: numpy.random.Generator, temperature: float = 1.0,
             top_k: int | None = None, top_p: float = 1.0) -> numpy.ndarray:
    """A token drawn from `distribution` at each step. out, eos and the result: as in `greedy`. temperature, top_k,
    top_p: as in `distribution`.

    rng gives all of its numbers at once, rng.random([batch, tokens]), one for each row and step. So a row's tokens
    depend on its own inputs and its own numbers, and not on what other rows say or when they end."""
    numbers = rng.random((len(out), out.shape[1] - 1))
    return _written(step, out, eos, lambda logits, t: drawn(distribution(logits, temperature, top_k, top_p),
                                                            numbers[:, t - 1]))


def _written(step: Step, out: numpy.ndarray, eos: Stops, choose: Callable[[Array, int], numpy.ndarray]
             ) -> numpy.ndarray:
    running = numpy.ones(len(out), dtype=bool)
    for t in range(1, out.shape[1]):
        chosen = choose(step(out[:, :t]), t)                                               # [batch]
        out[running, t] = chosen[running]
        running &= numpy.isin(chosen, eos, invert=True)
        if not running.any():
            return out[:, :1 + t]
    return out


def distribution(logits: Array, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float = 1.0) -> numpy.ndarray:
    """The probabilities that tokens are drawn with: logits [n, vocab] -> [n, vocab] on the host, in float64.

    In this order, as in transformers: logits are divided by `temperature`; those below the `top_k`-th largest become
    impossible (those equal to it stay; None: all stay); then the most probable tokens stay, as few as have a
    probability of at least `top_p` together (of equally probable ones the smaller ids first). Raises ValueError where
    the largest logit is not finite."""
    z = _numbers(logits)
    if top_k is not None and top_k < z.shape[-1]:  # first: division leaves their order, but may round two to one
        z[z < numpy.partition(z, -top_k, axis=-1)[:, -top_k, None]] = -math.inf
    with numpy.errstate(over="ignore"):  # a tiny temperature: the others become -inf
        z = (z - z.max(axis=-1, keepdims=True)) / temperature
    p = numpy.exp(z)
    p /= p.sum(axis=-1, keepdims=True)
    if top_p < 1:
        order = numpy.argsort(-p, axis=-1, kind="stable")
        reached = numpy.cumsum(numpy.take_along_axis(p, order, axis=-1), axis=-1)
        enough = numpy.zeros(p.shape, dtype=bool)  # before this token, in that order, top_p is reached
        enough[:, 1:] = reached[:, :-1] >= top_p
        p[numpy.take_along_axis(enough, numpy.argsort(order, axis=-1), axis=-1)] = 0
        p /= p.sum(axis=-1, keepdims=True)
    return p


def drawn(p: numpy.ndarray, u: numpy.ndarray) -> numpy.ndarray:
    """Tokens [n] from probabilities p [n, vocab] and uniform numbers u [n] in [0, 1): the first token up to which the
    probabilities sum to more than u."""
    sums = numpy.cumsum(p, axis=-1)
    u = numpy.minimum(u * sums[:, -1], numpy.nextafter(sums[:, -1], 0))  # the last sum may be rounded, to 1 - 1e-16
    return (sums <= u[:, None]).sum(axis=-1)


# ---- beam search: every row has several beginnings


class Beam(NamedTuple):
    """The beginning of an answer. ids: start token and tokens. total: the log-probability of the tokens. parent: the
    number of the prefix that it continues, in the step before."""

    ids: tuple[int, ...]
    total: float
    parent: int


class Row:
    """The search of one row of the batch. running: its beams, most probable first; none when it has ended. finished:
    [(score, ids)], best first. Of either at most num_beams."""

    def __init__(self, running: list[Beam]):
        self.running, self.finished = running, list[tuple[float, tuple[int, ...]]]()


def beam_search(step: Step, rows: int, start: int, eos: Stops, tokens: int, num_beams: int,
                length_penalty: float = 1.0, early_stopping: bool | str = False) -> list[tuple[float, tuple[int, ...]]]:
    """[(score, ids)], the best answer of each of the `rows`: ids begin with `start` and end with `eos`, or have
    `tokens` tokens behind `start`. The score of t tokens (eos is one) is their log-probability / t^length_penalty.

    At each step the 2 num_beams most probable continuations of a row are its candidates. Those among the first
    num_beams that end (by eos, or as the last step) are finished, and the best num_beams finished ones are kept. The
    first num_beams candidates that do not end run on. A row ends when num_beams are finished and, by early_stopping:
    True, at once; False, when the most probable beam that runs, scored as it is, is not better than the worst of them;
    "never", when it is not better even if it got no less probable up to the last step (where length_penalty > 0; else
    as False). These are the rules of transformers 4.57. Of equal candidates the one of the better beam, then of the
    smaller id comes first.

    Departures: the rows end one by one and leave the batch; an impossible continuation (logit -inf) is no candidate,
    so with more beams than possible continuations there are fewer beams (transformers has beams of log-probability
    -1e9 instead); logarithms of probabilities are float64 (there float32). Raises ValueError as `distribution` does."""
    stops = eos if isinstance(eos, tuple) else (eos,)
    found = [Row([Beam((start,), 0.0, i)]) for i in range(rows)]
    for t in range(1, 1 + tokens):
        beams = [beam for row in found for beam in row.running]
        if not beams:
            break
        log_p = _log_softmax(_numbers(step(numpy.array([beam.ids for beam in beams]),
                                           numpy.array([beam.parent for beam in beams]))))
        first = 0  # number of the row's first beam
        for row in found:
            here = len(row.running)
            if here:
                candidates = _continued(row.running, log_p[first:first + here], first, 2 * num_beams)
                ends = [t == tokens or beam.ids[-1] in stops for beam in candidates]
                row.finished += [(beam.total / t ** length_penalty, beam.ids)
                                 for beam, end in zip(candidates[:num_beams], ends) if end]
                row.finished = sorted(row.finished, key=lambda scored: -scored[0])[:num_beams]
                row.running = [beam for beam, end in zip(candidates, ends) if not end][:num_beams]
                longest = tokens if early_stopping == "never" and length_penalty > 0 else t
                if len(row.finished) == num_beams and (early_stopping is True or not any(
                        beam.total / longest ** length_penalty > row.finished[-1][0] for beam in row.running[:1])):
                    row.running = []
            first += here
    return [row.finished[0] if row.finished else (0.0, (start,)) for row in found]


def _continued(running: list[Beam], log_p: numpy.ndarray, first: int, count: int) -> list[Beam]:
    """The `count` most probable continuations of a row's beams by one token, most probable first. log_p [beams, vocab];
    first: the number of the row's first beam in the batch."""
    totals = (numpy.array([[beam.total] for beam in running]) + log_p).reshape(-1)
    least = numpy.partition(totals, -count)[-count] if count < len(totals) else -math.inf
    near = numpy.flatnonzero((totals >= least) & (totals > -math.inf))
    best = near[numpy.argsort(-totals[near], kind="stable")][:count].tolist()
    return [Beam((*running[beam].ids, token), float(totals[beam * log_p.shape[1] + token]), first + beam)
            for beam, token in (divmod(i, log_p.shape[1]) for i in best)]


def _log_softmax(z: numpy.ndarray) -> numpy.ndarray:
    z = z - z.max(axis=-1, keepdims=True)
    return z - numpy.log(numpy.exp(z).sum(axis=-1, keepdims=True))


def _numbers(logits: Array) -> numpy.ndarray:
    """logits [n, vocab] on the host, in float64."""
    z = to_host(logits).astype(numpy.float64)
    if not numpy.isfinite(z.max(axis=-1)).all():
        raise ValueError("the largest logit of the next token is NaN or infinite; expected a finite number (has "
                         "training diverged?)")
    return z


# ---- from input ids to ids


def decode(model: Any, input_ids: Any, attention_mask: Any = None, max_new_tokens: int = 20, adapter: Any = None,
           use_cache: bool = True, num_beams: int = 1, length_penalty: float = 1.0,
           early_stopping: bool | str = False, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0,
           rng: numpy.random.Generator | None = None) -> tuple[numpy.ndarray, numpy.ndarray | None]:
    """The ids that `model.generate` gives, and the score of each row: (ids [batch, 1 + new tokens], scores [batch]).
    The scores are None without beam search.

    input_ids [batch, source], attention_mask, max_new_tokens, adapter, use_cache, num_beams, length_penalty,
    early_stopping, temperature, top_k, top_p, rng: as in `generate`. Raises ValueError and TypeError as that
    does."""
    c, tokens = model.config, integer("max_new_tokens", max_new_tokens)
    num_beams = integer("num_beams", num_beams, 1)
    length_penalty, early_stopping = checked_beams(num_beams, length_penalty, early_stopping, tokens)
    temperature, top_k, top_p = checked_sampling(num_beams, temperature, top_k, top_p, rng)
    input_ids = host_ids(input_ids, "input_ids")
    pads = input_ids == c.pad_token_id
    if attention_mask is None and c.pad_token_id != c.eos_token_id and pads.any():
        attention_mask = ~pads
    ids, mask = model._checked(input_ids, attention_mask)
    out = numpy.full((len(ids), 1 + tokens), c.pad_token_id, dtype=numpy.int64)
    out[:, 0] = c.decoder_start_token_id
    with routed(model.host, adapter, len(ids)):
        encoded, mask = model.encoder(model.embed(ids), mask)
        cache = model.new_cache(tokens, encoded.shape[1]) if use_cache and tokens else None
        step = Steps(model, array_of(encoded), mask, adapter, cache)
        if rng is not None:
            return sampling(step, out, c.eos_token_id, rng, temperature, top_k, top_p), None
        if num_beams == 1:
            return greedy(step, out, c.eos_token_id), None
        found = beam_search(step, len(ids), c.decoder_start_token_id, c.eos_token_id, tokens, num_beams,
                            length_penalty, early_stopping)
    for row, (_, answer) in zip(out, found):
        row[:len(answer)] = answer
    return out[:, :max(len(answer) for _, answer in found)], numpy.array([score for score, _ in found])


def checked_beams(num_beams: int, length_penalty: Any, early_stopping: Any, tokens: int) -> tuple[float, bool | str]:
    """length_penalty and early_stopping for a search with num_beams beams and so many new `tokens`. Raises ValueError
    for those that are out of range, and for others than the defaults without beam search."""
    length_penalty, early_stopping = number("length_penalty", length_penalty), python(early_stopping)
    if abs(length_penalty) * math.log(max(2, tokens)) > 700:
        raise ValueError(f"length_penalty is {length_penalty!r}; expected a number for which max_new_tokens ^ "
                         f"length_penalty, {tokens} ^ {length_penalty!r}, is a float other than 0 and infinity")
    if type(early_stopping) is not bool and not (isinstance(early_stopping, str) and early_stopping == "never"):
        raise ValueError(f"early_stopping is {shown(early_stopping)}; expected True, False or 'never'")
    if num_beams == 1 and (length_penalty != 1 or early_stopping is not False):
        raise ValueError(f"length_penalty is {length_penalty!r} and early_stopping {early_stopping!r} with num_beams 1;"
                         f" expected 1.0 and False, or num_beams of at least 2: they are for beam search alone")
    return length_penalty, early_stopping


def checked_sampling(num_beams: int, temperature: Any, top_k: Any, top_p: Any,
                     rng: Any) -> tuple[float, int | None, float]:
    """temperature, top_k and top_p for sampling with `rng`, or the defaults without. Raises ValueError for those that
    are out of range, for others without rng, and for rng with num_beams > 1; TypeError for another kind of rng."""
    check_rng(rng)
    if not is_number(temperature) or python(temperature) <= 0:
        raise ValueError(f"temperature is {shown(temperature)}; expected a finite number > 0")
    if not is_number(top_p) or not 0 < python(top_p) <= 1:
        raise ValueError(f"top_p is {shown(top_p)}; expected a number above 0 and at most 1")
    temperature, top_p = float(temperature), float(top_p)
    top_k = None if top_k is None else integer("top_k", top_k, 1)
    if rng is None and (temperature, top_k, top_p) != (1, None, 1):
        raise ValueError(f"temperature is {temperature!r}, top_k {top_k!r} and top_p {top_p!r} without rng; they are "
                         f"for sampling: pass rng=numpy.random.default_rng(seed), or leave them out")
    if rng is not None and num_beams > 1:
        raise ValueError(f"rng is given with num_beams {num_beams}; expected num_beams 1: beam search draws nothing")
    return temperature, top_k, top_p
