"""Bugs planted in the plain block: in the choice of weights, and in switching training off.

The second argument of `planted` names its note in `notes.py`."""
from __future__ import annotations

import re

import numpy

from minipeft.conformance.arithmetic import on_grid
from minipeft.conformance.method import Planted
from minipeft.conformance.methods.selective.plain import Selective
from minipeft.conformance.planted import Accumulates

PLANTED = planted = Planted("selective")


@planted("bias_leaks", "BiasTrained")
class BiasLeaks(Selective):
    """Choosing a weight also chooses its bias."""

    def choose(self, chosen):
        along = {name.replace("weight", "bias") for name in chosen}
        super().choose({**{name: numpy.ones(self.shape(name), bool) for name in along}, **chosen})


@planted("frozen_zeros", "FrozenZeros")
class FrozenZeros(Selective):
    def vjp(self, x, g):
        return {name: numpy.zeros(self.shape(name)) if d is None else d for name, d in super().vjp(x, g).items()}


@planted("order_mixed", "OrderMixed")
class OrderMixed(Selective):
    """Gradients are in the order of the model, and names in the order of the list."""

    def known(self, names):
        self.names = super().known(names)
        return self.names

    def vjp(self, x, g):
        found = super().vjp(x, g)
        there = [d for name, d in found.items() if name != "x" and d is not None]
        return {**found, **dict(zip(self.names, there))} if len(there) == len(self.names) else found


@planted("mask_ignored", "MaskIgnored")
class MaskIgnored(Selective):
    def train_elements(self, masks):
        super().train_elements(masks)
        self.choose({name: numpy.ones(self.shape(name), bool) for name in masks})


@planted("mask_in_step_alone", "MaskInStepAlone")
class MaskInStepAlone(Selective):
    """The gradient is masked only in the step, so that clipping, or accumulation, sees the whole of it."""

    def restricted(self, name, gradient):
        return gradient if name in self.chosen else None


@planted("mask_order", "MaskOrder")
class MaskOrder(Selective):
    """The mask's flat indices count down the columns."""

    def train_elements(self, masks):
        super().train_elements(masks)
        self.choose({name: mask.reshape(-1)[::-1].reshape(mask.shape) if min(mask.shape) == 1 else
                     mask.reshape(-1, order="F").reshape(mask.shape) for name, mask in masks.items()})


@planted("rows_off", "RowIndexOffByOne")
class RowsOff(Selective):
    def mask_of_rows(self, rows, shape):
        return super().mask_of_rows((rows + 1) % shape[0], shape)


@planted("rows_counted", "RowsCounted")
class RowsCounted(Selective):
    """It trains the first rows, as many as were chosen."""

    def mask_of_rows(self, rows, shape):
        return super().mask_of_rows(numpy.arange(len(rows)), shape)


@planted("mask_broadcast", "MaskBroadcast")
class MaskBroadcast(Selective):
    """A mask of another shape is broadcast where it can be."""

    def train_elements(self, masks):
        super().train_elements({name: numpy.broadcast_to(mask, self.shape(name)) if mask.ndim < len(self.shape(name))
                                else mask for name, mask in masks.items()})


@planted("rows_wrap", "RowsWrap")
class RowsWrap(Selective):
    def train_rows(self, rows):
        super().train_rows({name: ids % len(self.base[name]) for name, ids in rows.items()})


@planted("off_keeps_biases", "BiasesNotRestored")
class OffKeepsBiases(Selective):
    def restored(self):
        return {name: self.w[name] if name.endswith("bias") else base for name, base in self.base.items()}


@planted("off_does_nothing", "BaseOverwritten")
class OffDoesNothing(Selective):
    """The base was trained in place: the kept array is the same one."""

    def restored(self):
        return self.w


@planted("off_subtracts", "RestoreDrifts")
class OffSubtracts(Selective):
    """It subtracts a stored difference, rounded to fewer digits than the weight has."""

    def restored(self):
        narrow = {"float64": "float32", "float32": "bfloat16"}.get(self.e.dtype, "bfloat16")
        return {name: self.e.r(w - on_grid(w - self.base[name], narrow)) for name, w in self.w.items()}


@planted("off_unfreezes", "DisableUnfreezes")
class OffUnfreezes(Selective):
    def on(self):
        super().on()
        self.choose({name: numpy.ones(self.shape(name), bool) for name in self.base})


@planted("nothing_matches_ignored", "NothingMatchesIgnored")
class NothingMatchesIgnored(Selective):
    def select(self, pattern):
        self.chosen = {name: numpy.ones(self.shape(name), bool) for name in self.base if re.search(pattern, name)}


@planted("unknown_ignored", "UnknownNameIgnored")
class UnknownIgnored(Selective):
    def known(self, names):
        return super().known([name for name in names if name in self.base] or ["fc1.weight"])


@planted("pattern_from_start", "PatternFromStart")
class PatternFromStart(Selective):
    """The pattern must match from the start of a name."""

    def select(self, pattern):
        found = [name for name in self.base if re.match(pattern, name)]
        super().select("|".join(f"^{re.escape(name)}$" for name in found) or "^no such name$")


@planted("selection_accumulates", "SelectionAccumulates")
class SelectionAccumulates(Selective):
    def select(self, pattern):
        before = self.chosen
        super().select(pattern)
        self.choose({**before, **self.chosen})


@planted("selection_forgets", "SelectionForgets")
class SelectionForgets(Selective):
    """Another selection starts from the base."""

    def select(self, pattern):
        super().select(pattern)
        self.w = self.base


@planted("gradients_accumulate", "GradientsAccumulate")
class GradientsAccumulate(Accumulates, Selective):
    pass
