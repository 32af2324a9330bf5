"""Bugs planted in what the plain adapter computes. The second argument of `planted` names its note in `notes.py`."""
from __future__ import annotations

import numpy

from minipeft.conformance.method import Planted
from minipeft.conformance.methods.bottleneck_adapter.plain import BottleneckAdapter

PLANTED = planted = Planted("adapter")
IN_BFLOAT16 = {"bfloat16": "the two differ by 5e-4 at most, and bfloat16 has steps of 4e-3 at 1"}


@planted("residual_missing", "ResidualMissing")
class ResidualMissing(BottleneckAdapter):
    def joined(self, x, F, a):
        return self.e.r(x + a)


@planted("stream_missing", "StreamMissing")
class StreamMissing(BottleneckAdapter):
    def joined(self, x, F, a):
        return self.e.r(F + a)


@planted("stream_twice", "StreamTwice")
class StreamTwice(BottleneckAdapter):
    """The skip connection around A carries its whole input x + F, and the block adds x once more."""

    def joined(self, x, F, a):
        y = super().joined(x, F, a)
        return self.e.r(y + x) if self.placement == "pfeiffer" else y


@planted("residual_scaled", "ResidualScaled")
class ResidualScaled(BottleneckAdapter):
    def joined(self, x, F, a):
        return super().joined(x, self.e.r(self.s * F), a)


@planted("bias_dropped", "BiasDropped")
class BiasDropped(BottleneckAdapter):
    def adapted(self, h):
        return self.e.r(self.s * self.e.mm(self.f(self.inner(h)), self.U.T))


@planted("inner_bias_dropped", "BiasDropped")
class InnerBiasDropped(BottleneckAdapter):
    def inner(self, h):
        return self.e.mm(h, self.D.T)


@planted("gelu_by_tanh", "GeluByTanh", below=IN_BFLOAT16)
class GeluByTanh(BottleneckAdapter):
    def phi(self, z):
        return self.e.r(0.5 * self.e.r(1 + self.bent(z)))


@planted("tanh_by_gelu", "TanhByGelu", below=IN_BFLOAT16)
class TanhByGelu(BottleneckAdapter):
    def f(self, z):
        return self.e.r(z * self.phi(z)) if self.activation == "gelu_tanh" else super().f(z)


@planted("gelu_by_sigmoid", "GeluBySigmoid")
class GeluBySigmoid(BottleneckAdapter):
    def f(self, z):
        r = self.e.r
        return r(z / r(1 + r(numpy.exp(-1.702 * z)))) if self.activation.startswith("gelu") else super().f(z)


@planted("swish_without_input", "SwishIsSigmoid")
class SwishIsSigmoid(BottleneckAdapter):
    def f(self, z):
        return self.e.r(1 / (1 + numpy.exp(-z))) if self.activation == "swish" else super().f(z)


@planted("activation_ignored", "ActivationIgnored")
class ActivationIgnored(BottleneckAdapter):
    """It is relu, whatever activation is asked for."""

    def f(self, z):
        return numpy.maximum(z, 0)


@planted("activation_missing", "ActivationMissing")
class ActivationMissing(BottleneckAdapter):
    def f(self, z):
        return z


@planted("activation_after", "ActivationAfter")
class ActivationAfter(BottleneckAdapter):
    """The activation acts after U, not before it."""

    def adapted(self, h):
        return self.e.r(self.s * self.f(self.e.r(self.e.mm(self.inner(h), self.U.T) + self.b_U)))


@planted("bias_after", "BiasAfter")
class BiasAfter(BottleneckAdapter):
    """b_D is added after the activation, not before it."""

    def adapted(self, h):
        a = self.e.r(self.f(self.e.mm(h, self.D.T)) + self.b_D)
        return self.e.r(self.s * self.e.r(self.e.mm(a, self.U.T) + self.b_U))


@planted("scale_forgotten", "ScaleForgotten")
class ScaleForgotten(BottleneckAdapter):
    def adapted(self, h):
        return self.e.r(self.e.mm(self.f(self.inner(h)), self.U.T) + self.b_U)


@planted("scale_before_bias", "ScaleBeforeBias")
class ScaleBeforeBias(BottleneckAdapter):
    def adapted(self, h):
        return self.e.r(self.e.r(self.s * self.e.mm(self.f(self.inner(h)), self.U.T)) + self.b_U)


@planted("scale_on_input", "ScaleOnInput")
class ScaleOnInput(BottleneckAdapter):
    def adapted(self, h):
        return self.e.r(self.e.mm(self.f(self.inner(self.e.r(self.s * h))), self.U.T) + self.b_U)


@planted("scale_two_percent", "ScaleSlightlyOff")
class ScaleTwoPercent(BottleneckAdapter):
    def adapted(self, h):
        return self.e.r(1.02 * super().adapted(h))


@planted("d_transposed", "Transposed")
class DTransposed(BottleneckAdapter):
    def inner(self, h):
        square = self.D.shape[0] == self.D.shape[1]
        return self.e.r(self.e.mm(h, self.D if square else self.D.T) + self.b_D)


@planted("u_transposed", "Transposed")
class UTransposed(BottleneckAdapter):
    def take(self, arrays):
        super().take(arrays)
        self.U = self.U.T if self.U.shape[0] == self.U.shape[1] else self.U


@planted("houlsby_reads_sum", "ReadsSum")
class HoulsbyReadsSum(BottleneckAdapter):
    def read(self, x, n, F):
        return self.e.r(x + F) if self.placement == "houlsby" else super().read(x, n, F)


@planted("pfeiffer_reads_sublayer", "ReadsSublayer")
class PfeifferReadsSublayer(BottleneckAdapter):
    def read(self, x, n, F):
        return F if self.placement == "pfeiffer" else super().read(x, n, F)


@planted("parallel_reads_sublayer", "ParallelIsSerial")
class ParallelReadsSublayer(BottleneckAdapter):
    def read(self, x, n, F):
        return F if self.placement == "parallel" else super().read(x, n, F)


@planted("parallel_reads_norm", "ParallelReadsNorm")
class ParallelReadsNorm(BottleneckAdapter):
    reads_norm = True


@planted("row_zero_leaks", "RowsMixed")
class RowZeroLeaks(BottleneckAdapter):
    def adapted(self, h):
        a = super().adapted(h)
        return self.e.r(a + 0.125 * a[:1])


@planted("unit_lost", "UnitLost")
class UnitLost(BottleneckAdapter):
    """The last unit of the bottleneck is left out."""

    def f(self, z):
        return super().f(z) * (numpy.arange(z.shape[1]) < max(1, z.shape[1] - 1))


@planted("normalized", "Normalized")
class Normalized(BottleneckAdapter):
    def adapted(self, h):
        size = float(numpy.sqrt((self.U ** 2).sum())) or 1.0
        return self.e.r(super().adapted(h) / size)


@planted("constant_added", "ConstantAdded")
class ConstantAdded(BottleneckAdapter):
    def adapted(self, h):
        return self.e.r(super().adapted(h) + 0.25)
