"""Bugs planted in the plain adapter's gradients, in the choice of trained weights, in its files, and in its checks."""
from __future__ import annotations

import numpy
import safetensors.numpy

from minipeft.conformance.method import Planted
from minipeft.conformance.methods.bottleneck_adapter.plain import LEAVES, BottleneckAdapter
from minipeft.conformance.planted import Accumulates, SharedState, StaleForward, UsesLastInput

PLANTED = planted = Planted("adapter")


@planted("grad_mean", "GradientIsMean")
class GradMean(BottleneckAdapter):
    def vjp(self, x, n, F, g):
        found = super().vjp(x, n, F, g)
        return {**found, **{name: self.e.r(found[name] / len(x)) for name in LEAVES}}


@planted("grad_bias_of_one_row", "GradientOfOneRow")
class GradBiasOfOneRow(BottleneckAdapter):
    def vjp(self, x, n, F, g):
        return {**super().vjp(x, n, F, g), "b_U": self.e.r(self.s * g[0])}


@planted("grad_unscaled", "GradientForgetsScale")
class GradUnscaled(BottleneckAdapter):
    def vjp(self, x, n, F, g):
        h = self.read(x, n, F)
        return {**super().vjp(x, n, F, g), "U": self.e.mm(g.T, self.f(self.inner(h))), "b_U": self.e.sum(g, axis=0)}


@planted("grad_without_slope", "GradientWithoutSlope")
class GradWithoutSlope(BottleneckAdapter):
    def slope(self, z):
        return numpy.ones(z.shape)


@planted("grad_gelu_halved", "GradientOfGelu")
class GradGeluHalved(BottleneckAdapter):
    """The slope of gelu is Phi(z), without z phi(z)."""

    def slope(self, z):
        return self.phi(z) if self.activation == "gelu" else super().slope(z)


@planted("grad_stopped", "GradientStopped")
class GradStopped(BottleneckAdapter):
    def to_stream(self, g, dh):
        return super().to_stream(g, 0 * dh)


@planted("grad_skip_missing", "GradientWithoutSkip")
class GradSkipMissing(BottleneckAdapter):
    def to_stream(self, g, dh):
        return super().to_stream(0 * g, dh)


@planted("grad_to_sublayer_alone", "GradientToOneReader")
class GradToSublayerAlone(BottleneckAdapter):
    def to_stream(self, g, dh):
        found = super().to_stream(g, dh)
        return {**found, "x": g.copy()} if self.placement == "pfeiffer" else found


@planted("n_zeros", "UnreadZeros")
class NZeros(BottleneckAdapter):
    def to_stream(self, g, dh):
        return {**super().to_stream(g, dh), "n": 0 * g}


@planted("biases_frozen", "BiasesFrozen")
class BiasesFrozen(BottleneckAdapter):
    def trainable(self):
        return {"D", "U"}


@planted("bias_gradient_absent", "BiasesFrozen")
class BiasGradientAbsent(BottleneckAdapter):
    def vjp(self, x, n, F, g):
        return {**super().vjp(x, n, F, g), "b_D": None}


@planted("merge_ignored", "MergeIgnored")
class MergeIgnored(BottleneckAdapter):
    def merge(self):
        pass


@planted("save_drops_scale", "SaveDropsScale")
class SaveDropsScale(BottleneckAdapter):
    def load(self, blob):
        s = self.s
        super().load(blob)
        self.s = s


@planted("save_drops_biases", "SaveDropsBiases")
class SaveDropsBiases(BottleneckAdapter):
    def load(self, blob):
        found = safetensors.numpy.load(blob)
        super().load(safetensors.numpy.save({**found, "b_D": 0 * found["b_D"], "b_U": 0 * found["b_U"]}))


@planted("load_unchecked", "LoadUnchecked")
class LoadUnchecked(BottleneckAdapter):
    def load(self, blob):
        found, d = safetensors.numpy.load(blob), self.D.shape[1]
        self.take({"D": found["D"][:, :d], "b_D": found["b_D"], "U": found["U"][:d], "b_U": found["b_U"][:d]})
        self.s = float(found["scale"])


@planted("save_scale_in_half", "SaveScaleInHalf", below={
    "bfloat16": "float16 has all that bfloat16 has between 2^-14 and 2^16"})
class SaveScaleInHalf(BottleneckAdapter):
    def save(self):
        found = safetensors.numpy.load(super().save())
        return safetensors.numpy.save({**found, "scale": found["scale"].astype(numpy.float16)})


@planted("load_half", "LoadHalf")
class LoadHalf(BottleneckAdapter):
    """The file's scale is taken before the file is checked."""

    def load(self, blob):
        self.s = float(safetensors.numpy.load(blob)["scale"])
        super().load(blob)


@planted("load_misses_gradient", "LoadMissesGradient")
class LoadMissesGradient(BottleneckAdapter):
    """Gradients use the scale that the adapter was made with."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.first = self.s

    def vjp(self, x, n, F, g):
        now, self.s = self.s, self.first
        found = super().vjp(x, n, F, g)
        self.s = now
        return found


@planted("forward_stale", "ForwardStale")
class ForwardStale(StaleForward, BottleneckAdapter):
    pass


@planted("last_input", "LastInput")
class LastInput(UsesLastInput, BottleneckAdapter):
    pass


@planted("activation_in_class", "SharedByAll")
class ActivationInClass(SharedState, BottleneckAdapter):
    shared = ("activation",)


@planted("shapes_unchecked", "Broadcasts")
class ShapesUnchecked(BottleneckAdapter):
    def take(self, arrays):
        self.D, self.b_D, self.U, self.b_U = (arrays[name].copy() for name in LEAVES)


@planted("names_unchecked", "UnknownNames")
class NamesUnchecked(BottleneckAdapter):
    """An unknown name ends in the last branch of every `if`."""

    def expect(self, activation, placement, scale):
        pass


@planted("streams_unchecked", "Broadcasts")
class StreamsUnchecked(BottleneckAdapter):
    def fit(self, x, n, F):
        pass


@planted("gradients_accumulate", "GradientsAccumulate")
class GradientsAccumulate(Accumulates, BottleneckAdapter):
    pass
