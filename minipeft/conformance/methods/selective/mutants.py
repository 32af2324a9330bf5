"""Bugs planted in the plain block: in what it computes, and in its steps.

The second argument of `planted` names its note in `notes.py`."""
from __future__ import annotations

import numpy

from minipeft.conformance.method import Planted
from minipeft.conformance.methods.selective.plain import Selective

PLANTED = planted = Planted("selective")


@planted("eps_tiny", "EpsTiny")
class EpsTiny(Selective):
    def root(self, variance):
        return numpy.sqrt(variance + variance.dtype.type(1e-12))


@planted("eps_outside", "EpsOutside")
class EpsOutside(Selective):
    def root(self, variance):
        return numpy.sqrt(variance) + variance.dtype.type(self.eps)


@planted("variance_unbiased", "VarianceUnbiased")
class VarianceUnbiased(Selective):
    def variance(self, centred):
        return (centred * centred).sum(axis=-1, keepdims=True) / max(1, centred.shape[-1] - 1)


@planted("variance_cancels", "VarianceCancels", below={
    "bfloat16": "no variance on its grid is so small beside the mean that float32 statistics lose it"})
class VarianceCancels(Selective):
    """The variance is mean(x^2) - mean(x)^2."""

    def normalized(self, x):
        x = numpy.asarray(x, self.e.wide)
        mean = x.mean(axis=-1, keepdims=True)
        root = self.root(numpy.maximum((x * x).mean(axis=-1, keepdims=True) - mean * mean, 0))
        return self.e.r((x - mean) / root), 1 / root


@planted("mean_kept", "MeanKept")
class MeanKept(Selective):
    """The norm of T5: no mean is subtracted."""

    def centred(self, x):
        return x


@planted("batch_statistics", "BatchStatistics")
class BatchStatistics(Selective):
    def centred(self, x):
        return x - x.mean()


@planted("norm_reset", "NormReset")
class NormReset(Selective):
    """A trained norm starts with the values of a new one."""

    def choose(self, chosen):
        super().choose(chosen)
        for name, value in (("norm.weight", 1.0), ("norm.bias", 0.0)):
            if name in chosen:
                self.w = {**self.w, name: numpy.full(self.shape(name), value)}


@planted("norm_frozen", "NormFrozen")
class NormFrozen(Selective):
    def restricted(self, name, gradient):
        return None if name.startswith("norm") else super().restricted(name, gradient)


@planted("norm_not_stepped", "NormFrozen")
class NormNotStepped(Selective):
    """The norm has gradients, but the optimizer does not know it."""

    def stepped(self, name, w, gradient, lr, decay):
        return w if name.startswith("norm") else super().stepped(name, w, gradient, lr, decay)


@planted("scale_gradient_raw", "ScaleGradientNotNormalized")
class ScaleGradientRaw(Selective):
    def scale_gradient(self, gn, p, x):
        return self.e.sum(self.e.r(gn * x), axis=0)


@planted("gradient_mean", "GradientIsMean")
class GradientMean(Selective):
    def restricted(self, name, gradient):
        d = super().restricted(name, gradient)
        return None if d is None else self.e.r(d / (3 if name.startswith("fc2") else 1))


@planted("dx_stopped", "GradientStopped")
class DxStopped(Selective):
    """A frozen norm is run without gradients, so none passes through it."""

    def vjp(self, x, g):
        norm = any(name.startswith("norm") for name in self.chosen)
        return super().vjp(x, g) if norm else {**super().vjp(x, g), "x": g.copy()}


@planted("dx_statistics_stopped", "StatisticsStopped")
class DxStatisticsStopped(Selective):
    """Mean and variance are constants to the gradient."""

    def through_norm(self, gn, p):
        return self.e.r(p["inverse"] * (gn * self.w["norm.weight"]))


@planted("decay_outside_mask", "DecayOutsideMask")
class DecayOutsideMask(Selective):
    """The gradient is masked, but the optimizer decays the whole weight."""

    def stepped(self, name, w, gradient, lr, decay):
        return self.update(w, gradient, lr, decay)


@planted("decays_frozen", "DecayOnFrozen")
class DecaysFrozen(Selective):
    def step(self, x, g, lr, weight_decay=0.0):
        super().step(x, g, lr, weight_decay)
        self.w = {name: w if name in self.chosen else self.e.r(w * (1 - lr * weight_decay))
                  for name, w in self.w.items()}


@planted("restored_by_rounding", "RestoredByRounding")
class RestoredByRounding(Selective):
    """Every weight makes the step; frozen weights take it back."""

    def step(self, x, g, lr, weight_decay=0.0):
        full = self.all_gradients(x, g)
        before = dict(self.w)
        super().step(x, g, lr, weight_decay)
        for name, w in before.items():
            if name not in self.chosen:
                update = self.e.r(lr * full[name])
                self.w[name] = self.e.r(self.e.r(w - update) + update)


@planted("steps_frozen", "FrozenTrained")
class StepsFrozen(Selective):
    """The optimizer was given every parameter."""

    def step(self, x, g, lr, weight_decay=0.0):
        full = self.all_gradients(x, g)
        self.w = {name: self.update(w, full[name], lr, weight_decay) for name, w in self.w.items()}


@planted("decay_without_rate", "DecayWithoutRate")
class DecayWithoutRate(Selective):
    def update(self, w, gradient, lr, decay):
        return self.e.r(self.e.r(w * (1 - decay)) - self.e.r(lr * gradient))


@planted("decay_ignored", "DecayIgnored")
class DecayIgnored(Selective):
    def update(self, w, gradient, lr, decay):
        return super().update(w, gradient, lr, 0.0)


@planted("decay_to_start", "DecayElsewhere")
class DecayToStart(Selective):
    """Decay pulls towards the weights before training, without declaring it."""

    def stepped(self, name, w, gradient, lr, decay):
        home = self.e.r(lr * decay * self.base[name])
        return numpy.where(self.chosen[name], self.e.r(self.update(w, gradient, lr, decay) + home), w)


@planted("residual_normalized", "ResidualNormalized")
class ResidualNormalized(Selective):
    def forward(self, x):
        return self.e.r(super().forward(x) - x + self.parts(x)["n"])


@planted("relu_slope_missing", "ReluSlopeMissing")
class ReluSlopeMissing(Selective):
    """relu passes every gradient on."""

    def parts(self, x):
        found = super().parts(x)
        return {**found, "h": abs(found["h"]) + 1}
