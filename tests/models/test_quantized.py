"""Folders with quantized weights: bitsandbytes' keys read and written, every kind of our own, merges, and damage."""
from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Callable

import numpy
import pytest
import safetensors.numpy

import minipeft
from minipeft import LoRA, T5, T5Config, Transformer, TransformerConfig, attach
from minipeft.attaching.origin import Origin
from minipeft.attaching.trained_on import has_origin, origin_of
from minipeft.files import read_dtypes, read_tensors, round_bf16, widen_bf16, write_tensors
from minipeft.laws.models import moved
from minipeft.quant import QuantizedWeight
from minipeft.quant.scheme import SCHEMES
from tests.methods.golden import close

FIXTURES = Path(__file__).parents[1] / "fixtures" / "bitsandbytes"
FOLDERS = ["nf4_double", "fp4"]
RNG = numpy.random.default_rng
CONFIG = T5Config(11, 64, 32, 2, 64, 1, 1, 8, 16, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
IDS = numpy.arange(1, 9).reshape(2, 4)
Q, K = "encoder.0.attn.q.weight", "encoder.0.attn.k.weight"
HF = "encoder.block.0.layer.0.SelfAttention.q.weight"
STATE = f"{HF}.quant_state.bitsandbytes__nf4"
CLOSE = 5e-6  # of the largest logit, in float32


def t5(dtype: str = "float32") -> T5:
    return T5(CONFIG, RNG(0), dtype)


def raw(path: Path) -> dict[str, numpy.ndarray]:
    """Tensors as they are in the file; the half-precision ones, which no test looks at, as float32."""
    return read_tensors(path / "model.safetensors")[0]


def config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def equal(a: dict[str, numpy.ndarray], b: dict[str, numpy.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a)


def same_model(a: Any, b: Any) -> bool:
    return equal(a.state(), b.state()) and a(IDS, IDS).data.tobytes() == b(IDS, IDS).data.tobytes()


def edited(tmp_path: Path, edit: Callable[[dict], Any], name: str = "nf4_double", **changes: Any) -> Path:
    """A copy of a golden folder whose tensors, {key: array}, `edit` changed; changes: of its quantization_config."""
    folder = tmp_path / "edited"
    shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
    tensors = raw(folder)
    edit(tensors)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"}, signed=False)
    if changes:
        values = config(folder)
        values["quantization_config"].update(changes)
        (folder / "config.json").write_text(json.dumps(values))
    return folder


def nothing(_: dict) -> None:
    pass


def state(**changes: Any) -> Callable[[dict], None]:
    """Changes fields of the state of one weight; None removes a field."""
    def edit(tensors: dict) -> None:
        values = {**json.loads(tensors[STATE].tobytes()), **changes}
        text = json.dumps({name: value for name, value in values.items() if value is not None})
        tensors[STATE] = numpy.frombuffer(text.encode(), "uint8")
    return edit


def put(leaf: str, change: Callable[[numpy.ndarray], numpy.ndarray]) -> Callable[[dict], None]:
    def edit(tensors: dict) -> None:
        tensors[HF + leaf] = change(tensors[HF + leaf].copy())
    return edit


def first(value: float) -> Callable[[numpy.ndarray], numpy.ndarray]:
    def change(array: numpy.ndarray) -> numpy.ndarray:
        array[0] = value
        return array
    return change


# ---- what bitsandbytes wrote

@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_bitsandbytes_has_its_weights_bit_for_bit_and_its_logits(name):
    model = T5.from_pretrained(FIXTURES / name)
    with numpy.load(FIXTURES / name / "golden.npz") as golden:
        keys = {key.removeprefix("sha256/") for key in golden if key.startswith("sha256/")}
        quantized = {n for n, slot in model.slots.items() if isinstance(slot.base, QuantizedWeight)}
        assert {model.to_hf_name(n) for n in quantized} == keys and len(keys) >= 14
        for key in keys:
            dense = model.slots[model.from_hf_name(key)].base.dense().data
            assert hashlib.sha256(dense.tobytes()).hexdigest() == str(golden[f"sha256/{key}"]), key
            if f"dense/{key}" in golden:
                assert numpy.array_equal(dense, golden[f"dense/{key}"])
                stored = dense if name != "fp4" else widen_bf16(round_bf16(dense))
                assert numpy.array_equal(stored, golden[f"stored/{key}"]), "one rounding to the dtype of the state"
        logits = model(golden["input_ids"], golden["decoder_input_ids"]).data
        assert close(logits, golden["logits"], CLOSE)


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_read_is_written_again_byte_for_byte(name, tmp_path):
    T5.from_pretrained(FIXTURES / name).save_pretrained(tmp_path)
    assert equal(raw(tmp_path), raw(FIXTURES / name)), "half-precision weights compare by their numbers"
    found, theirs = config(tmp_path)["quantization_config"], config(FIXTURES / name)["quantization_config"]
    assert {key: theirs[key] for key in found} == found and {
        "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_storage", "quant_method"} <= found.keys()


def test_shards_are_read_like_one_file(tmp_path):
    tensors = raw(FIXTURES / "nf4_double")
    shutil.copy(FIXTURES / "nf4_double" / "config.json", tmp_path)
    parts = [dict(list(tensors.items())[i::3]) for i in range(3)]  # the tensors of one weight are in different files
    for i, part in enumerate(parts):
        write_tensors(tmp_path / f"{i}.safetensors", part, signed=False)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {key: f"{i}.safetensors" for i, part in enumerate(parts) for key in part}}))
    assert same_model(T5.from_pretrained(tmp_path), T5.from_pretrained(FIXTURES / "nf4_double"))


@pytest.mark.parametrize("view", ["uint8", "float32", "float16", "int64", "BF16"])
@pytest.mark.parametrize("flat", [True, False])
def test_the_codes_may_be_stored_as_another_dtype_and_keep_every_bit(view, flat, tmp_path):
    """As with bnb_4bit_quant_storage. Among the bytes are the NaNs of float16, quiet and signaling."""
    def edit(tensors):
        tensors[HF][:8, 0] = [0x01, 0x7c, 0xff, 0xff, 0x00, 0x7e, 0x01, 0xfc]
    folder = edited(tmp_path, edit)
    wanted = raw(folder)[HF].reshape(-1)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    stored = tensors[HF].reshape(-1).view("uint16" if view == "BF16" else view)
    tensors[HF] = stored if flat else stored[:, None]
    written = safetensors.numpy.save(tensors)
    n = int.from_bytes(written[:8], "little")
    header = json.loads(written[8:8 + n])
    header[HF]["dtype"] = view if view == "BF16" else header[HF]["dtype"]
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + written[8 + n:])
    assert numpy.array_equal(T5.from_pretrained(folder).state()[f"{Q}.packed"], wanted)


def test_a_map_that_differs_from_ours_is_honored_and_written_again(tmp_path):
    plain = T5.from_pretrained(FIXTURES / "nf4_double").slots[Q].base.dense().data
    numbers = numpy.linspace(-2, 1, 16, dtype="float32")
    nested = numpy.linspace(-1, 1, 256, dtype="float32")

    def edit(tensors):
        tensors[f"{HF}.quant_map"], tensors[f"{HF}.nested_quant_map"] = numbers, nested
    model, tensors = T5.from_pretrained(edited(tmp_path, edit)), raw(tmp_path / "edited")
    packed = tensors[HF].reshape(-1)
    codes = numpy.stack([packed >> 4, packed & 15], 1).reshape(-1)
    offset = numpy.float32(json.loads(tensors[STATE].tobytes())["nested_offset"])
    absmax = nested[tensors[f"{HF}.absmax"]] * tensors[f"{HF}.nested_absmax"][0] + offset
    wanted = (numbers[codes].reshape(-1, 64) * absmax[:, None]).reshape(64, 64)
    assert numpy.array_equal(model.slots[Q].base.dense().data, wanted) and not numpy.array_equal(wanted, plain)
    model.save_pretrained(tmp_path / "again")
    assert equal(raw(tmp_path / "again"), tensors)


# ---- what we write

@pytest.mark.parametrize("dtype, said", [(None, "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"),
                                         ("float64", "float32")])
def test_the_state_names_the_dtype_in_which_the_other_weights_are_stored(dtype, said, tmp_path):
    model = t5()
    minipeft.quantize(model, "nf4", double=True)
    model.save_pretrained(tmp_path, dtype)
    tensors = raw(tmp_path)
    text = tensors[STATE].tobytes().decode()
    offset = float(model.state()[f"{Q}.offset"])
    assert text == (f'{{"quant_type": "nf4", "blocksize": 64, "dtype": "{said}", "shape": [64, 64], '
                    f'"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": {offset!r}}}')
    stored = read_dtypes(tmp_path / "model.safetensors")
    assert stored["shared.weight"] == (dtype or "float32")
    assert {stored[f"{HF}{leaf}"] for leaf in (".quant_map", ".nested_absmax", ".nested_quant_map")} == {"float32"}
    assert tensors[HF].shape == (2048, 1) and stored[HF] == stored[f"{HF}.absmax"] == "uint8"
    assert T5.from_pretrained(tmp_path).slots[Q].base.source == said


def test_a_dtype_that_was_read_is_remembered_and_an_argument_replaces_it(tmp_path):
    model = T5.from_pretrained(FIXTURES / "fp4")
    for dtype, said in ((None, "bfloat16"), ("float16", "float16")):
        model.save_pretrained(tmp_path, dtype)
        text = raw(tmp_path)[STATE.replace("nf4", "fp4")].tobytes()
        assert json.loads(text)["dtype"] == said


WAYS: dict[str, dict[str, Any]] = {kind: {} for kind in SCHEMES} | {
    "nf4": {"blocksize": 128, "double": True}, "int4": {"group": 16}}


@pytest.mark.parametrize("kind", sorted(SCHEMES))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_kind_keeps_its_codes_its_scales_and_its_outputs(kind, dtype, tmp_path):
    model = t5(dtype)
    minipeft.quantize(model, kind, r"(attn|cross|ff)\.\w+\.weight", **WAYS[kind])
    model.save_pretrained(tmp_path)
    again = T5.from_pretrained(tmp_path, dtype)
    assert same_model(model, again) and again.slots[Q].base.scheme == model.slots[Q].base.scheme
    again.save_pretrained(tmp_path / "b")
    assert equal(raw(tmp_path / "b"), raw(tmp_path))
    other = T5.from_pretrained(tmp_path, "float64" if dtype == "float32" else "float32")
    other.save_pretrained(tmp_path / "c", dtype)
    quantized = [key for key in raw(tmp_path) if key.startswith(HF)]
    assert equal(*({key: raw(tmp_path / where)[key] for key in quantized} for where in ("", "c")))


@pytest.mark.parametrize("make", [t5, lambda: Transformer(TransformerConfig(11, 64, 2, 64, 1, 1), RNG(0))])
def test_one_model_may_have_weights_of_many_kinds_and_of_none(make, tmp_path):
    model = make()
    for kind, where in (("nf4", r"^encoder.*\.q\."), ("fp4", r"^encoder.*\.k\."), ("int3", r"^encoder.*\.v\."),
                        ("q4_1", r"^decoder.*\.q\."), ("int8", r"^embedding")):
        minipeft.quantize(model, kind, where)
    model.save_pretrained(tmp_path)
    assert same_model(model, type(model).from_pretrained(tmp_path))
    said = config(tmp_path)["quantization_config"]
    assert said["quant_method"] == "minipeft" and len(said["weights"]) == 1 + 2 + 1
    assert not any("nf4" in json.dumps(v) for v in said["weights"].values()), "these describe themselves"


@pytest.mark.parametrize("where, skipped", [
    (r"(attn|cross)\.\w\.weight|wi_\d", None),
    (r"encoder.*attn\.\w\.weight", "listed"), (r"head|(attn|cross)\.\w\.weight|wi_\d", "head"), ("embedding", "ours")])
def test_the_configuration_tells_transformers_which_modules_are_not_quantized(where, skipped, tmp_path):
    model = t5()
    minipeft.quantize(model, "nf4", where)
    model.save_pretrained(tmp_path)
    said = config(tmp_path)["quantization_config"]
    if skipped == "ours":
        assert said == {"quant_method": "minipeft", "weights": {}}, "transformers has no embedding in 4 bits"
        return
    plain = {model.to_hf_name(n).removesuffix(".weight") for n, slot in model.slots.items()
             if slot.kind == "linear" and not isinstance(slot.base, QuantizedWeight)}
    assert said["quant_method"] == "bitsandbytes"
    assert said["llm_int8_skip_modules"] == (None if skipped is None else sorted(plain))
    assert ("lm_head" in plain) == (skipped != "head")


# ---- attachments and the original

def adapted(kind: str, method: Any) -> tuple[T5, Any]:
    model = t5()
    minipeft.quantize(model, kind)
    attachment = attach(model, method, RNG(1), "a")
    moved(attachment, RNG(2))
    return model, attachment


@pytest.mark.parametrize("merge", [True, False])
def test_qalora_is_saved_as_codes_whether_it_is_merged_before_or_by_saving(merge, tmp_path):
    model, attachment = adapted("int4", minipeft.QALoRA(2, group=32, where=r"encoder.*\.q\."))
    codes, out = model.slots[Q].base.arrays["codes"].data.copy(), model(IDS, IDS).data
    if merge:
        attachment.merge()
    report = model.save_pretrained(tmp_path, merged=True)
    again = T5.from_pretrained(tmp_path)
    assert numpy.array_equal(again.slots[Q].base.arrays["codes"].data, codes)
    assert not numpy.array_equal(again.slots[Q].base.arrays["offset"].data, model.slots[Q].base.arrays["offset"].data)
    assert close(again(IDS, IDS).data, out, CLOSE)
    assert report.dtypes[Q] == str(again.slots[Q].base.scheme) and 0 < report.worst < 1e-4
    assert isinstance(again.slots[K].base, QuantizedWeight), "nothing is plugged there"


def test_a_change_is_merged_into_numbers_unless_it_was_requantized(tmp_path):
    model, attachment = adapted("nf4", LoRA(2, 8, where=r"encoder.*\.q\."))
    out = model(IDS, IDS).data
    model.save_pretrained(tmp_path / "numbers", merged=True)
    found = T5.from_pretrained(tmp_path / "numbers")
    assert not isinstance(found.slots[Q].base, QuantizedWeight) and isinstance(found.slots[K].base, QuantizedWeight)
    assert close(found(IDS, IDS).data, out, CLOSE)
    attachment.merge("requantized")
    report = model.save_pretrained(tmp_path / "codes", merged=True)
    found = T5.from_pretrained(tmp_path / "codes")
    assert equal({leaf: p.data for leaf, p in found.slots[Q].base.arrays.items()},
                 {leaf: p.data for leaf, p in model.slots[Q].fold().arrays.items()})
    assert report.dtypes == {Q: "nf4, blocks of 64"} and report.errors[Q] > 1e-2
    model.save_pretrained(tmp_path / "base", merged=False)
    assert equal(T5.from_pretrained(tmp_path / "base").state(), model.state())


def test_the_origin_of_a_base_is_saved_and_read_unless_the_base_is_another_one_in_the_file(tmp_path):
    model, _ = adapted("nf4", LoRA(2, 8, where=r"encoder.*\.q\."))
    origin = Origin("f" * 64, "26 matrices in nf4")
    has_origin(model, origin)
    for options, kept in (({"merged": False}, True), ({"merged": True}, False),
                          ({"merged": False, "dtype": "bfloat16"}, False)):
        model.save_pretrained(tmp_path, **options)
        assert origin_of(T5.from_pretrained(tmp_path)) == (origin if kept else None)
    model.save_pretrained(tmp_path, merged=False)
    tensors, metadata = read_tensors(tmp_path / "model.safetensors")
    for text in ('{"base": "x"}', '{"base": "f", "quantization": 3}', "[]", metadata["origin"].replace("26", "27")):
        write_tensors(tmp_path / "model.safetensors", tensors, {**metadata, "origin": text})
        with pytest.raises(ValueError):
            T5.from_pretrained(tmp_path)


def test_an_adapter_is_not_looked_for_in_a_quantized_model(tmp_path):
    with pytest.raises(ValueError, match=r"a whole model.*T5.from_pretrained\(folder\)"):
        minipeft.load(t5(), FIXTURES / "fp4")


# ---- damage

NESTED = (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map")
REFUSED: dict[str, tuple[Callable[[dict], Any], str]] = {
    **{f"no {leaf}": (lambda t, leaf=leaf: t.pop(HF + leaf), rf"{HF}{leaf} is missing") for leaf in NESTED},
    "no codes": (lambda t: t.pop(HF), f"{HF} is missing"),
    "no state": (lambda t: t.pop(STATE), "no quant_state"),
    "two states": (lambda t: t.update({STATE.replace("nf4", "fp4"): t[STATE]}), "expected one"),
    "another state": (lambda t: t.update({STATE.replace("nf4", "int8"): t.pop(STATE)}), "bitsandbytes__int8"),
    "a state of fp4": (lambda t: t.update({STATE.replace("nf4", "fp4"): t.pop(STATE)}), "quant_type is 'nf4'; .*'fp4'"),
    "a companion of nothing": (lambda t: t.update({"lm_head.weight.absmax": t[f"{HF}.absmax"]}), "no quant_state"),
    "a companion of another name": (lambda t: t.update({"x.weight.absmax": t[f"{HF}.absmax"]}), "x.weight"),
    "an extra leaf": (lambda t: t.update({f"{HF}.more": t[f"{HF}.absmax"]}), "not a key of a T5"),
    "a state that is no JSON": (put(STATE.removeprefix(HF), first(0)), "is not valid JSON"),
    "a state that is too long": (put(STATE.removeprefix(HF), lambda a: numpy.resize(a, 5000)), r"1 to 4096"),
    "a state of floats": (put(STATE.removeprefix(HF), lambda a: a.astype("float32")), "expected uint8"),
    "a field less": (state(blocksize=None), "lacks blocksize"),
    "a field more": (state(more=1), "has a field 'more'"),
    "quant_type": (state(quant_type="int4"), "quant_type is 'int4'"),
    "blocksize 0": (state(blocksize=0), "blocksize is 0; expected"),
    "blocksize true": (state(blocksize=True), "blocksize is True"),
    "blocksize 32": (state(blocksize=32), r"absmax has 64 numbers; expected 128 for \[64, 64\] in blocks of 32"),
    "a huge blocksize": (state(blocksize=10 ** 30), "blocksize is 1000000000000000000000000000000; expected"),
    "a block for everything": (state(blocksize=2 ** 30), "expected 1 for"),
    "dtype": (state(dtype="int8"), "dtype is 'int8'; expected one of float32"),
    "dtype, a list": (state(dtype=[]), r"dtype is \[\]"),
    "shape": (state(shape=[32, 128]), r"shape is \[32, 128\]; expected \[64, 64\]"),
    "shape of floats": (state(shape=[64.0, 64.0]), r"shape is \[64.0, 64.0\]"),
    "nested_blocksize": (state(nested_blocksize=128), "nested_blocksize is 128; expected 256"),
    "nested_dtype": (state(nested_dtype="float16"), "nested_dtype is 'float16'"),
    "nested_offset, words": (state(nested_offset="1"), "nested_offset is '1'"),
    "nested_offset, huge": (state(nested_offset=1e39), r"nested_offset is 1e\+39"),
    "nested_offset, NaN": (state(nested_offset=float("nan")), "NaN is not a finite number"),
    "codes that are too few": (put("", lambda a: a[:-1]), r"uint8 \[2047, 1\]; expected the 2048 bytes"),
    "codes of another shape": (put("", lambda a: a.reshape(32, 64)), r"uint8 \[32, 64\]"),
    "absmax that are too few": (put(".absmax", lambda a: a[:-1]), "absmax has 63 numbers; expected 64"),
    "absmax of floats": (put(".absmax", lambda a: a.astype("float32")), "absmax is float32"),
    "nested absmax that are too many": (put(".nested_absmax", lambda a: numpy.ones(2, "float32")),
                                        "nested_absmax has 2 numbers; expected 1"),
    "nested absmax below 0": (put(".nested_absmax", first(-1)), "negative or not finite"),
    "nested absmax NaN": (put(".nested_absmax", first(numpy.nan)), "negative or not finite"),
    "absmax that overflow": (lambda t: (put(".nested_absmax", first(3e38))(t), state(nested_offset=3e38)(t)),
                             "not finite in float32"),
    "a map that does not rise": (put(".quant_map", lambda a: a[::-1].copy()), "quant_map begins .* larger than"),
    "a map with NaN": (put(".quant_map", first(numpy.nan)), "quant_map begins .*16 finite"),
    "a short map": (put(".quant_map", lambda a: a[:15]), r"quant_map is float32 \[15\]; expected float32 \[16\]"),
    "a nested map that does not rise": (put(".nested_quant_map", first(2)), "nested_quant_map begins"),
    "a nested map of doubles": (put(".nested_quant_map", lambda a: a.astype("float64")), "nested_quant_map is float64"),
    "8 bits": (lambda t: t.update({HF.replace("weight", "SCB"): numpy.ones(64, "float32")}), "SCB"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_folder_that_contradicts_itself_is_refused_by_the_name_of_the_tensor(what, tmp_path):
    edit, message = REFUSED[what]
    with pytest.raises(ValueError, match=message) as caught:
        T5.from_pretrained(edited(tmp_path, edit))
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("said, message", [
    ({"quant_method": "gptq"}, "quant_method 'gptq', which is not read"), ({"quant_method": ["awq"]}, "is not read"),
    ({"load_in_4bit": False, "load_in_8bit": True}, "load_in_8bit"), ({"load_in_4bit": 1}, "load_in_4bit = 1"),
    ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type = 'int4'"), ({"quant_method": "minipeft"}, "and weights")])
def test_another_quantization_than_four_bits_of_bitsandbytes_is_refused(said, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        T5.from_pretrained(edited(tmp_path, nothing, **said))


def test_keys_of_gptq_without_a_configuration_and_a_configuration_without_keys_are_refused(tmp_path):
    t5().save_pretrained(tmp_path)
    values = config(tmp_path)
    for said, message in (("x", "quant_method None"), ({"load_in_4bit": True}, "no tensor is called ...absmax")):
        (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": said}))
        with pytest.raises(ValueError, match=message):
            T5.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    tensors = raw(tmp_path)
    tensors[HF.replace("weight", "qweight")] = tensors.pop(HF)
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"qweight.*LLM.int8, GPTQ or AWQ, which are not read"):
        T5.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    folder, model = tmp_path_factory.mktemp("ours"), t5()
    minipeft.quantize(model, "int4", r"encoder.*\.q\.")
    minipeft.quantize(model, "q4_1", r"encoder.*\.k\.")
    model.save_pretrained(folder)
    return folder


OWN: dict[str, tuple[dict[str, Any] | None, Callable[[dict], Any], str]] = {
    "a kind": ({"kind": "int5"}, nothing, "kind is 'int5'"),
    "no kind": ({"kind": ["int4"]}, nothing, "kind is"),
    "another kind": ({"kind": "int8"}, nothing, r"codes is uint8 \[64, 32\]; expected uint8 \[64, 64\]"),
    "an option": ({"options": {"groups": 32}}, nothing, "no such options: groups"),
    "a value": ({"options": {"group": -1}}, nothing, "group is -1"),
    "another value": ({"options": {"group": 16}}, nothing, r"is float32 \[64, 2\]; expected float32 \[64, 4\]"),
    "a group that does not divide": ({"options": {"group": 48}}, nothing, "48"),
    "options that are none": ({"options": [32]}, nothing, "expected kind, options, shape"),
    "a shape": ({"shape": [32, 128]}, nothing, r"shape \[32, 128\]; expected \[64, 64\]"),
    "a field more": ({"more": 1}, nothing, "expected kind, options, shape"),
    "no description": (None, nothing, "unexpected|missing|not a key"),
    "no codes": ({}, lambda t: t.pop(f"{HF}.codes"), "codes is missing"),
    "a leaf more": ({}, lambda t: t.update({f"{HF}.more": numpy.ones(3, "uint8")}), "more is not expected"),
    "the weight itself": ({}, lambda t: t.update({HF: numpy.ones((64, 64), "float32")}), "<leaf> alone"),
    "NaN": ({}, lambda t: t[f"{HF}.scale"].__setitem__((0, 0), numpy.nan), "holds NaN or infinity"),
    "numbers that overflow": ({}, lambda t: t[f"{HF}.scale"].__setitem__((0, 0), 3e38), "not finite in float32"),
    "another dtype": ({}, put(".scale", lambda a: a.astype("float64")), r"float64 \[64, 2\]; expected float32"),
}


@pytest.mark.parametrize("what", OWN)
def test_a_description_that_does_not_fit_is_refused_by_the_key_of_the_weight(what, ours, tmp_path):
    change, edit, message = OWN[what]
    folder = tmp_path / "edited"
    shutil.copytree(ours, folder)
    values, tensors = config(folder), safetensors.numpy.load_file(folder / "model.safetensors")
    weights = values["quantization_config"]["weights"]
    weights[HF].update(change or {})
    if change is None:
        del weights[HF]
    edit(tensors)
    write_tensors(folder / "model.safetensors", tensors)  # without a digest: who forges the one forges the other
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        T5.from_pretrained(folder)


def test_another_kind_in_the_configuration_is_noticed_by_the_digest(ours, tmp_path):
    shutil.copytree(ours, tmp_path / "a")
    text = (tmp_path / "a" / "config.json").read_text()
    (tmp_path / "a" / "config.json").write_text(text.replace('"q4_1"', '"q5_1"'))
    assert '"q4_1"' in text
    with pytest.raises(ValueError):
        T5.from_pretrained(tmp_path / "a")
    minipeft.quantize(model := t5(), "nf4")
    model.save_pretrained(tmp_path / "b")
    text = (tmp_path / "b" / "config.json").read_text()
    (tmp_path / "b" / "config.json").write_text(text.replace('"nf4"', '"fp4"'))
    with pytest.raises(ValueError, match="is not the configuration that"):
        T5.from_pretrained(tmp_path / "b")


def test_any_flipped_bytes_give_a_model_with_finite_weights_or_a_value_error_that_names_the_folder(tmp_path):
    rng, ends = RNG(0), {"read": 0, "refused": 0}
    valid = raw(FIXTURES / "nf4_double")
    for _ in range(60):
        tensors = dict(valid)
        key = (HF, STATE, STATE, *(HF + leaf for leaf in NESTED))[rng.integers(7)]
        data = bytearray(tensors[key].tobytes())
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        tensors[key] = numpy.frombuffer(bytes(data), tensors[key].dtype).reshape(tensors[key].shape)
        folder = edited(tmp_path, lambda t: t.update(tensors))
        try:
            model = T5.from_pretrained(folder)
        except ValueError as error:
            assert str(folder) in str(error) and len(str(error)) < 1000
            ends["refused"] += 1
        else:
            assert all(numpy.isfinite(slot.base.dense().data).all() for slot in model.slots.values())
            ends["read"] += 1
    assert min(ends.values()) > 10
