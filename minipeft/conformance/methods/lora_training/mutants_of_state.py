"""Bugs planted in the plain training steps: at the ends of schedules, in moments, and in resumed runs."""
from __future__ import annotations

import math

import numpy

from minipeft.conformance.methods.lora_training.mutants import PLANTED
from minipeft.conformance.methods.lora_training.plain import LoraTraining

planted = PLANTED


@planted("warmup_of_nothing", "WarmupOfNothing")
class WarmupOfNothing(LoraTraining):
    def warm(self, t, warmup):
        return super().warm(t, warmup) if warmup else min(t - 1, 1.0)


@planted("linear_goes_on", "ScheduleBeyondItsEnd")
class LinearGoesOn(LoraTraining):
    def factor(self, t):
        kind, warmup, steps = (self.o["schedule"][name] for name in ("kind", "warmup", "steps"))
        return (steps - t + 1) / (steps - warmup) if kind == "linear" and t > steps else super().factor(t)


@planted("cosine_rises", "ScheduleBeyondItsEnd")
class CosineRises(LoraTraining):
    def factor(self, t):
        kind, warmup, steps = (self.o["schedule"][name] for name in ("kind", "warmup", "steps"))
        gone = (t - 1 - warmup) / (steps - warmup)
        return (1 + math.cos(math.pi * gone)) / 2 if kind == "cosine" and t > steps else super().factor(t)


@planted("beta_replaced", "BetaReplaced")
class BetaReplaced(LoraTraining):
    def betas(self):
        b1, b2 = super().betas()
        return b1 or 0.9, b2 or 0.999


@planted("correction_ends", "CorrectionEnds", below={
    "bfloat16": "after ten steps the bounds of A are wider than what is left of the bias"})
class CorrectionEnds(LoraTraining):
    def corrected(self, m, v, t):
        return super().corrected(m, v, t) if t < 10 else (m, v)


@planted("resume_keeps_step", "ResumeKeepsStep")
class ResumeKeepsStep(LoraTraining):
    def load_state(self, blob):
        own = self.t
        super().load_state(blob)
        self.t = max(own, self.t)


@planted("resume_keeps_moments", "ResumeKeepsMoments")
class ResumeKeepsMoments(LoraTraining):
    """A load sets moments only where there are none yet."""

    def load_state(self, blob):
        own = {name: (self.m[name], self.v[name]) for name in self.m}
        super().load_state(blob)
        for name, (m, v) in own.items():
            self.m[name], self.v[name] = (m, v) if numpy.any(v) else (self.m[name], self.v[name])


@planted("empty_loses_next", "EmptyLosesNext")
class EmptyLosesNext(LoraTraining):
    """Only from the third micro-batch of a step on."""

    def accumulated(self, micro_batches):
        kept = [micro for i, micro in enumerate(micro_batches)
                if i < 2 or micro_batches[i - 1][2].any()]
        loss, grads = super().accumulated(kept)
        share = self.tokens(kept) / self.tokens(micro_batches)
        return loss * share, {name: self.e.r(g * share) for name, g in grads.items()}
