"""Laws of a table with several uses: lookup by the encoder, lookup by the decoder, and output head.

A method on a shared table acts at all of its uses, or it is refused. Where it acts only at some, each use may be right
by itself.
"""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.lora_embedding.equations import unmerge_bound, values, values_after
from minipeft.conformance.methods.lora_embedding.laws import Seen, out
from minipeft.conformance.methods.lora_linear.steps import rate_of
from minipeft.conformance.observe import Observation, between, near

LAWS = Laws()
law = LAWS.law


def logits(table: Any, case: Case) -> numpy.ndarray:
    """[N, V] of the head, for the case's h."""
    return table.array("head", (len(case["h"]), len(case["E"])), case["h"])


@law("T1", "V: the head is h E'^T", "head")
def head(case: Case, make: Make) -> Seen:
    yield near(case, "logits", logits(make(case), case), values(case)["logits"])


@law("T2", "M: applied to unit vectors, the head gives the table that is looked up", "head", "forward")
def one_table(case: Case, make: Make) -> Seen:
    V, d = case["E"].shape
    whole = case.but({"ids": numpy.arange(V)[None], "g": numpy.zeros((1, V, d)), "h": numpy.eye(d),
                      "q": numpy.zeros((d, V))})
    table, ref = make(whole), values(whole)
    seen, there = out(table, whole)[0].T, ref["y"]
    rows = type(there)(there.exact[0].T, there.mag[0].T, there.k, there.n)
    yield between(case, "the table by its head", logits(table, whole), seen, ref["logits"], rows)


@law("T3", "M: the decoder looks up the same table as the encoder", "forward_decoder", "forward")
def both_stacks(case: Case, make: Make) -> Seen:
    table, ref = make(case), values(case)["y"]
    y = table.array("forward_decoder", case["g"].shape, case["ids"])
    yield between(case, "y of the decoder", y, out(table, case), ref, ref)
    if table.offers("merge"):
        table.merge()
        y = table.array("forward_decoder", case["g"].shape, case["ids"])
        yield near(case, "merged y of the decoder", y, values(case)["y_merged"])


@law("T4", "M: merged, the head computes what it did before; unmerged again, it follows a step", "merge", "head")
def merged_head(case: Case, make: Make) -> Seen:
    """Hence the step: until then, a head that keeps the merged table computes the same."""
    table, ref = make(case), values(case)
    before = logits(table, case)
    table.merge()
    yield between(case, "merged logits", logits(table, case), before, ref["logits"], ref["logits_merged"])
    if table.offers("unmerge", "step"):
        table.unmerge()
        table.step(case["ids"], case["g"], rate_of(ref))
        after = values_after(case)["logits"]
        bound = case.tau(after) + abs(case["h"]) @ unmerge_bound(case).T
        yield Observation("logits after merge, unmerge and a step", "B", logits(table, case), after.exact, bound)


@law("T5", "V: the gradients of both uses are added up", "vjp_tied")
def tied_gradients(case: Case, make: Make) -> Seen:
    found = make(case).arrays("vjp_tied", {leaf: case[leaf].shape for leaf in "AB"},
                              *(case[name] for name in ("ids", "g", "h", "q")))
    ref = values(case)
    for leaf in "AB":
        yield near(case, f"d{leaf} of lookup and head", found[leaf], ref[f"d{leaf}_tied"])
