"""Sampling: the distribution that tokens are drawn from, the draw itself, and models that generate with it."""
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minipeft.engine.tensor import Tensor
from minipeft.models.decoding import distribution, drawn, sampling
from tests.models.test_beam_search import ROUTING, with_adapters
from tests.models.test_decode import IDS_OF, VOCAB, any_model, every_model, sources, t5_v11

RNG, INF = np.random.default_rng, math.inf
LOGITS = arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(1, 7)), elements=st.one_of(
    st.sampled_from([0.0, 1.0, -2.0, -INF]), st.floats(-30, 30, width=32)))
UNIFORM = st.floats(0, 1, exclude_max=True)


def by_the_rules(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> list[float]:
    """The three rules on one row, each on what the one before has left, as sets of tokens."""
    weights = [math.exp((z - max(logits)) / temperature) for z in logits]
    if top_k is not None:
        least = sorted(logits, reverse=True)[:top_k][-1]
        weights = [w if z >= least else 0.0 for w, z in zip(weights, logits)]
    total, kept = math.fsum(weights), list[int]()
    for token in sorted(range(len(logits)), key=lambda i: (-weights[i], i)):
        if not kept or top_p == 1 or math.fsum(weights[i] for i in kept) / total < top_p:
            kept.append(token)
    total = math.fsum(weights[i] for i in kept)
    return [w / total if i in kept else 0.0 for i, w in enumerate(weights)]


@settings(max_examples=300)
@given(LOGITS, st.floats(0.1, 10), st.one_of(st.none(), st.integers(1, 9)), st.floats(0.01, 1))
def test_temperature_top_k_and_top_p_apply_in_this_order_as_in_transformers(logits, temperature, top_k, top_p):
    assume(np.isfinite(logits.max(axis=-1)).all())
    sums = np.cumsum(-np.sort(-distribution(logits, temperature, top_k)), axis=-1)
    assume(top_p == 1 or (np.abs(sums - top_p) > 1e-9).all())  # else rounding decides
    found = distribution(logits, temperature, top_k, top_p)
    wanted = np.array([by_the_rules(row, temperature, top_k, top_p) for row in logits.tolist()])
    assert found.dtype == np.float64 and np.array_equal(found > 0, wanted > 0)
    assert np.allclose(found, wanted, rtol=1e-12, atol=0)


def test_the_sets_that_top_k_and_top_p_keep():
    quarter = np.log([[0.25, 0.125, 0.25, 0.25, 0.125]])
    third, half = 1 / 3, 1 / 2
    for options, wanted in (({"top_k": 1}, [third, 0, third, third, 0]), ({"top_k": 2}, [third, 0, third, third, 0]),
                            ({"top_k": 4}, [0.25, 0.125, 0.25, 0.25, 0.125]), ({"top_p": 0.25}, [1, 0, 0, 0, 0]),
                            ({"top_p": 0.26}, [half, 0, half, 0, 0]), ({"top_p": 0.5}, [half, 0, half, 0, 0]),
                            ({"top_p": 0.75}, [third, 0, third, third, 0]), ({"top_p": 1e-300}, [1, 0, 0, 0, 0]),
                            ({"top_k": 3, "top_p": 0.5}, [half, 0, half, 0, 0]),
                            ({"top_p": 0.76}, [2 / 7, 1 / 7, 2 / 7, 2 / 7, 0])):
        assert np.allclose(distribution(quarter, **options), [wanted], rtol=1e-12), options
    hot, cold = distribution(quarter, 2.0)[0], distribution(quarter, 0.5)[0]
    assert np.allclose((hot[0] / hot[1], cold[0] / cold[1]), (math.sqrt(2), 4)), "temperature 2 flattens"
    assert distribution(np.array([[0.0, -INF, 1e30]]), 1e-300).tolist() == [[0, 0, 1]]
    assert (distribution(np.array([[1e-38, 0.0, 1.0]]), top_k=2) > 0).tolist() == [[True, False, True]], "no tie"


@given(st.lists(st.sampled_from([0.0, 1e-17, 0.1, 0.25, 3.0]), min_size=1, max_size=6), UNIFORM)
def test_the_token_drawn_is_the_first_up_to_which_the_probabilities_exceed_the_number(weights, u):
    assume(sum(weights) > 0)
    p = np.array([weights]) / sum(weights)
    token, = drawn(p, np.array([u]))
    assert p[0, token] > 0
    sums = p[0].cumsum()
    assert (sums[:token] <= u * sums[-1]).all() and (sums[token] > u * sums[-1] or token == np.flatnonzero(p[0])[-1])


def test_no_number_draws_an_impossible_token():
    p, largest = np.array([[0.0, 0.5, 0.0, 0.5, 0.0]]), 1 - 2.0 ** -53
    assert [int(drawn(p, np.array([u]))[0]) for u in (0.0, 0.25, 0.5, largest)] == [1, 1, 3, 3]
    assert drawn(np.array([[0.1] * 10 + [0.0]]), np.array([largest])).tolist() == [9], "they sum to 1 - 1e-16"


def test_equally_spaced_numbers_draw_each_token_as_often_as_it_is_probable():
    p, n = distribution(RNG(0).standard_normal((1, 9)), 0.7), 10_000
    counts = np.bincount(drawn(np.repeat(p, n, axis=0), (np.arange(n) + 0.5) / n), minlength=9)
    assert np.abs(counts - n * p[0]).max() <= 1


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    """The statistic of counts against probabilities; where p is 0 nothing may be counted."""
    assert not counts[p == 0].any()
    wanted = counts.sum() * p[p > 0]
    return float(((counts[p > 0] - wanted) ** 2 / wanted).sum())


def test_two_tokens_come_as_often_as_the_product_of_their_probabilities():
    """40 pairs are possible. The 99.9 % quantile of chi-square with 39 degrees of freedom is 72.1."""
    rng, n = RNG(5), 4000
    table = rng.standard_normal((9, 9)) + np.where(np.arange(9) == 3, -INF, 0.0)  # by the token before; no token is 3
    out = np.full((n, 3), 8)
    sampling(lambda prefixes: table[prefixes[:, -1]], out, 7, RNG(1), 0.8, 6)
    first, second = distribution(table[8:], 0.8, 6)[0], distribution(table, 0.8, 6)
    p = first[:, None] * np.where(np.arange(9)[:, None] == 7, np.arange(9) == 8, second)  # behind eos, 7, comes pad, 8
    assert chi_square(np.bincount(9 * out[:, 1] + out[:, 2], minlength=81), p.ravel()) < 72.1
    assert (p > 0).sum() <= 40


def test_a_models_tokens_come_as_often_as_they_are_probable():
    """13 tokens stay possible. The 99.9 % quantile of chi-square with 12 degrees of freedom is 32.9."""
    model, n = t5_v11(**IDS_OF), 1500
    ids = np.array([[7, 8, 9]])
    p = distribution(model(ids, [[5]]).data[:, 0], 3.0, 13)[0]
    found = model.generate(np.repeat(ids, n, axis=0), None, 1, temperature=3.0, top_k=13, rng=RNG(0))[:, 1]
    assert chi_square(np.bincount(found, minlength=VOCAB), p) < 32.9 and (p > 0).sum() == 13


@settings(max_examples=20)
@given(any_model, st.integers(0, 2**32), st.sampled_from([
    {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-9}, {"temperature": 1e-300}]), st.booleans())
def test_with_one_token_left_it_is_greedy_search(build, seed, options, use_cache):
    model, (ids, mask) = build(seed, **IDS_OF), sources(seed)
    assert np.array_equal(model.generate(ids, mask, 5, use_cache=use_cache, rng=RNG(seed), **options),
                          model.generate(ids, mask, 5))


@settings(max_examples=10)
@given(any_model, st.integers(0, 2**32))
def test_one_state_of_the_generator_gives_one_answer_with_and_without_a_cache(build, seed):
    model, (ids, mask) = build(seed, **IDS_OF), sources(seed)
    said = [model.generate(ids, mask, 6, use_cache=use_cache, temperature=2.0, rng=RNG(s))
            for s, use_cache in ((seed, True), (seed, False), (seed + 1, True))]
    assert np.array_equal(said[0], said[1]) and not np.array_equal(said[0], said[2])


def test_a_row_says_what_it_says_alone_with_its_own_numbers():
    """Row i of a mixed batch uses the numbers i * tokens to (i + 1) * tokens - 1 of the generator."""
    model, (ids, mask) = with_adapters(), sources(rows=6)
    found = model.generate(ids, mask, 7, ROUTING, temperature=2.0, top_p=0.95, rng=RNG(3))
    assert len({tuple(row) for row in found.tolist()}) == 6
    for i, entry in enumerate(ROUTING):
        rng = RNG(3)
        rng.bit_generator.advance(7 * i)
        alone = model.generate(ids[i:i + 1], mask[i:i + 1], 7, [entry], temperature=2.0, top_p=0.95, rng=rng)[0]
        assert np.array_equal(found[i, :len(alone)], alone) and (found[i, len(alone):] == 3).all()


@every_model
def test_rows_that_have_ended_are_filled_with_pad_and_draw_their_numbers_all_the_same(build):
    model, (ids, mask), rng = build(**IDS_OF), sources(), RNG(0)
    steps = iter([[7, 8, 9], [2, 8, 9], [9, 2, 9], [9, 9, 2], [9, 9, 9]])

    def logits(hidden: Any) -> Tensor:
        said = np.full((3, 1, VOCAB), -INF)
        said[np.arange(3), 0, next(steps)] = 0.0
        return Tensor(said)

    model.logits = logits
    assert model.generate(ids, mask, 6, rng=rng).tolist() == [[5, 7, 2, 3, 3], [5, 8, 8, 2, 3], [5, 9, 9, 9, 2]]
    other = RNG(0)
    other.random((3, 6))
    assert rng.bit_generator.state == other.bit_generator.state


@pytest.mark.parametrize("options, error, message", [
    *(({"temperature": value}, ValueError, f"temperature is {value!r}; expected a finite number > 0")
      for value in (0, -1.0, math.nan, INF, "1", True)),
    *(({"top_k": value}, ValueError, f"top_k is {value!r}; expected an integer >= 1") for value in (0, -1, 2.0, True)),
    *(({"top_p": value}, ValueError, f"top_p is {value!r}; expected a number above 0 and at most 1")
      for value in (0.0, -0.5, 1.5, math.nan, "1", None)),
    ({"rng": 7}, TypeError, "rng is int; expected a numpy.random.Generator"),
    ({"num_beams": 3}, ValueError, "rng is given with num_beams 3; expected num_beams 1")])
def test_an_option_of_sampling_out_of_range_is_refused_and_nothing_is_drawn(options, error, message):
    model, (ids, mask), rng = t5_v11(), sources(), RNG(0)
    model.encoder = None
    with pytest.raises(error, match=f"^{message}"):
        model.generate(ids, mask, 8, **{"rng": rng, **options})
    assert rng.bit_generator.state == RNG(0).bit_generator.state


@pytest.mark.parametrize("options", [
    {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.9}, {"top_p": 0.9, "num_beams": 2}])
def test_options_of_sampling_without_a_generator_are_refused_with_what_to_do(options):
    with pytest.raises(ValueError, match=r"without rng; they are for sampling: pass rng=numpy\.random\.default_rng"):
        t5_v11().generate([[5]], **options)


@pytest.mark.parametrize("gone", [math.nan, INF, -INF])
def test_logits_that_are_not_numbers_end_the_generation_with_an_error(gone):
    with pytest.raises(ValueError, match="the largest logit of the next token is NaN or infinite"):
        distribution(np.array([[0.0, 1.0], [gone, gone]]))
