"""Bugs planted in the plain training steps: the gradient, its accumulation, and its clipping."""
from __future__ import annotations

import numpy

from minipeft.conformance.method import Planted
from minipeft.conformance.methods.lora_training.plain import LoraTraining

PLANTED = planted = Planted("training")


@planted("mean_of_means", "MeanOfMeans")
class MeanOfMeans(LoraTraining):
    def accumulated(self, micro_batches):
        parts = [super(MeanOfMeans, self).accumulated([micro]) for micro in micro_batches if micro[2].any()]
        n = len(parts)
        return sum(loss for loss, _ in parts) / n, {name: self.e.r(sum(g[name] for _, g in parts) / n)
                                                    for name in self.p}


@planted("last_micro_batch", "LastMicroBatch")
class LastMicroBatch(LoraTraining):
    def accumulated(self, micro_batches):
        loss, _ = super().accumulated(micro_batches)
        return loss, super().accumulated([m for m in micro_batches if m[2].any()][-1:])[1]


@planted("sum_not_mean", "SumNotMean")
class SumNotMean(LoraTraining):
    def accumulated(self, micro_batches):
        loss, grads = super().accumulated(micro_batches)
        total = self.tokens(micro_batches)
        return loss * total, {name: self.e.r(g * total) for name, g in grads.items()}


@planted("gradients_summed", "SumNotMean")
class GradientsSummed(SumNotMean):
    """The reported loss is right."""

    def accumulated(self, micro_batches):
        loss, grads = super().accumulated(micro_batches)
        return loss / self.tokens(micro_batches), grads


@planted("micro_batches_not_averaged", "SumNotMean")
class NotAveraged(LoraTraining):
    """The micro-batches' means are summed: the loop forgets to divide by their number."""

    def accumulated(self, micro_batches):
        parts = [super(NotAveraged, self).accumulated([micro]) for micro in micro_batches if micro[2].any()]
        return sum(loss for loss, _ in parts), {name: self.e.r(sum(g[name] for _, g in parts)) for name in self.p}


@planted("rows_averaged", "RowsAveraged")
class RowsAveraged(LoraTraining):
    def tokens(self, micro_batches):
        rows = sum(len(w) for _, _, w in micro_batches)
        return float(rows) if any(w.any() for _, _, w in micro_batches) else 0.0


@planted("padding_counts", "PaddingCounts")
class PaddingCounts(LoraTraining):
    def sums(self, x, t, w):
        return super().sums(x, t, numpy.ones_like(w))


@planted("empty_nan", "EmptyIsNaN")
class EmptyIsNaN(LoraTraining):
    """Each mean is multiplied by its tokens and divided by those of the step: right, except for 0 / 0."""

    def sums(self, x, t, w):
        loss, grads = super().sums(x, t, w)
        with numpy.errstate(invalid="ignore"):
            n = numpy.float64(w.sum())
            return loss / n * n, {name: self.e.r(self.e.r(g / n) * n) for name, g in grads.items()}


@planted("empty_step_made", "EmptyStepMade")
class EmptyStepMade(LoraTraining):
    def tokens(self, micro_batches):
        return super().tokens(micro_batches) or 1.0


@planted("refused_half_way", "RefusesLate")
class RefusedHalfWay(LoraTraining):
    def step(self, micro_batches):
        self.p["A"] = self.decayed("A", self.p["A"]) if not super().tokens(micro_batches) else self.p["A"]
        return super().step(micro_batches)


@planted("refused_after_counting", "RefusesLate")
class RefusedAfterCounting(LoraTraining):
    """A refused step counts in the schedule."""

    def tokens(self, micro_batches):
        found = super().tokens(micro_batches)
        self.t += found == 0
        return found


@planted("refused_after_the_first", "RefusesLate")
class RefusedAfterTheFirst(LoraTraining):
    """It checks a micro-batch when its turn comes. By then the others are in the moments."""

    def step(self, micro_batches):
        x, t, w = micro_batches[-1]
        if x.shape != (len(w), self.W.shape[1]) or t.shape != (len(w), self.W.shape[0]):
            super().step(micro_batches[:-1])
        return super().step(micro_batches)


@planted("rows_cut", "RefusesNothing")
class RowsCut(LoraTraining):
    def step(self, micro_batches):
        return super().step([tuple(a[:min(map(len, micro))] for a in micro) for micro in micro_batches])


@planted("order_matters", "RowsMixed")
class OrderMatters(LoraTraining):
    """The gradient counts the first micro-batch twice."""

    def accumulated(self, micro_batches):
        loss, grads = super().accumulated(micro_batches)
        return loss, super().accumulated([micro_batches[0], *micro_batches])[1]


@planted("grad_a_unscaled", "GradientForgetsScale")
class GradAUnscaled(LoraTraining):
    def sums(self, x, t, w):
        loss, grads = super().sums(x, t, w)
        return loss, {**grads, "A": self.e.r(grads["A"] / self.scale)}


@planted("scale_alpha", "ScaleNotDivided")
class ScaleAlpha(LoraTraining):
    def __init__(self, W, b, A, B, alpha, dtype, *, optimizer):
        super().__init__(W, b, A, B, alpha, dtype, optimizer=optimizer)
        self.scale = alpha


@planted("gradient_kept", "GradientKept")
class GradientKept(LoraTraining):
    def accumulated(self, micro_batches):
        loss, grads = super().accumulated(micro_batches)
        self.kept = {name: self.e.r(g + getattr(self, "kept", {}).get(name, 0 * g)) for name, g in grads.items()}
        return loss, dict(self.kept)


@planted("loss_of_last", "LossOfLast")
class LossOfLast(LoraTraining):
    def accumulated(self, micro_batches):
        last = super().accumulated([m for m in micro_batches if m[2].any()][-1:])[0]
        return last, super().accumulated(micro_batches)[1]


@planted("loss_after_update", "LossAfterUpdate")
class LossAfterUpdate(LoraTraining):
    def step(self, micro_batches):
        super().step(micro_batches)
        return self.accumulated(micro_batches)[0]


@planted("clipped_early", "ClippedEarly")
class ClippedEarly(LoraTraining):
    def accumulated(self, micro_batches):
        total, loss, grads = self.tokens(micro_batches), 0.0, {name: 0 * p for name, p in self.p.items()}
        for micro in micro_batches:
            one, found = super().accumulated([micro]) if micro[2].any() else (0.0, grads)
            share = float(micro[2].sum()) / total
            self.norm = self.norm_of(found)
            loss += one * share
            grads = {name: self.e.r(grads[name] + share * g) for name, g in super().clipped(found).items()}
        return loss, grads

    def clipped(self, grads):
        return grads


@planted("clipped_apart", "ClippedApart")
class ClippedApart(LoraTraining):
    def clipped(self, grads):
        norm, found = self.norm, dict[str, numpy.ndarray]()
        for name, g in grads.items():
            self.norm = float(numpy.sqrt((g * g).sum()))
            found |= super().clipped({name: g})
        self.norm = norm
        return found


@planted("clip_counts_frozen", "ClipCountsFrozen")
class ClipCountsFrozen(LoraTraining):
    def sums(self, x, t, w):
        loss, grads = super().sums(x, t, w)
        y = x @ self.W.T + self.b + self.scale * (x @ self.p["A"].T) @ self.p["B"].T
        self.frozen = getattr(self, "frozen", 0.0) + (w[:, None] * (y - t)).T @ x
        return loss, grads

    def accumulated(self, micro_batches):
        self.frozen = 0.0
        found = super().accumulated(micro_batches)
        self.frozen /= self.tokens(micro_batches)
        return found

    def norm_of(self, grads):
        return float(numpy.hypot(super().norm_of(grads), numpy.linalg.norm(self.frozen)))


@planted("clip_forgotten", "ClipForgotten")
class ClipForgotten(LoraTraining):
    def clipped(self, grads):
        return grads


@planted("clip_squared", "ClipSquared")
class ClipSquared(LoraTraining):
    def norm_of(self, grads):
        return super().norm_of(grads) ** 2


@planted("clip_always", "ClipAlways")
class ClipAlways(LoraTraining):
    def clipped(self, grads):
        if self.o["clip"] is None or not self.norm:
            return grads
        return {name: self.e.r(g * (self.o["clip"] / self.norm)) for name, g in grads.items()}


@planted("clip_nan", "ClipNaN")
class ClipNaN(LoraTraining):
    def step(self, micro_batches):
        with numpy.errstate(invalid="ignore"):
            return super().step(micro_batches)

    def clipped(self, grads):
        if self.o["clip"] is None or self.norm:
            return super().clipped(grads)
        return {name: numpy.full_like(g, numpy.nan) for name, g in grads.items()}
