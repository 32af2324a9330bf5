"""Bugs planted in the gradients of the plain soft prompt, and in its file."""
from __future__ import annotations

import numpy
import safetensors.numpy

from minipeft.conformance.method import Planted
from minipeft.conformance.methods.soft_prompt.plain import SoftPrompt
from minipeft.conformance.planted import Accumulates, StaleForward, UsesLastInput

PLANTED = planted = Planted("prompt")


@planted("dead_rows", "DeadRows")
class DeadRows(SoftPrompt):
    def vjp(self, ids, mask, g):
        found = super().vjp(ids, mask, g)["P"]
        return {"P": numpy.concatenate([found, 0 * found]), "E": None}


@planted("dead_first_row", "DeadFirstRow")
class DeadFirstRow(SoftPrompt):
    def vjp(self, ids, mask, g):
        found = super().vjp(ids, mask, g)["P"]
        return {"P": found * (numpy.arange(len(found)) > 0)[:, None], "E": None}


@planted("gradient_mean", "GradientIsMean")
class GradientMean(SoftPrompt):
    def vjp(self, ids, mask, g):
        return {"P": self.e.r(super().vjp(ids, mask, g)["P"] / len(ids)), "E": None}


@planted("gradient_of_first_row", "GradientOfFirstRow")
class GradientOfFirstRow(SoftPrompt):
    def rows_of(self, ids, mask, g):
        return super().rows_of(ids, mask, g)[:1]


@planted("gradient_skips_padded", "GradientSkipsPadded")
class GradientSkipsPadded(SoftPrompt):
    def rows_of(self, ids, mask, g):
        return super().rows_of(ids, mask, g) * mask.all(axis=1)[:, None, None]


@planted("gradient_unscaled", "GradientUnscaled")
class GradientUnscaled(SoftPrompt):
    """The gradient through the scores lacks their factor. In exact cases that gradient is 0 anyway."""

    def into_x(self, g):
        for name in "qk":
            self.kept[name] = self.e.r(self.kept[name] / self.scale(g.shape[-1]))
        return super().into_x(g)


@planted("gradient_rolled", "GradientRolled")
class GradientRolled(SoftPrompt):
    def into_x(self, g):
        return numpy.roll(super().into_x(g), -1, axis=1)


@planted("table_gradient", "TableTrained")
class TableGradient(SoftPrompt):
    def vjp(self, ids, mask, g):
        E = numpy.zeros(self.table.shape)
        numpy.add.at(E, ids, self.e.r(g))
        return {**super().vjp(ids, mask, g), "E": self.e.r(E)}


@planted("table_leaks", "FrozenGradient")
class TableLeaks(SoftPrompt):
    def vjp(self, ids, mask, g):
        rows = numpy.zeros(self.table.shape)
        numpy.add.at(rows, ids, g)  # as if attention passed it on unchanged
        return {**super().vjp(ids, mask, g), "E": rows}


@planted("table_zeros", "FrozenZeros")
class TableZeros(SoftPrompt):
    def vjp(self, ids, mask, g):
        return {**super().vjp(ids, mask, g), "E": 0 * self.table}


@planted("table_trainable", "TableTrained")
class TableTrainable(SoftPrompt):
    def trainable(self):
        return {"P", "E"}


@planted("saved_backwards", "SavedBackwards")
class SavedBackwards(SoftPrompt):
    def load(self, blob):
        super().load(blob)
        self.P = self.P[::-1].copy() if len(self.P) > 1 else -self.P


@planted("saves_table", "SavesTable")
class SavesTable(SoftPrompt):
    def save(self):
        return safetensors.numpy.save({"P": self.P, "E": self.table})

    def state_keys(self):
        return {"P", "E"}


@planted("load_unchecked", "LoadUnchecked")
class LoadUnchecked(SoftPrompt):
    def load(self, blob):
        self.P = safetensors.numpy.load(blob)["P"][:, :self.table.shape[1]].copy()


@planted("gradients_accumulate", "GradientsAccumulate")
class GradientsAccumulate(Accumulates, SoftPrompt):
    pass


@planted("gradient_of_last_forward", "GradientOfLastForward")
class GradientOfLastForward(UsesLastInput, SoftPrompt):
    pass


@planted("gradient_off", "GradientOff")
class GradientOff(SoftPrompt):
    """Switched off for one call, the prompt is not trained from then on."""

    on = True

    def disabled(self, ids, mask):
        self.on = False
        return super().disabled(ids, mask)

    def vjp(self, ids, mask, g):
        found = super().vjp(ids, mask, g)
        return {**found, "P": found["P"] * self.on}


@planted("forward_stale", "ForwardStale")
class ForwardStale(StaleForward, SoftPrompt):
    pass


@planted("expanded_once", "ExpandedOnce")
class ExpandedOnce(SoftPrompt):
    """The prompt is taken at the first call, and kept."""

    first = numpy.zeros((0, 0))

    def prompts(self, P, b):
        if not len(self.first):
            self.first = P
        return super().prompts(self.first if len(P) else P, b)


@planted("gradient_stale", "GradientStale")
class GradientStale(SoftPrompt):
    """After a load, gradients are those of the prompt before it."""

    old = None

    def load(self, blob):
        self.old = self.P
        super().load(blob)

    def rows_of(self, ids, mask, g):
        new, self.P = self.P, self.P if self.old is None else self.old
        found, self.P = super().rows_of(ids, mask, g), new
        return found


@planted("loaded_into_base", "LoadedIntoBase")
class LoadedIntoBase(SoftPrompt):
    """A loaded prompt is never taken off."""

    loaded = False

    def load(self, blob):
        super().load(blob)
        self.loaded = True

    def base_forward(self, ids, mask):
        return self.forward(ids, mask) if self.loaded else super().base_forward(ids, mask)


@planted("load_keeps_length", "LoadKeepsLength")
class LoadKeepsLength(SoftPrompt):
    """A file of another length is cut, or filled with zeros."""

    def load(self, blob):
        p = len(self.P)
        super().load(blob)
        self.P = numpy.concatenate([self.P, numpy.zeros((p, self.P.shape[1]))])[:p]


@planted("prompt_of_class", "PromptShared")
class PromptOfClass(SoftPrompt):
    """The prompt is an attribute of the class: all layers have that of the newest one."""

    value = numpy.zeros((0, 0))

    @property
    def P(self):
        return PromptOfClass.value

    @P.setter
    def P(self, value):
        PromptOfClass.value = value
