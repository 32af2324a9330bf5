"""A soft prompt: its equations against numbers by hand and against the engine, its bounds, and both implementations."""
from __future__ import annotations

import hashlib
import math
import types
from typing import Any, Callable, Mapping

import numpy
import pytest

from minipeft.engine.tensor import value_and_grad
from minipeft.conformance.arithmetic import arithmetic
from minipeft.conformance.case import Case
from minipeft.conformance.diagnose import suspects, words
from minipeft.conformance.fault import Fault, Skip
from minipeft.conformance.look import fails, look
from minipeft.conformance.method import Mutant
from minipeft.conformance.methods.soft_prompt import METHOD, ours
from minipeft.conformance.methods.soft_prompt.cases import SIDES, made
from minipeft.conformance.methods.soft_prompt.equations import embeddings, layout, relative_bias, values
from minipeft.conformance.methods.soft_prompt.numbering import Numbered
from minipeft.conformance.methods.soft_prompt.plain import SoftPrompt
from minipeft.conformance.plugin import Plugin
from minipeft.conformance.running import Bounded, softmax
from minipeft.conformance.tolerance import rho
from minipeft.conformance.vectors.read import read
from minipeft.conformance.vectors.run import run
from minipeft.conformance.vectors.schema import FOLDER
from minipeft.nn.weight import Parameter
from minipeft.engine.ops import definitions, matmul, mul, transpose
from minipeft.engine.ops import sum as total

SIZES = {"b": 4, "t": 4, "p": 2, "d": 3, "V": 5}
OUTSIDE = {"left_padding": "outside the padding"}
TOKENS = {"numbering": "tokens"}
V1 = {"soft_prompt.json": "1eb332631058b82c", "soft_prompt.safetensors": "5cdb87cc5b50c08d"}
CONVENTIONS = [{"positions": positions, "left_padding": left, **numbering}
               for positions in METHOD.conventions["positions"] for left in METHOD.conventions["left_padding"]
               for numbering in ({}, TOKENS)]


def case_of(relative: bool, exact: bool = False, dtype: str = "float64", seed: int = 0, **sizes: int) -> Case:
    sizes = {**SIZES, **sizes}
    sides = [SIDES[row % len(SIDES)] for row in range(sizes["b"])]
    return made(numpy.random.default_rng(seed), dtype, exact, sizes, sides, relative)


def plugged(build: Callable, conventions: Mapping[str, str] | None = None) -> Plugin:
    capabilities = {"dtypes": ["float64", "float32", "bfloat16"], "conventions": {"soft_prompt": conventions or {}}}
    return Plugin(types.SimpleNamespace(capabilities=capabilities, soft_prompt=build))


def failing(build: Callable, case: Case, conventions: Mapping[str, str] | None = None) -> set[str]:
    plugin = plugged(build, conventions)
    case, make, found = plugin.settle(case, METHOD), plugin.make(METHOD), set()
    for prop in METHOD.properties:
        if prop.applies(case) and make(case).offers(*prop.needs) and fails(look(prop, case, plugin, make)[0]):
            found.add(prop.id)
    return found


def by_hand() -> Case:
    """One prompt vector 2, tokens of embeddings 1 and 5, the second masked; d = 1."""
    one = numpy.ones((1, 1))
    return Case("soft_prompt", "float64", False, {}, {
        "P": 2 * one, "E": numpy.array([[1.0], [5.0]]), "q": one, "k": one, "v": 3 * one, "o": one,
        "relative": numpy.array([0.5, 0.0, -1.0]), "ids": numpy.array([[0, 1]]),
        "mask": numpy.array([[True, False]]), "g": numpy.array([[[1.0], [0.0]]])})


def test_the_output_and_its_gradient_are_those_worked_out_by_hand():
    # the token sees the prompt with score 1 * 2 + relative[-1 -> 0] = 2.5, itself with 1 * 1 + 0
    w = 1 / (1 + math.exp(1.0 - 2.5))
    found = values(by_hand())
    assert float(found["y"].exact[0, 0, 0]) == pytest.approx(w * 6 + (1 - w) * 3, rel=1e-15)
    assert found["y"].exact[0, 1, 0] == 0
    # dy/dP = 3 w + (6 - 3) dw/dP, dw/dP = w (1 - w) since the score grows as P
    assert float(found["dP"].exact[0, 0]) == pytest.approx(3 * w + 3 * w * (1 - w), rel=1e-15)


def test_the_prompt_stands_where_its_convention_says():
    case = by_hand().but({"mask": numpy.array([[False, True]])})
    assert embeddings(case, layout(case))[0, :, 0].tolist() == [1, 2, 5]
    outside = case.but(conventions={"left_padding": "outside the padding", "positions": "restart"})
    at = layout(outside)
    assert embeddings(outside, at)[0, :, 0].tolist() == [2, 1, 5]
    assert at.mask.tolist() == [[True, False, True]] and at.positions.tolist() == [[0, 0, 1]]


def engine(case: Case) -> tuple[Any, Any]:
    """y and dP by minipeft's autograd over the definitions, one row at a time."""
    at, P, d = layout(case), Parameter(case["P"]), case["E"].shape[1]
    p, n = len(case["P"]), at.order.shape[1]
    rows = numpy.arange(n)

    def run(row: int) -> Any:
        chosen = numpy.eye(p + case["ids"].shape[1])[at.order[row]]                    # [n, p + t]
        x = matmul(chosen[:, :p], P) + chosen[:, p:] @ case["E"][case["ids"][row]]
        bias = numpy.where(at.mask[row], 0.0, -numpy.inf)[None, :].repeat(n, axis=0)
        if "position" in case:
            x = x + case["position"][at.positions[row]]
        else:
            bias = bias + relative_bias(case["relative"], n)
        q, k, v = (matmul(x, case[name].T) for name in "qkv")
        weights = definitions.softmax(mul(matmul(q, transpose(k, axes=(1, 0))), d ** -0.5) + bias)
        return matmul(numpy.eye(n)[rows][at.token[row]], matmul(matmul(weights, v), case["o"].T))

    ys = numpy.stack([run(row).data for row in range(len(case["ids"]))])
    _, grads = value_and_grad(lambda: sum((total(mul(run(row), case["g"][row])) for row in range(1, len(ys))),
                                          total(mul(run(0), case["g"][0]))), {"P": P})
    return numpy.where(case["mask"][..., None], ys, 0), grads["P"]


@pytest.mark.parametrize("conventions", CONVENTIONS)
@pytest.mark.parametrize("relative", [False, True])
def test_the_equations_are_what_the_engine_differentiates(relative: bool, conventions: dict):
    case = case_of(relative).but(conventions=conventions)
    y, dP = engine(case)
    found = values(case)
    assert rho(y, found["y"].exact, case.tau(found["y"])) <= 1
    assert rho(dP, found["dP"].exact, case.tau(found["dP"])) <= 1
    assert abs(y - found["y"].exact).max() < 1e-14 and abs(dP - found["dP"].exact).max() < 1e-13


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_fifty_digits_and_the_longest_floats_agree(dtype: str):
    for exact in (False, True):
        case = case_of(True, exact, dtype)
        slow, fast = METHOD.exact(case), values(case)
        for name in fast:
            assert abs(slow[name].exact - fast[name].exact).max() <= 2.0 ** -50 * fast[name].mag.max()


def test_no_case_is_held_bit_for_bit_behind_a_softmax():
    for case in (*METHOD.vectors(), case_of(False, exact=True)):
        assert not METHOD.exact_when(case) and not plugged(SoftPrompt).settle(case, METHOD).exact


def test_what_is_masked_has_no_weight_and_no_error():
    arith = arithmetic("bfloat16")
    p = softmax(Bounded(numpy.array([[1.0, -numpy.inf, 3.0]]), numpy.array([[0.5, 0.0, 0.25]]), arith))
    assert p.value[0, 1] == 0 and p.error[0, 1] == 0
    for moved in numpy.array([[0.5, -0.25], [-0.5, 0.25], [0.5, 0.25]]):  # no score in its interval leaves the bound
        w = numpy.exp(numpy.array([1.0, 3.0]) + moved)
        assert (abs(w / w.sum() - p.value[0, [0, 2]]) <= p.error[0, [0, 2]]).all()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_plain_numpy_fails_nothing(dtype: str):
    for relative in (False, True):
        for exact in (False, True):
            assert failing(SoftPrompt, case_of(relative, exact, dtype)) == set()


class Outside(ours.Prompted):
    """minipeft's prompt where it stands by default, and PEFT's does."""

    next_to_text = False


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("build, conventions", [(ours.soft_prompt, TOKENS), (Outside, {**OUTSIDE, **TOKENS})])
def test_minipeft_fails_nothing_in_either_place(build: Callable, conventions: dict, dtype: str):
    for relative in (False, True):
        for exact in (False, True):
            assert failing(build, case_of(relative, exact, dtype), conventions) == set()


def test_a_prompt_outside_the_padding_that_is_not_declared_is_found_and_named():
    case = case_of(True)
    assert {"P0", "P0e", "P1", "P5"} <= failing(Outside, case)
    plugin = plugged(Outside)
    law = next(prop for prop in METHOD.properties if prop.id == "P5")
    seen, _ = look(law, plugin.settle(case, METHOD), plugin, plugin.make(METHOD))
    assert seen[0].why == "left-padding shift: the distance from prompt to text grows with the padding"


@pytest.mark.parametrize("conventions", CONVENTIONS)
def test_positions_of_tokens_start_where_the_row_does_and_those_of_columns_where_the_batch_does(conventions: dict):
    """Three rows: two tokens masked on the left; a hole; nothing masked. One prompt vector."""
    mask = numpy.array([[0, 0, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]], bool)
    case = case_of(False, b=3, p=1).but({"mask": mask}).but(conventions=conventions)
    at, tokens = layout(case), conventions.get("numbering") == "tokens"
    next_to, restart = (conventions[name] == METHOD.conventions[name][i]
                        for name, i in (("left_padding", 0), ("positions", 1)))
    found = [numpy.where(at.mask[row], at.positions[row], 0).tolist() for row in range(3)]
    if restart:  # prompt 0, tokens 0, 1, ... each by itself
        text = [0, 1] if tokens else [2, 3]
        assert found == [[0, 0, 0, *text], [0, 0, 0, 2, 3], [0, 0, 1, 2, 3]]
    else:
        first = [0, 0, *([0, 1, 2] if tokens else [2, 3, 4])] if next_to else [0, 0, 0, 3, 4]
        assert found == [first, [0, 1, 0, 3, 4], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_plain_layer_that_counts_tokens_fails_nothing_if_it_says_so(dtype: str):
    for relative in (False, True):
        for exact in (False, True):
            assert failing(Numbered, case_of(relative, exact, dtype), TOKENS) == set()
    assert {"P0", "P0e"} <= failing(Numbered, case_of(False, dtype=dtype, seed=1)), "where it does not say so"


def test_who_counts_columns_and_says_tokens_is_found_and_named():
    case = case_of(False, seed=1)
    assert {"P0", "P0e"} <= failing(SoftPrompt, case, TOKENS)
    assert failing(SoftPrompt, case_of(True), TOKENS) == set(), "relative positions are the same, however they count"
    plugin = plugged(SoftPrompt, TOKENS)
    law, case = next(p for p in METHOD.properties if p.id == "P0"), plugin.settle(case, METHOD)
    seen, _ = look(law, case, plugin, plugin.make(METHOD))
    found = suspects(METHOD, law, case, seen)
    assert words(METHOD, found) == ("looks like the default conventions, not the declared ones: positions shifted, "
                                    "left_padding next to the text, numbering columns")


def test_declaring_the_default_of_a_convention_that_came_later_is_declaring_nothing():
    plain, said = plugged(SoftPrompt), plugged(SoftPrompt, {"numbering": "columns"})
    assert plain.conventions(METHOD) == said.conventions(METHOD) == METHOD.default()
    assert METHOD.meant({}) == {**METHOD.default(), "numbering": "columns"}
    case = case_of(False)
    assert plain.settle(case, METHOD).id == said.settle(case, METHOD).id != plugged(Numbered, TOKENS).settle(
        case, METHOD).id
    with pytest.raises(ValueError, match="numbering='rows'; expected"):
        plugged(SoftPrompt, {"numbering": "rows"}).conventions(METHOD)


@pytest.mark.parametrize("mutant", METHOD.after.mutants, ids=lambda mutant: mutant.id)
def test_every_bug_in_the_layer_that_counts_tokens_is_found_and_noted(mutant: Mutant):
    assert mutant.flag in METHOD.after.notes
    cases = [case_of(relative, exact, seed=1) for exact in (False, True) for relative in (False, True)]
    assert any(failing(mutant.build, case, TOKENS) for case in cases)


def test_the_vectors_of_v2_are_for_who_counts_tokens_and_those_of_v1_for_both_where_nobody_can_tell():
    pack = read("soft_prompt")
    later = [v for v in pack if v.case.conventions.get("numbering") == "tokens"]
    assert len(later) == 12 + 16 and all("numbering" not in v.case.conventions for v in pack.vectors[:-len(later)])
    assert all("prompt.positions_count_padding" in v.kills for v in later if v.level == "B"
               and v.case.dtype in ("float64", "float32"))
    held = {name: [s for s in run(METHOD, pack, plugged(build, conventions)) if not isinstance(s.what, str)]
            for name, build, conventions in (("columns", SoftPrompt, {}), ("tokens", Numbered, TOKENS),
                                             ("ours", ours.soft_prompt, TOKENS))}
    assert all(not isinstance(s.what, Fault) and s.what.holds for seen in held.values() for s in seen
               if s.vector.case.dtype != "bfloat16")
    columns, tokens = ({s.vector.id for s in held[name]} for name in ("columns", "tokens"))
    assert not columns & {v.id for v in later} and {v.id for v in later} <= tokens
    v1 = pack.vectors[:-len(later)]
    apart = {v.id for v in v1 if v.result == "valid" and "position" in v.case and not v.case["mask"][:, 0].all()}
    assert apart and not apart & tokens and {v.id for v in v1 if v.result == "valid"} - apart <= tokens


def test_v1_is_closed():
    """Byte for byte: what anybody was held against stays what it was."""
    digests = {name: hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()[:16]
               for name in ("soft_prompt.json", "soft_prompt.safetensors")}
    assert digests == V1


def test_a_wrong_declaration_fails():
    assert "P0" in failing(SoftPrompt, case_of(False), OUTSIDE)
    assert {"P0", "P4"} <= failing(SoftPrompt, case_of(False), {"positions": "restart"})


def test_positions_that_restart_conform_if_they_are_declared():
    mutant = _mutant("prompt.positions_not_shifted").build
    assert failing(mutant, case_of(False), {"positions": "restart"}) == set()
    assert {"P0", "P0e", "P1", "P4"} <= failing(mutant, case_of(False))


def test_dead_rows_are_found_and_named():
    plugin = plugged(_mutant("prompt.dead_rows").build)
    case, law = plugin.settle(case_of(True), METHOD), next(p for p in METHOD.properties if p.id == "P3d")
    seen, _ = look(law, case, plugin, plugin.make(METHOD))
    assert seen[0].name == "dead prompt rows" and seen[0].got == [2, 3]
    assert failing(_mutant("prompt.dead_rows").build, case) == {"P3d"}


def test_who_refuses_a_prompt_of_length_0_and_cannot_run_the_base_is_skipped():
    class NeverEmpty:
        def __init__(self, P, base, dtype):
            if not len(P):
                raise ValueError("a prompt of length 0")
            self.forward = SoftPrompt(P, base, dtype).forward

    plugin = plugged(NeverEmpty)
    case, law = plugin.settle(case_of(True), METHOD), next(p for p in METHOD.properties if p.id == "P1")
    with pytest.raises(Skip, match="a prompt of length 0"):
        look(law, case, plugin, plugin.make(METHOD))


@pytest.mark.parametrize("build", [SoftPrompt, Numbered, ours.soft_prompt])
def test_what_must_be_refused_is(build: Callable):
    for refusal in METHOD.refusals("float64"):
        plugin = plugged(build)
        with pytest.raises(Fault, match="raises"):
            METHOD.outputs["y"][1](plugin.make(METHOD), plugin.settle(refusal.case, METHOD))


@pytest.mark.parametrize("mutant", METHOD.mutants, ids=lambda mutant: mutant.id)
def test_every_planted_bug_is_found_and_noted(mutant: Mutant):
    assert mutant.flag in METHOD.notes
    cases = [case_of(relative, exact, seed=1) for exact in (False, True) for relative in (False, True)]
    assert any(failing(mutant.build, case) for case in cases)


def _mutant(id: str) -> Mutant:
    return next(mutant for mutant in METHOD.mutants if mutant.id == id)
