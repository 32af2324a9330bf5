"""Decoder: names, folders and what they refuse, padding, loss, generation, and methods on it."""
from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

import minipeft
from minipeft import (IA3, Bottleneck, Decoder, DecoderConfig, DoRA, LoRA, PrefixTuning, PromptTuning, QALoRA,
                      Selective, attach, quantize, select, value_and_grad)
from minipeft.files import read_shapes, read_tensors, write_tensors
from minipeft.laws.models import moved
from minipeft.models import decoder
from minipeft.models.continuing import continued
from minipeft.models.shapes import decoder_shapes
from tests.strict_namespace import strict
from tests.test_backend import host, portable

SMALL: dict[str, Any] = dict(vocab_size=23, hidden_size=12, intermediate_size=20, num_hidden_layers=2,
                             num_attention_heads=6, num_key_value_heads=2, head_dim=4, eos_token_ids=(1,),
                             bos_token_id=2)
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {}, "tied": dict(tie_word_embeddings=True), "biases": dict(attention_bias=True, mlp_bias=True),
    "mistral": dict(model_type="mistral", num_key_value_heads=6), "qwen2": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3", head_dim=6, num_key_value_heads=1),
    "linear": dict(rope_type="linear", rope_factor=3.0),
    "llama3": dict(rope_type="llama3", rope_factor=8.0, rope_original_length=16)}
every_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
METHODS = {"LoRA": LoRA(3, 5, where=r"\.(attn|ff)\.\w+\.weight$"), "DoRA": DoRA(2, 3, where=r"\.(q|wo)\.weight$"),
           "IA3": IA3(), "Bottleneck": Bottleneck("pfeiffer", 3), "prompt": PromptTuning(3, init="random"),
           "prefix": PrefixTuning(3, std=0.5), "prefix, mlp": PrefixTuning(2, mlp=5)}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
CLOSE = 1e-12  # of the largest entry: what a whole float64 model is allowed everywhere here


def built(seed: int = 0, dtype: str = "float64", **fields: Any) -> Decoder:
    """A model none of whose arrays is all zeros or all ones, with logits that differ."""
    rng = np.random.default_rng(seed)
    model = Decoder(DecoderConfig(**{**SMALL, **fields}), rng, dtype)
    for p in model.base_parameters.values():
        p.data += (0.3 * rng.standard_normal(p.shape)).astype(p.dtype)
    return model


def ids_of(seed: int = 0, rows: int = 3, time: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 23, (rows, time))


def near(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max() <= CLOSE * np.abs(b).max())


def padded(row: np.ndarray, left: int, right: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.concatenate([np.full(left, 9), row, np.full(right, 9)])[None]
    mask = np.concatenate([np.zeros(left, int), np.ones(len(row), int), np.zeros(right, int)])[None]
    return ids, mask


# ---- names


@every_variant
def test_the_table_of_names_in_the_docstring_and_the_shapes_without_a_model_are_those_of_the_model(fields):
    model = built(**fields)
    assert {name: slot.shape for name, slot in model.slots.items()} == decoder_shapes(model.config)
    text = decoder.__doc__ or ""
    c = model.config
    sizes = {"V": c.vocab_size, "d": c.d_model, "inner": c.num_attention_heads * c.head_dim,
             "narrow": c.num_key_value_heads * c.head_dim, "head_dim": c.head_dim, "d_ff": c.intermediate_size}
    table = {}
    for pattern, shape in re.findall(r"^    ((?:decoder|embedding|head)\.\S+)\s+\[([^\]]+)\]", text, re.M):
        braces = re.search(r"\{([\w,]+)\}", pattern)
        for part in braces[1].split(",") if braces else [""]:
            table[re.sub(r"\{[\w,]+\}", part, pattern)] = shape
    for name, slot in model.slots.items():
        shape = table[re.sub(r"\.\d+\.", ".i.", name)]
        sizes["d_out"] = slot.shape[0]
        assert slot.shape == tuple(sizes[word] for word in shape.split(", ")), name
    assert {re.sub(r"\.\d+\.", ".i.", site) for site in model.sites} == {
        "decoder.input", "decoder.i.attn.keys_values", "decoder.i.attn.out", "decoder.i.ff.out"}


@every_variant
def test_every_name_has_a_key_of_its_own_in_hugging_face_and_back(fields):
    names = list(built(**fields).slots)
    keys = [Decoder.to_hf_name(name) for name in names]
    assert len(set(keys)) == len(names) and [Decoder.from_hf_name(key) for key in keys] == names
    assert Decoder.to_hf_name("decoder.1.ff.wi_0.weight") == "model.layers.1.mlp.gate_proj.weight"
    assert Decoder.to_hf_name("decoder.0.attn.k.weight") == "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize("call, name", [(Decoder.to_hf_name, "decoder.0.cross.q.weight"),
                                        (Decoder.from_hf_name, "model.layers.0.mlp.router.weight")])
def test_a_name_without_a_counterpart_is_refused(call, name):
    with pytest.raises(ValueError, match=re.escape(name)):
        call(name)


# ---- folders


@every_variant
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_a_saved_model_is_read_back_with_every_number_and_field(fields, dtype, tmp_path):
    model = built(dtype="float32", **fields)
    model.save_pretrained(tmp_path, dtype)
    again = Decoder.from_pretrained(tmp_path)
    assert again.config == model.config
    stored = {name: p.data for name, p in again.base_parameters.items()}
    tolerance = {None: 0, "bfloat16": 2.0 ** -8, "float16": 2.0 ** -11}[dtype]  # one rounding to nearest
    for name, p in model.base_parameters.items():
        assert (abs(stored[name] - p.data) <= tolerance * abs(p.data) + (tolerance > 0) * 2.0 ** -24).all()
    assert ("lm_head.weight" in read_shapes(tmp_path / "model.safetensors")) == (not model.config.tie_word_embeddings)


def test_shards_are_read(tmp_path):
    model = built(dtype="float32")
    model.save_pretrained(tmp_path)
    tensors, _ = read_tensors(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    shards = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
    for file, part in shards.items():
        write_tensors(tmp_path / file, part, {})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {key: file for file, part in shards.items() for key in part}}))
    again = Decoder.from_pretrained(tmp_path)
    assert np.array_equal(again(ids_of()).data, model(ids_of()).data)


def test_quantized_weights_stay_quantized_in_a_folder(tmp_path):
    model = built(dtype="float32")
    quantize(model, "nf4")
    model.save_pretrained(tmp_path)
    again = Decoder.from_pretrained(tmp_path)
    kinds, expected = ({name: type(slot.base) for name, slot in m.slots.items()} for m in (again, model))
    assert kinds == expected and len(set(kinds.values())) == 2
    assert np.array_equal(again(ids_of()).data, model(ids_of()).data)


def folder(tmp_path: Any, change: dict[str, Any] | None = None, drop: tuple[str, ...] = (), **fields: Any) -> Any:
    built(dtype="float32", **fields).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values = {k: v for k, v in {**values, **(change or {})}.items() if k not in drop}
    (tmp_path / "config.json").write_text(json.dumps(values))
    tensors, _ = read_tensors(tmp_path / "model.safetensors")
    write_tensors(tmp_path / "model.safetensors", tensors, {})  # without the digest of the configuration
    return tmp_path


@pytest.mark.parametrize("change, named", [
    ({"model_type": "gemma"}, "model_type is 'gemma'"), ({"model_type": "smollm3"}, "model_type"),
    ({"model_type": ["llama"]}, "model_type"), ({"sliding_window": 8, "model_type": "mistral"}, "sliding_window"),
    ({"use_sliding_window": True, "sliding_window": 8, "model_type": "qwen2"}, "sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"num_experts": 4}, "num_experts"), ({"logit_scale": 0.5}, "logit_scale"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"), ({"auto_map": {"AutoModel": "x"}}, "auto_map"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attention_factor": 0.5}}, "attention_factor"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta"),
    ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "differ"),
    ({"hidden_act": "mish"}, "hidden_act"), ({"num_key_value_heads": 4}, "num_key_value_heads"),
    ({"head_dim": 3}, "head_dim"), ({"rms_norm_eps": 0}, "rms_norm_eps"), ({"hidden_size": "12"}, "hidden_size"),
    ({"eos_token_id": 23}, "eos_token_ids"), ({"eos_token_id": [1, "2"]}, "eos_token_ids"),
    ({"tie_word_embeddings": True}, "lm_head.weight differs"), ({"num_hidden_layers": 10 ** 9}, "num_hidden_layers"),
    ({"vocab_size": 24}, r"shape \[23, 12\]"), ({"attention_bias": True}, "missing"),
    ({"mlp_bias": True, "model_type": "qwen3"}, "mlp_bias"),
    ({"quantization_config": {"quant_method": "gptq"}}, "gptq")],
    ids=lambda value: value if isinstance(value, str) else ",".join(value))
def test_a_field_that_changes_the_mathematics_is_refused_by_name(change, named, tmp_path):
    with pytest.raises(ValueError, match=named) as error:
        Decoder.from_pretrained(folder(tmp_path, change))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("kind, field", [("mistral", "sliding_window"), ("qwen2", "num_key_value_heads"),
                                         ("llama", "hidden_size"), ("llama", "vocab_size")])
def test_a_missing_field_whose_default_would_mislead_is_refused(kind, field, tmp_path):
    with pytest.raises(ValueError, match=f"{field} is missing"):
        Decoder.from_pretrained(folder(tmp_path, drop=(field,), model_type=kind))


@pytest.mark.parametrize("change", [{"rope_interleaved": False}, {"num_experts": None}, {"pretraining_tp": 2},
                                    {"transformers_version": "5.24.0"}, {"torch_dtype": "float32"}, {"head_dim": None}])
def test_a_field_that_is_off_or_changes_nothing_is_ignored(change, tmp_path):
    fields = {"num_attention_heads": 3, "num_key_value_heads": 1}  # 12 / 3 = 4, the head_dim that is dropped
    assert Decoder.from_pretrained(folder(tmp_path, change, **fields)).config == built(**fields).config


def test_a_stored_head_that_equals_the_table_and_buffers_of_old_files_are_no_weights(tmp_path):
    folder(tmp_path, tie_word_embeddings=True)
    tensors, _ = read_tensors(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, "float32")
    write_tensors(tmp_path / "model.safetensors", tensors, {})
    model = Decoder.from_pretrained(tmp_path)
    assert model.head.weight is model.embedding.weight
    assert np.array_equal(model(ids_of()).data, built(dtype="float32", tie_word_embeddings=True)(ids_of()).data)


def test_an_untied_head_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lm_head.weight is missing"):
        Decoder.from_pretrained(folder(tmp_path, {"tie_word_embeddings": False}, tie_word_embeddings=True))


# ---- what a row sees


@every_variant
@pytest.mark.parametrize("left, right", [(3, 0), (0, 2), (2, 3)])
def test_a_padded_row_gives_what_it_gives_alone(fields, left, right):
    model, row = built(**fields), ids_of()[0]
    ids, mask = padded(row, left, right)
    assert near(model(ids, mask).data[:, left:left + len(row)], model(row[None]).data)


@every_method
@pytest.mark.parametrize("left, right", [(3, 0), (0, 2)])
def test_a_padded_row_gives_what_it_gives_alone_under_every_method(method, left, right):
    if isinstance(method, PromptTuning) and left:
        method = PromptTuning(3, init="random", next_to_text=True)  # else the padding stands between, as in PEFT
    model, row = built(), ids_of()[0]
    moved(attach(model, method, np.random.default_rng(1)), np.random.default_rng(2))
    ids, mask = padded(row, left, right)
    assert near(model(ids, mask).data[:, left:left + len(row)], model(row[None]).data)


@every_variant
def test_no_position_sees_a_later_one(fields):
    model, ids = built(**fields), ids_of()
    other = ids.copy()
    other[:, 4:] = ids_of(1)[:, 4:]
    assert near(model(other).data[:, :4], model(ids).data[:, :4])
    assert not near(model(other).data[:, 4:], model(ids).data[:, 4:])


def test_a_score_depends_on_the_distance_alone_so_a_shift_of_all_positions_changes_nothing():
    model, ids = built(), ids_of()
    x, position = model.embed(ids), model.decoder.position
    wanted = model.decoder(x).data
    rotation = position.rotation
    position.rotation = lambda positions: rotation(positions + 13)
    assert near(model.decoder(x).data, wanted)


def test_a_prefix_is_unrotated_keys_with_every_token_p_positions_later():
    """The definition: rotate by p + i, then put K in front as it is."""
    model, ids, p = built(), ids_of(), 3
    a = moved(attach(model, PrefixTuning(p, std=0.5), np.random.default_rng(1)), np.random.default_rng(2))
    found = model(ids).data
    pieces = {block.attn.keys_values: a.at[block.attn.keys_values] for block in model.decoder.blocks}
    for piece in pieces.values():
        piece.rotary = None
    position = model.decoder.position
    rotation = position.rotation
    position.rotation = lambda positions: rotation(positions + p)
    assert near(found, model(ids).data)
    position.rotation = rotation
    assert not near(found, model(ids).data), "it matters where the tokens are"


# ---- loss


def test_the_loss_is_the_mean_over_labels_of_the_next_tokens():
    model, ids = built(), ids_of()
    labels = ids.copy()
    labels[0, :4], labels[1, 2] = -100, -100
    z = model(ids).data
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    picked = [-log_p[r, t, labels[r, t + 1]] for r in range(3) for t in range(6) if labels[r, t + 1] != -100]
    assert near(model.loss(ids, labels).data, np.array(np.mean(picked)))


def test_a_prompt_is_neither_in_the_logits_nor_in_the_loss():
    model, ids = built(), ids_of()
    attach(model, PromptTuning(3, init="random"), np.random.default_rng(1))
    assert model(ids).shape == (3, 7, 23)
    z = model(ids).data[:, :-1]
    log_p = np.take_along_axis(z - np.log(np.exp(z).sum(axis=-1, keepdims=True)), ids[:, 1:, None], axis=-1)
    assert near(model.loss(ids, ids).data, np.array(-log_p.mean()))


@pytest.mark.parametrize("labels, error", [(ids_of()[:, 1:], "shape"), (np.full((3, 7), -100), "every label"),
                                           (ids_of() + 20, "labels holds"),
                                           (np.where(np.arange(7) == 0, 5, np.full((3, 7), -100)), "every label")])
def test_labels_that_cannot_be_counted_are_refused(labels, error):
    with pytest.raises(ValueError, match=error):
        built().loss(ids_of(), labels)


def test_a_batch_of_prompts_and_completions_has_its_loss_on_the_completions():
    model, pairs = built(), [([5, 6, 7], [8, 1]), ([9], [10, 11, 12, 1])]
    batch = minipeft.batch_of(pairs, causal=True)
    sums = [float(model.loss([[*p, *c]], [[-100] * len(p) + c])) * len(c) for p, c in pairs]
    assert near(model.loss(**batch).data, np.array(sum(sums) / 6))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "DoRA"])  # whose norm counts as constant
def test_gradients_under_every_method_are_those_of_central_differences(name):
    method = METHODS[name]
    model, ids = built(), ids_of(time=5)
    a = moved(attach(model, method, np.random.default_rng(1)), np.random.default_rng(2))
    mask = np.ones_like(ids)
    mask[0, -1] = mask[2, 0] = 0
    labels = np.where(mask, ids, -100)
    labels[2, 1] = -100
    minipeft.check_gradients(lambda: model.loss(ids, labels, mask), a.parameters, np.random.default_rng(3))


# ---- generation


@every_variant
def test_generation_with_a_cache_is_the_argmax_of_forwards_on_growing_rows(fields):
    model, ids = built(**fields), ids_of()
    rows = ids
    for _ in range(5):
        rows = np.concatenate([rows, model(rows).data[:, -1].argmax(axis=-1)[:, None]], axis=1)
    assert np.array_equal(model.generate(ids, max_new_tokens=5, stop=[]), rows)
    assert np.array_equal(model.generate(ids, max_new_tokens=5, stop=[], use_cache=False), rows)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", [None, *METHODS.values()], ids=["base", *METHODS])
def test_rows_padded_on_either_side_are_continued_as_they_are_alone(method, beams, use_cache):
    if isinstance(method, PromptTuning):
        method = PromptTuning(3, init="random", next_to_text=True)
    model, rows = built(), ids_of(rows=3, time=6)
    if method is not None:
        moved(attach(model, method, np.random.default_rng(1)), np.random.default_rng(2))
    alone = [continued(model, row[None, :n], None, 5, num_beams=beams, use_cache=use_cache)
             for row, n in zip(rows, (6, 4, 3))]
    ids, mask = np.full((3, 6), 9), np.zeros((3, 6), int)
    ids[0], mask[0] = rows[0], 1
    ids[1, 2:], mask[1, 2:] = rows[1, :4], 1
    ids[2, :3], mask[2, :3] = rows[2, :3], 1
    found, scores = continued(model, ids, mask, 5, num_beams=beams, use_cache=use_cache)
    assert np.array_equal(found[:, :6], ids)
    for i, (row, score) in enumerate(alone):
        new = row[0, (6, 4, 3)[i]:]
        assert np.array_equal(found[i, 6:6 + len(new)], new) and (found[i, 6 + len(new):] == 0).all()
        assert scores is None or near(scores[i:i + 1], score)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("search", ["greedy", "beams", "sampling"])
def test_rows_with_adapters_of_their_own_are_continued_as_they_are_alone(search, use_cache):
    model, ids = built(), ids_of(rows=4, time=5)
    for i, (name, method) in enumerate(METHODS.items()):
        a = attach(model, method, np.random.default_rng(i), name.replace(", ", "-"))
        moved(a, np.random.default_rng(i)).unplug()
    asked = ["LoRA", ("prefix", "Bottleneck"), None, "prompt"]
    options = {"use_cache": use_cache, "max_new_tokens": 4, "stop": [], "num_beams": 1 + (search == "beams")}
    numbers = np.random.default_rng(5).random((4, 4))

    def drawn(rows: Any) -> dict[str, Any]:
        return {"rng": Drawn(numbers[rows])} if search == "sampling" else {}

    together = model.generate(ids, adapter=asked, **drawn(slice(None)), **options)
    alone = [model.generate(ids[i:i + 1], adapter=asked[i] or (), **drawn([i]), **options) for i in range(4)]
    assert np.array_equal(together, np.concatenate(alone))


class Drawn(np.random.Generator):
    """A generator whose uniform numbers are given."""

    def __init__(self, numbers: np.ndarray):
        super().__init__(np.random.PCG64(0))
        self.numbers = numbers

    def random(self, size: Any = None, *_: Any, **__: Any) -> Any:
        assert size == self.numbers.shape
        return self.numbers


def test_a_row_ends_at_any_token_of_stop_and_is_filled_with_pad():
    model, ids = built(), ids_of()
    free = model.generate(ids, max_new_tokens=6, stop=[])
    first, second = int(free[0, 8]), int(free[1, 9])
    found = model.generate(ids, max_new_tokens=6, stop=[first, second])
    for row, whole in zip(found[:, 7:], free[:, 7:]):
        end = next((i for i, token in enumerate(whole) if token in (first, second)), 5)
        assert np.array_equal(row[:end + 1], whole[:end + 1]) and (row[end + 1:] == 0).all()
    assert np.array_equal(built(eos_token_ids=(first, second)).generate(ids, max_new_tokens=6), found)


def test_no_new_tokens_gives_the_prompt_and_pads_of_the_input_are_padding():
    model, ids = built(), ids_of()
    assert np.array_equal(model.generate(ids, max_new_tokens=0), ids)
    with_pads = np.concatenate([np.zeros((3, 2), int), ids], axis=1)
    new = model.generate(ids, max_new_tokens=4)[:, 7:]
    assert np.array_equal(model.generate(with_pads, max_new_tokens=4)[:, 9:], new)


@pytest.mark.parametrize("options, error", [({"stop": [23]}, "stop"), ({"stop": [-1]}, "stop"), ({"top_k": 3}, "top_k"),
                                            ({"max_new_tokens": -1}, "max_new_tokens"),
                                            ({"num_beams": 0}, "num_beams")])
def test_options_out_of_range_are_refused(options, error):
    with pytest.raises(ValueError, match=error):
        built().generate(ids_of(), **options)


# ---- methods


@every_method
@pytest.mark.parametrize("variant, dtype", [("llama", "float64"), ("qwen3", "float32"), ("biases", "float64")])
def test_every_law_of_the_library_holds_on_a_decoder(method, variant, dtype):
    found = minipeft.laws.check(method, built(dtype=dtype, **VARIANTS[variant]))
    found.raise_for_failures()
    assert not found.skipped and {v.law.split()[0] for v in found.all} >= {"1", "2", "4", "7", "8", "12", "13"}


@every_method
def test_a_method_is_saved_loaded_unplugged_and_routed(method, tmp_path):
    model, ids = built(), ids_of()
    before = model(ids).data
    a = moved(attach(model, method, np.random.default_rng(1), "a"), np.random.default_rng(2))
    with_it = model(ids).data
    assert not near(with_it, before)
    a.save(tmp_path / "a.safetensors")
    a.unplug()
    assert np.array_equal(model(ids).data, before)
    mixed = model(ids, adapter=["a", None, "a"]).data
    assert near(mixed[[0, 2]], with_it[[0, 2]]) and near(mixed[1], before[1])
    other = built()
    minipeft.load(other, tmp_path / "a.safetensors")
    assert np.array_equal(other(ids).data, with_it)


@pytest.mark.parametrize("method", [METHODS["LoRA"], METHODS["DoRA"], METHODS["IA3"]], ids=["LoRA", "DoRA", "IA3"])
def test_a_merged_method_gives_the_same_logits_and_is_saved_into_the_folder(method, tmp_path):
    model, ids = built(), ids_of()
    a = moved(attach(model, method, np.random.default_rng(1)), np.random.default_rng(2))
    wanted = model(ids).data
    model.save_pretrained(tmp_path, merged=True)
    a.merge()
    assert near(model(ids).data, wanted)
    assert near(Decoder.from_pretrained(tmp_path, "float64")(ids).data, wanted)


def test_training_moves_the_chosen_parameters_alone_on_a_quantized_base():
    model, ids = built(dtype="float32"), ids_of()
    quantize(model, "nf4")
    attach(model, LoRA(2, 4), np.random.default_rng(1))
    loss, grads = value_and_grad(lambda: model.loss(ids, ids), select(model, "@"))
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in grads.values())
    assert set(grads) == set(select(model, "@"))


def test_qalora_is_merged_into_the_offsets_of_a_quantized_decoder():
    model, ids = built(), ids_of()
    quantize(model, "int4", group=4)
    a = moved(attach(model, QALoRA(2, group=4), np.random.default_rng(1)), np.random.default_rng(2))
    wanted, places = model(ids).data, [slot for slot in a.places.values()]
    before = [slot.base.arrays["codes"].data.copy() for slot in places]
    a.merge()
    assert near(model(ids).data, wanted)
    for slot, codes in zip(places, before, strict=True):
        assert np.array_equal(slot.merged[0].merged.arrays["codes"].data, codes)


def test_full_and_selective_tuning_reach_every_parameter():
    model, ids = built(), ids_of()
    assert set(value_and_grad(lambda: model.loss(ids, ids), select(model, ".*"))[1]) == set(model.base_parameters)
    attach(model, Selective("norm"), np.random.default_rng(1))
    grads = value_and_grad(lambda: model.loss(ids, ids), select(model, "@"))[1]
    assert len(grads) == 2 * 2 + 1 and all(np.abs(g).max() > 0 for g in grads.values())


# ---- other libraries, and tracing


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_life_under_the_strict_namespace_is_that_of_plain_arrays_bit_for_bit(dtype):
    ids = ids_of(rows=4)
    mask = np.ones_like(ids)
    mask[0, -2:] = mask[2, :3] = 0

    def life(library: Any) -> dict[str, Any]:
        model = built(dtype=dtype, attention_dropout=0.1).to(library)
        with minipeft.use(library):
            parts = [moved(attach(model, method, np.random.default_rng(i), f"m{i}"), np.random.default_rng(i))
                     for i, method in enumerate(METHODS.values())]
            params = {name: p for a in parts for name, p in a.parameters.items()}
            loss, grads = value_and_grad(lambda: model.loss(ids, ids, mask, rng=np.random.default_rng(5)), params)
            routing = ["m0", None, ("m5", "m2"), "m4"]
            return {"loss": loss, "grads": host(grads), "mixed": host({"": model(ids, mask, routing)}),
                    "greedy": model.generate(ids, mask, 4, routing).tolist(),
                    "beams": model.generate(ids, mask, 4, routing, num_beams=2).tolist()}

    assert life(strict) == life(portable)


def test_a_decoder_is_traced_and_compared_with_itself(tmp_path):
    model, ids = built(), ids_of()
    moved(attach(model, LoRA(2, 4), np.random.default_rng(1)), np.random.default_rng(2))
    minipeft.trace(model, {"input_ids": ids, "labels": ids}, tmp_path / "a")
    shapes = read_shapes(tmp_path / "a")
    assert any("decoder.1.attn.k" in name for name in shapes) and any("lora" in name for name in shapes)
