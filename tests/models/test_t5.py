"""T5: sizes, initialization, Hugging Face names and folders, the head's scale, padding."""
from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, strategies as st

from minipeft import LoRA, T5, T5Config, attach, report
from minipeft.files import STORAGE, read_tensors, write_tensors
from minipeft.models import t5
from minipeft.nn.layers import ACTIVATIONS

SMALL: dict[str, Any] = dict(vocab_size=23, d_model=12, d_kv=5, num_heads=3, d_ff=20, num_layers=2,
                             num_decoder_layers=3, relative_attention_num_buckets=8,
                             relative_attention_max_distance=16)
V11: dict[str, Any] = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, scale_decoder_outputs=False)
VARIANTS: dict[str, dict[str, Any]] = {"v1.0": {}, "v1.1": V11, "v1.0 untied": dict(tie_word_embeddings=False),
                                       "v1.1 tied": dict(V11, tie_word_embeddings=True)}
every_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())


def built(seed: int = 0, dtype: str = "float64", **fields: Any) -> T5:
    return T5(T5Config(**{**SMALL, **fields}), np.random.default_rng(seed), dtype)


def ids_of(seed: int = 0, rows: int = 3, time: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 23, (rows, time))


# ------------------------------------------------------------------------------------------------ sizes, first values

PUBLISHED = {  # the sizes of the released models: d_model, d_kv, heads, d_ff, layers, parameters
    "v1.0 small": (512, 64, 8, 2048, 6, 60_506_624), "v1.0 base": (768, 64, 12, 3072, 12, 222_903_552),
    "v1.0 large": (1024, 64, 16, 4096, 24, 737_668_096), "v1.0 3b": (1024, 128, 32, 16384, 24, 2_851_598_336),
    "v1.0 11b": (1024, 128, 128, 65536, 24, 11_307_321_344), "v1.1 small": (512, 64, 6, 1024, 8, 76_961_152),
    "v1.1 base": (768, 64, 12, 2048, 12, 247_577_856), "v1.1 large": (1024, 64, 16, 2816, 24, 783_150_080),
    "v1.1 xl": (2048, 64, 32, 5120, 24, 2_849_757_184), "v1.1 xxl": (4096, 64, 64, 10240, 24, 11_135_332_352)}


def config_of(size: str) -> T5Config:
    d_model, d_kv, heads, d_ff, layers, _ = PUBLISHED[size]
    return T5Config(d_model=d_model, d_kv=d_kv, num_heads=heads, d_ff=d_ff, num_layers=layers,
                    num_decoder_layers=layers, **(V11 if size.startswith("v1.1") else {}))


def counted(c: T5Config) -> int:
    """The number of parameters by arithmetic."""
    attention, ff = 4 * c.d_model * c.num_heads * c.d_kv, (3 if c.gated else 2) * c.d_model * c.d_ff
    encoder = c.num_layers * (attention + ff + 2 * c.d_model) + c.d_model
    decoder = c.num_decoder_layers * (2 * attention + ff + 3 * c.d_model) + c.d_model
    tables = 2 * c.relative_attention_num_buckets * c.num_heads
    return encoder + decoder + tables + (1 if c.tie_word_embeddings else 2) * c.vocab_size * c.d_model


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_released_sizes_have_the_published_number_of_parameters(size):
    assert counted(config_of(size)) == PUBLISHED[size][-1]


@pytest.mark.parametrize("size", [size for size, row in PUBLISHED.items() if row[-1] < 3e8])
def test_a_model_without_a_seed_has_the_published_number_of_parameters(size):
    model = T5(config_of(size), None)
    assert sum(p.data.size for p in model.base_parameters.values()) == PUBLISHED[size][-1] == report(model).all


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="whether untouched zeros take room, Linux tells")
def test_a_model_without_a_seed_takes_no_memory_until_it_is_filled():
    program = """
import resource
from minipeft import T5, T5Config
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = T5(T5Config(d_model=1024, num_heads=16, d_ff=4096, num_layers=24, num_decoder_layers=24), None)
print(sum(p.data.size for p in model.base_parameters.values()))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    count, kilobytes = map(int, done.stdout.split())
    assert count == PUBLISHED["v1.0 large"][-1]
    assert kilobytes < 50_000, "of 2,950,672 that the numbers would fill"


def test_flan_base_by_component():
    r = report(T5(config_of("v1.1 base"), None))
    assert r.components == {"attention": 84_934_656, "feed-forward": 113_246_208, "embedding": 24_674_304,
                            "head": 24_674_304, "norm": 62 * 768, "position": 2 * 32 * 12, "bias": 0}
    assert 62 * 768 + 2 * 32 * 12 == 48_384 and sum(r.components.values()) == r.all == r.trainable
    assert r.weight_bytes == 4 * r.all and r.percent == 100


@every_variant
def test_the_count_by_arithmetic_is_that_of_the_model(fields):
    model = built(**fields)
    assert counted(model.config) == sum(p.data.size for p in model.base_parameters.values())


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_first_values_have_the_documented_spread(factor):
    c = T5Config(**dict(SMALL, vocab_size=300, d_model=96, d_kv=20, num_heads=4, d_ff=200), **V11,
                 initializer_factor=factor)
    d, inner = 96, 80
    spread = {"embedding": 1, "head": 1, ".q": (d * 20) ** -0.5, ".k": d ** -0.5, ".v": d ** -0.5,
              ".o": inner ** -0.5, ".wi_0": d ** -0.5, ".wi_1": d ** -0.5, ".wo": 200 ** -0.5, ".position": d ** -0.5}
    for name, array in T5(c, np.random.default_rng(0)).state().items():
        key = name.removesuffix(".weight")
        if key.endswith("norm"):
            assert (array == np.float32(factor)).all()
            continue
        std = factor * next(s for suffix, s in spread.items() if key.endswith(suffix))
        # n draws: the sample's std is within 5 of its own standard deviations, std / sqrt(2 n), of the true one
        assert abs(array.std(dtype=float) - std) < 5 * std / math.sqrt(2 * array.size), name
        assert abs(array.mean(dtype=float)) < 5 * std / math.sqrt(array.size), name


# -------------------------------------------------------------------------------------------------- Hugging Face names

def hf_keys(c: T5Config) -> dict[str, tuple]:
    """The keys that transformers stores for such a model, and their shapes."""
    d, inner, keys = c.d_model, c.num_heads * c.d_kv, {"shared.weight": (c.vocab_size, c.d_model)}
    if not c.tie_word_embeddings:
        keys["lm_head.weight"] = (c.vocab_size, d)
    for stack, layers in (("encoder", c.num_layers), ("decoder", c.num_decoder_layers)):
        keys[f"{stack}.final_layer_norm.weight"] = (d,)
        keys[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (
            c.relative_attention_num_buckets, c.num_heads)
        for i in range(layers):
            sublayers = ["SelfAttention", *(["EncDecAttention"] if stack == "decoder" else []), "DenseReluDense"]
            for n, sublayer in enumerate(sublayers):
                at = f"{stack}.block.{i}.layer.{n}"
                keys[f"{at}.layer_norm.weight"] = (d,)
                if sublayer == "DenseReluDense":
                    for wi in ("wi_0", "wi_1") if c.gated else ("wi",):
                        keys[f"{at}.{sublayer}.{wi}.weight"] = (c.d_ff, d)
                    keys[f"{at}.{sublayer}.wo.weight"] = (d, c.d_ff)
                else:
                    keys.update({f"{at}.{sublayer}.{part}.weight": (inner, d) for part in "qkv"})
                    keys[f"{at}.{sublayer}.o.weight"] = (d, inner)
    return keys


@every_variant
def test_names_map_to_the_keys_of_transformers_and_back(fields):
    model = built(**fields, num_layers=11)
    expected = hf_keys(model.config)
    found = {T5.to_hf_name(name): p.shape for name, p in model.base_parameters.items()}
    assert found == expected and len(found) == len(model.base_parameters)
    for name in model.base_parameters:
        assert T5.from_hf_name(T5.to_hf_name(name)) == name
    for key in expected:
        assert T5.to_hf_name(T5.from_hf_name(key)) == key


@pytest.mark.parametrize("name", ["", "embedding", "embedding.weight.A", "encoder.0.cross.q.weight", "encoder.0.attn.q",
                                  "encoder.0.attn.q.bias", "encoder.x.attn.q.weight", "encoder.0.attn.q.weight@lora.A",
                                  "encoder.attn.q.weight", "decoder.0.ff.wi_2.weight", "encoder.0.cross_norm.weight",
                                  "encoder.0.attn.q.weight\n", "shared.weight"])
def test_a_name_that_no_parameter_has_is_refused(name):
    with pytest.raises(ValueError, match="not the name of a T5 parameter"):
        T5.to_hf_name(name)


@pytest.mark.parametrize("key", [
    "", "shared", "embedding.weight", "encoder.block.0.layer.1.EncDecAttention.q.weight", "lm_head.bias",
    "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight", "encoder.embed_tokens.weight",
    "encoder.block.0.layer.2.DenseReluDense.wo.weight", "decoder.block.0.layer.1.DenseReluDense.wo.weight",
    "encoder.block.0.layer.2.layer_norm.weight", "decoder.block.0.layer.3.layer_norm.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", "transformer.shared.weight",
    "encoder.block.0.layer.0.SelfAttention.q.weight.absmax"])
def test_a_key_that_no_t5_has_is_refused(key):
    with pytest.raises(ValueError, match="not a key of a T5 state dict"):
        T5.from_hf_name(key)


def test_the_keys_in_the_docstring_are_those_of_the_mapping():
    name = r"(?:embedding|encoder|decoder|head)\.(?:[\w.*]|\{[\w,]+\})+"
    rows = re.findall(rf"^    ({name}(?:, {name})*) +(?:\[.*?\] *)?(.*)$", t5.__doc__, flags=re.MULTILINE)
    remarks = {pattern.split(", ")[0]: remark for pattern, remark in rows}
    remarks["encoder.position.weight"] = re.search(r"buckets, heads\]\n\s+(\S+)", t5.__doc__)[1]
    checked = 0
    for pattern, remark in remarks.items():
        key = re.match(r"(?:shared|lm_head|encoder\.|decoder\.)[\w.]*", remark)
        if key:
            name = re.sub(r"\{(\w)[\w,]*\}", r"\1", pattern).replace(".i.", ".0.").replace("*", "wo.weight")
            found = T5.to_hf_name(name)
            assert f"{found}.".startswith(key[0].replace(".i.", ".0.").rstrip(".") + "."), pattern
            checked += 1
    assert checked == 9


# --------------------------------------------------------------------------------------------- folders: what we write

@every_variant
@pytest.mark.parametrize("storage", [None, *STORAGE])
def test_a_saved_model_is_loaded_as_it_was_rounded_once(tmp_path, fields, storage):
    model = built(**fields)
    model.save_pretrained(tmp_path / "new" / "folder", storage)
    file = tmp_path / "new" / "folder" / "model.safetensors"
    with safetensors.safe_open(file, framework="np") as opened:
        assert set(opened.keys()) == set(hf_keys(model.config)) and opened.metadata()["format"] == "pt"
        expected = {None: "F64", "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}[storage]
        assert {opened.get_slice(key).get_dtype() for key in opened.keys()} == {expected}
    wide = T5.from_pretrained(tmp_path / "new" / "folder", "float64")
    narrow = T5.from_pretrained(str(tmp_path / "new" / "folder"))
    assert wide.config == narrow.config == model.config
    unit = {None: 0, "float64": 0, "float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}[storage]
    for name, array in model.state().items():
        assert wide.state()[name].dtype == np.float64 and narrow.state()[name].dtype == np.float32
        # half a unit in the last place; float16 is subnormal below 2^-14, and then its spacing is 2^-24
        assert (np.abs(wide.state()[name] - array) <= np.maximum(unit * np.abs(array), 2**-25 * (unit > 0))).all()
        assert np.array_equal(narrow.state()[name], wide.state()[name].astype(np.float32))
    if unit == 0:
        assert np.array_equal(wide(ids_of(), ids_of()).data, model(ids_of(), ids_of()).data)


def test_a_model_of_float32_is_widened_exactly(tmp_path):
    model = built(dtype="float32", **V11)
    for storage in (None, "float32", "float64"):
        model.save_pretrained(tmp_path, storage)
        for name, array in T5.from_pretrained(tmp_path, "float64").state().items():
            assert np.array_equal(array, model.state()[name]) and array.dtype == np.float64


def test_saving_the_base_writes_it_whatever_is_plugged_or_merged(tmp_path):
    model = built()
    model.save_pretrained(tmp_path / "before")
    lora = attach(model, LoRA(2, 4), np.random.default_rng(0))
    for p in lora.parameters.values():
        p.data += 1
    model.save_pretrained(tmp_path / "plugged", merged=False)
    lora.merge()
    model.save_pretrained(tmp_path / "merged", merged=False)
    lora.unmerge()
    lora.unplug()
    model.save_pretrained(tmp_path / "off")
    for file in ("config.json", "model.safetensors"):
        assert len({(tmp_path / when / file).read_bytes() for when in ("before", "plugged", "merged", "off")}) == 1


def test_a_weight_too_large_for_the_storage_is_named_and_nothing_is_written(tmp_path):
    model = built()
    model.base_parameters["decoder.1.ff.wo.weight"].data[0, 0] = 70000.0
    with pytest.raises(ValueError, match="decoder.block.1.layer.2.DenseReluDense.wo.weight reaches 70000.*float16"):
        model.save_pretrained(tmp_path / "new", "float16")
    assert not list((tmp_path / "new").glob("*"))


def test_the_written_config_says_what_transformers_asks_for(tmp_path):
    built(**V11).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    wanted = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True,
              "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True,
              "tie_word_embeddings": False, "d_kv": 5, "num_decoder_layers": 3, "decoder_start_token_id": 0}
    assert {key: values[key] for key in wanted} == wanted


# ---------------------------------------------------------------------------------------------- folders: what we read

GONE = object()


def folder(path: Path, fields: dict[str, Any], config: dict[str, Any] | None = None,
           tensors: dict[str, Any] | None = None) -> tuple[Path, T5]:
    """A folder as transformers 4 writes it, with some config entries and tensors changed (GONE: left out)."""
    model = built(**fields)
    values = {k: v for k, v in model.config.to_hf().items() if k != "scale_decoder_outputs"}
    arrays = {T5.to_hf_name(name): array for name, array in model.state().items()}
    for target, changes in ((values, config or {}), (arrays, tensors or {})):
        for key, value in changes.items():
            target[key] = value
            if value is GONE:
                del target[key]
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(values))
    safetensors.numpy.save_file(arrays, path / "model.safetensors", {"format": "pt"})
    return path, model


TABLE = built().state()["embedding.weight"]
HEAD = built(**V11).state()["head.weight"]
ALIASES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def same(a: T5, b: T5) -> bool:
    return np.array_equal(a(ids_of(), ids_of()).data, b(ids_of(), ids_of()).data)


@pytest.mark.parametrize("present", [ALIASES[:1], ALIASES[1:2], ALIASES[2:], ALIASES[1:], ALIASES, ALIASES[::2]])
def test_any_one_name_of_the_input_embedding_will_do_and_several_if_they_are_equal(tmp_path, present):
    path, model = folder(tmp_path, {}, tensors={name: TABLE if name in present else GONE for name in ALIASES
                                                if name in present or name == "shared.weight"})
    assert same(T5.from_pretrained(path, "float64"), model)


@pytest.mark.parametrize("other", ALIASES[1:])
def test_input_embeddings_that_differ_are_refused(tmp_path, other):
    changed = TABLE.copy()
    changed[3, 4] += 1e-9
    path, _ = folder(tmp_path, {}, tensors={other: changed})
    with pytest.raises(ValueError, match=f"shared.weight and {other} differ"):
        T5.from_pretrained(path)


def test_a_folder_without_an_input_embedding_is_refused(tmp_path):
    path, _ = folder(tmp_path, {}, tensors={"shared.weight": GONE})
    with pytest.raises(ValueError, match="no input embedding; expected one of shared.weight, encoder.embed_tokens"):
        T5.from_pretrained(path)


@pytest.mark.parametrize("says, stored, scale_flag, tied, scaled", [
    # what config.json says of tie_word_embeddings; the stored head; scale_decoder_outputs; is it tied, is it scaled
    (True, None, GONE, True, True), (GONE, None, GONE, True, True),            # v1.0
    (False, "own", GONE, False, False), (False, "equal", GONE, False, False),  # v1.1, transformers 4
    (True, "own", GONE, False, True), (GONE, "own", GONE, False, True),        # a head is there: it is used
    (True, "equal", GONE, True, True), (GONE, "equal", GONE, True, True),      # an alias of the table
    (True, "own", False, False, False), (True, "equal", False, True, False),   # v1.1, transformers 5: always "tied"
    (True, None, True, True, True), (True, None, False, True, False), (GONE, "own", False, False, False),
    (False, "own", True, False, True), (None, None, None, True, True), (GONE, None, None, True, True)])
def test_the_head_and_its_scale_follow_the_rules_old_and_new(tmp_path, says, stored, scale_flag, tied, scaled):
    fields = dict(feed_forward_proj="gated-gelu")
    head = {None: {}, "own": {"lm_head.weight": HEAD}, "equal": {"lm_head.weight": TABLE}}[stored]
    path, base = folder(tmp_path / "a", fields, tensors=head,
                        config={"tie_word_embeddings": says, "scale_decoder_outputs": scale_flag})
    model = T5.from_pretrained(path, "float64")
    assert (model.config.tie_word_embeddings, model.config.scale_decoder_outputs) == (tied, scaled)
    assert ("head.weight" in model.base_parameters) == (not tied) == (model.head.weight is not model.embedding.weight)
    used = HEAD if stored == "own" else TABLE
    assert np.array_equal(model.head.weight.base.data, used)
    hidden = np.random.default_rng(0).standard_normal((2, 3, 12))
    expected = (hidden * 12 ** -0.5 if scaled else hidden) @ used.T
    # sums of 12 products in float64, in whatever order: 14 roundings of at most |h| |w| each
    bound = 14 * 2.0**-53 * (np.abs(hidden) @ np.abs(used).T)
    assert (np.abs(model.logits(hidden).data - expected) <= 2 * bound).all()
    model.save_pretrained(tmp_path / "b")
    again = T5.from_pretrained(tmp_path / "b", "float64")
    assert again.config == model.config and same(again, model)


def test_flipping_the_scale_alone_multiplies_the_logits_by_the_root_of_d_model():
    plain, scaled = built(d_model=16, scale_decoder_outputs=False), built(d_model=16, scale_decoder_outputs=True)
    assert np.array_equal(plain(ids_of(), ids_of()).data, scaled(ids_of(), ids_of()).data * 4), "a power of two: exact"


def test_a_missing_head_is_an_error_if_the_config_says_untied(tmp_path):
    path, _ = folder(tmp_path, V11, tensors={"lm_head.weight": GONE})
    with pytest.raises(ValueError, match="tie_word_embeddings = false, but lm_head.weight is missing"):
        T5.from_pretrained(path)


def test_the_unused_bias_of_the_first_release_is_passed_over(tmp_path):
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    path, model = folder(tmp_path, {}, tensors={unused: np.ones((8, 3))})
    assert same(T5.from_pretrained(path, "float64"), model)


Q = "encoder.block.1.layer.0.SelfAttention.q.weight"


@pytest.mark.parametrize("message, tensors", [
    ("'lm_head.bias' is not a key", {"lm_head.bias": np.zeros(23)}),
    ("'encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight' is not a key",
     {"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": np.zeros((8, 3))}),
    ("1 unexpected: encoder.2.attn.q.weight", {Q.replace("block.1", "block.2"): np.zeros((15, 12))}),
    ("1 missing: encoder.1.attn.q.weight", {Q: GONE}),
    ("1 missing: encoder.position.weight",
     {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": GONE}),
    (r"1 missing: encoder.1.attn.q.weight; 1 unexpected: encoder.2", {Q: GONE, Q.replace("block.1", "block.2"):
                                                                      np.zeros((15, 12))}),
    (r"encoder.1.attn.q.weight has shape \[12, 15\]; expected \[15, 12\]", {Q: np.zeros((12, 15))}),
    (r"encoder.1.attn.q.weight has shape \[180\]; expected \[15, 12\]", {Q: np.zeros(180)}),
    (r"encoder.1.attn.q.weight has dtype int64", {Q: np.zeros((15, 12), np.int64)}),
    (r"encoder.1.attn.q.weight has dtype bool", {Q: np.zeros((15, 12), bool)}),
    (r"embedding.weight has shape \[22, 12\]; expected \[23, 12\]", {"shared.weight": np.zeros((22, 12))}),
    (r"encoder.0.attn_norm.weight has shape \[1\]", {"encoder.block.0.layer.0.layer_norm.weight": np.ones(1)})])
def test_missing_extra_and_misshapen_tensors_are_named(tmp_path, message, tensors):
    path, _ = folder(tmp_path, {}, tensors=tensors)
    with pytest.raises(ValueError, match=message):
        T5.from_pretrained(path)


def test_a_load_that_fails_leaves_the_model_as_it_was():
    model = built()
    before = {name: (array, array.copy()) for name, array in model.state().items()}
    bad = {name: array + 1 for name, array in model.state().items()}
    for broken in ({**bad, "decoder.norm.weight": np.zeros(3)}, {**bad, "more": np.zeros(3)},
                   {n: a for n, a in bad.items() if n != "decoder.norm.weight"},
                   {**bad, "decoder.norm.weight": np.zeros(12, int)}):
        with pytest.raises(ValueError):
            model.load_state(broken)
        assert all(model.state()[name] is array and np.array_equal(array, kept)
                   for name, (array, kept) in before.items())


@pytest.mark.parametrize("field, value", [
    ("d_model", "12"), ("d_model", 12.0), ("d_model", True), ("d_model", 0), ("d_model", -12), ("d_model", [12]),
    ("vocab_size", 0), ("num_heads", 1.5), ("num_layers", 0), ("num_decoder_layers", False), ("d_kv", {}),
    ("dropout_rate", "0.1"), ("dropout_rate", 1.0), ("dropout_rate", -0.1), ("dropout_rate", True),
    ("layer_norm_epsilon", "1e-6"), ("layer_norm_epsilon", float("nan")), ("layer_norm_epsilon", float("inf")),
    ("feed_forward_proj", "gated-gated"), ("feed_forward_proj", 3), ("feed_forward_proj", "selu"),
    ("tie_word_embeddings", "false"), ("tie_word_embeddings", 0), ("scale_decoder_outputs", 1),
    ("relative_attention_num_buckets", 8.0), ("relative_attention_num_buckets", 3),
    ("relative_attention_max_distance", 4), ("pad_token_id", 23), ("pad_token_id", -1), ("eos_token_id", [1]),
    ("decoder_start_token_id", 1.0), ("initializer_factor", "1"), ("model_type", "bart"), ("model_type", 5)])
def test_a_config_field_of_the_wrong_type_or_range_is_named(tmp_path, field, value):
    path, _ = folder(tmp_path, {}, config={field: value})
    named = "(feed_forward_proj|activation)" if field == "feed_forward_proj" else field
    with pytest.raises(ValueError, match=f"config: {named} is "):
        T5.from_pretrained(path)


def test_absent_null_and_unknown_config_fields_mean_what_they_mean_to_transformers(tmp_path):
    fields = dict(relative_attention_max_distance=128, num_decoder_layers=2)
    path, model = folder(tmp_path, fields, config={
        "relative_attention_max_distance": GONE, "num_decoder_layers": GONE, "model_type": GONE, "pad_token_id": None,
        "n_positions": 512, "task_specific_params": {"summarization": {"num_beams": 4}}, "torch_dtype": "float32"})
    loaded = T5.from_pretrained(path, "float64")
    assert loaded.config == model.config and same(loaded, model)
    assert T5Config.from_hf({}) == T5Config()


@pytest.mark.parametrize("proj, activation, gated", [("relu", "relu", False), ("gated-gelu", "gelu_new", True),
                                                     ("gelu", "gelu", False), ("gated-silu", "silu", True),
                                                     ("gelu_new", "gelu_new", False), ("gated-relu", "relu", True)])
def test_feed_forward_proj_names_the_activation_and_the_gate(proj, activation, gated):
    c = T5Config(**SMALL, feed_forward_proj=proj)
    assert (c.activation, c.gated) == (activation, gated)
    ff = T5(c, None).encoder.blocks[0].ff
    assert ff.activation is ACTIVATIONS[activation] and ff.gated == gated


# -------------------------------------------------------------------------------------------------- folders: the shards

INDEX = "model.safetensors.index.json"


def sharded(path: Path, names: tuple[str, ...] = ("model-00001-of-00002.safetensors",
                                                  "model-00002-of-00002.safetensors")) -> T5:
    """The folder's one file split in two, with an index."""
    _, model = folder(path, V11)
    whole = safetensors.numpy.load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {}
    for n, name in enumerate(names):
        part = dict(list(whole.items())[n::2])
        safetensors.numpy.save_file(part, path / name)
        weight_map.update(dict.fromkeys(part, name))
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return model


def rewrite(path: Path, change: Any) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def test_shards_are_read_through_the_index(tmp_path):
    model = sharded(tmp_path)
    (tmp_path / "unrelated.safetensors").write_bytes(b"not listed, so never opened")
    assert same(T5.from_pretrained(tmp_path, "float64"), model)


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors.*missing"):
        T5.from_pretrained(tmp_path)


@pytest.mark.parametrize("escape", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "",
                                    "./model-00001-of-00002.safetensors", "../x/../secret.safetensors", "sub/"])
def test_an_index_cannot_name_a_file_outside_the_folder(tmp_path, escape):
    path = tmp_path / "x"
    sharded(path)
    (path / "sub").mkdir()
    for place in (tmp_path / "secret.safetensors", path / "sub" / "model.safetensors"):
        place.write_bytes((path / "model-00001-of-00002.safetensors").read_bytes())
    first = "model-00001-of-00002.safetensors"
    rewrite(path, lambda found: found.update({key: escape for key, shard in found.items() if shard == first}))
    with pytest.raises(ValueError, match="not a plain file name in the same folder"):
        T5.from_pretrained(path)


def test_an_absolute_path_in_an_index_is_refused_even_if_it_leads_back(tmp_path):
    sharded(tmp_path)
    rewrite(tmp_path, lambda found: found.update({key: str(tmp_path / shard) for key, shard in found.items()}))
    with pytest.raises(ValueError, match="not a plain file name"):
        T5.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda found: found.pop("shared.weight"), "keys are not those that .* first: 'shared.weight'"),
    (lambda found: found.update({"extra": "model-00001-of-00002.safetensors"}), "first: 'extra'"),
    (lambda found: found.update({"shared.weight": next(f for f in set(found.values()) if f != found["shared.weight"])}),
     "first: 'shared.weight'"),
    (lambda found: found.clear(), "no input embedding"),
    (lambda found: found.update({"shared.weight": 1}), "weight_map is not a map")])
def test_an_index_that_does_not_match_its_shards_is_refused(tmp_path, change, message):
    sharded(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        T5.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": null}}', "[]", "{"])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=re.escape(INDEX)):
        T5.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_a_pickle_is_refused_with_the_remedy_and_never_opened(tmp_path, name):
    path, _ = folder(tmp_path, {})
    (path / "model.safetensors").unlink()
    (path / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    os.chmod(path / name, 0)
    with pytest.raises(ValueError, match=rf"{name} is a pickle.*save_pretrained\(folder, safe_serialization=True\)"):
        T5.from_pretrained(path)


def test_safetensors_are_read_though_a_pickle_lies_beside_them(tmp_path):
    path, model = folder(tmp_path, {})
    (path / "pytorch_model.bin").write_bytes(b"never opened")
    assert same(T5.from_pretrained(path, "float64"), model)


def test_an_empty_folder_and_one_without_weights_say_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no config.json.*expected a folder with"):
        T5.from_pretrained(tmp_path)
    path, _ = folder(tmp_path, {})
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor model.safetensors.index.json"):
        T5.from_pretrained(path)


def test_a_damaged_file_is_named(tmp_path):
    path, _ = folder(tmp_path, {})
    whole = (path / "model.safetensors").read_bytes()
    for damaged in (whole[:-1], whole[:100], whole + b"\0", (2**60).to_bytes(8, "little") + whole[8:]):
        (path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors"):
            T5.from_pretrained(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        T5.from_pretrained(path)


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_half_precision_is_storage_and_computing_is_in_full(tmp_path, storage):
    model = built(dtype="float32")
    model.save_pretrained(tmp_path, storage)
    loaded, stored = T5.from_pretrained(tmp_path), read_tensors(tmp_path / "model.safetensors")[0]
    for name, array in loaded.state().items():
        assert array.dtype == np.float32 and np.array_equal(array, stored[T5.to_hf_name(name)])
    write_tensors(tmp_path / "model.safetensors", stored)  # the widened numbers, as float32
    assert same(T5.from_pretrained(tmp_path), loaded)


# ------------------------------------------------------------------------------------------------------------- padding

@given(st.integers(0, 2**32), st.integers(1, 30), st.booleans(), st.sampled_from(sorted(VARIANTS)))
def test_padding_on_either_side_changes_no_logit(seed, pads, left, variant):
    """Positions are relative, so even a shift to the right is nothing."""
    model, ids = built(seed % 5, **VARIANTS[variant]), ids_of(seed, rows=2)
    targets = np.random.default_rng(seed).integers(0, 23, (2, 4))
    filler = np.random.default_rng(seed + 1).integers(0, 23, (2, pads))
    parts = [(filler, np.zeros_like(filler)), (ids, np.ones_like(ids))]
    padded, mask = (np.concatenate(part, axis=1) for part in zip(*(parts if left else parts[::-1])))
    alone = model(ids, targets).data
    # longer sums with exact zeros in them, grouped differently: 1e-12, as for a whole float64 model everywhere here
    assert np.abs(model(padded, targets, mask).data - alone).max() <= 1e-12 * np.abs(alone).max()
    states = model.encode(padded, mask).data[:, pads:] if left else model.encode(padded, mask).data[:, :7]
    assert np.abs(states - model.encode(ids).data).max() <= 1e-12 * np.abs(states).max()


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_padding_before_the_decoder_s_input_changes_no_logit(seed, pads):
    model, ids, targets = built(seed % 5), ids_of(seed, 2), np.random.default_rng(seed).integers(0, 23, (2, 4))
    padded = np.concatenate([np.zeros((2, pads), int), targets], axis=1)
    mask = np.concatenate([np.zeros((2, pads), int), np.ones((2, 4), int)], axis=1)
    alone = model(ids, targets).data
    assert np.abs(model(ids, padded, None, mask).data[:, pads:] - alone).max() <= 1e-12 * np.abs(alone).max()


def test_attention_is_not_scaled_and_its_width_is_its_own():
    """heads * d_kv = 15 with d_model = 12: one encoder attention, recomputed by hand."""
    model, ids = built(num_layers=1), ids_of(rows=1, time=4)
    state = {name: array for name, array in model.state().items() if name.startswith("encoder")}
    x = model.state()["embedding.weight"][ids[0]]
    n = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-6) * state["encoder.0.attn_norm.weight"]
    q, k, v = (n @ state[f"encoder.0.attn.{part}.weight"].T for part in "qkv")
    position = state["encoder.position.weight"]
    mixed = np.empty((4, 15))
    for head in range(3):
        part = slice(5 * head, 5 * head + 5)
        scores = q[:, part] @ k[:, part].T
        for i in range(4):
            for j in range(4):  # 8 buckets, half for each side; the first two distances have their own
                distance = abs(j - i)
                scores[i, j] += position[(4 if j > i else 0) + (distance if distance < 2 else 2), head]
        p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        mixed[:, part] = p @ v[:, part]
    x = x + mixed @ state["encoder.0.attn.o.weight"].T
    n = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-6) * state["encoder.0.ff_norm.weight"]
    x = x + np.maximum(n @ state["encoder.0.ff.wi.weight"].T, 0) @ state["encoder.0.ff.wo.weight"].T
    x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-6) * state["encoder.norm.weight"]
    assert np.abs(model.encode(ids).data[0] - x).max() <= 1e-12 * np.abs(x).max()


def test_the_scale_follows_the_tie_unless_it_is_said():
    assert T5Config().scale_decoder_outputs is True
    assert T5Config(tie_word_embeddings=False).scale_decoder_outputs is False
    assert T5Config(tie_word_embeddings=False, scale_decoder_outputs=True).scale_decoder_outputs is True


def test_an_epsilon_of_0_is_refused_and_numbers_of_numpy_are_numbers():
    with pytest.raises(ValueError, match="layer_norm_epsilon is 0"):
        T5Config(layer_norm_epsilon=0)
    assert T5Config(vocab_size=np.int64(30)) == T5Config(vocab_size=30)
