"""Laws of a soft prompt.

V: results against the reference. M: relations among the implementation's own results, some also against the reference.
S: facts, such as a set of names.
A law is given a case and `make(case)`, which builds the implementation under test; it yields observations.
P1 compares with the layer itself, run without a prompt on a vocabulary that contains the prompt's vectors.
"""
from __future__ import annotations

from typing import Any, Iterator

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.fault import RAISES, WRONG_TYPE, Fault, Skip
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.soft_prompt.equations import (LEFT_PADDING, Layout, embeddings, layout,
                                                                masked_first, values)
from minipeft.conformance.numbers import derangement, floats
from minipeft.conformance.observe import Observation, between, fact, near, same
from minipeft.conformance.plugin import checked
from minipeft.conformance.tolerance import Value

LAWS = Laws()
law = LAWS.law
Seen = Iterator[Observation]
SHIFT = "left-padding shift: the distance from prompt to text grows with the padding"


def out(layer: Any, case: Case, name: str = "forward") -> numpy.ndarray:
    """y [b, t, d] by the call `name`, 0 at masked tokens. The guard checks its shape."""
    y = layer.array(name, (*case["ids"].shape, case["E"].shape[1]), case["ids"], case["mask"])
    return numpy.where(case["mask"][..., None], y, 0) if case["mask"].shape == y.shape[:2] else y


def bare(case: Case) -> Case:
    """The case with a prompt of length 0."""
    return case.but({"P": case["P"][:0]})


def with_no_vectors(case: Case, make: Make) -> numpy.ndarray:
    """y [b, t, d] with a prompt of length 0. Raises Skip where the implementation refuses one."""
    try:
        return out(make(bare(case)), case)
    except Fault as fault:
        if fault.kind == RAISES:
            raise Skip(f"a prompt of length 0 is refused: {fault.detail}") from None
        raise


def out_of_base(case: Case, make: Make) -> numpy.ndarray:
    """y [b, t, d] of the layer by itself: by `base_forward`, or with a prompt of length 0."""
    layer = make(case)
    return out(layer, case, "base_forward") if layer.offers("base_forward") else with_no_vectors(case, make)


def rows_of(case: Case, chosen: Any) -> Case:
    """The case with only these rows of the batch."""
    return case.but({name: case[name][chosen] for name in ("ids", "mask", "g")})


def part(value: Value, chosen: Any) -> Value:
    """The chosen entries of a reference and its bound."""
    return Value(value.exact[chosen], value.mag[chosen], value.k, value.n)


@law("P0", "V: the forward is the equation", "forward")
def forward(case: Case, make: Make) -> Seen:
    yield near(case, "y", out(make(case), case), values(case)["y"])


@law("P0e", "V: embeddings, mask and positions are those of prompt and tokens, bit for bit", "embed")
def embedded(case: Case, make: Make) -> Seen:
    at, found = layout(case), make(case).embed(case["ids"], case["mask"])
    if not isinstance(found, (tuple, list)) or len(found) != 3:
        raise Fault(WRONG_TYPE, f"embed returned {type(found).__name__}; expected (X, mask, positions)")
    x = embeddings(case, at)
    yield same("X", checked("soft_prompt.embed: X", found[0], x.shape), x)
    yield same("mask of prompt and tokens", numpy.asarray(found[1]), at.mask)
    if "position" in case:
        yield same("positions of prompt and tokens", *_held(case, at, numpy.asarray(found[2])))


def _held(case: Case, at: Layout, positions: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The positions and the expected ones, both without the columns that take none."""
    if case.conventions.get("numbering") != "tokens" or positions.shape != at.positions.shape:
        return positions, at.positions
    taken = numpy.logical_or.accumulate(at.mask, axis=1)
    return numpy.where(taken, positions, 0), numpy.where(taken, at.positions, 0)


@law("P1", "M: y is that of the layer itself on a vocabulary that has the prompt, its ids among the tokens", "forward")
def extended_vocabulary(case: Case, make: Make) -> Seen:
    at, ref = layout(case), values(case)["y"]
    y = out(make(case), case)
    twin = _as_tokens(case, at)
    if case.conventions.get("positions") == "restart" and "position" in case:
        z = numpy.stack([_base_row(case, twin, at, make, row) for row in range(len(y))])
    else:
        z = out_of_base(twin, make)
    z = numpy.where(case["mask"][..., None], z[at.rows, at.token], 0)
    yield between(case, "y against that of the extended vocabulary", y, z, ref, ref)


def _as_tokens(case: Case, at: Layout) -> Case:
    """The case in which the prompt's vectors are in the vocabulary, and their ids among those of the tokens."""
    p = len(case["P"])
    prompt = numpy.tile(numpy.arange(len(case["E"]), len(case["E"]) + p), (len(case["ids"]), 1))
    ids = numpy.concatenate([prompt, case["ids"]], axis=1)[at.rows, at.order]
    return case.but({"E": numpy.concatenate([case["E"], case["P"]]), "ids": ids, "mask": at.mask,
                     "g": numpy.zeros((*ids.shape, case["E"].shape[1]))})


def _base_row(case: Case, twin: Case, at: Layout, make: Make, row: int) -> numpy.ndarray:
    """y of one row. Its table holds just the positions of its columns, where the layer will look for them."""
    alone = rows_of(twin, slice(row, row + 1))
    here = at.positions[row]
    if case.conventions.get("numbering") == "tokens":  # the layer counts from the first visible column
        here = numpy.roll(here, -int(at.mask[row].argmax()))
    return out_of_base(alone.but({"position": case["position"][here]}), make)[0]


def other_ids(case: Case) -> numpy.ndarray:
    """[b, t]: ids, each of them different from the case's."""
    return (case["ids"] + 1) % len(case["E"])


@law("P2", "M: masked tokens change nothing", "forward", where=lambda case: not case["mask"].all())
def masked_is_inert(case: Case, make: Make) -> Seen:
    """Not bit for bit: the largest score, which is subtracted before exp, may be a masked one."""
    layer, ref = make(case), values(case)["y"]
    twin = case.but({"ids": numpy.where(case["mask"], case["ids"], other_ids(case))})
    yield between(case, "y with other ids under the mask", out(layer, twin), out(layer, case), ref, ref)


@law("P2p", "M: every row sees the prompt", "forward")
def prompt_is_seen(case: Case, make: Make) -> Seen:
    twin = case.but({"P": -case["P"][::-1]})
    ref, there = values(case)["y"], values(twin)["y"]
    moves = abs(ref.exact - there.exact) > case.tau(ref, there)
    moved = out(make(case), case) != out(make(twin), case)
    rows = range(len(moves))
    yield fact("rows that do not see the prompt", [i for i in rows if moves[i].any() and not moved[i].any()], [])


@law("P2r", "M: rows do not see each other", "forward", where=lambda case: len(case["ids"]) > 1)
def independent_rows(case: Case, make: Make) -> Seen:
    layer, ref, b = make(case), values(case)["y"], len(case["ids"])
    y = out(layer, case)
    order = derangement(numpy.random.default_rng(case.seed), b)
    yield between(case, "y of the rows in another order", out(layer, rows_of(case, order)), y[order],
                  part(ref, order), part(ref, order))
    for chosen in (slice(0, 1), slice(b - 1, b)):
        yield between(case, "y of a row alone", out(layer, rows_of(case, chosen)), y[chosen], part(ref, chosen),
                      part(ref, chosen))


@law("P2z", "M: a prompt of length 0 is no prompt", "forward", "base_forward")
def empty_prompt(case: Case, make: Make) -> Seen:
    ref, y = values(bare(case))["y"], with_no_vectors(case, make)
    yield between(case, "y with a prompt of length 0", y, out(make(case), case, "base_forward"), ref, ref)


@law("P2d", "M: switched off, nothing of the prompt is left; switched on, it is as before", "disabled", "forward")
def switched_off(case: Case, make: Make) -> Seen:
    layer = make(case)
    y = out(layer, case)
    yield near(bare(case), "y, switched off", out(layer, case, "disabled"), values(bare(case))["y"])
    yield same("y, switched on again", out(layer, case), y)


@law("P4", "M: the rows of the table of positions that are read are the declared ones", "forward")
def table_rows(case: Case, make: Make) -> Seen:
    case = _with_table(case)
    at, layer = layout(case), make(case)
    y, read = out(layer, case), int(at.positions[at.mask].max()) + 1
    beyond = case["position"].copy()
    beyond[read:] *= -1
    yield same(f"y with another table beyond its first {read} rows", out(make(case.but({"position": beyond})), case), y)
    last = case["position"].copy()
    last[read - 1] *= -1
    twin = case.but({"position": last})
    ref, there = values(case)["y"], values(twin)["y"]
    moves = bool((abs(ref.exact - there.exact) > case.tau(ref, there)).any())
    moved = bool((out(make(twin), case) != y).any())
    yield fact(f"y depends on row {read - 1} of the table", moved or not moves, True)


def _with_table(case: Case) -> Case:
    """The case with a table of positions, also if it had relative ones, with two rows to spare."""
    n, d = len(case["P"]) + case["ids"].shape[1], case["E"].shape[1]
    rng = numpy.random.default_rng(case.seed)
    table = case["position"][:n] if "position" in case else floats(rng, (n, d), case.dtype)
    return case.without("relative").but({"position": numpy.concatenate([table, floats(rng, (2, d), case.dtype)])})


@law("P5", "M: with relative positions, the side on which a row is padded changes nothing", "forward",
     where=lambda case: case["ids"].shape[1] > 1 and
     case.conventions.get("left_padding", LEFT_PADDING[0]) == LEFT_PADDING[0])
def padding_side(case: Case, make: Make) -> Seen:
    left = _padded_left(case)
    pads = masked_first(left["mask"])

    def rolled(array: numpy.ndarray) -> numpy.ndarray:
        return numpy.stack([numpy.roll(row, -l, axis=0) for row, l in zip(array, pads)])

    right = left.but({name: rolled(left[name]) for name in ("ids", "mask", "g")})
    refs = values(right)["y"], values(left)["y"]
    y, z = out(make(right), right), rolled(out(make(left), left))
    moved = Value(rolled(refs[1].exact), rolled(refs[1].mag), 1, 1)
    yield between(case, "y padded on the left against y padded on the right", z, y, moved, refs[0], why=SHIFT)


def _padded_left(case: Case) -> Case:
    """The case with relative positions, also if it had a table, and rows padded on the left by 1 to t - 1 tokens."""
    t, rng = case["ids"].shape[1], numpy.random.default_rng(case.seed)
    pads = 1 + numpy.arange(len(case["ids"])) % (t - 1)
    table = case["relative"] if "relative" in case else floats(rng, (7,), case.dtype)
    return case.without("position").but({"relative": table, "mask": numpy.arange(t) >= pads[:, None]})
