"""Soft prompts whose positions count tokens: plain layer, planted bugs and vectors. The vectors of v1 count columns.

A row that is padded on the left by l has its prompt, or its first token, at position 0 and not at l.
"""
from __future__ import annotations

import dataclasses
from typing import Any

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.method import Method, Mutant, Note
from minipeft.conformance.methods.soft_prompt.cases import DTYPES, made
from minipeft.conformance.methods.soft_prompt.equations import NUMBERING
from minipeft.conformance.methods.soft_prompt.plain import SoftPrompt

Array = numpy.ndarray
SKIPS = "prompt.positions_skip_padding"  # a bug only where columns are counted
COUNTS = Mutant("prompt.positions_count_padding", "PositionsCountPadding", SoftPrompt)
NOTE = Note("padding on the left takes positions", "outputs depend on the side of the padding; if it is meant, leave "
            "conventions={'soft_prompt': {'numbering': 'tokens'}} out",
            ("huggingface/transformers #21080", "ndif-team/nnsight #672", "keras-team/keras-hub #571"))
LINE = ("numbering of tokens: position counts from the first column that mask' shows, and what is masked on the left "
        "of that stands at 0")


class Numbered(SoftPrompt):
    """The plain layer; only the positions differ."""

    def laid_out(self, ids: Array, mask: Array, P: Array) -> tuple[Array, Array, Array, Array]:
        x, seen, positions, at = super().laid_out(ids, mask, P)
        return x, seen, numpy.maximum(positions - seen.argmax(axis=1)[:, None], 0), at


def of_tokens(method: Method) -> Method:
    """The method under the convention that positions count tokens. method: the one that counts columns."""
    mutants = [dataclasses.replace(m, build=_numbered(m.build)) for m in method.mutants if m.id != SKIPS]
    return dataclasses.replace(
        method, equation=(*method.equation, LINE), plain=Numbered, mutants=(*mutants, COUNTS), vectors=vectors,
        notes={**{flag: note for flag, note in method.notes.items() if flag in {m.flag for m in mutants}},
               COUNTS.flag: NOTE},
        conventions={**method.conventions, "numbering": NUMBERING[::-1]}, later=())


def _numbered(build: Any) -> Any:
    """The same bug in the layer above."""
    return type(build.__name__, (build, Numbered), {})


def vectors() -> list[Case]:
    """The published cases: rows padded on the left by different amounts, beside others. All have a table of positions:
    relative positions are the same however they are counted."""
    cases = []
    for seed, (b, t, p, d, sides, label) in enumerate([
            (3, 6, 2, 5, ["left", "none", "left"], "rows padded on the left, each by its own"),
            (4, 5, 3, 16, ["left", "right", "hole", "left"], "rows padded on either side, and a hole that keeps its "
                                                             "place"),
            (2, 4, 4, 4, ["left", "left"], "every row is padded on the left; text, prompt and width are the same"),
            (2, 7, 1, 3, ["hole", "left"], "a prompt of one vector")]):
        for dtype in DTYPES:
            sizes = {"b": b, "t": t, "p": p, "d": d, "V": 7}
            cases.append(made(numpy.random.default_rng([3, seed]), dtype, False, sizes, sides, False, label))
    return cases
