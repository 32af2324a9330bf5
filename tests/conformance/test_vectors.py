"""The published vectors: they are what the methods give, a stranger can use them, and no damaged file is believed."""
from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy
import pytest

from minipeft.conformance.fault import Fault
from minipeft.conformance.methods import all_methods
from minipeft.conformance.methods.lora_linear import METHOD
from minipeft.conformance.methods.lora_linear.equations import SCALINGS
from minipeft.conformance.plugin import Plugin
from minipeft.conformance.vectors import publish
from minipeft.conformance.vectors.generate import difference, generate, main
from minipeft.conformance.vectors.read import read
from minipeft.conformance.vectors.run import ABSENT, run
from minipeft.conformance.vectors.schema import _RULES, FOLDER, LATER, NAME, Mismatch, match, the_schema
from minipeft.files import read_tensors, write_tensors

PUBLISHED = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
ALL = ["float64", "float32", "bfloat16"]

# What somebody writes who has two files and no minipeft: json, numpy, safetensors, and the line in the header.
STRANGER = r"""
import json, sys, numpy, safetensors.numpy
folder, scale = sys.argv[1], sys.argv[2]
U = {"float64": 2.0 ** -53, "float32": 2.0 ** -24}
TINY = {"float64": 2.0 ** -1074, "float32": 2.0 ** -149}
def kappa(k, n, dtype):
    u = U[dtype]
    return numpy.expm1(k * numpy.log1p(u) + numpy.log1p(n * u / (1 - n * u))) + 2.0 ** -53
def lora(W, b, A, B, x, g, alpha, dtype):
    W, b, A, B, x, g = (v.astype(dtype) for v in (W, b, A, B, x, g))
    s = numpy.array(alpha / len(A) if scale == "right" else alpha, dtype)
    merged = W + s * (B @ A)
    return {"y": x @ W.T + b + s * ((x @ A.T) @ B.T), "dA": s * ((g @ B).T @ x), "dB": s * (g.T @ (x @ A.T)),
            "dx": g @ W + s * ((g @ B) @ A), "W_merged": merged, "y_merged": x @ merged.T + b}
document = json.load(open(folder + "/lora_linear.json"))
tensors = safetensors.numpy.load_file(folder + "/lora_linear.safetensors")
right = wrong = 0
for group in document["groups"]:
    if group["dtype"] in U and group["level"] in "BE" and group["conventions"] == {"scaling": "alpha/r"}:
        for test in group["tests"]:
            t = {name: tensors[f"{test['id']}/in/{name}"] for name in test["inputs"]}
            found = lora(**t, alpha=test["params"]["alpha"], dtype=group["dtype"])
            for name, o in test["outputs"].items():
                got, want = found[name].astype(numpy.float64), tensors[f"{test['id']}/out/{name}"]
                if group["level"] == "E":
                    ok = (got == want).all()
                else:
                    mag = tensors[f"{test['id']}/mag/{name}"]
                    bound = kappa(o["k"], o["n"], group["dtype"]) * mag + o["n"] * TINY[group["dtype"]]
                    ok = (abs(got - want) <= bound).all()
                right, wrong = right + ok, wrong + (not ok)
print(right, wrong, "minipeft" in sys.modules)
"""


def stranger(scale: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", STRANGER, str(FOLDER), scale], capture_output=True, text=True,
                          check=True, timeout=60).stdout.split()


def test_a_stranger_needs_two_files_and_one_line():
    right, wrong, met = stranger("right")
    assert (int(right), wrong, met) == (6 * (6 + 5) * 2, "0", "False")
    right, wrong, _ = stranger("alpha")
    assert int(wrong) > 0.7 * (int(right) + int(wrong))


def test_the_line_is_in_the_header():
    assert "|got - want| <= kappa(k, n, dtype) * mag + n * tiny" in " ".join(read("lora_linear").header)


def plugin(build, dtypes=ALL, **capabilities) -> Plugin:
    return Plugin(types.SimpleNamespace(capabilities=dict(dtypes=dtypes, **capabilities), lora_linear=build))


def wrongs(seen) -> list[str]:
    return [s.output for s in seen if isinstance(s.what, Fault) or not isinstance(s.what, str) and not s.what.holds]


def test_plain_and_minipeft_pass_and_a_planted_bug_does_not():
    from minipeft.conformance.methods.lora_linear import ours
    pack = [vector for vector in read("lora_linear") if vector.case.conventions == METHOD.default()]
    assert wrongs(run(METHOD, pack, plugin(METHOD.plain))) == []
    found = list(run(METHOD, pack, Plugin(ours)))
    assert wrongs(found) == []
    assert {s.what for s in found if isinstance(s.what, str)} == {"bfloat16 is not declared"}
    for mutant in METHOD.mutants:
        if any(mutant.id in vector.kills for vector in pack):
            killed = {vector.id for vector in pack if mutant.id in vector.kills}
            seen = list(run(METHOD, [v for v in pack if v.id in killed], plugin(mutant.build)))
            assert killed == {s.vector.id for s in seen if wrongs([s])}, mutant.id


def test_what_cannot_be_held_is_said():
    class Forward:
        def __init__(self, W, b, A, B, alpha, dtype):
            self.inner = METHOD.plain(W, b, A, B, alpha, dtype)
            self.forward = self.inner.forward

    seen = list(run(METHOD, read("lora_linear"), plugin(Forward, ["float32"])))
    reasons = [s.what for s in seen if isinstance(s.what, str) and s.vector.case.dtype == "float32"]
    others = {f"other conventions: scaling is 'alpha/r', not {scaling!r}" for scaling in SCALINGS[1:]}
    assert wrongs(seen) == [] and set(reasons) == {"not offered: vjp", "not offered: merge, weight",
                                                   "not offered: merge", *others}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_convention_has_vectors_and_they_are_for_it_and_for_who_cannot_be_told_apart(scaling):
    """The plain layer knows alpha / r alone: under another convention it fails everything that it computes."""
    declares = plugin(METHOD.plain, conventions={"lora_linear": {"scaling": scaling}})
    by = {other: [] for other in SCALINGS}
    for seen in run(METHOD, read("lora_linear"), declares):
        by[seen.vector.case.conventions["scaling"]].append(seen)
    mine = by.pop(scaling)
    assert {s.vector.case.dtype for s in mine} == {"float64", "float32", "bfloat16"}
    others = [s for seen in by.values() for s in seen]
    assert {s.what for s in others if isinstance(s.what, str)} == {
        f"other conventions: scaling is {scaling!r}, not {other!r}" for other in by}
    one = [s for s in others if not isinstance(s.what, str)]
    assert bool(one) == (scaling != SCALINGS[0]), "those for alpha / r have rank 1 among them"
    assert all(s.vector.case["A"].shape[0] == 1 for s in one)
    wrong = set(wrongs(mine))
    assert wrong == (set() if scaling == SCALINGS[0] else set(METHOD.outputs))


def test_a_gradient_that_must_not_exist_is_seen():
    class Zeros(METHOD.plain):
        def vjp(self, x, g):
            return {**super().vjp(x, g), "W": numpy.zeros(self.W.shape)}

    seen = wrongs(run(METHOD, read("lora_linear"), plugin(Zeros)))
    assert set(seen) == {ABSENT} and len(seen) == 33


def test_a_wider_arithmetic_has_another_bound():
    pack = [v for v in read("lora_linear") if v.case.dtype == "bfloat16" and v.level == "B"]
    low = plugin(METHOD.plain, arith={"bfloat16": {"accumulate": "bfloat16"}})
    rhos = [[s.what.rho for s in run(METHOD, pack, p) if s.output == "y"] for p in (plugin(METHOD.plain), low)]
    assert all(a > b for a, b in zip(*rhos))


def test_reading_and_running_need_neither_hypothesis_nor_mpmath():
    code = ("import sys, types\n"
            "from minipeft.conformance.methods.lora_linear import METHOD\n"
            "from minipeft.conformance.plugin import Plugin\n"
            "from minipeft.conformance.vectors.read import read\n"
            "from minipeft.conformance.vectors.run import run\n"
            "module = types.SimpleNamespace(capabilities={'dtypes': ['float64']}, lora_linear=METHOD.plain)\n"
            "print(len(list(run(METHOD, read('lora_linear'), Plugin(module)))) > 50,\n"
            "      [m for m in ('hypothesis', 'mpmath', 'jsonschema', 'torch') if m in sys.modules])")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout == "True []\n"


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_file_is_read_and_every_test_in_it_finds_a_bug(name):
    pack = read(name)
    assert pack.name == "2026.11.0" and len(pack) >= 20
    assert all(v.kills and v.flags for v in pack if v.result == "valid")
    assert {v.result for v in pack} == {"valid", "must_raise"}
    method = all_methods()[name]
    known = [*method.mutants, *(method.after.mutants if method.after else ())]
    assert {m for v in pack for m in v.kills} <= {m.id for m in known}


def test_the_package_data_stay_small():
    assert sum(path.stat().st_size for folder in (FOLDER, LATER) for path in folder.iterdir()) < 2_000_000


def test_what_came_later_is_in_v2_in_the_same_format_and_in_a_pack_of_its_own():
    jsonschema = pytest.importorskip("jsonschema")
    assert {path.stem for path in LATER.iterdir()} == {n for n, method in all_methods().items() if method.after}
    for path in LATER.glob("*.json"):
        jsonschema.validate(json.loads(path.read_text()), the_schema(), jsonschema.Draft7Validator)
        later, both = read(path.stem, LATER), read(path.stem)
        assert later.name == "2026.12.0" and not {v.id for v in later} & {v.id for v in read(path.stem, FOLDER)}
        assert [v.id for v in both] == [v.id for v in (*read(path.stem, FOLDER), *later)]


# -- the generator ---------------------------------------------------------------------------------------------------


def few(**changed) -> "publish.Method":
    """LoRA with a few of its vectors."""
    cases = [case for case in METHOD.vectors() if case["W"].size <= 20]
    chosen = [next(case for case in cases if case.exact == exact and case.dtype == dtype)
              for exact, dtype in ((False, "bfloat16"), (True, "float32"))]
    return dataclasses.replace(METHOD, **{"vectors": lambda: chosen, **changed})


def test_generated_again_it_is_the_same_and_a_difference_is_named(tmp_path, capsys):
    assert generate([few()], folder=tmp_path) == 0
    published = {vector.id: vector for vector in read("lora_linear")}
    for vector in read("lora_linear", tmp_path):
        twin = published[vector.id]
        assert (vector.kills, vector.flags, vector.result) == (twin.kills, twin.flags, twin.result)
        assert vector.outputs.keys() == twin.outputs.keys()
        assert all(numpy.array_equal(value.exact, twin.outputs[name].exact) and
                   numpy.array_equal(value.mag, twin.outputs[name].mag) for name, value in vector.outputs.items())
    assert generate([few()], check=True, folder=tmp_path) == 0
    path = tmp_path / "lora_linear.json"
    id = json.loads(path.read_text())["groups"][0]["tests"][0]["id"]
    path.write_text(path.read_text().replace('"lora.scale_alpha": ', '"lora.scale_alpha": 1', 1))
    assert generate([few()], check=True, folder=tmp_path) == 1
    assert f"lora_linear.json: test {id} differs" in capsys.readouterr().err
    path.unlink()
    assert difference(path, b"") == "lora_linear.json: is missing"


@pytest.mark.parametrize("more", [[], ["--check"]])
def test_without_mpmath_a_sentence_says_what_is_missing(capsys, monkeypatch, more):
    monkeypatch.setitem(sys.modules, "mpmath", None)
    assert main(["generate", *more]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "making vectors needs mpmath: pip install 'minipeft[conformance]'\n")


def failing(method, capsys) -> str:
    assert generate([method], check=True) == 1
    return capsys.readouterr().err


def test_nothing_is_published_on_which_the_witnesses_disagree(capsys, monkeypatch):
    wrong = {mutant.id: mutant.build for mutant in METHOD.mutants}
    assert "plain NumPy, bfloat16, does not agree on y: rho" in failing(few(plain=wrong["lora.scale_alpha"]), capsys)

    def exact(case):
        return METHOD.exact(case.but(params={"alpha": 2 * case.params["alpha"]}))

    assert "minipeft, float64, does not agree on y: rho" in failing(few(exact=exact), capsys)
    accepted = few(refusals=lambda dtype: [dataclasses.replace(METHOD.refusals(dtype)[0], case=few().vectors()[0])])
    assert "does not agree on must raise" in failing(accepted, capsys)


def test_a_test_that_finds_no_bug_is_not_published(capsys):
    blind = few().vectors()[0]
    blind = blind.but({"x": 0 * blind["x"], "g": 0 * blind["g"], "B": 0 * blind["B"]})
    harmless = [m for m in METHOD.mutants if m.id == "lora.scale_alpha"]
    words = failing(few(vectors=lambda: [blind], mutants=tuple(harmless)), capsys)
    assert "finds no planted bug by a margin of 2" in words and "lora_linear-" in words and blind.label in words


def test_the_same_test_twice_and_numbers_that_are_not_are_not_published(capsys):
    case = few().vectors()[0]
    assert "occurs twice" in failing(few(vectors=lambda: [case, case]), capsys)
    assert "has no label" in failing(few(vectors=lambda: [case.but(label="")]), capsys)


# -- the reader ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in (NAME, "lora_linear.json", "lora_linear.safetensors"):
        shutil.copy(FOLDER / name, tmp_path)
    return tmp_path


def put(document, where: str, value):
    *way, last = [int(part) if part.isdigit() else part for part in where.split("/")]
    for part in way:
        document = document[part]
    if value is ...:
        del document[last]
    else:
        document[last] = value


TEST = "groups/0/tests/0"
DAMAGE = [
    ("numberOfTests", 3, "numberOfTests"), ("numberOfTests", True, "numberOfTests"), ("more", 1, "more: is not known"),
    ("pack", ..., "pack: is missing"), ("schema", "v2", "schema"), ("spec_version", 2, "spec_version"),
    ("method", "lora_embedding", "method"), ("groups", [], "groups"), ("groups/0/level", "A", "level"),
    ("groups/0/dtype", "float128", "dtype"), ("groups/0/dtype", "float32", "in/W: "),
    ("groups/0/level", "E", "id: its inputs"),
    ("groups/0/level", "S", "result"), ("groups/0/conventions/scaling", "alpha", "id: its inputs"),
    ("groups/0/source/more", "", "source.more"), (f"{TEST}/more", 1, "more: is not known"),
    (f"{TEST}/id", "lora_linear-00000000", "in/W"),
    (f"{TEST}/id", 7, "id"), (f"{TEST}/id", "../x", "id"), (f"{TEST}/params/alpha", 6.0, "id: its inputs"),
    (f"{TEST}/params/alpha", [5.0], "params.alpha"), (f"{TEST}/params/alpha", float("nan"), "params.alpha"),
    (f"{TEST}/inputs", ["W"], "id: its inputs"), (f"{TEST}/inputs/0", "Z", "in/Z"),
    (f"{TEST}/outputs/y/k", -1, "outputs.y.k"),
    (f"{TEST}/outputs/y/n", 10 ** 9, "outputs.y.n"), (f"{TEST}/outputs/y/k", ..., "outputs.y.k"),
    (f"{TEST}/outputs/y/shape", [17, 7], "out/y"), (f"{TEST}/outputs/y", ..., "y: belongs to no test"),
    (f"{TEST}/outputs", {}, "outputs"),
    (f"{TEST}/result", "acceptable", "result"), (f"{TEST}/result", "must_raise", "result"),
    (f"{TEST}/kills/nobody.knows", 4, "kills"), (f"{TEST}/kills", {"x": 4}, "kills.x"),
    (f"{TEST}/flags", ["Odd"], "flags"),
    (f"{TEST}/flags", ["RsLora", "RsLora"], "flags"),
    (f"{TEST}/kills/lora.scale_alpha", 0.5, "kills"), (f"{TEST}/absent_grads", "W", "absent_grads")]


@pytest.mark.parametrize("where, value, field", DAMAGE, ids=lambda v: str(v)[:40])
def test_a_damaged_document_is_refused_with_file_test_and_field(folder, where, value, field):
    path = folder / "lora_linear.json"
    document = json.loads(path.read_text())
    put(document, where, value)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError) as error:
        read("lora_linear", folder)
    assert "lora_linear." in str(error.value) and field in str(error.value), str(error.value)
    if where.startswith(TEST) and where != f"{TEST}/id":
        assert document["groups"][0]["tests"][0]["id"] in str(error.value)


def change(folder: Path, change_one) -> None:
    tensors = read_tensors(folder / "lora_linear.safetensors")[0]
    id = read("lora_linear").vectors[0].id
    write_tensors(folder / "lora_linear.safetensors", change_one(tensors, id) or tensors)


def replaced(kind, f):
    return lambda tensors, id: tensors.update({f"{id}/{kind}": f(tensors[f"{id}/{kind}"])})


def with_one(value):
    def put_one(array):
        array = array.copy()
        array.flat[0] = value
        return array
    return put_one


@pytest.mark.parametrize("damage, words", [
    (lambda t, id: t.pop(f"{id}/in/W") is None, "in/W: is missing"),
    (lambda t, id: t.pop(f"{id}/mag/y") is None, "mag/y: is missing"),
    (lambda t, id: t.update(extra=numpy.zeros(2)), "extra: belongs to no test"),
    (replaced("in/W", lambda a: a.astype(numpy.float32)), "in/W: has dtype float32"),
    (replaced("out/y", lambda a: a.astype(numpy.int64)), "out/y: has dtype int64"),
    (replaced("out/y", lambda a: a.T.copy()), "out/y: has shape"),
    (replaced("in/W", lambda a: a[:, ::-1].copy()), "id: its inputs"),
    (replaced("in/W", with_one(numpy.nan)), "in/W: holds NaN"),
    (replaced("out/y", with_one(numpy.inf)), "out/y: holds NaN"),
    (replaced("mag/y", with_one(-1.0)), "mag/y: is negative")], ids=range(10))
def test_damaged_tensors_are_refused_with_file_test_and_name(folder, damage, words):
    change(folder, damage)
    with pytest.raises(ValueError, match="lora_linear.safetensors|lora_linear.json") as error:
        read("lora_linear", folder)
    assert words in str(error.value)


def test_numbers_that_the_dtype_does_not_have_are_refused(folder):
    vectors = read("lora_linear").vectors
    narrow = next(v for v in vectors if v.case.dtype == "bfloat16")
    exact = next(v for v in vectors if v.level == "E" and v.case.dtype == "bfloat16")
    original = read_tensors(folder / "lora_linear.safetensors")[0]
    for name in (f"{narrow.id}/in/x", f"{exact.id}/out/y"):
        write_tensors(folder / "lora_linear.safetensors", {**original, name: original[name] + 1 / 3})
        with pytest.raises(ValueError, match="holds a number that is not a bfloat16 number"):
            read("lora_linear", folder)


def test_a_field_that_stands_twice_is_refused_whichever_of_the_two_is_right(folder):
    path = folder / "lora_linear.json"
    text, n = path.read_text(), len(read("lora_linear"))
    for twice in (f'"numberOfTests": 1, "numberOfTests": {n}', f'"numberOfTests": {n}, "numberOfTests": 1'):
        path.write_text(text.replace(f'"numberOfTests": {n}', twice, 1))
        with pytest.raises(ValueError, match="lora_linear.json.*a name appears twice"):
            read("lora_linear", folder)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"[" * 100_000, b"\xff", b'{"a": ' + b"9" * 5000 + b"}"])
def test_what_is_no_document_is_refused(folder, data):
    (folder / "lora_linear.json").write_bytes(data)
    with pytest.raises(ValueError, match="lora_linear.json"):
        read("lora_linear", folder)


@pytest.mark.parametrize("where, value", [(f"{TEST}/inputs/0", "W\n"), ("pack", "2026.11.0\n")])
def test_a_pattern_ends_where_the_text_ends(folder, where, value):
    """As the draft has it (Python's $, and so the jsonschema package, allows one more newline)."""
    path = folder / "lora_linear.json"
    document = json.loads(path.read_text())
    put(document, where, value)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"\\n'; expected a match of"):
        read("lora_linear", folder)


def test_a_number_that_no_float64_holds_is_none(folder):
    path, vector = folder / "lora_linear.json", read("lora_linear").vectors[0]
    document = json.loads(path.read_text())
    for alpha in (10 ** 400, 1e400):
        put(document, f"{TEST}/params/alpha", alpha)
        path.write_text(json.dumps(document).replace("Infinity", "1e400"))
        with pytest.raises(ValueError, match=f"test {vector.id}: params.alpha: is (1000|inf).*; expected number"):
            read("lora_linear", folder)


@pytest.mark.parametrize("method", ["../lora_linear", "/lora_linear", "lora_linear/", "", "..", "lora\0linear"])
def test_no_other_folder_is_looked_into(folder, monkeypatch, method):
    (folder / "inner").mkdir()
    monkeypatch.setattr("minipeft.conformance.vectors.read.read_json", lambda path: pytest.fail(f"{path} was opened"))
    with pytest.raises(ValueError, match="cannot be the name of a method"):
        read(method, folder / "inner")


def test_an_id_that_is_withdrawn_is_refused(folder):
    path, id = folder / "lora_linear.json", read("lora_linear").vectors[-1].id
    document = json.loads(path.read_text())
    document["withdrawn"][id] = "it was wrong"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"test {id}: id: is used twice, or was withdrawn"):
        read("lora_linear", folder)


def test_many_entries_are_looked_through_once_each():
    rule = {"type": "array", "uniqueItems": True}
    many = [f"A{i}" for i in range(200_000)]  # pair by pair, this would take minutes
    match(many, rule, {})
    with pytest.raises(Mismatch, match="an entry twice"):
        match([*many, "A0"], rule, {})
    match([True, 1, "1", [1], {"a": 1}], rule, {})


def test_no_file_and_a_huge_file_are_refused(folder):
    with pytest.raises(ValueError, match="there is no such file"):
        read("nothing", folder)
    with open(folder / "lora_linear.json", "ab") as file:
        file.truncate(17 * 2 ** 20)
    with pytest.raises(ValueError, match="at most 16777216 are read"):
        read("lora_linear", folder)


# -- the schema ------------------------------------------------------------------------------------------------------


def nodes(value):
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(inner)


def test_the_schema_is_strict_and_every_keyword_in_it_is_known():
    schema = the_schema()
    plain = {"type", "$ref", "description", "$schema", "$id", "title", "definitions"}
    rules = [node for node in nodes(schema) if {"type", "$ref", "enum", "const", "anyOf"} & set(node)
             and not isinstance(node.get("type"), dict)]
    assert {key for rule in rules for key in rule} <= plain | set(_RULES)
    for rule in rules:
        if rule.get("type") == "object":
            assert "additionalProperties" in rule
            if "properties" in rule:
                assert rule["additionalProperties"] is False and rule["required"] == list(rule["properties"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_documents_match_by_the_judgement_of_jsonschema_too(name):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft7Validator.check_schema(the_schema())
    jsonschema.validate(json.loads((FOLDER / f"{name}.json").read_text()), the_schema(), jsonschema.Draft7Validator)


@pytest.mark.parametrize("where, value, _", DAMAGE, ids=lambda v: str(v)[:40])
def test_ours_and_jsonschema_agree_on_what_is_damaged(where, value, _):
    jsonschema = pytest.importorskip("jsonschema")
    document = json.loads((FOLDER / "lora_linear.json").read_text())
    put(document, where, value)
    try:
        match(document, schema := the_schema(), schema)
        ours = True
    except Mismatch:
        ours = False
    finite = value == value  # NaN is no JSON, and jsonschema does not look
    assert not finite or ours == jsonschema.Draft7Validator(the_schema()).is_valid(document)


# -- a library from elsewhere ----------------------------------------------------------------------------------------


def test_hugging_face_peft_and_torch_agree_with_the_vectors_of_lora():
    """No part of the rule of publication: the files must not depend on what is installed."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    for vector in read("lora_linear"):
        case = vector.case
        if vector.result == "must_raise" or case.conventions["scaling"] == "alpha":
            continue  # PEFT has no factor that is given directly
        dtype = getattr(torch, case.dtype)
        model = torch.nn.Sequential(torch.nn.Linear(case["W"].shape[1], case["W"].shape[0], dtype=dtype))
        config = peft.LoraConfig(r=len(case["A"]), lora_alpha=case.params["alpha"], target_modules=["0"],
                                 use_rslora=case.conventions["scaling"] == "alpha/sqrt(r)")
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        layer = model.base_model.model[0]
        given = {"W": layer.base_layer.weight, "b": layer.base_layer.bias, "A": layer.lora_A["default"].weight,
                 "B": layer.lora_B["default"].weight}
        for name, parameter in given.items():
            parameter.data = torch.tensor(case[name], dtype=dtype)
        x = torch.tensor(case["x"], dtype=dtype, requires_grad=True)
        y = layer(x)
        y.backward(torch.tensor(case["g"], dtype=dtype))
        found = {"y": y, "dA": given["A"].grad, "dB": given["B"].grad, "dx": x.grad}
        layer.merge()
        found |= {"W_merged": layer.base_layer.weight, "y_merged": layer(x)}
        for name, value in vector.outputs.items():
            got = found[name].detach().double().numpy()
            error = abs(got - value.exact)
            assert not error.any() if case.exact else (error <= case.tau(value)).all(), (vector.label, name)
