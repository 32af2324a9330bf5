"""Soft prompts that are right in another way than the reference's: none of them may fail."""
from __future__ import annotations

import math
from typing import Callable

import numpy
import pytest

from minipeft.conformance.arithmetic import arithmetic
from minipeft.conformance.emulated import Emulated
from minipeft.conformance.methods.soft_prompt.equations import values
from minipeft.conformance.methods.soft_prompt.plain import SoftPrompt
from minipeft.conformance.running import Bounded, softmax
from minipeft.conformance.tolerance import rho
from tests.conformance.test_soft_prompt import by_hand, case_of, failing


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_bound_of_a_softmax_holds_for_either_form(dtype: str):
    arith, r = arithmetic(dtype), Emulated(dtype).r
    for seed in range(20):
        rng = numpy.random.default_rng(seed)
        x = r(4 * rng.standard_normal((50, 7)) + rng.choice([0.0, 30.0]))
        x[:10] = x[:10, :1]  # the same score everywhere: 1 / 7
        bounded, top = softmax(Bounded.of(x, arith)), x.max(axis=1, keepdims=True)
        e = r(numpy.exp(r(x - top)))
        lse = r(top + r(numpy.log(r(e.sum(axis=1, keepdims=True)))))
        for got in (r(e / r(e.sum(axis=1, keepdims=True))), r(numpy.exp(r(x - lse)))):
            assert rho(got, bounded.value, bounded.error) <= 1


class ByLogSum(SoftPrompt):
    """exp(s - log sum exp s), each step rounded."""

    def weights_of(self, scores: numpy.ndarray) -> numpy.ndarray:
        r, top = self.e.r, scores.max(axis=-1, keepdims=True)
        sums = self.e.sum(r(numpy.exp(r(scores - top))), axis=-1, keepdims=True)
        return r(numpy.exp(r(scores - r(top + r(numpy.log(sums))))))


class ByLargestOfAll(SoftPrompt):
    """exp(s - m), m the largest score of all keys, also of those that the mask hides."""

    def attention(self, x: numpy.ndarray, seen: numpy.ndarray, positions: numpy.ndarray) -> numpy.ndarray:
        self.seen = seen
        return super().attention(x, seen, positions)

    def bias(self, seen: numpy.ndarray, positions: numpy.ndarray) -> numpy.ndarray:
        return super().bias(numpy.ones_like(seen), positions)

    def weights_of(self, scores: numpy.ndarray) -> numpy.ndarray:
        r = self.e.r
        e = r(numpy.exp(r(scores - scores.max(axis=-1, keepdims=True)))) * self.seen[:, None, :]
        return r(e / self.e.sum(e, axis=-1, keepdims=True))


class BaseApart(SoftPrompt):
    """Without a prompt, by the other form: another path leads to the same output."""

    def base_forward(self, ids: numpy.ndarray, mask: numpy.ndarray) -> numpy.ndarray:
        return ByLogSum(self.P[:0], self.base, self.e.dtype).forward(ids, mask)


class OneLength(SoftPrompt):
    """Refuses a file of another length."""

    def load(self, blob: bytes) -> None:
        before = self.P
        super().load(blob)
        if len(self.P) != len(before):
            self.P = before
            raise ValueError("a prompt of another length")


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("build", [ByLogSum, ByLargestOfAll, BaseApart, OneLength])
def test_what_is_right_in_another_way_fails_nothing(build: Callable, dtype: str):
    for seed in range(3):
        for relative in (False, True):
            for exact in (False, True):
                assert failing(build, case_of(relative, exact, dtype, seed)) == set()


def test_a_gradient_that_may_be_rounding_is_not_missed():
    """dy/dP = 3 w + 3 w (1 - w) k, w = 1 / (1 + exp(-k - 1/2)), is next to 0 for some k."""
    low, high = -3.0, -1.0
    for _ in range(60):
        k = (low + high) / 2
        w = 1 / (1 + math.exp(-k - 0.5))
        low, high = (low, k) if 1 + (1 - w) * k > 0 else (k, high)
    case = by_hand().but({"k": numpy.array([[float(numpy.float32(low))]])}, dtype="float32")
    ref = values(case)["dP"]
    assert 0 < abs(ref.exact).max() < case.tau(ref).max()

    class Zero(SoftPrompt):
        def vjp(self, *args):
            return {"P": numpy.zeros((1, 1)), "E": None}

    assert failing(Zero, case) == set()
