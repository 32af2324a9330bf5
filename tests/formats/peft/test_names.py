"""Keys that tools have changed are mapped where that is unique, and refused in clear words where it is not."""
import pytest

from minipeft import T5
from minipeft.formats.peft import names
from minipeft.formats.peft.names import PREFIX, check_keys, check_shapes, linear_modules, modules, stripped
from tests.methods.golden import FIXTURES

PATHS = ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.1.layer.0.SelfAttention.q",
         "decoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.1.EncDecAttention.q")
RIGHT = [f"{PREFIX}{path}.lora_{factor}.weight" for path in PATHS for factor in "AB"]
MODEL = T5.from_pretrained(FIXTURES / "t5" / "v11")
BARE = [key.removeprefix(PREFIX) for key in RIGHT]


def mapped(keys, expected):
    return names.mapped(keys, expected, MODEL)


def changed(change):
    """{changed key: right key}."""
    return {change(key): key for key in RIGHT}


@pytest.mark.parametrize("change", [
    lambda key: f"_orig_mod.{key}", lambda key: f"module.{key}", lambda key: f"_orig_mod.module.{key}",
    lambda key: f"{PREFIX}_orig_mod.{key[len(PREFIX):]}", lambda key: f"{PREFIX}module.{key[len(PREFIX):]}",
    lambda key: key.replace(".layer.", "._orig_mod.layer."), lambda key: f"{PREFIX}{key}", lambda key: PREFIX * 2 + key,
    lambda key: key.removeprefix(PREFIX), lambda key: key.replace(".weight", ".default.weight"),
    lambda key: f"{PREFIX}model.{key[len(PREFIX):]}", lambda key: f"{PREFIX}language_model.{key[len(PREFIX):]}",
    lambda key: key.replace(PREFIX, "base_model.model.model.language_model."),
    lambda key: key.replace(PREFIX, "t5."), lambda key: key.replace("lora_A.weight", "lora_A"),
    lambda key: f"module.{key[len(PREFIX):].replace('.weight', '.default.weight')}"])
def test_what_tools_add_or_leave_out_is_mended_and_said(change):
    found, (note,) = mapped(changed(change), RIGHT)
    assert found == changed(change)
    assert f"{change(RIGHT[0])!r} as {RIGHT[0]!r}" in note


def test_keys_as_peft_writes_them_are_taken_without_a_note():
    assert mapped(RIGHT[::-1], RIGHT) == ({key: key for key in RIGHT}, [])


def test_a_few_changed_keys_among_right_ones_are_mended_too():
    keys = [f"module.{RIGHT[0]}", *RIGHT[1:]]
    found, (note,) = mapped(keys, RIGHT)
    assert set(found.values()) == set(RIGHT) and "(1 in all)" in note


def test_a_word_that_the_file_lacks_in_every_key_is_mended():
    """As where the inner "model." of a decoder is missing."""
    expected = [f"{PREFIX}model.layers.{i}.q_proj.lora_A.weight" for i in range(3)]
    assert mapped([key.replace("model.layers", "layers") for key in expected], expected)[0]
    inner = [key.replace("model.layers", "model.text.layers") for key in expected]
    assert set(mapped(expected, inner)[0].values()) == set(inner)


@pytest.mark.parametrize("change, extra", [
    (lambda key: key.replace("encoder", "decoder") if "EncDec" not in key else key, 4),
    (lambda key: key.replace("encoder", "encoder_1").replace("decoder", "encoder_1"), 8),
    (lambda key: key.replace(".q.", ".v."), 8), (lambda key: key.replace("block.0", "block.2"), 6),
    (lambda key: key.replace("lora_A", "lora_down"), 4)])
def test_other_places_are_never_taken_for_those_that_are_expected(change, extra):
    keys = [change(key) for key in RIGHT]
    with pytest.raises(ValueError, match="not those of its configuration"):
        mapped(keys, RIGHT)


def test_an_adapter_of_the_encoder_is_not_put_on_the_decoder():
    """Every key of the file has a word that the model's have not, and the other way round."""
    encoder = [key for key in RIGHT if "encoder" in key]
    with pytest.raises(ValueError, match="Not expected: .*encoder.block.0.* Missing: .*decoder.block.0"):
        mapped(encoder, [key.replace("encoder", "decoder") for key in encoder])


def test_numbers_are_never_left_out():
    with pytest.raises(ValueError, match="Not expected"):
        mapped([key for key in RIGHT if "encoder.block.0" in key], [key for key in RIGHT if "encoder.block.1" in key])
    with pytest.raises(ValueError, match="Not expected"):
        mapped([f"{PREFIX}experts.1.q.lora_A.weight"], [f"{PREFIX}experts.q.lora_A.weight"])


def test_two_keys_for_one_place_are_refused():
    keys = [*(f"vision.{key}" for key in BARE), *(f"text.{key}" for key in BARE)]
    with pytest.raises(ValueError, match="Not expected"):
        mapped(keys, RIGHT)
    with pytest.raises(ValueError, match=r"Not expected: 'module\..* \(1 in all\). Missing: none"):
        mapped([*RIGHT, f"module.{RIGHT[0]}"], RIGHT)


def test_the_error_names_three_keys_of_each_side_and_counts_them():
    with pytest.raises(ValueError) as error:
        mapped([f"x.{i}" for i in range(5)], RIGHT)
    said = str(error.value)
    assert "'x.0', 'x.1', 'x.2' (5 in all)" in said and "(8 in all)" in said
    assert sum(f"{key!r}" in said for key in RIGHT) == 3
    with pytest.raises(ValueError, match=rf"Not expected: none. Missing: '{RIGHT[-1]}' \(1 in all\)"):
        mapped(RIGHT[:-1], RIGHT)


def test_the_model_is_not_searched_again_for_each_of_very_many_keys(monkeypatch):
    model, searched = T5.from_pretrained(FIXTURES / "t5" / "v10"), []
    monkeypatch.setattr(names, "uses", lambda model: searched.append(model) or {"lm_head": "shared"})
    check_keys([f"x.{i}" for i in range(100)], model)
    assert len(searched) == 1


def test_a_key_is_stripped_of_what_tools_leave_behind():
    assert stripped(f"module.{PREFIX}{PREFIX}_orig_mod.a.lora_A.default.weight") == f"{PREFIX}a.lora_A.weight"
    assert stripped("prompt_embeddings") == "prompt_embeddings"
    assert stripped(PREFIX * 10 ** 5 + "a") == f"{PREFIX}a", "at once"


@pytest.mark.parametrize("shape, said", [
    ((16, 8), r"\[16, 8\]; expected \[32, 8\]: truncated, with 16 of 32 rows"),
    ((32, 4), r"\[32, 4\]; expected \[32, 8\]: truncated, with 4 of 8 columns"),
    ((64, 8), r"\[64, 8\]; expected \[32, 8\]$"), ((8, 32), r"\[8, 32\]; expected \[32, 8\]$"),
    ((32,), r"\[32\]; expected \[32, 8\]$"), ((0, 8), "no number at all")])
def test_a_shape_that_does_not_fit_is_refused_and_a_part_of_a_tensor_is_called_truncated(shape, said):
    with pytest.raises(ValueError, match=said):
        check_shapes({"A": shape}, {"A": (32, 8)})


def test_the_linear_modules_are_all_but_the_head():
    for name, count in (("v10", 64), ("v11", 36)):
        model = T5.from_pretrained(FIXTURES / "t5" / name)
        assert len(linear_modules(model)) == count and "lm_head" not in linear_modules(model)
        assert ("lm_head" in modules(model)) == (name == "v11")
