"""Bugs planted in the plain block: in its memory of earlier calls, choices and steps."""
from __future__ import annotations

import numpy

from minipeft.conformance.method import Planted
from minipeft.conformance.methods.selective.plain import Selective
from minipeft.conformance.planted import SharedState, UsesLastInput

PLANTED = planted = Planted("selective")


@planted("last_input", "LastInput")
class LastInput(UsesLastInput, Selective):
    pass


@planted("choice_in_class", "SharedByAll")
class ChoiceInClass(SharedState, Selective):
    shared = ("chosen",)


@planted("packed_once", "PackedOnce")
class PackedOnce(Selective):
    """The weights of the first call are used until training is switched off or on."""

    packed = None

    def forward(self, x):
        self.packed = self.packed or self.w
        now, self.w = self.w, self.packed
        y = super().forward(x)
        self.w = now
        return y

    def off(self):
        super().off()
        self.packed = None

    def on(self):
        super().on()
        self.packed = None


@planted("decay_by_default", "DecayByDefault")
class DecayByDefault(Selective):
    def step(self, x, g, lr, weight_decay=0.01):
        super().step(x, g, lr, weight_decay)


@planted("rate_remembered", "RateRemembered")
class RateRemembered(Selective):
    first = None

    def step(self, x, g, lr, weight_decay=0.0):
        self.first = lr if self.first is None else self.first
        super().step(x, g, self.first, weight_decay)


@planted("off_keeps_earlier", "EarlierNotRestored")
class OffKeepsEarlier(Selective):
    def restored(self):
        return {name: self.base[name] if name in self.chosen else w for name, w in self.w.items()}


@planted("on_restores_first", "FirstStateRestored")
class OnRestoresFirst(Selective):
    first = None

    def off(self):
        super().off()
        self.first = self.first or self.kept

    def on(self):
        self.kept = None if self.kept is None else self.first
        super().on()


@planted("step_while_off", "BaseTrainedWhileOff")
class StepWhileOff(Selective):
    def step(self, x, g, lr, weight_decay=0.0):
        super().step(x, g, lr, weight_decay)
        if self.kept is not None:
            self.base = self.w


@planted("trainable_stale", "TrainableStale")
class TrainableStale(Selective):
    def __init__(self, weights, train, dtype, *, eps=1e-5):
        super().__init__(weights, train, dtype, eps=eps)
        self.names = set(train)

    def trainable(self):
        return self.names


@planted("mask_survives", "MaskSurvives")
class MaskSurvives(Selective):
    def train_elements(self, masks):
        super().train_elements(masks)
        self.masks = dict(masks)

    def select(self, pattern):
        super().select(pattern)
        self.choose({**self.chosen, **{name: mask for name, mask in getattr(self, "masks", {}).items()
                                       if name in self.chosen}})


@planted("rows_accumulate", "RowsAccumulate")
class RowsAccumulate(Selective):
    def train_rows(self, rows):
        before = getattr(self, "rows", {})
        super().train_rows(rows)
        self.rows = {**before, **{name: mask | before.get(name, False) for name, mask in self.chosen.items()}}
        self.choose({name: self.rows[name] for name in rows})


@planted("rows_as_range", "RowsAsRange")
class RowsAsRange(Selective):
    def mask_of_rows(self, rows, shape):
        mask = super().mask_of_rows(rows, shape)
        inside = numpy.arange(shape[0])
        return (mask.T & (inside >= rows[0]) & (inside <= rows[-1])).T
