"""Bugs planted in the uses of the plain LoRA table: by parts of a model, by ids, and in its gradients."""
from __future__ import annotations

import numpy

from minipeft.conformance.method import Planted
from minipeft.conformance.methods.lora_embedding.plain import LoraEmbedding
from minipeft.conformance.planted import Accumulates

PLANTED = planted = Planted("embedding")


@planted("no_effect", "NoEffect")
class NoEffect(LoraEmbedding):
    """The adapter hangs on a table that the model no longer uses: only merging involves it."""

    def forward(self, ids):
        return self.E[self.checked(ids)]

    def head(self, h):
        return self.e.mm(h, self.E.T)

    def vjp(self, ids, g):
        self.checked(ids)
        return {"A": None, "B": None, "E": None}

    def vjp_tied(self, ids, g, h, q):
        return self.vjp(ids, g)


@planted("no_effect_zeros", "NoEffect")
class NoEffectZeros(NoEffect):
    def vjp(self, ids, g):
        self.checked(ids)
        return {"A": 0 * self.A, "B": 0 * self.B, "E": None}


@planted("head_only", "HeadOnly")
class HeadOnly(LoraEmbedding):
    def forward(self, ids):
        return self.E[self.checked(ids)]

    def vjp(self, ids, g):
        self.checked(ids)
        return {"A": 0 * self.A, "B": 0 * self.B, "E": None}


@planted("lookup_only", "LookupOnly")
class LookupOnly(LoraEmbedding):
    def head(self, h):
        return self.e.mm(h, self.E.T)

    def vjp_tied(self, ids, g, h, q):
        return self.vjp(ids, g)


@planted("head_gradient_lost", "TiedGradientLost")
class HeadGradientLost(LoraEmbedding):
    def vjp_tied(self, ids, g, h, q):
        return self.vjp(ids, g)


@planted("lookup_gradient_lost", "TiedGradientLost")
class LookupGradientLost(LoraEmbedding):
    def vjp_tied(self, ids, g, h, q):
        return {**self.vjp_head(h, q), "E": None}


@planted("encoder_only", "OneStackOnly")
class EncoderOnly(LoraEmbedding):
    def forward_decoder(self, ids):
        return self.E[self.checked(ids)]


@planted("ids_off_by_one", "IdsOffByOne")
class IdsOffByOne(LoraEmbedding):
    """In the adapter alone, ids count from 1, as if id 0 were padding."""

    def codes(self, ids):
        return self.A.T[ids - 1]


@planted("ids_wrapped", "IdsWrapped")
class IdsWrapped(LoraEmbedding):
    def checked(self, ids):
        return ids % len(self.E)


@planted("ids_negative", "NegativeIds")
class NegativeIds(LoraEmbedding):
    """A negative id has NumPy's meaning: -1 is the last row."""

    def checked(self, ids):
        return super().checked(numpy.where(ids < 0, ids + len(self.E), ids))


@planted("ids_clipped", "IdsClipped")
class IdsClipped(LoraEmbedding):
    def checked(self, ids):
        return numpy.clip(ids, 0, len(self.E) - 1)


@planted("padding_skipped", "PaddingSkipped")
class PaddingSkipped(LoraEmbedding):
    def scattered(self, ids, rows):
        return super().scattered(ids[ids != 0], rows[ids != 0])


@planted("grad_overwritten", "GradientOverwritten")
class GradOverwritten(LoraEmbedding):
    """out[ids] += rows: NumPy keeps only the last row of each id."""

    def scattered(self, ids, rows):
        out = numpy.zeros((len(self.E), rows.shape[1]))
        out[ids] += rows
        return self.e.r(out)


@planted("grad_by_frequency", "GradientByFrequency")
class GradByFrequency(LoraEmbedding):
    def scattered(self, ids, rows):
        often = numpy.bincount(ids, minlength=len(self.E))
        return self.e.r(super().scattered(ids, rows) / numpy.maximum(often, 1)[:, None])


@planted("grad_mean", "GradientIsMean")
class GradMean(LoraEmbedding):
    def vjp(self, ids, g):
        found = super().vjp(ids, g)
        return {**found, "A": self.e.r(found["A"] / ids.size)}


@planted("grad_b_mean", "GradientIsMean")
class GradBMean(LoraEmbedding):
    def vjp(self, ids, g):
        found = super().vjp(ids, g)
        return {**found, "B": self.e.r(found["B"] / len(ids))}


@planted("grad_a_unscaled", "GradientForgetsScale")
class GradAUnscaled(LoraEmbedding):
    def vjp(self, ids, g):
        found, flat = super().vjp(ids, g), ids.reshape(-1)
        return {**found, "A": self.scattered(flat, self.e.mm(g.reshape(len(flat), -1), self.B)).T}


@planted("grad_spread", "GradientSpread")
class GradSpread(LoraEmbedding):
    """Every id has a gradient in A, as from weight decay, whether it occurred or not."""

    def vjp(self, ids, g):
        found = super().vjp(ids, g)
        return {**found, "A": self.e.r(found["A"] + 0.5 * self.A)}


@planted("table_gradient", "TableTrained")
class TableGradient(LoraEmbedding):
    def vjp(self, ids, g):
        flat = ids.reshape(-1)
        return {**super().vjp(ids, g), "E": self.scattered(flat, g.reshape(len(flat), -1))}


@planted("frozen_zeros", "FrozenZeros")
class FrozenZeros(LoraEmbedding):
    def vjp(self, ids, g):
        return {**super().vjp(ids, g), "E": 0 * self.E}


@planted("table_leaks", "FrozenGradient")
class TableLeaks(LoraEmbedding):
    def vjp(self, ids, g):
        rows = numpy.zeros(self.E.shape)
        numpy.add.at(rows, ids, g)
        return {**super().vjp(ids, g), "E": rows}


@planted("positions_mixed", "PositionsMixed")
class PositionsMixed(LoraEmbedding):
    def low_rank(self, ids):
        y = super().low_rank(ids)
        return self.e.r(y + 0.125 * y[:1, :1])


@planted("gradients_accumulate", "GradientsAccumulate")
class GradientsAccumulate(Accumulates, LoraEmbedding):
    pass
