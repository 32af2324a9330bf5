"""What stands beside LoRA in PEFT's files: whole modules, rows of tables, biases, copies of the base."""
from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest

import minipeft
from minipeft import LoRA, Selective, T5, T5Config, Union
from minipeft.files import read_tensors, write_tensors
from minipeft.formats.peft import beside, save, saved_modules, to_peft
from minipeft.formats.peft.codec import CODECS
from minipeft.formats.peft.files import Source, written_config
from minipeft.laws.models import batch_for, bits, logits, moved
from tests.formats.golden import check
from tests.formats.golden import logits as golden_logits
from tests.methods.golden import FIXTURES, close

RNG = numpy.random.default_rng
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SHARED, HEAD = "base_model.model.shared.weight", "base_model.model.lm_head.weight"
ROWS = "base_model.model.shared.token_adapter.trainable_tokens_delta"
EMBED = [f"base_model.model.{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")]
BATCH = batch_for(13, 0)


def t5(tied: bool = True, dtype: str = "float64") -> T5:
    return T5(T5Config(13, 12, 5, 3, 17, 1, 1, 8, 20, tie_word_embeddings=tied), RNG(0), dtype)


def lora(**fields: Any) -> LoRA:
    return LoRA(2, 3, where=r"\.q\.weight$", **fields)


def flat(*rows: int) -> numpy.ndarray:
    """The flat indices of these rows of the head [13, 12]."""
    return numpy.add.outer(12 * numpy.array(rows), numpy.arange(12)).reshape(-1)


def attached(model: T5, *parts: Any, **fields: Any) -> Any:
    method = Union(lora(), *parts, **fields) if parts else lora()
    return moved(minipeft.attach(model, method, RNG(1), "a"), RNG(2))


def edited(source: Path, target: Path, fields: dict, tensors: Any = dict) -> Path:
    """A copy of a directory with other fields, and with tensors({key: array}) as its tensors."""
    shutil.copytree(source, target)
    config = {**json.loads((source / CONFIG).read_text()), **fields}
    (target / CONFIG).write_text(json.dumps(config))
    write_tensors(target / WEIGHTS, tensors(read_tensors(source / WEIGHTS)[0]), {"format": "pt"})
    return target


@pytest.fixture
def plain(tmp_path):
    """A directory with a LoRA alone, for both kinds of t5()."""
    model = t5()
    attachment = attached(model)
    save(attachment, tmp_path / "plain")
    return tmp_path / "plain"


def refused(model: T5, folder: Path, message: str) -> None:
    before = bits(model.state())
    with pytest.raises(ValueError, match=message):
        minipeft.load(model, folder)
    assert not model.attachments and bits(model.state()) == before


# ---- directories of PEFT's


@pytest.mark.parametrize("folder", ["lora_modules_to_save", "lora_token_rows", "lora_token_rows_head", "lora_lm_head"])
def test_a_directory_of_peft_gives_its_logits_gradients_and_merged_logits_and_is_written_back(folder, tmp_path):
    """A trained head; rows of a tied table, in no order, beside norms; rows of a head beside position tables and all of
    o, with bias="all"; a LoRA on the head, beside a copy of its base."""
    found = check(f"adapters/{folder}", tmp_path)
    said, written = (json.loads((path / CONFIG).read_text()) for path in (FIXTURES / "adapters" / folder,
                                                                          tmp_path / "written"))
    for field in ("modules_to_save", "trainable_token_indices", "bias", "ensure_weight_tying"):
        assert written[field] == said[field], field
    assert isinstance(found.method, Union) == (folder != "lora_lm_head")


def own_head(model: T5) -> T5:
    """The same function, with a head of its own."""
    config = dataclasses.replace(model.config, tie_word_embeddings=False)
    made = T5(config, None, "float64")
    made.load_state({**model.state(), "head.weight": model.state()["embedding.weight"]})
    return made


def test_a_trained_head_of_a_tied_model_is_refused_there_and_acts_on_a_head_of_its_own(tmp_path):
    """In PEFT its merge multiplies the logits by sqrt(d_model)."""
    folder = FIXTURES / "adapters" / "lora_modules_to_save_tied"
    with numpy.load(folder / "golden.npz") as arrays:
        g = dict(arrays)
    model = T5.from_pretrained(FIXTURES / str(g["base"]), "float64")
    refused(model, folder, "modules_to_save chooses lm_head, but not encoder.embed_tokens: on this model lm_head has "
                           "the weight of shared.*; load it on a model with a head of its own: "
                           "tie_word_embeddings=False, scale_decoder_outputs=True, and a copy of embedding.weight")
    model = own_head(model)
    assert close(golden_logits(model, g), g["logits_base"], 1e-10) and model.config.scale_decoder_outputs
    attachment = minipeft.load(model, folder)
    assert close(golden_logits(model, g), g["logits"], 1e-10)
    attachment.merge()
    assert close(golden_logits(model, g), g["logits"], 1e-10)


def test_a_lora_on_the_head_of_a_tied_model_is_refused():
    model = T5.from_pretrained(FIXTURES / "t5" / "v10")
    refused(model, FIXTURES / "adapters" / "lora_lm_head", "lm_head.lora_A.weight' is for lm_head alone: on this model")


# ---- the table, which several modules use


def with_table(keys: list[str], tables: list[numpy.ndarray]) -> Any:
    return lambda tensors: {**tensors, **dict(zip(keys, tables))}


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_table_that_peft_ignores_acts_here_with_a_warning(tied, plain, tmp_path):
    table = RNG(3).standard_normal((13, 12))
    folder = edited(plain, tmp_path / "a", {"modules_to_save": ["shared"]}, with_table([SHARED], [table]))
    model, other = t5(tied), t5(tied)
    with pytest.warns(UserWarning, match="PEFT's own forward ignores what is stored for 'shared'"):
        minipeft.load(model, folder)
    other.load_state({**other.state(), "embedding.weight": table})
    minipeft.load(other, plain)
    assert close(logits(model, BATCH), logits(other, BATCH), 1e-13)


def test_a_warning_that_is_turned_into_an_error_changes_nothing(plain, tmp_path):
    folder = edited(plain, tmp_path / "a", {"modules_to_save": ["nothing"]})
    model = t5()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="names 'nothing'"):
            minipeft.load(model, folder)
    assert not model.attachments


def test_copies_of_the_table_for_all_its_uses_are_one_weight_if_they_are_equal(plain, tmp_path):
    table = RNG(3).standard_normal((13, 12))
    fields = {"modules_to_save": ["embed_tokens"]}
    folder = edited(plain, tmp_path / "a", fields, with_table(EMBED, [table, table]))
    model = t5(tied=False)
    found = minipeft.load(model, folder)
    assert close(model.slots["embedding.weight"].fold().dense().data, table, 1e-15)
    assert close(to_peft(found, found.tensors)[EMBED[1]], table, 1e-15)
    refused(t5(), folder, "chooses encoder.embed_tokens, but not lm_head: on this model encoder.embed_tokens has the")
    folder = edited(plain, tmp_path / "b", fields, with_table(EMBED, [table, table + 1]))
    refused(t5(tied=False), folder, f"{EMBED[0]} and {EMBED[1]} differ; expected the same array twice")
    folder = edited(plain, tmp_path / "c", {"modules_to_save": ["encoder.embed_tokens"]},
                    with_table(EMBED[:1], [table]))
    refused(t5(tied=False), folder, "chooses encoder.embed_tokens, but not decoder.embed_tokens")


def test_rows_of_an_untied_table_that_peft_ignores_act_here_with_a_warning(plain, tmp_path):
    new = RNG(3).standard_normal((2, 12))
    folder = edited(plain, tmp_path / "a", {"trainable_token_indices": [9, 4]}, with_table([ROWS], [new]))
    model = t5(tied=False)
    with pytest.warns(UserWarning, match="ignores what is stored for 'shared'"):
        found = minipeft.load(model, folder)
    dense, base = model.slots["embedding.weight"].fold().dense().data, model.state()["embedding.weight"]
    assert close(dense[[9, 4]], new, 1e-15), "the rows replace those of the base"
    others = numpy.delete(numpy.arange(13), [9, 4])
    assert (dense[others] == base[others]).all()
    assert found.method.parts[1].rows == (9, 4)
    minipeft.load(t5(), folder, name="tied: without a warning".replace(" ", "-").replace(":", ""))


def test_on_a_tied_model_the_same_ids_for_table_and_head_are_one(plain, tmp_path):
    new = RNG(3).standard_normal((2, 12))
    fields = {"trainable_token_indices": {"lm_head": [9, 4], "shared": [9, 4]}}
    found = minipeft.load(t5(), edited(plain, tmp_path / "a", fields, with_table([ROWS], [new])))
    assert [type(part) for part in found.method.parts] == [LoRA, Selective]
    fields["trainable_token_indices"]["lm_head"] = [4]
    refused(t5(), edited(plain, tmp_path / "b", fields, with_table([ROWS], [new])),
            r"has \[4\] for lm_head and \[9, 4\] for shared|has \[9, 4\] for shared and \[4\] for lm_head")


# ---- which modules a name chooses


def test_a_name_chooses_modules_by_the_end_of_their_paths_and_all_that_is_inside_of_them():
    model = t5(tied=False)

    def chosen(*names: str) -> set[str]:
        return set(saved_modules.saved({"modules_to_save": list(names)}, model).values())

    assert chosen("lm_head") == chosen("head") == {"head.weight"}
    assert chosen("o") == {f"{at}.weight" for at in ("encoder.0.attn.o", "encoder.0.ff.wo", "decoder.0.attn.o",
                                                     "decoder.0.cross.o", "decoder.0.ff.wo")}
    assert chosen("encoder.block.0.layer.0.SelfAttention") == {
        "encoder.position.weight", *(f"encoder.0.attn.{w}.weight" for w in "qkvo")}
    assert chosen("final_layer_norm") == {"encoder.norm.weight", "decoder.norm.weight"}
    assert chosen("block.0.layer.0.Self") == set(), "but not by their middle"


def test_a_name_that_chooses_nothing_is_reported_and_written_back(plain, tmp_path):
    folder = edited(plain, tmp_path / "a", {"modules_to_save": ["classifier"]})
    with pytest.warns(UserWarning, match="modules_to_save names 'classifier', which is no module of this model"):
        found = minipeft.load(t5(), folder)
        save(found, tmp_path / "b")
    assert isinstance(found.method, LoRA)
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["modules_to_save"] == ["classifier"]


def test_beside_a_prompt_the_keys_lack_a_model():
    model = t5(tied=False)

    class Prompts(type(CODECS["LORA"])):  # type: ignore[misc]
        peft_type = "PROMPT_TUNING"

    for codec, key in ((Prompts(), "base_model.lm_head.weight"), (CODECS["LORA"], HEAD)):
        config = {"modules_to_save": ["lm_head"]}
        method = beside.joined(lora(), codec, config, model)
        assert [row.theirs for row in beside.rows(method, codec, model, config)][-1] == key
        assert beside.fields(codec) >= {"modules_to_save"}
    assert beside.fields(Prompts()) == {"modules_to_save"}


# ---- what is refused


@pytest.mark.parametrize("field, message", [
    ([], r"has \[\] for shared; expected distinct integers >= 0, at least one"), ({"shared": 3}, "has 3 for shared"),
    ([1, 1], r"has \[1, 1\] for shared"), ([-1], r"has \[-1\]"), ([1.0], r"has \[1.0\]"), ([True], r"has \[True\]"),
    ([13], r"has \[13\] for shared, whose weight is \[13, 12\]; expected ids of its rows"), ("shared", "has 'shared'"),
    ({"embed": [1]}, "names 'embed', which is no module of this model"), ({"": [1]}, "names ''"),
    ({"encoder.final_layer_norm": [1]}, r"has .* whose weight is \[12\]; expected ids of its rows"),
    ({"lm_head": [1], "head": [2]}, r"has two lists for lm_head, \[1\] and \[2\]"),
    ({"encoder.embed_tokens": [1], "decoder.embed_tokens": [2]}, r"has \[1\] for encoder.embed_tokens and \[2\] for")])
def test_malformed_token_indices_are_refused(field, message, plain, tmp_path):
    refused(t5(tied=False), edited(plain, tmp_path / "a", {"trainable_token_indices": field}),
            f"trainable_token_indices {message}")


@pytest.mark.parametrize("fields, message", [
    ({"target_modules": ["q", "shared"], "trainable_token_indices": [1]}, "embedding.weight is chosen by the method "
     "itself and by trainable_token_indices"),
    ({"modules_to_save": ["shared"], "trainable_token_indices": [1]}, "embedding.weight is chosen by modules_to_save "
     "and by trainable_token_indices"),
    ({"target_modules": ["q", "wo"], "modules_to_save": ["o"]}, "encoder.0.ff.wo.weight is chosen by the method itself "
     "and by modules_to_save; expected one of them")])
def test_a_weight_that_two_fields_choose_is_refused_by_name(fields, message, plain, tmp_path):
    refused(t5(), edited(plain, tmp_path / "a", fields), message)


@pytest.mark.parametrize("field", ["modules_to_save", "trainable_token_indices"])
def test_a_field_without_its_tensors_and_tensors_without_their_field_are_refused(field, tmp_path):
    """PEFT drops such tensors without a word."""
    source = FIXTURES / "adapters" / "lora_token_rows"
    refused(T5.from_pretrained(FIXTURES / "t5" / "v10"), edited(source, tmp_path / "a", {field: None}),
            "the tensors of the file are not those of its configuration .* Not expected: 'base_model")
    refused(T5.from_pretrained(FIXTURES / "t5" / "v10"), edited(source, tmp_path / "b", {}, lambda tensors: {
        key: array for key, array in tensors.items() if "lora" in key}), "Missing: 'base_model.model.")


def test_a_bias_that_is_stored_is_named(plain, tmp_path):
    key = "base_model.model.encoder.block.0.layer.0.SelfAttention.q.base_layer.bias"
    folder = edited(plain, tmp_path / "a", {"bias": "lora_only"}, with_table([key], [numpy.zeros(15)]))
    refused(t5(), folder, f"'{key}' is a bias, and T5 has none")
    minipeft.load(t5(), edited(plain, tmp_path / "b", {"bias": "lora_only"}))


def test_a_copy_of_the_base_is_kept_if_it_is_equal_and_refused_if_not(tmp_path):
    source, key = FIXTURES / "adapters" / "lora_lm_head", "base_model.model.lm_head.base_layer.weight"
    for dtype in ("float64", "float32"):  # of the model, of which either may be the wider one
        found = minipeft.load(T5.from_pretrained(FIXTURES / "t5" / "v11", dtype), source)
        save(found, tmp_path / dtype)
        ours, theirs = (read_tensors(folder / WEIGHTS)[0][key] for folder in (tmp_path / dtype, source))
        assert ours.dtype == theirs.dtype and (ours == theirs).all()
    folder = edited(source, tmp_path / "a", {}, lambda tensors: {**tensors, key: tensors[key] + 1})
    refused(T5.from_pretrained(FIXTURES / "t5" / "v11"), folder, f"{key} should be a copy of the base, and this model "
            "has other numbers there: load the adapter on the base that it was trained on$")
    folder = edited(source, tmp_path / "b", {}, lambda tensors: {**tensors, key: tensors[key][:-1]})
    refused(T5.from_pretrained(FIXTURES / "t5" / "v11"), folder, rf"{key} has shape \[52, 16\]; expected \[53, 16\]")


def test_copies_of_table_and_head_beside_other_places_are_accepted_if_they_are_equal(plain, tmp_path):
    """As after a change of the vocabulary."""
    for tied in (True, False):
        model = t5(tied)
        table = model.state()["embedding.weight"]
        copies = [table, model.state().get("head.weight", table)]
        folder = edited(plain, tmp_path / f"{tied}", {}, with_table([SHARED, HEAD], copies))
        assert isinstance(minipeft.load(model, folder).method, LoRA)
        refused(t5(tied), edited(plain, tmp_path / f"{tied} other", {}, with_table([SHARED, HEAD], [table, table + 1])),
                f"{HEAD} should be a copy of the base, .*; or, if the module was trained as a whole, name it in mod")


# ---- writing

TABLE = {"rows": Selective(rows=(9, 3), where="^embedding"), "whole": Selective(component="embedding")}
WRITTEN = {
    "tied, rows": (True, [TABLE["rows"]], None, {"shared": [9, 3]}),
    "tied, table": (True, [TABLE["whole"]], ["embed_tokens", "lm_head"], None),
    "untied, rows": (False, [TABLE["rows"]], None, {f"{s}.embed_tokens": [9, 3] for s in ("encoder", "decoder")}),
    "untied, table": (False, [TABLE["whole"]], ["embed_tokens"], None),
    "rows and head": (False, [TABLE["rows"], Selective(component="head")], ["lm_head"],
                      {f"{s}.embed_tokens": [9, 3] for s in ("encoder", "decoder")}),
    "rows of a head": (False, [Selective(mask={"head.weight": flat(7, 2)})], None, {"lm_head": [2, 7]}),
    "norms": (True, [Selective(component="norm")], ["final_layer_norm", "layer_norm"], None),
    "some norms, positions": (True, [Selective(where="^encoder.norm"), Selective(component="position")],
                              ["encoder.final_layer_norm", "decoder.block.0.layer.0.SelfAttention."
                               "relative_attention_bias", "encoder.block.0.layer.0.SelfAttention."
                               "relative_attention_bias"], None)}


@pytest.mark.parametrize("tied, parts, modules, tokens", WRITTEN.values(), ids=WRITTEN)
def test_a_union_is_written_with_fields_by_which_peft_computes_the_same(tied, parts, modules, tokens, tmp_path):
    """That PEFT does is seen where it is installed (test_beside_in_peft.py)."""
    model = t5(tied)
    attachment = attached(model, *parts)
    save(attachment, tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert sorted(config["modules_to_save"] or []) == sorted(modules or [])
    assert config["trainable_token_indices"] == tokens and config["target_modules"] == ["q"]
    wanted = logits(model, BATCH)
    twin = t5(tied)
    again = minipeft.load(twin, tmp_path / "a")
    assert set(again.places) == set(attachment.places) and close(logits(twin, BATCH), wanted, 1e-13)


def test_a_union_without_some_of_the_places_of_its_parts_is_written_without_them(tmp_path):
    attachment = attached(t5(), Selective(component="norm"), where=r"^encoder\.\d")
    save(attachment, tmp_path / "a")
    again = minipeft.load(t5(), tmp_path / "a")
    assert set(again.places) == set(attachment.places) == {
        "encoder.0.attn.q.weight", "encoder.0.attn_norm.weight", "encoder.0.ff_norm.weight"}


@pytest.mark.parametrize("parts, message", [
    ([minipeft.IA3()], "PEFT holds one method in a file, and beside it whole modules and rows of tables; this is LoRA"),
    ([Selective(mask={"head.weight": numpy.arange(11)})], "the mask of head.weight is not made of whole rows"),
    ([Selective(mask={"encoder.norm.weight": [3]})], "the mask of encoder.norm.weight is not made of whole rows")])
def test_parts_that_peft_cannot_hold_are_refused_before_anything_is_written(parts, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save(attached(t5(tied=False), *parts), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_rows_are_written_beside_lora_alone():
    with pytest.raises(ValueError, match="rows of a table beside LoRA alone; it cannot hold those of embedding.weight"):
        class Other(type(CODECS["LORA"])):  # type: ignore[misc]
            peft_type = "OTHER"
        beside.written(Union(lora(), TABLE["rows"]), Other(), t5(), {})


def test_a_saved_module_that_did_not_change_is_written_back_bit_for_bit_though_differences_round(tmp_path):
    """In float32, W0 + (W - W0) is not always W."""
    folder = edited(FIXTURES / "adapters" / "lora_modules_to_save", tmp_path / "source", {}, with_table(
        [HEAD], [RNG(0).standard_normal((53, 16)).astype("float32")]))
    model = T5.from_pretrained(FIXTURES / "t5" / "v11", "float32")
    found = minipeft.load(model, folder)
    d, W, key = found.parameters[f"head.weight@{found.name}.d"], model.state()["head.weight"], HEAD
    theirs = read_tensors(folder / WEIGHTS)[0][key]
    assert (W + d.data != theirs).any()
    save(found, tmp_path / "a")
    assert (read_tensors(tmp_path / "a" / WEIGHTS)[0][key] == theirs).all()
    d.data = d.data * 2
    save(found, tmp_path / "b")
    assert (read_tensors(tmp_path / "b" / WEIGHTS)[0][key] == W + d.data).all()


def test_the_fields_of_the_file_are_dropped_where_the_method_says_something_else(plain, tmp_path):
    """For example where an attachment was given to another method's name by hand."""
    attachment = attached(t5(tied=False), Selective(component="head"))
    attachment.source = Source({"peft_type": "LORA", "modules_to_save": ["lm_head", "nothing"], "bias": "all"})
    assert written_config(attachment)["modules_to_save"] == ["lm_head", "nothing"]
    attachment.source = Source({"peft_type": "LORA", "modules_to_save": ["wi"], "trainable_token_indices": [1]})
    config = written_config(attachment)
    assert (config["modules_to_save"], config["trainable_token_indices"], config["bias"]) == (["lm_head"], None, "none")


def test_a_file_of_ours_holds_what_was_read_from_one_of_peft(tmp_path):
    found = minipeft.load(T5.from_pretrained(FIXTURES / "t5" / "v11"), FIXTURES / "adapters" / "lora_token_rows_head")
    found.save(tmp_path / "a.safetensors")
    again = minipeft.load(T5.from_pretrained(FIXTURES / "t5" / "v11"), tmp_path / "a.safetensors")
    assert bits(again.tensors) == bits(found.tensors) and again.method.fields() == found.method.fields()
