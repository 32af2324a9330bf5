"""Which modules a file chooses, with which rank and alpha: as the real peft does."""
import functools
import json

import pytest

from minipeft import T5
from minipeft.formats.peft.codec import CODECS
from minipeft.formats.peft.names import modules
from minipeft.formats.peft.targets import Patterns, chosen, pattern
from tests.methods.golden import FIXTURES

RECORDED = json.loads((FIXTURES / "peft_targets.json").read_text())


@functools.cache
def model(name):
    return T5.from_pretrained(FIXTURES / "t5" / name)


def ours(case):
    """{path: (rank, alpha)} of the places that our LoRA has for the config of a case."""
    m = model(case["model"])
    method = CODECS["LORA"].method({"r": 1, "lora_alpha": 8, **case["config"]}, {}, m)
    paths = {slot: path for path, slot in modules(m).items()}
    return {paths[name]: (method.rank_at(name, slot), method.alpha_at(name))
            for name, slot in method.places(m).items()}


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: str(case["config"]))
def test_the_modules_ranks_and_alphas_are_those_that_peft_0_21_2_chooses(case):
    if "refused" in case:
        with pytest.raises(ValueError):
            ours(case)
        return
    names, r, a = RECORDED["modules"][case["model"]], case.get("r", {}), case.get("lora_alpha", {})
    assert ours(case) == {names[i]: (r.get(str(i), 1), a.get(str(i), 8)) for i in case["chosen"]}


@pytest.mark.parametrize("field, value", [
    ("target_modules", 3), ("target_modules", [3]), ("target_modules", [""]), ("target_modules", "("),
    ("target_modules", {"q": 1}), ("exclude_modules", "["), ("exclude_modules", 0.5), ("modules_to_save", "lm_head"),
    ("layers_to_transform", "1"), ("layers_to_transform", [True]), ("layers_to_transform", 1.0),
    ("layers_pattern", 3), ("layers_pattern", ["("])])
def test_a_malformed_field_is_refused_by_its_name_or_its_value(field, value):
    with pytest.raises(ValueError) as error:
        chosen({"target_modules": ["q"], "layers_to_transform": [1], field: value}, ["a.b.1.q"], [])
    assert field in str(error.value) or "regular expression" in str(error.value)


def test_nothing_chosen_is_an_error_that_says_what_the_modules_are_called():
    with pytest.raises(ValueError, match=r"\['query'\], which chooses none of the 3 modules .* end in q, v$"):
        chosen({"target_modules": ["query"]}, ["a.q", "a.v", "b.q"], [])


def test_patterns_know_which_of_their_keys_match_nothing():
    found = pattern({"rank_pattern": {"q": 1, "^v": 2, "a.*": 3}}, "rank_pattern")
    assert found.first("a.q") == 1 and found.first("a.v") == 3 and found.first("b.v") is None
    assert found.unused(["a.q", "a.v"]) == ["^v"], "a key whose places an earlier key takes is no unused one"
    assert pattern({}, "rank_pattern") == Patterns({}) == {}
    with pytest.raises(ValueError, match="rank_pattern is"):
        pattern({"rank_pattern": ["q"]}, "rank_pattern")


def test_a_module_to_save_takes_everything_inside_of_it():
    config = {"target_modules": r".*(q|lm_head.*)", "modules_to_save": ["block", "lm_head"]}
    others = ["encoder.blocks.0.q", "a.lm_head_2"]
    assert chosen(config, ["encoder.block.0.q", "a.lm_head", *others], []) == others
