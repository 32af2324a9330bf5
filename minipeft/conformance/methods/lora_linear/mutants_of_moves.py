"""Bugs planted in the operations of the plain LoRA layer: merging, swapping, saving."""
from __future__ import annotations

import numpy
import safetensors.numpy

from minipeft.conformance.arithmetic import on_grid
from minipeft.conformance.method import Planted
from minipeft.conformance.methods.lora_linear.plain import LoraLinear

PLANTED = planted = Planted("lora")
NARROW = {"float64": "float32", "float32": "bfloat16", "bfloat16": "bfloat16", "float16": "float16"}


@planted("merge_transposed", "MergeTransposed")
class MergeTransposed(LoraLinear):
    def merged(self):
        d = self.delta(self.active[0])
        return self.e.r(self.W + (d.T if d.shape[0] == d.shape[1] else d))


@planted("merge_unscaled", "MergeForgetsScale")
class MergeUnscaled(LoraLinear):
    def merged(self):
        A, B, _ = self.adapters[self.active[0]]
        return self.e.r(self.W + self.e.mm(B, A))


@planted("merge_renormalizes", "MergeRenormalizes")
class MergeRenormalizes(LoraLinear):
    def merged(self):
        w = super().merged()
        norm, was = (numpy.sqrt((v ** 2).sum(axis=1, keepdims=True)) for v in (w, self.W))
        return self.e.r(w * was / numpy.where(norm == 0, 1, norm))


class Subtracts(LoraLinear):
    """Not a bug in itself: it unmerges as most libraries do, by subtracting."""

    def unmerge(self):
        self.W, self.kept = self.subtracted(), None

    def subtracted(self):
        return self.e.r(self.W - self.delta(self.active[0]))


@planted("unmerge_unscaled", "UnmergeForgetsScale")
class UnmergeUnscaled(Subtracts):
    def subtracted(self):
        A, B, _ = self.adapters[self.active[0]]
        return self.e.r(self.W - self.e.mm(B, A))


@planted("unmerge_rounded", "UnmergeDrifts")
class UnmergeRounded(Subtracts):
    """Adds the unrounded update, and subtracts it rounded to fewer digits than W has."""

    def subtracted(self):
        return self.e.r(self.W - on_grid(self.delta(self.active[0]), NARROW[self.e.dtype]))

    def merged(self):
        A, B, alpha = self.adapters[self.active[0]]
        return self.e.r(self.W + self.scale(A, alpha) * (B @ A))


@planted("merges_twice", "MergesTwice")
class MergesTwice(Subtracts):
    def merge(self):
        self.kept = self.W
        self.W = self.merged()


@planted("merged_adds_again", "MergedForwardAddsAgain")
class MergedAddsAgain(LoraLinear):
    def forward(self, x):
        y = self.base(x)
        for name in self.active:
            y = self.e.r(y + self.low_rank(x, name))
        return y


@planted("swap_leaves_merged", "SwapLeavesMerged")
class SwapLeavesMerged(LoraLinear):
    def unmerge(self):
        self.kept = None


@planted("save_drops_alpha", "SaveDropsAlpha")
class SaveDropsAlpha(LoraLinear):
    def load(self, blob):
        found = safetensors.numpy.load(blob)
        self.add("default", found["A"], found["B"], self.adapters["default"][2])


@planted("row_index_off", "RowIndexOffByOne")
class RowIndexOff(LoraLinear):
    def adapter_of(self, rows):
        return [*rows[1:], rows[0]]


@planted("merged_flag_lost", "MergedFlagLost")
class MergedFlagLost(LoraLinear):
    def save(self):
        A, B, alpha = self.adapters[self.active[0]]
        return safetensors.numpy.save({"A": A, "B": B, "alpha": numpy.array(alpha), "W": self.W})

    def load(self, blob):
        super().load(blob)
        W = safetensors.numpy.load(blob)["W"]
        if W.shape != self.W.shape:
            raise ValueError("another W")
        self.W = W


@planted("saves_base", "SavesBase")
class SavesBase(LoraLinear):
    def state_keys(self):
        return {"A", "B", "alpha", "W"}


@planted("load_unchecked", "LoadUnchecked")
class LoadUnchecked(LoraLinear):
    def load(self, blob):
        found = safetensors.numpy.load(blob)
        d_in = self.W.shape[1]
        if found["A"].shape[1] >= d_in:
            self.add("default", found["A"][:, :d_in], found["B"], float(found["alpha"]))


@planted("safe_merge_differs", "MergesDiffer")
class SafeMergeDiffers(LoraLinear):
    """The checked merge first rounds the update to fewer digits; the plain merge adds it unrounded."""

    def merge_safe(self):
        self.kept, self.W = self.W, self.e.r(self.W + on_grid(self.delta(self.active[0]), NARROW[self.e.dtype]))

    def merged(self):
        A, B, alpha = self.adapters[self.active[0]]
        return self.e.r(self.W + self.scale(A, alpha) * (B @ A))


@planted("unknown_ignored", "UnknownNameIgnored")
class UnknownIgnored(LoraLinear):
    def activate(self, names):
        super().activate([name for name in names if name in self.adapters])
