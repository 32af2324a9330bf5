"""Bugs planted in the plain training steps: the optimizer, the schedule, frozen weights, and resuming."""
from __future__ import annotations

import numpy

from minipeft.conformance.methods.lora_training.mutants import PLANTED
from minipeft.conformance.methods.lora_training.plain import LoraTraining

planted = PLANTED


@planted("decay_coupled", "DecayCoupled")
class DecayCoupled(LoraTraining):
    def decayed(self, name, p):
        return p

    def direction(self, name, g):
        return super().direction(name, self.e.r(g + self.o["weight_decay"] * self.p[name]))


@planted("decay_on_frozen", "DecayOnFrozen")
class DecayOnFrozen(LoraTraining):
    def update(self, grads):
        super().update(grads)
        self.W = self.decayed("W", self.W)


@planted("decay_without_rate", "DecayWithoutRate")
class DecayWithoutRate(LoraTraining):
    def decayed(self, name, p):
        return self.e.r(p * (1 - self.o["weight_decay"]))


@planted("decay_unscheduled", "DecayUnscheduled", below={
    "bfloat16": "where the rate varies there are only bounds, and decay is a small part of a step"})
class DecayUnscheduled(LoraTraining):
    def decayed(self, name, p):
        return self.e.r(p * (1 - self.o["lr"] * self.o["weight_decay"]))


@planted("decay_on_a", "DecayOnA")
class DecayOnA(LoraTraining):
    def decayed(self, name, p):
        return super().decayed(name, p) if name == "A" else p


@planted("decay_forgotten", "DecayForgotten")
class DecayForgotten(LoraTraining):
    def decayed(self, name, p):
        return p


@planted("eps_inside_root", "EpsInsideRoot")
class EpsInsideRoot(LoraTraining):
    def ratio(self, m, v):
        return m / numpy.sqrt(v + self.o["eps"])


@planted("eps_before_correction", "EpsBeforeCorrection")
class EpsBeforeCorrection(LoraTraining):
    def ratio(self, m, v):
        return m / (numpy.sqrt(v) + self.o["eps"] / numpy.sqrt(1 - self.betas()[1] ** self.t))


@planted("uncorrected", "Uncorrected")
class Uncorrected(LoraTraining):
    def corrected(self, m, v, t):
        return m, v


@planted("correction_late", "CorrectionLate")
class CorrectionLate(LoraTraining):
    def corrected(self, m, v, t):
        return super().corrected(m, v, t + 1)


@planted("correction_early", "CorrectionLate")
class CorrectionEarly(LoraTraining):
    def corrected(self, m, v, t):
        return super().corrected(m, v, max(t - 1, 1))


@planted("first_moment_uncorrected", "Uncorrected")
class FirstMomentUncorrected(LoraTraining):
    def corrected(self, m, v, t):
        return m, super().corrected(m, v, t)[1]


@planted("betas_swapped", "BetasSwapped")
class BetasSwapped(LoraTraining):
    def betas(self):
        return super().betas()[::-1]


@planted("update_clipped", "UpdateClipped")
class UpdateClipped(LoraTraining):
    """It clips the optimizer's update, array by array."""

    def clipped(self, grads):
        return grads

    def direction(self, name, g):
        found, norm = super().direction(name, g), self.norm
        self.norm = float(numpy.sqrt((found * found).sum()))
        found, self.norm = super().clipped({name: found})[name], norm
        return found


@planted("schedule_late", "ScheduleLate")
class ScheduleLate(LoraTraining):
    def factor(self, t):
        return super().factor(t - 1)


@planted("schedule_early", "ScheduleLate")
class ScheduleEarly(LoraTraining):
    def factor(self, t):
        return super().factor(t + 1)


@planted("warmup_from_zero", "ScheduleLate")
class WarmupFromZero(LoraTraining):
    """It follows the convention "first step at 0", without declaring it."""

    def warm(self, t, warmup):
        return super().warm(t - 1, warmup)


@planted("warmup_ignored", "WarmupIgnored")
class WarmupIgnored(LoraTraining):
    def warm(self, t, warmup):
        return 1.0


@planted("schedule_ignored", "ScheduleIgnored")
class ScheduleIgnored(LoraTraining):
    def factor(self, t):
        return 1.0


@planted("schedule_fast", "ScheduleFast")
class ScheduleFast(LoraTraining):
    def ticks(self, micro_batches):
        return len(micro_batches)


@planted("resume_without_moments", "ResumeWithoutMoments")
class ResumeWithoutMoments(LoraTraining):
    def load_state(self, blob):
        super().load_state(blob)
        self.m = {name: 0 * m for name, m in self.m.items()}
        self.v = {name: 0 * v for name, v in self.v.items()}


@planted("resume_without_step", "ResumeWithoutStep")
class ResumeWithoutStep(LoraTraining):
    def load_state(self, blob):
        super().load_state(blob)
        self.t = 0


@planted("resume_rounds", "ResumeRounds")
class ResumeRounds(LoraTraining):
    """The file keeps five binary digits of every number."""

    def load_state(self, blob):
        super().load_state(blob)
        for of in (self.p, self.m, self.v):
            for name, a in of.items():
                mantissa, power = numpy.frexp(a)
                of[name] = numpy.ldexp(numpy.round(32 * mantissa) / 32, power)


@planted("frozen_moments", "FrozenMoments")
class FrozenMoments(LoraTraining):
    def moments(self):
        return {**super().moments(), "m.W": 0 * self.W, "v.W": 0 * self.W}


@planted("bias_trained", "BiasTrained")
class BiasTrained(LoraTraining):
    def sums(self, x, t, w):
        y = x @ self.W.T + self.b + self.scale * (x @ self.p["A"].T) @ self.p["B"].T
        self.db = self.e.sum(w[:, None] * (y - t), axis=0)
        return super().sums(x, t, w)

    def update(self, grads):
        super().update(grads)
        self.b = self.e.r(self.b - self.rate * self.db)


@planted("b_after_a", "BTrainedAfterA")
class BAfterA(LoraTraining):
    """Two optimizers step one after the other, each on a gradient of its own."""

    def step(self, micro_batches):
        b = self.p["B"]
        loss = super().step(micro_batches)
        self.t, self.p["B"] = self.t - self.ticks(micro_batches), b
        if self.m:
            g = self.clipped(self.accumulated(micro_batches)[1])["B"]
            b1, b2 = self.betas()
            self.m["B"], self.v["B"] = ((self.m["B"] - (1 - b1) * self.last) / b1,
                                        numpy.maximum(self.v["B"] - (1 - b2) * self.last ** 2, 0) / b2)
        else:
            g = self.clipped(self.accumulated(micro_batches)[1])["B"]
        self.t += self.ticks(micro_batches)
        self.p["B"] = self.e.r(self.decayed("B", b) - self.rate * self.direction("B", g))
        return loss

    def direction(self, name, g):
        if name == "B":
            self.last = g
        return super().direction(name, g)


SHARED: dict = {}


@planted("moments_shared", "MomentsShared")
class MomentsShared(LoraTraining):
    """Weights and moments are in one dictionary for all runs, by the names of the arrays."""

    def __init__(self, W, b, A, B, alpha, dtype, *, optimizer):
        super().__init__(W, b, A, B, alpha, dtype, optimizer=optimizer)
        SHARED.clear()
        SHARED.update(p=dict(self.p), m=self.m)

    def step(self, micro_batches):
        self.m = SHARED["m"]
        return super().step(micro_batches)
