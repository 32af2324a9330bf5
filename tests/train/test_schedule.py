"""Schedules: their values at the corners, their range, what they refuse."""
import math
from typing import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft import constant, cosine_decay, inverse_sqrt, linear_decay

DECAYS = [linear_decay, cosine_decay]


def test_constant_is_one() -> None:
    assert {constant()(step) for step in (1, 10, 10 ** 6)} == {1.0}


def test_linear_decay_goes_up_to_one_in_the_warmup_and_down_in_equal_parts() -> None:
    assert [linear_decay(6, warmup=2)(step) for step in range(1, 9)] == [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]


def test_cosine_decay_is_half_way_down_in_the_middle() -> None:
    factors = [cosine_decay(6, warmup=2)(step) for step in range(1, 9)]
    wanted = [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0, 0]
    assert factors == pytest.approx(wanted, abs=1e-15)  # a few roundings of numbers up to 1


def test_inverse_sqrt_is_the_papers_formula_and_peaks_at_the_end_of_the_warmup() -> None:
    rate = inverse_sqrt(512, warmup=4000)
    assert rate(4000) == pytest.approx(512 ** -0.5 * 4000 ** -0.5, rel=1e-15)
    assert rate(1000) == pytest.approx(rate(4000) / 4, rel=1e-15)
    assert rate(16000) == pytest.approx(rate(4000) / 2, rel=1e-15)


@pytest.mark.parametrize("decay", DECAYS)
@given(steps=st.integers(1, 300), data=st.data())
def test_a_decay_rises_to_one_never_rises_again_and_reaches_zero_after_the_last_step(
        decay: Callable, steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    schedule = decay(steps, warmup)
    factors = [schedule(step) for step in range(1, steps + 3)]
    assert all(0 <= f <= 1 for f in factors)
    assert factors[:warmup] == [step / warmup for step in range(1, warmup + 1)] and factors[warmup] == 1
    assert all(a > b for a, b in zip(factors[warmup:], factors[warmup + 1:steps + 1]))
    assert factors[steps:] == [0, 0]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("steps, warmup", [(5, 5), (5, -1), (0, 0)])
def test_a_warmup_that_leaves_no_step_is_refused(decay: Callable, steps: int, warmup: int) -> None:
    with pytest.raises(ValueError, match=f"warmup is {warmup} and steps {steps}; expected 0 <= warmup < steps"):
        decay(steps, warmup)


@pytest.mark.parametrize("d_model, warmup", [(0, 10), (8, 0)])
def test_inverse_sqrt_needs_a_width_and_a_warmup(d_model: int, warmup: int) -> None:
    with pytest.raises(ValueError, match=f"d_model is {d_model} and warmup {warmup}"):
        inverse_sqrt(d_model, warmup)
