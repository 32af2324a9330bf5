"""A soft prompt in front of an attention layer: the parts of the method, put together."""
from __future__ import annotations

import dataclasses
from typing import Any

from minipeft.conformance.case import Case
from minipeft.conformance.method import Make, Method
from minipeft.conformance.methods.soft_prompt.cases import draw, refusals, vectors
from minipeft.conformance.methods.soft_prompt.equations import (BASE, LEFT_PADDING, NUMBERING, POSITIONS,
                                                                exact_values, never_rounded, values)
from minipeft.conformance.methods.soft_prompt.laws import LAWS, out
from minipeft.conformance.methods.soft_prompt.laws_of_files import LAWS as LAWS_OF_FILES
from minipeft.conformance.methods.soft_prompt.laws_of_training import LAWS as LAWS_OF_TRAINING
from minipeft.conformance.methods.soft_prompt.laws_of_training import gradient
from minipeft.conformance.methods.soft_prompt.mutants import PLANTED
from minipeft.conformance.methods.soft_prompt.mutants_of_training import PLANTED as PLANTED_IN_TRAINING
from minipeft.conformance.methods.soft_prompt.notes import NOTES
from minipeft.conformance.methods.soft_prompt.numbering import of_tokens
from minipeft.conformance.methods.soft_prompt.plain import SoftPrompt


def arguments(case: Case) -> tuple:
    """The factory's positional arguments (P, base, dtype), and no others. base: {name: array} of the layer."""
    return (case["P"], {name: case[name] for name in BASE if name in case}, case.dtype), {}


def _dP(make: Make, case: Case) -> Any:
    return gradient(make(case), case)[:len(case["P"])]


METHOD = Method(
    name="soft_prompt", title="a soft prompt in front of an attention layer",
    equation=("X = [P; E[ids]] (+ position[0 .. p + t - 1]), mask' = [1_p; mask]; of a row padded on the left the "
              "prompt stands between padding and text",
              "Y = softmax(X q^T (X k^T)^T / sqrt(d) (+ relative[clip(j - i, -R, R) + R])) X v^T o^T over the keys j "
              "that mask' shows; y = Y at the t tokens, 0 where mask is 0",
              "dP = sum over the batch of dX at the prompt; nothing else has a gradient"),
    source={"paper": "Lester, Al-Rfou & Constant, 2021, arXiv:2104.08691", "where": "sec. 2"},
    conventions={"positions": POSITIONS, "left_padding": LEFT_PADDING, "numbering": NUMBERING}, later=("numbering",),
    axes={"P": ("p", "d"), "E": ("V", "d"), "q": ("d", "d"), "k": ("d", "d"), "v": ("d", "d"), "o": ("d", "d"),
          "position": ("L", "d"), "relative": ("W",), "ids": ("b", "t"), "mask": ("b", "t"), "g": ("b", "t", "d")},
    sizes={"b": (1, 4), "t": (2, 7), "p": (1, 4), "d": (1, 16), "V": (2, 9)},
    draw=draw, arguments=arguments, reference=values, exact=exact_values,
    outputs={"y": (("forward",), lambda make, c: out(make(c), c)), "dP": (("vjp",), _dP)},
    properties=(*LAWS.all, *LAWS_OF_TRAINING.all, *LAWS_OF_FILES.all), plain=SoftPrompt,
    mutants=(*PLANTED.all, *PLANTED_IN_TRAINING.all), refusals=refusals, vectors=vectors, notes=NOTES, absent=("E",),
    exact_when=never_rounded)
METHOD = dataclasses.replace(METHOD, after=of_tokens(METHOD))
