"""LoRA on a linear layer: the parts of the method, put together."""
from __future__ import annotations

from typing import Any

from minipeft.conformance.case import Case
from minipeft.conformance.method import Make, Method
from minipeft.conformance.methods.lora_linear.cases import draw, refusals, vectors
from minipeft.conformance.methods.lora_linear.equations import (SCALINGS, exact_values, in_defaults, never_rounded,
                                                                values)
from minipeft.conformance.methods.lora_linear.laws import LAWS
from minipeft.conformance.methods.lora_linear.laws_of_moves import LAWS as LAWS_OF_MOVES
from minipeft.conformance.methods.lora_linear.laws_of_state import LAWS as LAWS_OF_STATE
from minipeft.conformance.methods.lora_linear.mutants import PLANTED
from minipeft.conformance.methods.lora_linear.mutants_of_moves import PLANTED as OF_MOVES
from minipeft.conformance.methods.lora_linear.mutants_of_state import PLANTED as OF_STATE
from minipeft.conformance.methods.lora_linear.notes import NOTES
from minipeft.conformance.methods.lora_linear.plain import LoraLinear
from minipeft.conformance.numbers import float_of


def arguments(case: Case) -> tuple:
    """The factory's positional arguments (W, b, A, B, alpha, dtype), and {"dropout": p} where the case has one."""
    dropout = {"dropout": case.params["dropout"]} if "dropout" in case.params else {}
    return (*(case[name] for name in ("W", "b", "A", "B")), float_of(case.params["alpha"]), case.dtype), dropout


def _merged(make: Make, case: Case) -> Any:
    layer = make(case)
    layer.merge()
    return layer


def _gradient(leaf: str) -> tuple:
    return ("vjp",), lambda make, c: make(c).arrays("vjp", {leaf: c[leaf].shape}, c["x"], c["g"])[leaf]


OUTPUTS = {
    "y": (("forward",), lambda make, c: make(c).array("forward", c["g"].shape, c["x"])),
    "dA": _gradient("A"), "dB": _gradient("B"), "dx": _gradient("x"),
    "W_merged": (("merge", "weight"), lambda make, c: _merged(make, c).array("weight", c["W"].shape)),
    "y_merged": (("merge", "forward"), lambda make, c: _merged(make, c).array("forward", c["g"].shape, c["x"]))}


METHOD = Method(
    name="lora_linear", title="LoRA on a linear layer",
    equation=("y = x W^T + b + s (x A^T) B^T, s = alpha/r; W' = W + s B A; W [out, in], A [r, in], B [out, r]",
              "dA = s (g B)^T x, dB = s g^T (x A^T), dx = g W + s (g B) A; W and b have no gradient"),
    source={"paper": "Hu et al., 2021, arXiv:2106.09685", "where": "eq. (3), sec. 4.1"},
    conventions={"scaling": SCALINGS},
    axes={"W": ("out", "in"), "b": ("out",), "A": ("r", "in"), "B": ("out", "r"), "x": ("N", "in"), "g": ("N", "out")},
    sizes={"N": (1, 7), "in": (1, 48), "out": (1, 33), "r": (1, 5)},
    draw=draw, arguments=arguments, reference=values, exact=exact_values, outputs=OUTPUTS,
    properties=(*LAWS.all, *LAWS_OF_MOVES.all, *LAWS_OF_STATE.all), plain=LoraLinear,
    mutants=(*PLANTED.all, *OF_MOVES.all, *OF_STATE.all),
    refusals=refusals, vectors=vectors, notes=NOTES, absent=("W", "b"),
    exact_when=never_rounded, in_defaults=in_defaults)
