"""LoRA on an embedding table: the parts of the method, put together."""
from __future__ import annotations

from typing import Any

from minipeft.conformance.case import Case
from minipeft.conformance.method import Make, Method
from minipeft.conformance.methods.lora_embedding.cases import draw, refusals, vectors
from minipeft.conformance.methods.lora_embedding.equations import exact_values, values
from minipeft.conformance.methods.lora_embedding.laws import LAWS
from minipeft.conformance.methods.lora_embedding.laws_of_state import LAWS as LAWS_OF_STATE
from minipeft.conformance.methods.lora_embedding.laws_of_ties import LAWS as LAWS_OF_TIES
from minipeft.conformance.methods.lora_embedding.mutants import PLANTED
from minipeft.conformance.methods.lora_embedding.mutants_of_state import PLANTED as PLANTED_IN_STATE
from minipeft.conformance.methods.lora_embedding.mutants_of_uses import PLANTED as PLANTED_IN_USES
from minipeft.conformance.methods.lora_embedding.notes import NOTES
from minipeft.conformance.methods.lora_embedding.plain import LoraEmbedding
from minipeft.conformance.methods.lora_linear.equations import SCALINGS, in_defaults, never_rounded
from minipeft.conformance.numbers import float_of


def arguments(case: Case) -> tuple:
    """The factory's positional arguments (E, A, B, alpha, dtype), and no others."""
    return (*(case[name] for name in ("E", "A", "B")), float_of(case.params["alpha"]), case.dtype), {}


def _merged(make: Make, case: Case) -> Any:
    table = make(case)
    table.merge()
    return table


def _gradient(leaf: str) -> tuple:
    return ("vjp",), lambda make, c: make(c).arrays("vjp", {leaf: c[leaf].shape}, c["ids"], c["g"])[leaf]


def _tied_gradient(leaf: str) -> tuple:
    return ("vjp_tied",), lambda make, c: make(c).arrays("vjp_tied", {leaf: c[leaf].shape}, c["ids"], c["g"], c["h"],
                                                         c["q"])[leaf]


OUTPUTS = {
    "y": (("forward",), lambda make, c: make(c).array("forward", c["g"].shape, c["ids"])),
    "dA": _gradient("A"), "dB": _gradient("B"),
    "E_merged": (("merge", "weight"), lambda make, c: _merged(make, c).array("weight", c["E"].shape)),
    "y_merged": (("merge", "forward"), lambda make, c: _merged(make, c).array("forward", c["g"].shape, c["ids"])),
    "logits": (("head",), lambda make, c: make(c).array("head", c["q"].shape, c["h"])),
    "logits_merged": (("merge", "head"), lambda make, c: _merged(make, c).array("head", c["q"].shape, c["h"])),
    "dA_tied": _tied_gradient("A"), "dB_tied": _tied_gradient("B")}


METHOD = Method(
    name="lora_embedding", title="LoRA on an embedding table",
    equation=("y = E[ids] + s A^T[ids] B^T, s = alpha/r; E' = E + s (B A)^T; E [V, d], A [r, V], B [d, r], ids [b, t]",
              "dA[:, v] = s sum over ids = v of (g B)^T, dB = s g^T A^T[ids]; E has no gradient",
              "tied to the head: logits = h E'^T, with q = dL/dlogits dA += s (h B)^T q, dB += s h^T (q A^T)"),
    source={"paper": "Hu et al., 2021, arXiv:2106.09685", "where": "eq. (3), sec. 4.1, of the table's transpose"},
    conventions={"scaling": SCALINGS},
    axes={"E": ("V", "d"), "A": ("r", "V"), "B": ("d", "r"), "ids": ("b", "t"), "g": ("b", "t", "d"), "h": ("N", "d"),
          "q": ("N", "V")},
    sizes={"b": (1, 4), "t": (1, 6), "V": (1, 16), "d": (1, 12), "r": (1, 4), "N": (1, 5)},
    draw=draw, arguments=arguments, reference=values, exact=exact_values, outputs=OUTPUTS,
    properties=(*LAWS.all, *LAWS_OF_STATE.all, *LAWS_OF_TIES.all), plain=LoraEmbedding,
    mutants=(*PLANTED.all, *PLANTED_IN_USES.all, *PLANTED_IN_STATE.all),
    refusals=refusals, vectors=vectors, notes=NOTES, absent=("E",),
    exact_when=never_rounded, in_defaults=in_defaults)
