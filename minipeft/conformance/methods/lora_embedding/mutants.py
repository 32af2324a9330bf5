"""Bugs planted in the plain LoRA table: scales, shapes, merging, files. `mutants_of_uses.py` has those of its uses."""
from __future__ import annotations

import numpy
import safetensors.numpy

from minipeft.conformance.method import Planted
from minipeft.conformance.methods.lora_embedding.plain import LoraEmbedding

PLANTED = planted = Planted("embedding")
HALF_THE_BITS = {"float64": 26, "float32": 12, "float16": 5, "bfloat16": 4}


@planted("scale_forgotten", "ScaleForgotten")
class ScaleForgotten(LoraEmbedding):
    def scale(self):
        return 1.0


@planted("scale_alpha", "ScaleNotDivided")
class ScaleAlpha(LoraEmbedding):
    def scale(self):
        return self.alpha


@planted("scale_by_width", "ScaleByAnotherAxis")
class ScaleByWidth(LoraEmbedding):
    """alpha / B.shape[0]: the rank is read off the wrong axis, d."""

    def scale(self):
        return self.alpha / len(self.B)


@planted("scale_sqrt", "RankStabilized")
class ScaleSqrt(LoraEmbedding):
    def scale(self):
        return self.alpha / len(self.A) ** 0.5


@planted("scale_twice", "ScaleTwice")
class ScaleTwice(LoraEmbedding):
    def scale(self):
        return (self.alpha / len(self.A)) ** 2


@planted("scale_two_percent", "ScaleSlightlyOff")
class ScaleTwoPercent(LoraEmbedding):
    def scale(self):
        return 1.02 * self.alpha / len(self.A)


@planted("alpha_int", "AlphaTruncated")
class AlphaInt(LoraEmbedding):
    def read(self, alpha):
        return int(alpha)


@planted("alpha_optional", "AlphaMissing")
class AlphaOptional(LoraEmbedding):
    def take(self, A, B, alpha):
        super().take(A, B, alpha or 0.0)


@planted("unchecked", "Unchecked")
class Unchecked(LoraEmbedding):
    def take(self, A, B, alpha):
        self.A, self.B, self.alpha = A.copy(), B.copy(), alpha


@planted("merged_head_adds_again", "MergedForwardAddsAgain")
class MergedHeadAddsAgain(LoraEmbedding):
    def head(self, h):
        return self.e.r(self.e.mm(h, self.E.T) + self.low_rank_head(h))


@planted("merged_adds_again", "MergedForwardAddsAgain")
class MergedAddsAgain(LoraEmbedding):
    def forward(self, ids):
        return self.e.r(self.E[self.checked(ids)] + self.low_rank(ids))


@planted("merge_transposed", "MergeTransposed")
class MergeTransposed(LoraEmbedding):
    def merged(self):
        d = self.delta()
        return self.e.r(self.E + (d.T if d.shape[0] == d.shape[1] else d))


@planted("merge_unscaled", "MergeForgetsScale")
class MergeUnscaled(LoraEmbedding):
    def merged(self):
        return self.e.r(self.E + self.e.mm(self.B, self.A).T)


@planted("merge_lost", "MergeLost")
class MergeLost(LoraEmbedding):
    """The update goes into a copy of the table."""

    def merged(self):
        return self.E


@planted("merge_renormalizes", "MergeRenormalizes")
class MergeRenormalizes(LoraEmbedding):
    def merged(self):
        e = super().merged()
        norm, was = (numpy.sqrt((v ** 2).sum(axis=1, keepdims=True)) for v in (e, self.E))
        return self.e.r(e * was / numpy.where(norm == 0, 1, norm))


class Subtracts(LoraEmbedding):
    """Not a bug in itself: it unmerges as most libraries do, by subtracting."""

    def unmerge(self):
        self.E, self.kept = self.subtracted(), None

    def subtracted(self):
        return self.e.r(self.E - self.delta())


@planted("unmerge_unscaled", "UnmergeForgetsScale")
class UnmergeUnscaled(Subtracts):
    def subtracted(self):
        return self.e.r(self.E - self.e.mm(self.B, self.A).T)


@planted("unmerge_rounded", "UnmergeDrifts")
class UnmergeRounded(Subtracts):
    """Adds the unrounded update, and subtracts it rounded to half the digits that E has."""

    def subtracted(self):
        digits, exponent = numpy.frexp(self.delta())
        bits = HALF_THE_BITS[self.e.dtype]
        return self.e.r(self.E - numpy.ldexp(numpy.round(numpy.ldexp(digits, bits)), exponent - bits))

    def merged(self):
        return self.e.r(self.E + self.scale() * (self.B @ self.A).T)


@planted("merges_twice", "MergesTwice")
class MergesTwice(Subtracts):
    def merge(self):
        self.kept = self.E
        self.E = self.merged()


@planted("table_trainable", "TableTrained")
class TableTrainable(LoraEmbedding):
    def trainable(self):
        return {"A", "B", "E"}


@planted("table_steps", "TableTrained")
class TableSteps(LoraEmbedding):
    def step(self, ids, g, lr):
        super().step(ids, g, lr)
        self.E = self.e.r(self.E * (1 - 0.05 * lr))


@planted("a_transposed", "ATransposed")
class ATransposed(LoraEmbedding):
    def take(self, A, B, alpha):
        super().take(A.T if A.shape[0] == A.shape[1] else A, B, alpha)


@planted("adapter_bias", "AdapterBias")
class AdapterBias(LoraEmbedding):
    def low_rank(self, ids):
        return self.e.r(super().low_rank(ids) + 0.25)


@planted("normalized", "DeltaNormalized")
class Normalized(LoraEmbedding):
    def low_rank(self, ids):
        size = float(numpy.sqrt((self.B ** 2).sum())) or 1.0
        return self.e.r(super().low_rank(ids) / size)


@planted("save_drops_alpha", "SaveDropsAlpha")
class SaveDropsAlpha(LoraEmbedding):
    def load(self, blob):
        found = safetensors.numpy.load(blob)
        self.take(found["A"], found["B"], self.alpha)


@planted("saves_table", "SavesTable")
class SavesTable(LoraEmbedding):
    def state_keys(self):
        return {"A", "B", "alpha", "E"}


@planted("load_unchecked", "LoadUnchecked")
class LoadUnchecked(LoraEmbedding):
    def load(self, blob):
        found = safetensors.numpy.load(blob)
        self.take(found["A"][:, :len(self.E)], found["B"], float(found["alpha"]))
