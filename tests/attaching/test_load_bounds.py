"""A file says how large an attachment is: what it claims is compared with what it holds before anything is made."""
import json
import time
import tracemalloc
from typing import Any

import numpy
import pytest

import minipeft
from minipeft.files import read_tensors
from tests.adapters import write_signed
from tests.methods_under_test import VARIANTS
from tests.models_under_test import Case, bits, logits

CASE, RNG = Case(("t5 v1.0", "q and v"), 2, 3, "float32", 0), numpy.random.default_rng
SMALL: dict[str, Any] = {
    "LoRA": CASE.method, "Bottleneck": minipeft.Bottleneck(size=2), "PromptTuning": minipeft.PromptTuning(3),
    "Selective": minipeft.Selective(rows=(5, 2))}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{method: (tensors, metadata)} of small files."""
    folder, found = tmp_path_factory.mktemp("small"), {}
    for kind, method in SMALL.items():
        minipeft.attach(CASE.model(), method, RNG(0), "mine").save(folder / kind)
        found[kind] = read_tensors(folder / kind)
    return found


def refused(path, message):
    """Loading raises ValueError, says so in a few lines, in two seconds, in memory of less than 5 MB and twenty times
    the file (its text, as JSON, as lists and sets of strings); the model is untouched. It is the message."""
    model = CASE.model()
    before, output = bits(model.state()), logits(model, CASE.batch())
    start = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as error:
            minipeft.load(model, path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 2 + path.stat().st_size / 1e6
    assert peak < 5e6 + 20 * path.stat().st_size
    assert not model.attachments and not any(p.attached or p.entries for _, p in model.named_places())
    assert bits(model.state()) == before and logits(model, CASE.batch()).tobytes() == output.tobytes()
    assert len(str(error.value)) < 1000 + len(str(path))
    return str(error.value)


def tampered(saved, tmp_path, kind, fields=None, **metadata):
    """The path of a small file whose method has other fields, or whose metadata are others."""
    tensors, old = saved[kind]
    method = json.dumps({**json.loads(old["method"]), **(fields or {})})
    write_signed(tmp_path / "a", tensors, {**old, "method": method, **metadata})
    return tmp_path / "a"


@pytest.mark.parametrize("kind, fields, message", [
    ("PromptTuning", {"length": 10 ** 9}, r"encoder.input.P has shape \[3, 12\]; expected \[1000000000, 12\]$"),
    ("PromptTuning", {"length": 10 ** 18}, r"has shape \[3, 12\]; expected \[1000000000000000000, 12\]$"),
    ("PromptTuning", {"length": 10 ** 9, "init": "random"}, r"has shape \[3, 12\]; expected \[1000000000, 12\]$"),
    ("PromptTuning", {"length": 10 ** 9, "init": "tokens", "tokens": [3]}, r"expected \[1000000000, 12\]$"),
    ("Bottleneck", {"size": 10 ** 9}, r"encoder.0.attn.out.D has shape \[2, 12\]; expected \[1000000000, 12\]$"),
    ("Bottleneck", {"size": 10 ** 30}, r"has shape \[2, 12\]; expected \[10{30}, 12\]$"),
    ("Bottleneck", {"size": None, "reduction": 1}, r"has shape \[2, 12\]; expected \[12, 12\]$"),
    ("LoRA", {"rank": 10 ** 9}, r"LoRA: rank 1000000000 exceeds 12, the largest that \S+ \[15, 12\] can have$"),
    ("LoRA", {"alpha": 1e300}, "LoRA: alpha is 1e[+]300; expected a finite alpha / r in float32$"),
    ("Bottleneck", {"scale": 1e300}, "Bottleneck: scale is 1e[+]300; expected a finite number in float32$"),
    ("Selective", {"rows": [2, 10 ** 9]}, r"rows holds 1000000000; embedding.weight \[13, 12\] has rows 0 to 12$"),
    ("Selective", {"rows": [10 ** 30, 2]}, r"rows holds 10{30}; embedding.weight \[13, 12\] has rows 0 to 12$"),
    ("Selective", {"rows": list(range(10 ** 5))}, "rows holds 99999; embedding.weight"),
    ("Selective", {"rows": None}, r"embedding.weight.d has shape \[2, 12\]; expected \[13, 12\]$"),
    ("Selective", {"rows": []}, r"rows is \(\); expected distinct ids, at least one$")])
def test_sizes_that_a_file_claims_and_does_not_hold_are_refused_before_they_are_made(
        saved, tmp_path, kind, fields, message):
    refused(tampered(saved, tmp_path, kind, fields), message)


@pytest.mark.parametrize("kind, field", [
    ("LoRA", "init"), ("PromptTuning", "init"), ("Bottleneck", "placement"), ("Bottleneck", "activation"),
    ("Bottleneck", "stacks"), ("Bottleneck", "input"), ("Selective", "component"), ("Selective", "type"),
    ("LoRA", "rank"), ("Selective", "layers")])
def test_three_million_letters_are_not_printed(saved, tmp_path, kind, field):
    path = tampered(saved, tmp_path, kind, {field: 3_000_000 * "x"})
    message = refused(path, rf"{field} is \(?'x{{198,199}}\.{{3}}; expected ")
    assert message.count("x") < 210


@pytest.mark.parametrize("metadata, message", [
    ({"name": 3_000_000 * "."}, "name is '[.]{202}; expected letters, digits, '_' and '-'$"),
    ({"places": json.dumps([3_000_000 * "x"])}, r"it has no place 'x{199}\.{3} \(1 of 1 are missing\)$"),
    ({"below": json.dumps([{"name": 3_000_000 * "x", "content": ""}])},
     r"was trained on top of attachment 'x{199}\.{3}, which is not plug"),
    ({"method": json.dumps({"kind": 3_000_000 * "x"})}, r"method 'x{199}\.{3} is not known; known are "),
    ({"format": 3_000_000 * "x"}, r"its metadata says format 'x{199}\.{3}, version '2'\)$")])
def test_nor_are_they_printed_from_the_metadata(saved, tmp_path, metadata, message):
    refused(tampered(saved, tmp_path, "LoRA", **metadata), message)


@pytest.mark.parametrize("kind, field", [("LoRA", "init"), ("LoRA", "rank"), ("PromptTuning", "tokens"),
                                         ("Bottleneck", "stacks"), ("Selective", "rows"), ("Selective", "component")])
@pytest.mark.parametrize("depth", [30, 300, 900, 3000, 10 ** 5])
def test_fields_that_are_nested_too_deep_are_refused_at_any_depth(saved, tmp_path, kind, field, depth):
    """By the reader of JSON, by the recursion through lists, or as no value of the field."""
    tensors, metadata = saved[kind]
    fields = json.loads(metadata["method"])
    fields.pop(field)
    method = json.dumps(fields)[:-1] + f', "{field}": {depth * "["}{depth * "]"}}}'
    write_signed(tmp_path / "a", tensors, {**metadata, "method": method})
    refused(tmp_path / "a", "does not fit this model: |the adapter's metadata is incomplete or malformed")


def test_a_hundred_thousand_places_are_refused_whether_they_are_repeated_unknown_or_both(saved, tmp_path):
    known = json.loads(saved["LoRA"][1]["places"])[0]
    for places, message in (
            (10 ** 5 * [known], "places is not a list of distinct names$"),
            ([known, known], "places is not a list of distinct names$"),
            ([known, *(f"p{i}" for i in range(10 ** 5))], r"it has no place 'p0' \(100000 of 100001 are missing\)$")):
        refused(tampered(saved, tmp_path, "LoRA", places=json.dumps(places)), message)


@pytest.mark.parametrize("key", ["below", "together"])
@pytest.mark.parametrize("layers", [{"lower": "x"}, [{"name": "lower"}], [{"name": "lower", "content": 1}], [[]],
                                    [None], [["lower", "x"]], [{"name": "a", "content": "b", "more": "c"}], "", None,
                                    3, True])
def test_what_it_was_trained_on_is_lists_of_names_and_fingerprints(saved, tmp_path, key, layers):
    path = tampered(saved, tmp_path, "LoRA", **{key: json.dumps(layers)})
    refused(path, f"{key} is not a list of names and fingerprints$")


# ---- shapes, and what a load does not do


@pytest.mark.parametrize("kind, variant", [(kind, variant) for kind, found in VARIANTS.items() for variant in found])
@pytest.mark.parametrize("family", ["t5 v1.1", "pre-LN"])
def test_the_shapes_that_a_method_says_are_those_that_it_makes(kind, variant, family):
    model = Case((family, "q and v"), 1, 1, "float32", 0).model()
    if (family, variant) == ("t5 v1.1", "biases"):
        model = Case(("post-LN", "q and v"), 1, 1, "float32", 0).model()  # a T5 has none
    method = VARIANTS[kind][variant](model, RNG(0))
    places = method.places(model)
    said = {declared.key(name, leaf): declared.shape for name, place in places.items()
            for leaf, declared in method.arrays(name, place, model).items()}
    attachment = minipeft.attach(model, method, RNG(0), "mine")
    assert {name: p.shape for name, p in attachment.tensors.items()} == said
    assert {declared.key(name, leaf): attachment.at[place].arrays[leaf].shape for name, place in places.items()
            for leaf, declared in method.arrays(name, place, model).items()} == said


@pytest.mark.parametrize("kind", SMALL)
def test_a_load_draws_no_random_number_and_asks_for_no_embedding(saved, tmp_path, monkeypatch, kind):
    """`attach` does both, for a prompt."""
    tensors, metadata = saved[kind]
    write_signed(tmp_path / "a", tensors, metadata)
    model = CASE.model()

    def no(*args, **kwargs):
        raise AssertionError("a load has no business here")

    monkeypatch.setattr(numpy.random, "default_rng", no)
    monkeypatch.setattr(numpy.random, "Generator", no)
    monkeypatch.setattr(model, "embed", no, raising=False)
    state = str(numpy.random.get_state())
    attachment = minipeft.load(model, tmp_path / "a")
    assert str(numpy.random.get_state()) == state
    assert bits(attachment.tensors) == bits(tensors)
