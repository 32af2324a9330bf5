"""Bugs planted in the forward of the plain soft prompt. The second argument of `planted` names a note in `notes.py`."""
from __future__ import annotations

import numpy

from minipeft.conformance.arithmetic import on_grid
from minipeft.conformance.method import Planted
from minipeft.conformance.methods.soft_prompt.plain import SoftPrompt

PLANTED = planted = Planted("prompt")
NARROW = {"float64": "float32", "float32": "bfloat16", "bfloat16": "bfloat16", "float16": "float16"}


def side_by_side(mask, p, first=0):
    """[b, p + t]: columns of prompt and tokens, with the prompt at column `first` in all rows. mask: [b, t]."""
    b, t = mask.shape
    tokens = numpy.arange(t) + p * (numpy.arange(t) >= first)
    return numpy.tile(numpy.concatenate([first + numpy.arange(p), tokens]), (b, 1))


@planted("after_tokens", "PromptAfterTokens")
class AfterTokens(SoftPrompt):
    def places(self, mask, p):
        return side_by_side(mask, p, mask.shape[1])


@planted("mask_missing", "PromptMasked")
class MaskMissing(SoftPrompt):
    def mask_of(self, mask, p):
        return numpy.concatenate([numpy.zeros((len(mask), p), bool), mask], axis=1)


@planted("mask_behind", "MaskExtendedBehind")
class MaskBehind(SoftPrompt):
    """The mask is lengthened on the right, so that its start falls on the prompt and the first tokens."""

    def mask_of(self, mask, p):
        return numpy.concatenate([mask, numpy.ones((len(mask), p), bool)], axis=1)


@planted("mask_rolled", "MaskRolled")
class MaskRolled(SoftPrompt):
    def mask_of(self, mask, p):
        return numpy.roll(super().mask_of(mask, p), 1, axis=1)


@planted("mask_of_first_row", "MaskOfFirstRow")
class MaskOfFirstRow(SoftPrompt):
    def visible(self, seen):
        return seen[:1, None, :]


@planted("mask_on_queries", "MaskOnQueries")
class MaskOnQueries(SoftPrompt):
    """Masked queries average over all keys, and the others see masked keys."""

    def visible(self, seen):
        return seen[:, :, None]

    def hidden(self):
        return -1e4


@planted("mask_ignored", "MaskIgnored")
class MaskIgnored(SoftPrompt):
    def hidden(self):
        return 0.0


@planted("mask_weak", "MaskWeak", below={"bfloat16": "a fiftieth of a weight is within the bounds of a softmax there"})
class MaskWeak(SoftPrompt):
    def hidden(self):
        return -4.0


@planted("masked_where_padded", "PromptMaskedWherePadded")
class MaskedWherePadded(SoftPrompt):
    def mask_of(self, mask, p):
        return numpy.concatenate([numpy.repeat(mask.all(axis=1)[:, None], p, axis=1), mask], axis=1)


@planted("positions_not_shifted", "PositionsNotShifted")
class PositionsNotShifted(SoftPrompt):
    def positions_of(self, places, p):
        b, n = places.shape
        return numpy.tile([*range(p), *range(n - p)], (b, 1))


@planted("distances_without_prompt", "DistancesWithoutPrompt")
class DistancesWithoutPrompt(PositionsNotShifted):
    """The same bug, with relative positions only."""

    def positions_of(self, places, p):
        return super().positions_of(places, p) if "relative" in self.base else places

    def distance(self, positions):
        return positions[:, None, :] - positions[:, :, None]


@planted("prompt_without_positions", "PromptWithoutPositions")
class PromptWithoutPositions(SoftPrompt):
    """All vectors of the prompt have position 0."""

    def positions_of(self, places, p):
        return numpy.where(numpy.arange(places.shape[1]) < p, 0, places)


@planted("positions_skip_padding", "PositionsSkipPadding")
class PositionsSkipPadding(SoftPrompt):
    """Masked tokens on the left take no position."""

    def positions_of(self, places, p):
        first = places[:, :p].min(axis=1, keepdims=True) if p else 0
        return numpy.maximum(places - first, 0)


@planted("left_padding_shift", "LeftPaddingShift")
class LeftPaddingShift(SoftPrompt):
    def places(self, mask, p):
        return side_by_side(mask, p)


@planted("wrong_end_stripped", "WrongEndStripped")
class WrongEndStripped(SoftPrompt):
    def stripped(self, y, at):
        return y[:, :at.shape[1]]


@planted("not_stripped", "NotStripped")
class NotStripped(SoftPrompt):
    def stripped(self, y, at):
        return y


@planted("row_zero_leaks", "RowsMixed", below={
    "bfloat16": "a hundredth of a row is within the bounds there"})
class RowZeroLeaks(SoftPrompt):
    def run(self, ids, mask, P):
        y = super().run(ids, mask, P)
        return self.e.r(y + 1e-2 * y[:1])


@planted("added", "PromptAdded")
class Added(SoftPrompt):
    """The prompt is added to the first tokens."""

    def laid_out(self, ids, mask, P):
        x, seen, positions, at = super().laid_out(ids, mask, P[:0])
        p = min(len(P), x.shape[1])
        x[:, :p] = self.e.r(x[:, :p] + P[:p])
        return x, seen, positions, at

    def run(self, ids, mask, P):
        return self.attention(*self.laid_out(ids, mask, P)[:3])

    def rows_of(self, ids, mask, g):
        self.run(ids, mask, self.P)
        p, into = len(self.P), self.into_x(g)
        return numpy.pad(into, [(0, 0), (0, p), (0, 0)])[:, :p]


@planted("first_row_only", "FirstRowOnly")
class FirstRowOnly(SoftPrompt):
    def prompts(self, P, b):
        return numpy.stack([P, *[0 * P] * (b - 1)])


@planted("backwards", "PromptBackwards")
class Backwards(SoftPrompt):
    def prompts(self, P, b):
        return super().prompts(P[::-1], b)


@planted("scaled", "PromptScaled")
class Scaled(SoftPrompt):
    """The prompt is scaled by sqrt(d), as some models scale the embeddings of tokens."""

    def prompts(self, P, b):
        return self.e.r(super().prompts(P, b) * P.shape[1] ** 0.5)


@planted("narrow", "PromptNarrow", below={"bfloat16": "there is no narrower dtype to keep it in"})
class Narrow(SoftPrompt):
    def prompts(self, P, b):
        return on_grid(super().prompts(P, b), NARROW[self.e.dtype])


@planted("scores_unscaled", "ScoresUnscaled")
class ScoresUnscaled(SoftPrompt):
    def scale(self, d):
        return 1.0


@planted("scores_over_d", "ScoresOverWidth")
class ScoresOverWidth(SoftPrompt):
    def scale(self, d):
        return 1 / d


@planted("empty_is_zero", "EmptyPromptIsZero")
class EmptyIsZero(SoftPrompt):
    """A prompt of length 0 becomes one vector of zeros."""

    def forward(self, ids, mask):
        return self.run(ids, mask, self.P if len(self.P) else numpy.zeros((1, self.P.shape[1])))


@planted("not_switched_off", "NotSwitchedOff")
class NotSwitchedOff(SoftPrompt):
    def disabled(self, ids, mask):
        return self.forward(ids, mask)


@planted("stays_off", "StaysOff")
class StaysOff(SoftPrompt):
    def disabled(self, ids, mask):
        self.P = self.P[:0]
        return self.forward(ids, mask)
