"""A failing case becomes as small as it can be, and stays a case on which a correct implementation is right."""
from __future__ import annotations

import types

import numpy
import pytest
from hypothesis import given, settings, strategies as st

from minipeft.conformance.case import Case
from minipeft.conformance.look import fails, look
from minipeft.conformance.methods.lora_linear import METHOD
from minipeft.conformance.plugin import Plugin
from minipeft.conformance.shrink import places, shrink, simpler, sound, without

MUTANTS = {mutant.id: mutant for mutant in METHOD.mutants}
LAWS = {prop.id: prop for prop in METHOD.properties}


def drawn(dtype="float64", exact=True, seed=0, **sizes):
    return METHOD.draw(numpy.random.default_rng(seed), dtype, exact, {"N": 7, "in": 48, "out": 33, "r": 4, **sizes})


def failing(mutant, law):
    """(fails, the cases that it was asked about)"""
    module = types.SimpleNamespace(capabilities={"dtypes": ("float64", "float32", "bfloat16")},
                                   lora_linear=MUTANTS[mutant].build)
    plugin, asked = Plugin(module), []

    def still(case):
        asked.append(case)
        return fails(look(LAWS[law], case, plugin, plugin.make(METHOD))[0])
    return still, asked


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("exact", [False, True])
def test_a_scale_not_divided_becomes_the_example_of_the_notes(dtype, exact):
    still, asked = failing("lora.scale_alpha", "L1")
    small = shrink(drawn(dtype, exact, seed=1), METHOD, still)
    assert {name: small[name].tolist() for name in "WABx"} == {
        "W": [[0.0]], "A": [[1.0], [0.0]], "B": [[1.0, 0.0]], "x": [[1.0]]}
    assert small.params == {"alpha": 1.0} and len(asked) <= 116
    assert METHOD.reference(small)["y"].exact.tolist() == [[0.5]]


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(["lora.merge_transposed", "lora.grad_a_mean", "lora.row_zero_leaks", "lora.normalized"]),
       st.booleans(), st.integers(0, 99))
def test_the_result_fails_is_no_larger_and_the_same_every_time(mutant, exact, seed):
    still, _ = failing(mutant, "L2" if "grad" in mutant else "L3m")
    case = drawn("float32", exact, seed, **{"in": 6, "out": 6})
    if not still(case):
        return
    small = shrink(case, METHOD, still)
    assert still(small) and small.id == shrink(case, METHOD, still).id
    assert all(small[name].size <= case[name].size for name in case.arrays)
    assert small.exact == case.exact and small.dtype == case.dtype and small.params.keys() == case.params.keys()
    assert sound(METHOD, small), "a correct implementation fails on it"


def test_tries_are_bounded_and_none_leaves_the_case_as_it_was():
    still, asked = failing("lora.scale_alpha", "L1")
    shrink(drawn(), METHOD, still, tries=5)
    assert len(asked) == 5
    case = drawn()
    assert shrink(case, METHOD, still, tries=0) is case


def test_a_candidate_that_makes_the_question_raise_is_refused():
    def still(case):
        if case["W"].shape[0] < 10:
            raise ValueError("too small to ask")
        return True
    assert shrink(drawn(), METHOD, still)["W"].shape == (10, 1)


def test_an_exact_case_keeps_a_scale_that_is_a_power_of_two():
    def still(c):
        return len(c["A"]) >= 3 and bool((c.params["alpha"] * c["x"] @ c["A"].T @ c["B"].T).any())
    small = shrink(drawn(exact=True), METHOD, still)
    assert len(small["A"]) == 4 and small.params == {"alpha": 1.0}
    assert len(shrink(drawn(exact=False), METHOD, still)["A"]) == 3


def test_entries_become_0_then_1_then_integers_and_never_less_simple():
    x = numpy.array([0.0, 1.0, 2.7, -3.0])
    assert [list(y) for y in simpler(x, slice(0, 4))] == [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, -3]]
    assert list(simpler(numpy.zeros(3), slice(0, 3))) == []


TABLE = types.SimpleNamespace(axes={"E": ("V", "d"), "A": ("r", "V"), "ids": ("b", "t")})


def test_ids_follow_the_rows_of_a_vocabulary_that_loses_some():
    e = numpy.arange(6.0)[:, None]
    case = Case("table", "float64", False, {}, {"E": e, "A": e.T, "ids": numpy.array([[0, 1, 2, 3, 4, 5]])})
    middle = without(case, TABLE, "V", 2, 4)
    assert middle["E"][:, 0].tolist() == middle["A"][0].tolist() == [0, 1, 4, 5]
    assert middle["ids"].tolist() == [[0, 1, 2, 2, 2, 3]] and middle["ids"].dtype == numpy.int64
    last = without(case, TABLE, "V", 4, 6)
    assert last["ids"].tolist() == [[0, 1, 2, 3, 3, 3]]
    assert without(case, TABLE, "t", 0, 2)["ids"].tolist() == [[2, 3, 4, 5]]


def test_a_square_array_loses_rows_and_columns_and_unequal_lengths_are_left_alone():
    square = types.SimpleNamespace(axes={"q": ("d", "d"), "x": ("N", "d")})
    case = Case("square", "float64", False, {}, {"q": numpy.arange(9.0).reshape(3, 3), "x": numpy.ones((2, 3))})
    assert without(case, square, "d", 1, 2)["q"].tolist() == [[0, 2], [6, 8]]
    assert list(places(case.but({"x": numpy.ones((2, 4))}), square, "d")) == []
    assert without(case, square, "nothing", 0, 1) is None
