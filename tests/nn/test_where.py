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
    assert found == [n for n in NAMES if any(
        p in n.split(".") if p.isalnum() else re.search(p, n) for p in patterns)]


def test_a_bare_word_in_a_list_is_a_whole_segment_and_alone_it_is_searched():
    names = [*(f"encoder.0.attn.{part}.weight" for part in "qkvo"), "decoder.0.cross.o.weight@lora.A",
             "position.weight"]
    assert matching(names, ["q", "o"]) == [names[0], names[3], names[4]]
    assert matching(names, ("lora",)) == matching(names, ["A"]) == [names[4]]
    assert matching(names, ["0"]) == names[:5] and matching(names, "o") == names
    assert matching(names, [r"o"]) == [names[3], names[4]] and matching(names, [r"pos."]) == [names[5]]
    with pytest.raises(ValueError, match="where='attn_q' matches none"):
        matching(names, ["attn_q"])


@pytest.mark.parametrize("theirs, ours", [("q_proj", "q"), (r"\.v_proj$", "v"), ("query", "q"), ("out_proj", "o"),
                                          ("fc1", "wi"), ("linear2", "wo"), ("embed_tokens", "embedding"),
                                          ("wieght", "weight")])
def test_a_name_of_another_library_leads_to_ours(theirs, ours):
    names = [f"encoder.0.{part}.weight" for part in ("attn.q", "attn.k", "attn.v", "attn.o", "ff.wi", "ff.wo")]
    for where in (theirs, [theirs]):
        with pytest.raises(ValueError) as caught:
            matching([*names, "embedding.weight"], where)
        near = str(caught.value).split("nearest: ")[1].split("; ")[0].split(", ")
        assert all(ours in name.split(".") for name in near), near


def test_a_tied_head_is_said_to_be_tied():
    with pytest.raises(ValueError, match="the head of this model is tied to the embedding: choose 'embedding'"):
        matching(["embedding.weight", "encoder.0.attn.q.weight"], "^head")
    with pytest.raises(ValueError) as caught:
        matching(["embedding.weight", "head.weight"], "^heads")
    assert "tied" not in str(caught.value)


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
