"""Training steps that are right in another way than the reference's: none of them may fail."""
from __future__ import annotations

import math

import numpy
import pytest

from minipeft.conformance.arithmetic import arithmetic
from minipeft.conformance.methods.lora_training import METHOD
from minipeft.conformance.methods.lora_training.batches import repeated, steps_of
from minipeft.conformance.methods.lora_training.equations import path_values
from minipeft.conformance.methods.lora_training.field import Bounds
from minipeft.conformance.methods.lora_training.plain import LoraTraining
from tests.conformance.test_lora_training import drawn, failures, of_adamw, plugin


class Stepped(LoraTraining):
    """The learning rate is the last one times a quotient, as of torch's LinearLR and CosineAnnealingLR."""

    def factor(self, t):
        f = super().factor(1)
        for k in range(2, t + 1):
            last, next_ = super().factor(k - 1), super().factor(k)
            f = f * (1 + (next_ - last) / last) if last else next_
        return f


class AtTheEdge(LoraTraining):
    """A schedule that is off by as much as a formula may be."""

    def factor(self, t):
        off = 0 if self.o["schedule"]["kind"] == "constant" else 9 * numpy.finfo(self.e.wide).eps / 2
        return super().factor(t) * (1 - off)


class DecayAndStepAtOnce(LoraTraining):
    """Where nothing is clipped, p - lr' (decay p + u), without p (1 - lr' decay) on the way."""

    def update(self, grads):
        if self.o["clip"] is not None:
            return super().update(grads)
        for name, g in grads.items():
            whole = self.o["weight_decay"] * self.p[name] + self.direction(name, g)
            self.p[name] = self.e.r(self.p[name] - self.e.r(self.rate * self.e.r(whole)))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("build", [Stepped, AtTheEdge, DecayAndStepAtOnce])
def test_what_is_right_in_another_way_fails_nothing(build, dtype):
    for case in (*(of_adamw(seed, dtype) for seed in (4, 7, 11, 12)), drawn(3, dtype, exact=True)):
        assert failures(plugin(build), case) == set()


def test_dyadic_steps_have_one_learning_rate():
    case = drawn(3, exact=True)
    assert METHOD.exact_when(case)
    assert not METHOD.exact_when(case.but(params={"schedule": "linear", "warmup": 2, "steps": 4}))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_schedule_that_is_stepped_stays_within_its_bound(dtype):
    """As torch's LinearLR steps it: up from 1/n in n - 1 steps, and as its CosineAnnealingLR: down, by ratios."""
    one, bounds, most = numpy.dtype(dtype).type, Bounds(arithmetic(dtype)), 0.0
    for n in (3, 7, 30, 300):
        start = one(1) / one(n)
        up, down = start, one(1)
        for k in range(1, n):
            up = up * (one(1) + (one(1) - start) / (one(n - 1) * start + one(k - 1) * (one(1) - start)))
            cos = [one(1) + numpy.cos(one(math.pi) * one(i) / one(n)) for i in (k - 1, k)]
            down = down * (cos[1] / cos[0])
            for got, want in ((up, numpy.longdouble(k + 1) / n), (down, (1 + numpy.cos(
                    4 * numpy.arctan(numpy.longdouble(1)) * k / n)) / 2)):
                assert abs(got - want) <= bounds.factor(want, k + 1).error
                most = max(most, float(abs(got - want) / bounds.sums.u_s))
    assert most > 10  # more than a formula


def test_a_case_is_repeated_step_by_step():
    case = of_adamw(4, "float64")
    own, twice = steps_of(case), steps_of(repeated(case, 7))
    assert len(own) == 5 and len(twice) == 7 and len(path_values(repeated(case, 7))) == 7
    for got, want in zip(twice, own + own):
        assert all(numpy.array_equal(a, b) for g, w in zip(got, want) for a, b in zip(g, w))
