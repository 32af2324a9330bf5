"""Bugs planted in the state of the plain LoRA layer: kept from a forward, a merge or a step, or in its class."""
from __future__ import annotations

from minipeft.conformance.method import Planted
from minipeft.conformance.methods.lora_linear.plain import LoraLinear
from minipeft.conformance.planted import SharedState, StaleForward, UsesLastInput

PLANTED = planted = Planted("lora")


@planted("dropout_by_p", "DropoutByP")
class DropoutByP(LoraLinear):
    def forward_train(self, x, keep):
        dropped = self.e.r(self.e.r(x * keep) / self.dropout)
        return self.e.r(self.base(x) + self.low_rank(dropped, self.active[0]))


@planted("step_b_after_a", "StepInTurns")
class StepBAfterA(LoraLinear):
    def step(self, x, g, lr):
        name = self.active[0]
        A, B, alpha = self.adapters[name]
        A = self.e.r(A - lr * self.vjp(x, g)["A"])
        self.adapters[name] = A, B, alpha
        self.adapters[name] = A, self.e.r(B - lr * self.vjp(x, g)["B"]), alpha


@planted("forward_stale", "ForwardStale")
class ForwardStale(StaleForward, LoraLinear):
    pass


@planted("last_input", "LastInput")
class LastInput(UsesLastInput, LoraLinear):
    pass


@planted("scale_shared", "StateShared")
class ScaleShared(SharedState, LoraLinear):
    """The scale is a constant of the class, as in a kernel that was compiled for the newest layer."""

    shared = ("s",)

    def __init__(self, W, b, A, B, alpha, dtype, *, dropout=0.0):
        super().__init__(W, b, A, B, alpha, dtype, dropout=dropout)
        self.s = alpha / len(A)

    def low_rank(self, x, name):
        if name != "default":
            return super().low_rank(x, name)
        A, B, _ = self.adapters[name]
        return self.e.r(self.s * self.e.mm(self.e.mm(x, A.T), B.T))

    def load(self, blob):
        super().load(blob)
        A, _, alpha = self.adapters["default"]
        self.s = alpha / len(A)


@planted("scale_of_first_rank", "RankOfFirst")
class ScaleOfFirstRank(LoraLinear):
    """That rank scales all adapters, and those that are loaded from a file."""

    def scale(self, A, alpha):
        return alpha / self.__dict__.setdefault("rank", len(A))


@planted("first_always", "FirstAlways")
class FirstAlways(LoraLinear):
    def vjp(self, x, g):
        return self._of_first(lambda: super(FirstAlways, self).vjp(x, g))

    def merged(self):
        return self.e.r(self.W + self.delta("default"))

    def save(self):
        return self._of_first(super().save)

    def _of_first(self, action):
        active, self.active = self.active, ["default"]
        found = action()
        self.active = active
        return found


@planted("delta_stale", "DeltaStale")
class DeltaStale(LoraLinear):
    def __init__(self, *args, **fields):
        self.deltas = {}
        super().__init__(*args, **fields)

    def add(self, name, A, B, alpha):
        super().add(name, A, B, alpha)
        self.deltas[name] = self.delta(name)

    def merged(self):
        return self.e.r(self.W + self.deltas[self.active[0]])


@planted("unmerge_current", "UnmergesCurrent")
class UnmergeCurrent(LoraLinear):
    def unmerge(self):
        assert self.kept is not None
        self.W, self.kept = self.e.r(self.W - self.delta(self.active[0])), None


@planted("unmerge_unmerged", "UnmergesUnmerged")
class UnmergeUnmerged(LoraLinear):
    def unmerge(self):
        if self.kept is None:
            self.W = self.e.r(self.W - self.delta(self.active[0]))
        else:
            super().unmerge()


@planted("remove_leaves_merged", "RemoveLeavesMerged")
class RemoveLeavesMerged(LoraLinear):
    def remove(self, name):
        del self.adapters[name]
        self.active = [n for n in self.active if n != name]


@planted("alpha_zero", "AlphaZeroIsDefault")
class AlphaZero(LoraLinear):
    def read(self, alpha):
        return float(alpha or 16.0)
