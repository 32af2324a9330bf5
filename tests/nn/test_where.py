"""One grammar for "which"."""
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.nn.where import matching

NAMES = ["encoder.0.attn.q.weight", "encoder.0.attn.q.bias", "encoder.1.attn.q.weight", "head.weight"]


def test_a_regular_expression_is_searched_not_matched():
    assert matching(NAMES, "attn") == NAMES[:3]
    assert matching(NAMES, r"^encoder\.\d\.attn\.q\.weight$") == [NAMES[0], NAMES[2]]
    assert matching(NAMES, "") == NAMES


def test_a_callable_is_asked_and_any_true_value_counts():
    assert matching(NAMES, lambda name: name.count("weight")) == [NAMES[0], *NAMES[2:]]
    assert matching(NAMES, re.compile("head").search) == ["head.weight"]


@given(st.lists(st.sampled_from(["q", "bias", "head", r"\.1\.", "weight$"]), min_size=1, max_size=4), st.booleans())
def test_a_list_chooses_what_any_of_it_does_each_once_in_the_order_of_the_names(patterns, as_tuple):
    found = matching(NAMES, tuple(patterns) if as_tuple else patterns)
    assert found == [n for n in NAMES if any(re.search(p, n) for p in patterns)]


def test_names_may_come_from_any_iterable():
    assert matching(iter(NAMES), "head") == matching(dict.fromkeys(NAMES), "head") == ["head.weight"]


@pytest.mark.parametrize("where", ["atn.q", ["q", "atn.q"]])
def test_a_pattern_that_matches_nothing_names_itself_and_the_nearest(where):
    with pytest.raises(ValueError, match=r"where='atn.q' matches none of the 4 parameter names; nearest: encoder"):
        matching(NAMES, where)


def test_a_mistyped_name_finds_the_name_that_was_meant_first():
    with pytest.raises(ValueError, match=r"nearest: encoder\.1\.attn\.q\.weight"):
        matching(NAMES, r"^encoder\.1\.attn\.q\.weigth$")


def test_a_callable_that_chooses_nothing_is_told_some_names():
    with pytest.raises(ValueError, match="where=the callable matches none of the 4 site names; nearest: encoder.0"):
        matching(NAMES, lambda name: False, "site")


def test_no_names_at_all_is_said_so():
    with pytest.raises(ValueError, match="where='x' matches nothing: there is no matrix"):
        matching([], "x", "matrix")


@pytest.mark.parametrize("pattern", ["(", "[a", "*", r"\q", "a{2,1}"])
def test_a_malformed_expression_is_shown_with_what_is_wrong(pattern):
    with pytest.raises(ValueError, match="is not a regular expression: "):
        matching(NAMES, pattern)


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="where is an empty list"):
        matching(NAMES, [])


@pytest.mark.parametrize("where", [5, None, b"head", {"head"}, ["head", 5], re.compile("head"), {"a": 1}])
def test_anything_else_is_refused_by_type(where):
    with pytest.raises(TypeError, match="expected a regular expression, a callable on the name, or a list of these"):
        matching(NAMES, where)


def test_an_error_of_the_callable_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        matching(NAMES, lambda name: 1 / 0)
