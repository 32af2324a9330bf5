"""Bugs planted in what the plain LoRA layer computes. The second argument of `planted` names its note in `notes.py`."""
from __future__ import annotations

import numpy

from minipeft.conformance.method import Planted
from minipeft.conformance.methods.lora_linear.plain import LoraLinear
from minipeft.conformance.planted import Accumulates

PLANTED = planted = Planted("lora")


@planted("scale_forgotten", "ScaleForgotten")
class ScaleForgotten(LoraLinear):
    def scale(self, A, alpha):
        return 1.0


@planted("scale_alpha", "ScaleNotDivided")
class ScaleAlpha(LoraLinear):
    def scale(self, A, alpha):
        return alpha


@planted("scale_times_rank", "ScaleTimesRank")
class ScaleTimesRank(LoraLinear):
    def scale(self, A, alpha):
        return alpha * len(A)


@planted("scale_sqrt", "RankStabilized")
class ScaleSqrt(LoraLinear):
    def scale(self, A, alpha):
        return alpha / len(A) ** 0.5


@planted("scale_twice", "ScaleTwice")
class ScaleTwice(LoraLinear):
    def scale(self, A, alpha):
        return (alpha / len(A)) ** 2


@planted("scale_two_percent", "ScaleSlightlyOff")
class ScaleTwoPercent(LoraLinear):
    def scale(self, A, alpha):
        return 1.02 * alpha / len(A)


@planted("alpha_int", "AlphaTruncated")
class AlphaInt(LoraLinear):
    def read(self, alpha):
        return int(alpha)


@planted("no_effect", "NoEffect")
class NoEffect(LoraLinear):
    """The adapter hangs on a layer that the model does not use: only merging involves it."""

    def forward(self, x):
        return self.base(x)

    def vjp(self, x, g):
        return {"x": self.e.mm(g, self.W), "A": None, "B": None, "W": None, "b": None}


@planted("dropout_at_eval", "DropoutInEvaluation")
class DropoutAtEval(LoraLinear):
    def low_rank(self, x, name):
        if self.dropout:
            keep = numpy.random.default_rng(0).random(x.shape) >= self.dropout
            x = self.e.r(x * keep / (1 - self.dropout))
        return super().low_rank(x, name)

    def forward_train(self, x, keep):
        return self.e.r(self.base(x) + LoraLinear.low_rank(self, self.e.r(x * keep / (1 - self.dropout)), "default"))


@planted("dropout_unscaled", "DropoutUnscaled")
class DropoutUnscaled(LoraLinear):
    def forward_train(self, x, keep):
        return self.e.r(self.base(x) + self.low_rank(x * keep, self.active[0]))


@planted("dropout_on_base", "DropoutOnBase")
class DropoutOnBase(LoraLinear):
    def forward_train(self, x, keep):
        x = self.e.r(x * keep / (1 - self.dropout))
        return self.e.r(self.base(x) + self.low_rank(x, self.active[0]))


@planted("grad_a_unscaled", "GradientForgetsScale")
class GradAUnscaled(LoraLinear):
    def vjp(self, x, g):
        return {**super().vjp(x, g), "A": self.e.mm(self.e.mm(g, self.adapters[self.active[0]][1]).T, x)}


@planted("grad_a_mean", "GradientIsMean")
class GradAMean(LoraLinear):
    def vjp(self, x, g):
        found = super().vjp(x, g)
        return {**found, "A": self.e.r(found["A"] / len(x))}


@planted("grad_x_stopped", "GradientStopped")
class GradXStopped(LoraLinear):
    def vjp(self, x, g):
        return {**super().vjp(x, g), "x": self.e.mm(g, self.W)}


@planted("bias_gradient", "BiasTrained")
class BiasGradient(LoraLinear):
    def vjp(self, x, g):
        return {**super().vjp(x, g), "b": self.e.sum(g, axis=0)}


@planted("gradient_moves", "GradientMoves")
class GradientMoves(LoraLinear):
    def vjp(self, x, g):
        found = super().vjp(x, g)
        A, B, alpha = self.adapters[self.active[0]]
        self.adapters[self.active[0]] = 2 * A, B, alpha
        return found


@planted("frozen_zeros", "FrozenZeros")
class FrozenZeros(LoraLinear):
    def vjp(self, x, g):
        return {**super().vjp(x, g), "W": 0 * self.W}


@planted("base_leaks", "FrozenGradient")
class BaseLeaks(LoraLinear):
    def vjp(self, x, g):
        return {**super().vjp(x, g), "W": self.e.mm(g.T, x)}


@planted("bias_trainable", "BiasTrained")
class BiasTrainable(LoraLinear):
    def trainable(self):
        return {"A", "B", "b"}


@planted("base_steps", "BaseTrained")
class BaseSteps(LoraLinear):
    def step(self, x, g, lr):
        super().step(x, g, lr)
        self.W = self.e.r(self.W * (1 - 0.1 * lr))


@planted("normalized", "DeltaNormalized")
class Normalized(LoraLinear):
    def low_rank(self, x, name):
        size = float(numpy.sqrt((self.adapters[name][1] ** 2).sum())) or 1.0
        return self.e.r(super().low_rank(x, name) / size)


@planted("adapter_bias", "AdapterBias")
class AdapterBias(LoraLinear):
    def low_rank(self, x, name):
        return self.e.r(super().low_rank(x, name) + 0.25)


@planted("row_zero_leaks", "RowsMixed")
class RowZeroLeaks(LoraLinear):
    def low_rank(self, x, name):
        y = super().low_rank(x, name)
        return self.e.r(y + 1e-3 * y[:1])


@planted("a_transposed", "ATransposed")
class ATransposed(LoraLinear):
    def add(self, name, A, B, alpha):
        super().add(name, A.T if A.shape[0] == A.shape[1] else A, B, alpha)


@planted("gradients_of_b_rolled", "GradientOfB")
class GradBRolled(LoraLinear):
    def vjp(self, x, g):
        found = super().vjp(x, g)
        return {**found, "B": numpy.roll(found["B"], 1, axis=0)}


@planted("gradients_accumulate", "GradientsAccumulate")
class GradientsAccumulate(Accumulates, LoraLinear):
    pass
