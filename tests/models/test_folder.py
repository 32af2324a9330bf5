"""Folders of models: a configuration cannot ask for more than the weights give, and belongs to them; merged models."""
from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tracemalloc
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

import minipeft
from minipeft import T5, Bottleneck, LoRA, PromptTuning, Selective, T5Config, Transformer, TransformerConfig, attach
from minipeft.files import read_metadata, read_shapes, read_tensors, write_tensors
from minipeft.models import shapes
from minipeft.models.config import LARGEST
from minipeft.models.shapes import t5_shapes, transformer_shapes

T5_FIELDS: dict[str, Any] = dict(vocab_size=23, d_model=12, d_kv=5, num_heads=3, d_ff=20, num_layers=2,
                                 num_decoder_layers=3, relative_attention_num_buckets=8,
                                 relative_attention_max_distance=20)
FIELDS: dict[str, Any] = dict(vocab_size=23, d_model=12, num_heads=3, d_ff=20, num_layers=1, num_decoder_layers=2)
KINDS: list[tuple[type, Any]] = [(T5, T5Config(**T5_FIELDS)),
                                 (T5, T5Config(**T5_FIELDS, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
                                 (Transformer, TransformerConfig(**FIELDS)),
                                 (Transformer, TransformerConfig(**FIELDS, positions="learned", max_length=7,
                                                                 final_norm=True, tie_embeddings=False))]
every_kind = pytest.mark.parametrize("kind, config", KINDS, ids=["v1.0", "v1.1", "tied", "learned and untied"])
IDS = np.random.default_rng(0).integers(2, 23, (2, 2, 5))


def built(kind: type, config: Any, seed: int = 1) -> Any:
    return kind(config, np.random.default_rng(seed), "float64")


def logits(model: Any) -> np.ndarray:
    return model(IDS[0], IDS[1]).data


def rewritten(path: Path, change: Callable[[dict], Any]) -> None:
    """config.json or an index, changed."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def unsigned(folder: Path) -> None:
    """The weights as somebody else would write them: without a digest of the configuration."""
    tensors, _ = read_tensors(folder / "model.safetensors")
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"}, signed=False)


# -------------------------------------------------------------------------------------- names and shapes before a model

@pytest.mark.parametrize("fields", [{}, {"feed_forward_proj": "gated-gelu"}, {"tie_word_embeddings": False},
                                    {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False, "num_layers": 1}])
def test_the_shapes_of_a_t5_configuration_are_those_of_the_model(fields):
    config = T5Config(**T5_FIELDS | fields)
    assert t5_shapes(config) == {name: array.shape for name, array in T5(config, None).state().items()}


@pytest.mark.parametrize("fields", [{}, {"positions": "learned", "max_length": 7}, {"final_norm": True},
                                    {"tie_embeddings": False, "pre_norm": True, "num_layers": 3}])
def test_the_shapes_of_a_transformer_configuration_are_those_of_the_model(fields):
    config = TransformerConfig(**FIELDS | fields)
    model = Transformer(config, None)
    assert transformer_shapes(config) == {name: array.shape for name, array in model.state().items()}


SIZES = ["vocab_size", "d_model", "d_ff", "num_layers", "num_decoder_layers", "num_heads"]


@every_kind
@pytest.mark.parametrize("sized", [10 ** 5, 10 ** 9, LARGEST, LARGEST + 1, 10 ** 400])
def test_a_huge_size_is_refused_before_a_model_is_built(tmp_path, monkeypatch, kind, config, sized):
    """With heads that divide the width, so that no other check comes first."""
    built(kind, config).save_pretrained(tmp_path)
    unsigned(tmp_path)
    original = (tmp_path / "config.json").read_text()
    monkeypatch.setattr(kind, "__init__", lambda *_: pytest.fail("a model was built"))
    extra = ["d_kv", "relative_attention_num_buckets"] if kind is T5 else ["max_length"]
    for field in SIZES + extra:
        if field == "max_length" and config.positions != "learned":
            continue  # nothing has that size
        (tmp_path / "config.json").write_text(original)
        rewritten(tmp_path / "config.json", lambda values: values.update({field: sized, "num_heads": 1}))
        if field == "num_heads":
            rewritten(tmp_path / "config.json", lambda values: values.update(num_heads=sized))
        if field == "relative_attention_num_buckets":
            rewritten(tmp_path / "config.json", lambda values: values.update(relative_attention_max_distance=LARGEST))
        tracemalloc.start()
        with pytest.raises(ValueError) as error:
            kind.from_pretrained(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000, field
        tracemalloc.stop()
        assert str(error.value).startswith(f"{tmp_path}: ") and len(str(error.value)) < 600 + len(str(tmp_path))


def test_names_are_compared_only_for_as_many_layers_as_the_weights_can_have(monkeypatch):
    """So that the largest header that is read cannot make the names of millions of layers."""
    config = dataclasses.replace(KINDS[0][1], num_layers=10 ** 4, num_decoder_layers=10 ** 4)
    with pytest.raises(ValueError, match="num_layers is 10000 and num_decoder_layers 10000; there are 79999 tensors"):
        shapes.check_layers(config, 79_999)
    shapes.check_layers(config, 80_000)


# --------------------------------------------------------------------------------------------------------- its numbers

@every_kind
@pytest.mark.parametrize("text", ["9" * 400, "9" * 4000, "9" * 5000, "1e400", "-1e400", "NaN", "2147483648",
                                  "2147483648.5", "-1", "true", '"1"', "[" * 900 + "]" * 900, '"' + "x" * 5000 + '"'])
def test_every_number_is_bounded_and_an_error_about_it_is_short(tmp_path, kind, config, text):
    built(kind, config).save_pretrained(tmp_path)
    original = (tmp_path / "config.json").read_text()
    for field in dataclasses.fields(config):
        if field.type == "bool" or field.type == "str" and text[0] == '"' and field.name != "positions":
            continue
        (tmp_path / "config.json").write_text(original)
        rewritten(tmp_path / "config.json", lambda values: values.update({field.name: "@"}))
        raw = (tmp_path / "config.json").read_text().replace('"@"', text)
        (tmp_path / "config.json").write_text(raw)
        with pytest.raises(ValueError) as error:
            kind.from_pretrained(tmp_path)
        assert str(tmp_path) in str(error.value) and len(str(error.value)) < 600 + len(str(tmp_path)), field.name


def test_a_value_nested_too_deep_to_be_shown_is_told_by_its_type():
    """A file can hold one that can just be read, and no longer be shown."""
    deep: list = []
    for _ in range(200_000):
        deep = [deep]
    with pytest.raises(ValueError, match="config: d_model is list; expected an integer >= 1"):
        TransformerConfig(23, deep)  # type: ignore[arg-type]


def test_nesting_is_refused_at_every_depth(tmp_path):
    built(*KINDS[2]).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    text, ends = json.dumps({**values, "d_model": "@"}), set()
    # where Python gives up depends on its version; at 100,000 every version has
    for depth in (*range(sys.getrecursionlimit() - 250, sys.getrecursionlimit() + 10), 100_000):
        (tmp_path / "config.json").write_text(text.replace('"@"', "[" * depth + "]" * depth))
        with pytest.raises(ValueError) as error:
            Transformer.from_pretrained(tmp_path)
        ends.add(str(error.value).partition(" is ")[2][:9])
    assert {"[" * 9, "not valid"} <= ends


def test_the_largest_size_is_accepted_and_one_more_is_not():
    assert T5Config(vocab_size=LARGEST).vocab_size == LARGEST
    for config, field in ((T5Config, "d_kv"), (T5Config, "initializer_factor"), (TransformerConfig, "max_length")):
        with pytest.raises(ValueError, match=f"config: {field} is 2147483648; expected at most 2147483647"):
            config(**{"vocab_size": 5, field: LARGEST + 1})


def test_numpy_scalars_become_plain_numbers():
    config = TransformerConfig(np.int64(23), np.int32(12), np.uint8(3), dropout_rate=np.float32(0.5), layer_norm_eps=1)
    assert [type(v) for v in (config.vocab_size, config.d_model, config.num_heads)] == [int] * 3
    assert type(config.dropout_rate) is type(config.layer_norm_eps) is float and config.dropout_rate == 0.5
    with pytest.raises(ValueError, match="config: d_model is True"):
        TransformerConfig(23, np.True_)


# ------------------------------------------------------------------------------------------------------ missing fields

@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(TransformerConfig)])
def test_a_field_that_is_missing_from_our_own_configuration_is_named(tmp_path, field):
    built(*KINDS[2]).save_pretrained(tmp_path)
    rewritten(tmp_path / "config.json", lambda values: values.pop(field))
    with pytest.raises(ValueError, match=f"{tmp_path}: config: missing {field}$"):
        Transformer.from_pretrained(tmp_path)


def test_a_field_that_is_missing_from_a_hugging_face_configuration_is_its_default(tmp_path):
    built(*KINDS[0]).save_pretrained(tmp_path)
    unsigned(tmp_path)
    rewritten(tmp_path / "config.json", lambda values: [values.pop(name) for name in (
        "dropout_rate", "layer_norm_epsilon", "feed_forward_proj", "tie_word_embeddings", "scale_decoder_outputs")])
    found = T5.from_pretrained(tmp_path).config
    assert found == dataclasses.replace(KINDS[0][1], dropout_rate=0.1, layer_norm_epsilon=1e-6)


# ------------------------------------------------------------------------------ weights and configuration go together

@every_kind
def test_weights_beside_another_configuration_are_refused(tmp_path, kind, config):
    """As a kill between the two files of save_pretrained leaves them: of equal shapes, and of other ones."""
    for fields in ({"activation": "gelu"} if kind is Transformer else {"feed_forward_proj": "relu" if config.gated
                   else "silu"}, {"d_ff": 21}, {"dropout_rate": 0.25}, {"pad_token_id": 3}):
        built(kind, config).save_pretrained(tmp_path)
        old = (tmp_path / "config.json").read_bytes()
        built(kind, dataclasses.replace(config, **fields), 2).save_pretrained(tmp_path)
        kept = (tmp_path / "config.json").read_bytes()
        (tmp_path / "config.json").write_bytes(old)
        with pytest.raises(ValueError) as error:
            kind.from_pretrained(tmp_path)
        assert str(tmp_path) in str(error.value)
        if "d_ff" not in fields and not (kind is T5 and "feed_forward_proj" in fields and config.gated):
            assert "config.json is not the configuration that model.safetensors was saved with" in str(error.value)
        (tmp_path / "config.json").write_bytes(kept)
        assert kind.from_pretrained(tmp_path).config == dataclasses.replace(config, **fields)


def test_a_kill_between_the_two_files_is_seen_when_they_are_read(tmp_path, monkeypatch):
    old, new = (built(Transformer, dataclasses.replace(KINDS[2][1], activation=name)) for name in ("relu", "gelu"))
    old.save_pretrained(tmp_path)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("minipeft.models.folder.write_atomic", die)
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="not the configuration .* save the model again"):
        Transformer.from_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    assert np.array_equal(logits(Transformer.from_pretrained(tmp_path, "float64")), logits(new))


def test_the_same_configuration_in_other_words_is_the_same(tmp_path):
    config = T5Config(**T5_FIELDS, feed_forward_proj="gated-gelu", dropout_rate=0)
    built(T5, config).save_pretrained(tmp_path)
    rewritten(tmp_path / "config.json", lambda values: values.update(
        feed_forward_proj="gated-gelu_tanh", dropout_rate=0, layer_norm_epsilon=0.000001, more="words"))
    assert T5.from_pretrained(tmp_path).config.digest() == config.digest()


@every_kind
def test_the_digest_covers_every_field(kind, config):
    other: dict[str, Any] = {"int": lambda n: n * 2, "float": lambda x: x / 2 + 0.125, "bool": lambda b: not b,
                             "str": lambda s: {"sinusoidal": "learned", "learned": "sinusoidal"}.get(s, "silu")}
    seen = {config.digest()}
    for field in dataclasses.fields(config):
        fields = {field.name: other[field.type](getattr(config, field.name))}
        if field.name.endswith("_id"):
            fields = {field.name: 7}
        if field.name == "relative_attention_num_buckets":
            fields = {field.name: 10}
        seen.add(dataclasses.replace(config, **fields).digest())
    assert len(seen) == 1 + len(dataclasses.fields(config))


def test_a_shipped_base_says_nothing_and_is_read(tmp_path):
    """Folders without a digest: of transformers, of an earlier version, in shards."""
    built(*KINDS[1]).save_pretrained(tmp_path)
    assert read_metadata(tmp_path / "model.safetensors")["config_sha256"] == KINDS[1][1].digest()
    unsigned(tmp_path)
    rewritten(tmp_path / "config.json", lambda values: values.update(dropout_rate=0.5))
    assert T5.from_pretrained(tmp_path).config.dropout_rate == 0.5


# ----------------------------------------------------------------------------------------------- what a model computes

def test_what_a_configuration_computes_leaves_out_what_changes_no_output():
    config = T5Config(**T5_FIELDS, feed_forward_proj="gated-gelu")
    for fields in ({"dropout_rate": 0.5}, {"initializer_factor": 2.0}, {"pad_token_id": 3}, {"eos_token_id": 4},
                   {"decoder_start_token_id": 2}, {"feed_forward_proj": "gated-gelu_new"},
                   {"feed_forward_proj": "gated-gelu_tanh"}):
        assert dataclasses.replace(config, **fields).computes() == config.computes()
    for fields in ({"num_heads": 15, "d_kv": 1}, {"layer_norm_epsilon": 1e-5}, {"feed_forward_proj": "gated-silu"},
                   {"feed_forward_proj": "gelu"}, {"scale_decoder_outputs": False}, {"tie_word_embeddings": False},
                   {"relative_attention_max_distance": 21}, {"relative_attention_num_buckets": 10}):
        assert dataclasses.replace(config, **fields).computes() != config.computes()
    plain = TransformerConfig(**FIELDS)
    for fields in ({"dropout_rate": 0.5}, {"label_smoothing": 0.1}, {"max_length": 7}, {"pad_token_id": 3}):
        assert dataclasses.replace(plain, **fields).computes() == plain.computes()
    for fields in ({"num_heads": 4}, {"layer_norm_eps": 1e-6}, {"pre_norm": True}, {"activation": "gelu"},
                   {"final_norm": True}, {"positions": "learned"}, {"tie_embeddings": False}):
        assert dataclasses.replace(plain, **fields).computes() != plain.computes()
    assert TransformerConfig(**FIELDS, activation="swish").computes() == \
        TransformerConfig(**FIELDS, activation="silu").computes()
    assert (config.computes()["kind"], plain.computes()["kind"]) == ("T5", "Transformer")
    assert json.loads(json.dumps(config.computes())) == config.computes()


# -------------------------------------------------------------------------------------------------------------- merged

def adapted(kind: type, config: Any, method: Any, name: str = "a", model: Any = None, seed: int = 3) -> tuple[Any, Any]:
    model = built(kind, config) if model is None else model
    attachment = attach(model, method, np.random.default_rng(seed), name)
    rng = np.random.default_rng(seed + 1)
    for p in attachment.parameters.values():
        p.data = p.data + 0.3 * rng.standard_normal(p.shape)
    return model, attachment


@every_kind
@pytest.mark.parametrize("method", [LoRA(rank=2), LoRA(rank=3, where=[".*weight$"]), Selective(where="bias|norm"),
                                    LoRA(rank=2, where="embedding"), LoRA(rank=2, dropout=0.5)],
                         ids=["q and v", "all", "norms", "table", "dropout"])
def test_a_merged_model_saved_and_loaded_computes_what_the_adapted_one_does(tmp_path, kind, config, method):
    if method.where == [".*weight$"]:
        method = dataclasses.replace(method, where=[r"\.(q|k|v|o|wi|wi_0|wi_1|wo)\.weight$", "embedding"])
    model, attachment = adapted(kind, config, method)
    wanted, base = logits(model), model.state()["embedding.weight"].copy()
    model.save_pretrained(tmp_path / "plugged", merged=True)
    attachment.merge()
    model.save_pretrained(tmp_path / "merged", merged=True)
    assert np.array_equal(model.state()["embedding.weight"], base), "the model itself is what it was"
    for folder in ("plugged", "merged"):
        loaded = kind.from_pretrained(tmp_path / folder, "float64")
        assert np.array_equal(logits(loaded), logits(model))  # merging is the definition, bit for bit
        np.testing.assert_allclose(logits(loaded), wanted, rtol=0, atol=1e-10 * max(1, abs(wanted).max()))
        assert not np.allclose(logits(loaded), logits(built(kind, config)))
        assert loaded.config == config and (loaded.head.weight is loaded.embedding.weight) == (
            model.head.weight is model.embedding.weight), "tied weights stay tied"
        assert set(loaded.state()) == set(model.state())


def test_several_attachments_are_merged_in_their_order_and_those_that_are_off_are_not(tmp_path):
    model, first = adapted(*KINDS[0], LoRA(rank=2))
    adapted(*KINDS[0], Selective(where="norm"), "b", model, 5)
    _, off = adapted(*KINDS[0], LoRA(rank=1), "off", model, 7)
    off.unplug()
    wanted = logits(model)
    first.merge()
    model.save_pretrained(tmp_path, merged=True)
    np.testing.assert_allclose(logits(T5.from_pretrained(tmp_path, "float64")), wanted, rtol=0, atol=1e-10)


@every_kind
def test_while_something_is_plugged_the_choice_must_be_made(tmp_path, kind, config):
    model, attachment = adapted(kind, config, LoRA(rank=2))
    for state in ("plugged", "merged"):
        with pytest.raises(ValueError, match=f"'a' is {state}: pass merged=True to save the model .* or merged=Fal"):
            model.save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new").exists()
        attachment.merge() if state == "plugged" else attachment.unmerge()
    model.save_pretrained(tmp_path / "base", merged=False)
    attachment.unplug()
    model.save_pretrained(tmp_path / "off")
    model.save_pretrained(tmp_path / "off merged", merged=True)
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("base", "off", "off merged")}) == 1
    with pytest.raises(TypeError, match="merged is 'float16'; expected True, False or None"):
        model.save_pretrained(tmp_path / "new", merged="float16")


@pytest.mark.parametrize("method", [Bottleneck(reduction=2), PromptTuning(2)], ids=["bottleneck", "prompt"])
@every_kind
def test_what_no_weight_can_absorb_is_refused_by_name_before_anything_is_written(tmp_path, kind, config, method):
    model, _ = adapted(kind, config, LoRA(rank=2), "fine")
    _, other = adapted(kind, config, method, "stream", model)
    with pytest.raises(ValueError, match="'stream' cannot be merged: at .* it acts on hidden states"):
        model.save_pretrained(tmp_path / "new", merged=True)
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path / "base", merged=False)
    other.unplug()
    model.save_pretrained(tmp_path / "new", merged=True)


def test_what_has_no_dense_form_is_refused_by_name(tmp_path, monkeypatch):
    model, _ = adapted(*KINDS[0], LoRA(rank=2))

    def refuse(self: Any) -> Any:
        raise TypeError("Odd does not define dense()")

    monkeypatch.setattr("minipeft.methods.lora.LowRank.dense", refuse)
    with pytest.raises(ValueError, match=r"'a' cannot be merged: Odd does not define dense\(\)"):
        model.save_pretrained(tmp_path / "new", merged=True)
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------------ what is no file

def specials() -> dict[str, Callable[[Path], Any]]:
    return {"a FIFO": os.mkfifo, "a folder": Path.mkdir, "a device": lambda path: path.symlink_to("/dev/zero")}


@pytest.mark.parametrize("what", specials())
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@every_kind
def test_what_is_no_regular_file_is_refused_by_what_it_is(tmp_path, kind, config, file, what):
    built(kind, config).save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    specials()[what](tmp_path / file)
    with pytest.raises(ValueError, match=f"{tmp_path / file} is {what}; expected a regular file"):
        kind.from_pretrained(tmp_path)


@every_kind
def test_links_to_regular_files_are_followed(tmp_path, kind, config):
    """Caches are made of them, and the files they lead to lie elsewhere."""
    model = built(kind, config)
    model.save_pretrained(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "snapshot" / file).symlink_to(f"../blobs/{file}")
    assert np.array_equal(logits(kind.from_pretrained(tmp_path / "snapshot", "float64")), logits(model))


@pytest.mark.parametrize("name", ["~/model", "~user/model"])
def test_a_new_folder_below_a_tilde_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="~.* does not exist.*'~' is not expanded"):
        built(*KINDS[0]).save_pretrained(name)
    assert list(tmp_path.iterdir()) == []


@every_kind
def test_an_error_in_the_present_folder_names_it(tmp_path, monkeypatch, kind, config):
    built(kind, config).save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    rewritten(tmp_path / "config.json", lambda values: values.update(d_ff="x"))
    with pytest.raises(ValueError, match=r"^\.: config: d_ff is 'x'"):
        kind.from_pretrained(".")


# -------------------------------------------------------------------------------------------------------------- shards

INDEX = "model.safetensors.index.json"


def sharded(folder: Path, count: int = 2) -> T5:
    model = built(*KINDS[0])
    model.save_pretrained(folder)
    tensors, _ = read_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(count):
        part = dict(list(tensors.items())[i::count])
        write_tensors(folder / f"shard-{i}", part)
        weight_map.update(dict.fromkeys(part, f"shard-{i}"))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return model


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 256, "é" * 128, "a\0b", "\ud800", "a/b", "a\\b", "../secret", "..",
                                  ".", "", "/etc/passwd", "x" * 200 + "/../../secret"])
def test_a_shard_is_a_plain_name_of_at_most_255_bytes_and_the_error_is_short(tmp_path, name):
    sharded(tmp_path / "m")
    rewritten(tmp_path / "m" / INDEX, lambda values: values["weight_map"].update({"shared.weight": name}))
    with pytest.raises(ValueError, match="is not a plain file name in the same folder") as error:
        T5.from_pretrained(tmp_path / "m")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'm'}{os.sep}{INDEX}") and len(message) < 600 + len(str(tmp_path))


@pytest.mark.parametrize("what", specials())
def test_a_shard_that_is_no_regular_file_is_refused(tmp_path, what):
    sharded(tmp_path)
    (tmp_path / "shard-1").unlink()
    specials()[what](tmp_path / "shard-1")
    with pytest.raises(ValueError, match=f"shard-1 is {what}; expected a regular file"):
        T5.from_pretrained(tmp_path)


def test_an_index_of_a_hundred_thousand_shards_is_read_once_and_not_once_for_each(tmp_path):
    sharded(tmp_path)
    rewritten(tmp_path / INDEX, lambda values: values["weight_map"].update(
        {f"k{i}": f"s{i}" for i in range(100_000)}))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: shard 's0' of {INDEX} is missing"):
        T5.from_pretrained(tmp_path)


def test_many_shards_and_linked_ones_are_read(tmp_path):
    model = sharded(tmp_path, len(t5_shapes(KINDS[0][1])))
    shutil.move(tmp_path / "shard-3", tmp_path / "elsewhere")
    (tmp_path / "shard-3").symlink_to("elsewhere")
    assert np.array_equal(logits(T5.from_pretrained(tmp_path, "float64")), logits(model))


@pytest.mark.parametrize("weight_map", [None, [], "x", {"a": 1}, {"a": ["b"]}, {"a": None}, {"a": {"b": "c"}}, 5])
def test_a_weight_map_of_another_type_is_refused(tmp_path, weight_map):
    sharded(tmp_path)
    rewritten(tmp_path / INDEX, lambda values: values.update(weight_map=weight_map))
    with pytest.raises(ValueError, match=f"{INDEX}: weight_map is not a map from key to file name"):
        T5.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["k" * 5000, "\ud800", "a\nb\x1b[2J",
                                  "encoder.block.٣.layer.0.SelfAttention.q.weight"])
@every_kind
def test_an_error_about_a_strange_key_is_short_and_printable(tmp_path, kind, config, name):
    built(kind, config).save_pretrained(tmp_path)
    tensors, _ = read_tensors(tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + n])
    header[name] = header.pop(next(key for key in header if key.endswith("norm.weight")))
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n:])
    assert name in read_shapes(tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        kind.from_pretrained(tmp_path)
    message = str(error.value)
    assert message.startswith(str(tmp_path)) and len(message) < 600 + len(str(tmp_path))
    assert message.isprintable() and message.encode()


def test_a_file_that_grows_to_a_configuration_of_the_wrong_kind_is_told(tmp_path):
    built(*KINDS[0]).save_pretrained(tmp_path)
    rewritten(tmp_path / "config.json", lambda values: values.update(model_type="x" * 5000))
    with pytest.raises(ValueError, match="model_type is 'xxx.*; expected 't5'") as error:
        minipeft.T5.from_pretrained(tmp_path)
    assert len(str(error.value)) < 600 + len(str(tmp_path))
