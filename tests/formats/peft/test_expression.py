"""Regular expressions of a file: those of `re`, in bounded time."""
import re
import time
import warnings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minipeft.formats.peft.expression import Expression, Steps

UNSLOTH = (r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
           r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
           r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|k_proj)))")
USED = (UNSLOTH, r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$", r"^(?!.*vision).*(?:q_proj|v_proj)$",
        r"model\.layers\.(0|1|2[0-9])\.self_attn\.[qv]_proj", r"(?i)MODEL.*Q_PROJ", r".*(?<!lm_)head",
        r"^(?:language_)?model(?=\.).*\.\w+", r"(?x) model  # a comment\n .*", r"(?P<n>.*)\.q_proj",
        r"\Amodel\b.*\Z", r".*[^a-z\d]q_proj\S*", r"\w+?\D{1,3}layers(\.[0-9]+)?\.(?s:.*)")
PATHS = ("model.layers.3.self_attn.q_proj", "model.language_model.layers.10.mlp.down_proj", "lm_head", "head",
         "vision.model.layers.0.self_attn.v_proj", "decoder.block.0.layer.1.EncDecAttention.v", "model.q_proj",
         "model.layers.21.x.k_proj", "language_model.layers.1.self_attn.q_proj")
HOSTILE = ("(a+)+$", "(a+)+b", "(.*.*)*x", ".*.*.*.*.*.*.*x", "(a|a)*b", "(a|aa)+$b", "(?:a?){40}a{40}b",
           "((a{1,50}){1,50}){1,50}b", "(a|a)" * 40 + "b", "((a*)*)*b", "(?=(a+)+b)a", "(.*?,){25}P",
           "a{1,4294967294}b", "(?:" * 60 + "a*" + ")*" * 60 + "b")
ATOMS = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\W", r"\b", r"\B", "^", "$", "A", "",
                         "[A-c0-9]"])
EXPRESSIONS = st.recursive(ATOMS, lambda inner: st.one_of(
    st.tuples(inner, inner).map("".join), st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})"),
    st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{0,3}?", "{2,}"])).map(
        lambda p: f"({p[0]}){p[1]}"),
    inner.map(lambda p: f"(?={p})"), inner.map(lambda p: f"(?!{p})"), inner.map(lambda p: f"(?i:{p})"),
    ATOMS.map(lambda p: f"(?<={p})"), ATOMS.map(lambda p: f"(?<!{p})")), max_leaves=8)


@example(text="(a){1,2}", path="aaa")
@example(text="(a){2,}b?", path="a")
@example(text="(?!a).", path="a")
@given(text=EXPRESSIONS, path=st.text("abA.1", min_size=1, max_size=6))
def test_a_match_is_there_where_python_finds_one(text, path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = re.compile(text)
    except re.error:
        return
    found = Expression(text)
    assert found.whole(path) == bool(expected.fullmatch(path))
    assert found.begins(path) == bool(expected.match(path))
    assert found.ends(path) == [n for n in range(len(path) + 1) if re.match(rf"(?:{text})(?<=\A.{{{n}}})", path)]


@pytest.mark.parametrize("text", USED)
def test_expressions_that_people_use_match_as_in_python(text):
    for path in PATHS:
        assert Expression(text).whole(path) == bool(re.fullmatch(text, path)), path
        assert Expression(text).begins(path) == bool(re.match(text, path)), path


@pytest.mark.parametrize("text", HOSTILE)
def test_an_expression_on_which_python_would_hang_is_matched_at_once(text):
    began = time.monotonic()
    assert not Expression(text, after="$").begins("a" * 40 + "!")
    assert time.monotonic() - began < 5


def test_what_stands_before_and_after_belongs_to_it():
    expression = Expression("q|v", r"(.*\.)?(", ")$")
    assert expression.begins("a.v") and not expression.begins("a.vx")


@pytest.mark.parametrize("text, why", [
    ("(", "not a regular expression"), ("a{2}{3}", "not a regular expression"), (r"(a)\1", "GROUPREF"),
    ("(a)?(?(1)b|c)", "GROUPREF_EXISTS"), ("(?>a+)b", "ATOMIC_GROUP"), ("a++b", "POSSESSIVE_REPEAT"),
    ("(" * 4000 + ")" * 4000, "not a regular expression"), ("a" * 10_001, "sensible length"),
    (3, "sensible length"), (None, "sensible length")])
def test_what_is_no_expression_or_depends_on_the_match_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        Expression(text)


@pytest.mark.parametrize("depth", [300, 900])
def test_a_deep_expression_is_refused_not_a_crash(depth):
    with pytest.raises(ValueError, match="nested too deeply|not a regular expression"):
        Expression("(" * depth + "a" + ")*" * depth).whole("ab")


def test_the_time_for_all_expressions_of_a_field_is_bounded():
    steps = Steps(1000)  # parsing counts, too
    Expression("a*b", steps=steps).whole("a" * 50)
    with pytest.raises(ValueError, match="too long on the names of this model"):
        for _ in range(100):
            Expression("a*b", steps=steps).whole("a" * 50)
    with pytest.raises(ValueError, match="too long"):  # a plain one counts, too
        Expression("a", steps=Steps(30)).begins("a")
