"""Loading an adapter: what fits is loaded, everything else is refused and leaves the model as it was."""
import json
import shutil
import warnings

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.files import read_tensors
from tests.adapters import write_signed
from tests.models_under_test import Case, bits, logits

CASE = Case(("t5 v1.0", "q and v"), 2, 3, "float32", 0)
FIRST = "encoder.0.attn.q.weight.A"  # its shape is [2, 12]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter's file, its (tensors, metadata), and the output with it."""
    path, model = tmp_path_factory.mktemp("adapter") / "mine.safetensors", CASE.model()
    CASE.attach(model, "mine").save(path)
    return path, *read_tensors(path), logits(model, CASE.batch())


def refused(path, message, model=None, error=ValueError, **options):
    """Loading raises, with the message, and the model has every bit and no attachment that it had not."""
    model = CASE.model() if model is None else model
    before, names, output = bits(minipeft.select(model, ".")), list(model.attachments), logits(model, CASE.batch())
    with pytest.raises(error, match=message):
        minipeft.load(model, path, **options)
    assert list(model.attachments) == names and bits(minipeft.select(model, ".")) == before
    assert {n for _, place in model.named_places() for n in place.attached} == set(names)
    assert logits(model, CASE.batch()).tobytes() == output.tobytes()


# ---- what fits


def test_what_was_saved_comes_back_plugged_under_its_name(saved):
    path, tensors, _, output = saved
    model = CASE.model()
    attachment = minipeft.load(model, path)
    assert (attachment.name, attachment.state) == ("mine", "plugged")
    assert (attachment.method.rank, attachment.method.alpha) == (2, 3)
    assert bits({n.replace("@mine", ""): p for n, p in attachment.parameters.items()}) == bits(tensors)
    assert logits(model, CASE.batch()).tobytes() == output.tobytes()


def test_the_file_holds_its_own_tensors_and_resolved_names_and_nothing_of_the_base(saved):
    _, tensors, metadata, _ = saved
    places = json.loads(metadata["places"])
    assert set(tensors) == {f"{place}.{leaf}" for place in places for leaf in "AB"} and len(places) == 10
    assert json.loads(metadata["method"]) == {"kind": "LoRA", "rank": 2, "alpha": 3, "dropout": 0.0,
                                              "init": "gaussian"}
    assert metadata["name"] == "mine" and len(metadata["base"]) == 64


def test_a_callable_pattern_is_saved_as_the_names_that_it_chose(tmp_path):
    model = CASE.model()
    CASE.attach(model, where=lambda name: name.endswith("1.ff.wi.weight")).save(tmp_path / "a")
    other = CASE.model()
    assert list(minipeft.load(other, tmp_path / "a").places) == ["decoder.1.ff.wi.weight"]


def test_another_name_can_be_given_and_a_taken_one_is_refused(saved):
    model = CASE.model()
    minipeft.load(model, saved[0])
    assert minipeft.load(model, saved[0], name="again").name == "again"
    refused(saved[0], "'mine' is already on this model", model)
    refused(saved[0], "'again' is already on this model", model, name="again")
    refused(saved[0], "expected letters", model, name="a.b")


def test_a_float32_adapter_fits_the_same_base_computed_in_float64_and_back(saved, tmp_path):
    """The fingerprint is of values widened to float64, so both are the same base."""
    narrow = CASE.model()
    wide = minipeft.T5(narrow.config, None, "float64")
    wide.load_state(narrow.state())
    loaded = minipeft.load(wide, saved[0])
    assert {p.dtype for p in loaded.parameters.values()} == {numpy.dtype("float64")}
    loaded.save(tmp_path / "wide")
    back = minipeft.load(narrow, tmp_path / "wide")
    assert {n.replace("@mine", ""): b for n, b in bits(back.parameters).items()} == bits(saved[1])


def test_alpha_survives_as_the_number_it_was(tmp_path):
    for alpha in (0.1, -3, 1 / 3, 7, 1e-300):
        model = CASE.model()
        minipeft.attach(model, minipeft.LoRA(1, alpha), numpy.random.default_rng(0)).save(tmp_path / "a")
        method = minipeft.load(CASE.model(), tmp_path / "a").method
        assert method.alpha == alpha and type(method.alpha) is type(alpha)


# ---- another base


def another_base():
    model = CASE.model()
    model.slots["decoder.1.ff_norm.weight"].base.data[3] *= numpy.float32(1 + 2 ** -20)
    return model


def test_an_adapter_for_another_base_is_refused_unless_forced(saved):
    refused(saved[0], "made for another base model, .*or pass force=True", another_base())
    assert minipeft.load(another_base(), saved[0], force=True).state == "plugged"


def test_force_skips_no_other_check(saved, tmp_path):
    path, tensors, metadata, _ = saved
    write_signed(tmp_path / "a", {**tensors, FIRST: tensors[FIRST] * numpy.nan}, metadata)
    refused(tmp_path / "a", "not finite", another_base(), force=True)


def test_a_model_with_other_places_is_refused(saved):
    other = Case(("pre-LN", "q and v"), 1, 1, "float32", 0)
    model = other.model()  # one encoder block fewer, d_out 12: the shapes do not fit
    with pytest.raises(ValueError, match="has shape"):
        minipeft.load(model, saved[0], force=True)
    model = minipeft.T5(minipeft.T5Config(13, 12, 5, 3, 17, 1, 1, 8, 20), numpy.random.default_rng(0))
    with pytest.raises(ValueError, match=r"does not fit this model: it has no place 'decoder.1.attn.q.weight' \(4 of "
                                         r"10 are missing\)$"):
        minipeft.load(model, saved[0], force=True)
    assert not model.attachments


# ---- damaged files


@given(st.data())
def test_a_truncated_file_is_refused_at_any_length(saved, tmp_path_factory, data):
    whole = saved[0].read_bytes()
    length = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path_factory.getbasetemp() / "truncated"
    path.write_bytes(whole[:length])
    model = CASE.model()
    with pytest.raises(ValueError, match="truncated"):
        minipeft.load(model, path)
    assert not model.attachments and not any(place.attached for _, place in model.named_places())


def test_a_file_with_bytes_after_its_end_is_refused(saved, tmp_path):
    (tmp_path / "a").write_bytes(saved[0].read_bytes() + b"\0")
    refused(tmp_path / "a", "the tensors end at byte")


@given(st.integers(0, 10 ** 6), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_is_another_number_in_a_tensor(saved, tmp_path_factory, at, flip):
    """Whatever a byte is changed to: a ValueError and an untouched model, or a well-formed adapter."""
    raw = bytearray(saved[0].read_bytes())
    raw[at % len(raw)] ^= flip
    path, model = tmp_path_factory.getbasetemp() / "flipped", CASE.model()
    path.write_bytes(raw)
    before = bits(model.state())
    try:
        attachment = minipeft.load(model, path)
    except ValueError:
        assert not model.attachments and not any(place.attached for _, place in model.named_places())
    else:
        assert all(numpy.isfinite(p.data).all() for p in attachment.parameters.values())
    assert bits(model.state()) == before


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(FIRST), rf"'{FIRST}' is missing \(1 tensors do not match\)"),
    (lambda t: t.update(extra=numpy.zeros(3, "float32")), r"'extra' is not expected \(1 tensors do not match\)"),
    (lambda t: t.update({FIRST.replace(".A", ".C"): t.pop(FIRST)}), r"is missing \(2 tensors do not match\)"),
    (lambda t: t.update({FIRST: t[FIRST].T}), rf"{FIRST} has shape \[12, 2\]; expected \[2, 12\]"),
    (lambda t: t.update({FIRST: t[FIRST][:1]}), rf"{FIRST} has shape \[1, 12\]; expected \[2, 12\]"),
    (lambda t: t.update({FIRST: t[FIRST][0]}), rf"{FIRST} has shape \[12\]; expected \[2, 12\]"),
    (lambda t: t.update({FIRST: t[FIRST].astype("int32")}), rf"{FIRST} has dtype int32; expected floating point"),
    (lambda t: t.update({FIRST: t[FIRST].astype(bool)}), rf"{FIRST} has dtype bool; expected floating point"),
    (lambda t: t[FIRST].__setitem__((1, 5), numpy.nan), rf"{FIRST} holds numbers that are not finite in float32"),
    (lambda t: t[FIRST].__setitem__((0, 0), -numpy.inf), rf"{FIRST} holds numbers that are not finite in float32"),
    (lambda t: t.update({FIRST: numpy.full((2, 12), 1e300)}), rf"{FIRST} holds numbers .* not finite in float32")])
def test_tensors_that_do_not_fit_are_refused_by_name(saved, tmp_path, change, message):
    tensors = {name: array.copy() for name, array in saved[1].items()}
    change(tensors)
    write_signed(tmp_path / "a", tensors, saved[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(tmp_path / "a", message)


def method(**changes):
    """Changes to the JSON of the method; None drops a field."""
    def change(metadata):
        fields = {**json.loads(metadata["method"]), **changes}
        metadata["method"] = json.dumps({k: v for k, v in fields.items() if v is not None})
    return change


@pytest.mark.parametrize("change, message", [
    (lambda m: m.clear(), "not an adapter file of minipeft"),
    (lambda m: m.update(format="pt"), "not an adapter file of minipeft, version 1 or 2 .*format 'pt'"),
    (lambda m: m.update(version="3"), "not an adapter file of minipeft, version 1 or 2 .*version '3'"),
    *((lambda m, k=key: m.pop(k), f"incomplete or malformed .{key} is missing")
      for key in ("name", "method", "places", "base", "below", "together")),
    *((method(**{field: None}), f"LoRA: the field '{field}' is missing")
      for field in ("rank", "alpha", "dropout", "init")),
    *((lambda m, k=key, t=text: m.update({k: t}), f"{key} is not a list of names and fingerprints")
      for key in ("below", "together")
      for text in ("{}", "[1]", '[{"name": "a"}]', '[{"name": "a", "content": 1}]', "null", '"a"')),
    (lambda m: m.update(method="{"), "incomplete or malformed"), (lambda m: m.update(method="[]"), "or malformed"),
    (lambda m: m.update(method='"LoRA"'), "or malformed"), (lambda m: m.update(method="null"), "or malformed"),
    (lambda m: m.update(method="[" * 10 ** 5), "or malformed"),
    (method(kind=None), "or malformed"), (method(kind="DoRB"), "method 'DoRB' is not known; known are "),
    (method(kind=[]), r"method \[\] is not known"), (method(kind={"a": 1}), "is not known"),
    (method(rank=0), "rank is 0"), (method(rank=2.0), r"rank is 2\.0"), (method(rank="2"), "rank is '2'"),
    (method(rank=True), "rank is True"), (method(rank=99), "rank 99 exceeds 12"), (method(rank=3), "has shape"),
    (method(alpha=float("nan")), "alpha is nan"), (method(alpha=float("inf")), "alpha is inf"),
    (method(alpha=0), "alpha is 0"), (method(alpha=10 ** 400), "alpha is 1000"), (method(alpha="3"), "alpha is '3'"),
    (method(dropout=1), "dropout is 1"), (method(init="zeros"), "init is 'zeros'"), (method(init=[]), "init is .."),
    (method(lora_alpha=16),
     "the field 'lora_alpha' is unknown; expected alpha, alpha_pattern, any_rank, dropout"),
    (method(where="."), "where"),
    *((lambda m, p=places: m.update(places=p), "places is not a list of distinct names$")
      for places in ("{}", "[]", "[1]", '"encoder"', "null", '["a", "a"]', '["a", ["a"]]')),
    (lambda m: m.update(places='["nonesuch"]'), r"it has no place 'nonesuch' \(1 of 1 are missing\)$"),
    (lambda m: m.update(places=json.dumps(json.loads(m["places"]) + ["nonesuch"])), r"'nonesuch' \(1 of 11 are mis"),
    (lambda m: m.update(places='["encoder.0.attn.x.bias"]'), "it has no place 'encoder.0.attn.x.bias'"),
    (lambda m: m.update(places='["encoder.0.ff_norm.weight"]'), r"where=.* matches none of the \d+ matrix names"),
    (lambda m: m.update(places='["encoder.0.attn.q.weight"]'), "is not expected"),
    (lambda m: m.update(places=json.dumps(json.loads(m["places"]) + ["embedding.weight"])), "is missing"),
    (lambda m: m.update(name="a b"), "/a: name is 'a b'; expected letters"),
    (lambda m: m.update(name=""), "expected letters"),
    (lambda m: m.update(base="0" * 64), "made for another base"), (lambda m: m.update(base=""), "another base")])
def test_tampered_metadata_is_refused(saved, tmp_path, change, message):
    metadata = dict(saved[2])
    change(metadata)
    write_signed(tmp_path / "a", saved[1], metadata)
    refused(tmp_path / "a", message)


# ---- other kinds of files


def test_a_models_file_a_checkpoint_and_no_file_are_refused(tmp_path):
    model = CASE.model()
    model.save_pretrained(tmp_path)
    refused(tmp_path / "model.safetensors", "not an adapter file of minipeft")
    params = CASE.attach(model).parameters
    minipeft.fit(model, params, minipeft.Batches([([1], [2])], 1), steps=1, checkpoint=tmp_path / "run", progress=False)
    refused(tmp_path / "run", "not an adapter file of minipeft.*'minipeft-checkpoint-2'")
    refused(tmp_path / "nowhere", "nowhere", error=FileNotFoundError)
    (tmp_path / "text").write_text("an adapter, honestly")
    refused(tmp_path / "text", "truncated, or not a safetensors file")


def test_an_adapter_is_refused_as_a_model_and_as_a_checkpoint(saved, tmp_path):
    model = CASE.model()
    model.save_pretrained(tmp_path)
    shutil.copy(saved[0], tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no input embedding"):
        minipeft.T5.from_pretrained(tmp_path)
    params = CASE.attach(model).parameters
    before = bits(params)
    with pytest.raises(ValueError, match="not a checkpoint of minipeft"):
        minipeft.fit(model, params, minipeft.Batches([([1], [2])], 1), steps=1, progress=False,
                     checkpoint=tmp_path / "model.safetensors")
    assert bits(params) == before


def test_saving_over_an_old_file_replaces_it_whole(saved, tmp_path):
    shutil.copy(saved[0], tmp_path / "a")
    model = CASE.model()
    attachment = CASE.attach(model, "other", 5, where="decoder")
    attachment.save(tmp_path / "a")
    assert set(read_tensors(tmp_path / "a")[0]) == {n.replace("@other", "") for n in attachment.parameters}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
