"""A failure is written as a case that can be run again, and as a script that runs without the kit."""
from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy
import pytest

from minipeft.conformance.again import again
from minipeft.conformance.case import Case
from minipeft.conformance.importing import found_in, imports, name_of
from minipeft.conformance.literals import Names, literal
from minipeft.conformance.look import fails, look
from minipeft.conformance.methods.lora_linear import METHOD
from minipeft.conformance.methods import all_methods
from minipeft.conformance.plugin import Plugin
from minipeft.conformance.outputs import property_named
from minipeft.conformance.replay import read, write
from minipeft.files import read_tensors, write_tensors

PLUGIN = """
capabilities = dict(name="mine", dtypes=["float64", "bfloat16"])


class Layer:
    def __init__(self, W, b, A, B, alpha):
        self.W, self.b, self.A, self.B, self.alpha = W.copy(), b, A, B, alpha

    def forward(self, x):
        return x @ self.W.T + self.b + self.alpha * (x @ self.A.T) @ self.B.T

    def weight(self):
        return self.W

    def merge(self):
        self.W += self.B @ self.A

    def unmerge(self):
        self.W -= 1.5 * self.B @ self.A

    def vjp(self, x, g):
        return {"A": g @ self.B, "B": None, "x": x}

    def save(self):
        raise RuntimeError("no disk")

    def load(self, blob):
        pass

    def step(self, x, g, lr):
        g *= lr


def lora_linear(W, b, A, B, alpha, dtype, *, dropout=0.0):
    return Layer(W, b, A, B, alpha)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The plug-in above, as a module of a folder of its own."""
    (tmp_path / "my_adapter.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield Plugin(importlib.import_module("my_adapter"))
    del sys.modules["my_adapter"]


def failure(plugin, law, dtype="float64", exact=True, n=2):
    case = METHOD.draw(numpy.random.default_rng(3), dtype, exact, {"N": n, "in": 3, "out": 2, "r": 2})
    case = plugin.settle(case, METHOD)
    seen, made = look(property_named(METHOD, law), case, plugin, plugin.make(METHOD))
    assert fails(seen)
    return case, seen, made


def written(plugin, folder, law, **fields):
    case, seen, made = failure(plugin, law, **fields)
    return case, seen, *write(folder, plugin, METHOD, law, case, seen, made)


def output(script, cwd):
    run = subprocess.run([sys.executable, str(script)], cwd=cwd, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": ""})
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().splitlines()


def test_the_script_shows_the_wrong_number_beside_the_right_one(mine, tmp_path):
    case, seen, _, script = written(mine, tmp_path / "out", "L1")
    text = script.read_text()
    assert "minipeft" not in text and len(text.splitlines()) <= 18
    assert output(script, tmp_path)[-1] == (
        f"got {seen[0].got.tolist()} expected {METHOD.reference(case)['y'].exact.astype(float).tolist()}")


@pytest.mark.parametrize("law, part", [
    ("L3", "w.tolist()"), ("L3m", "got [["), ("L5c", "for _ in range(100):"), ("L11b", "'expected', y_2.tolist())"),
    ("L13", "no disk"), ("L2", "'B'"), ("L7s", "read-only"), ("V y", "y.tolist()"), ("L4", "got")])
def test_every_kind_of_failure_gives_a_script_that_runs(mine, tmp_path, law, part):
    _, _, _, script = written(mine, tmp_path / "out", law)
    lines = output(script, tmp_path)
    assert "got" in lines[-1] and "expected" in lines[-1]
    assert part in script.read_text() + "\n".join(lines)


def test_what_does_not_fail_a_second_time_is_shown_with_the_calls_that_were_made(mine, tmp_path):
    case, seen, made = failure(mine, "L1")
    mine.module.Layer.forward = lambda self, x: x @ self.W.T + self.b + self.alpha / 2 * (x @ self.A.T) @ self.B.T
    _, script = write(tmp_path / "out", mine, METHOD, "L1", case, seen, made)
    assert output(script, tmp_path)[-1].startswith(f"got {seen[0].got.tolist()} expected")


def test_the_case_comes_back_bit_for_bit(mine, tmp_path):
    for dtype, exact in (("float64", False), ("bfloat16", False), ("float64", True)):
        case, _, file, _ = written(mine, tmp_path / "out", "L1", dtype=dtype, exact=exact)
        law, back = read(file)
        assert (law, back.id, back.label, dict(back.declared)) == ("L1", case.id, case.label, dict(case.declared))
        assert (back.dtype, back.exact, dict(back.params)) == (case.dtype, case.exact, dict(case.params))
        assert all(back[name].tobytes() == case[name].tobytes() for name in case.arrays)


def test_the_same_failure_is_written_once_and_no_other_file_is_overwritten(mine, tmp_path):
    case, seen, made = failure(mine, "L1")
    first = write(tmp_path, mine, METHOD, "L1", case, seen, made)
    assert write(tmp_path, mine, METHOD, "L1", case, seen, made) == first
    for path in first:
        path.write_bytes(b"mine")
    others = write(tmp_path, mine, METHOD, "L1", case, seen, made)
    assert [path.name for path in others] == [f"{path.stem}-2{path.suffix}" for path in first]
    assert all(path.read_bytes() == b"mine" for path in first)


def test_the_files_of_the_last_run_replace_those_of_an_earlier_one_and_are_the_newest(mine, tmp_path):
    case, seen, made = failure(mine, "L1")
    first = write(tmp_path, mine, METHOD, "L1", case, seen, made)
    before = first[1].read_text()
    mine.module.Layer.forward = lambda self, x: x[:, :0]
    assert write(tmp_path, mine, METHOD, "L1", case, *look(property_named(METHOD, "L1"), case, mine,
                                                           mine.make(METHOD))) == first
    assert first[1].read_text() != before and len([*tmp_path.glob("L1-*")]) == 2
    for path in first:
        os.utime(path, (0, 0))
    write(tmp_path, mine, METHOD, "L1", case, seen, made)
    assert all(path.stat().st_mtime > 0 for path in first)


def test_a_script_that_was_edited_and_one_of_another_plug_in_stay_as_they_are(mine, tmp_path, monkeypatch):
    case, seen, made = failure(mine, "L1")
    first = write(tmp_path, mine, METHOD, "L1", case, seen, made)
    edited = first[1].read_text() + "print(layer.alpha)\n"
    first[1].write_text(edited)
    second = write(tmp_path, mine, METHOD, "L1", case, seen, made)
    assert second[1].stem == f"{first[1].stem}-2" and first[1].read_text() == edited
    (tmp_path / "other_adapter.py").write_text(PLUGIN)
    monkeypatch.setitem(sys.modules, "other_adapter", None)
    monkeypatch.delitem(sys.modules, "other_adapter")
    other = Plugin(importlib.import_module("other_adapter"))
    theirs = written(other, tmp_path, "L1")[2:]
    assert theirs[1].stem == f"{first[1].stem}-3" and written(other, tmp_path, "L1")[2:] == theirs
    assert write(tmp_path, mine, METHOD, "L1", case, seen, made) == second and first[1].read_text() == edited
    link = tmp_path / "link"
    second[1].rename(link)
    second[1].symlink_to(link)
    assert write(tmp_path, mine, METHOD, "L1", case, seen, made)[1].stem == f"{first[1].stem}-4"


@pytest.mark.parametrize("taken", [0, 1])
def test_a_case_and_its_script_have_one_number(mine, tmp_path, taken):
    case, seen, made = failure(mine, "L1")
    first = write(tmp_path, mine, METHOD, "L1", case, seen, made)
    first[taken].write_bytes(b"mine")
    file, script = write(tmp_path, mine, METHOD, "L1", case, seen, made)
    assert file.stem == script.stem == f"{first[0].stem}-2"
    assert write(tmp_path, mine, METHOD, "L1", case, seen, made) == (file, script)
    script.unlink()
    assert write(tmp_path, mine, METHOD, "L1", case, seen, made) == (file, script) and script.exists()
    assert first[taken].read_bytes() == b"mine" and len(list(tmp_path.glob("L1-*"))) == 4


def test_the_name_of_a_file_has_nothing_that_a_file_system_minds(mine, tmp_path):
    _, _, file, script = written(mine, tmp_path, "V y")
    assert file.parent == script.parent == tmp_path and file.stem == script.stem
    assert file.name.startswith("V_y-lora_linear-")


def test_a_plug_in_that_is_no_module_has_a_case_and_no_script(mine, tmp_path):
    case, seen, made = failure(mine, "L1")
    for found in (mine.module.__dict__, {**mine.module.__dict__, "capabilities": {"name": "my lora"}}):
        file, script = write(tmp_path, Plugin(SimpleNamespace(**found)), METHOD, "L1", case, seen, made)
        assert read(file)[1].id == case.id and str(script).startswith("none: ") and not [*tmp_path.glob("L1-*.py")]
    assert write(tmp_path, "my_adapter", METHOD, "L1", case, seen, made)[1].exists()


def test_only_what_another_process_can_import_has_a_name(mine):
    assert name_of(mine.module) == "my_adapter"
    by_hand = ModuleType("my_adapter")
    assert [name_of(plugin) for plugin in (by_hand, sys.modules["__main__"], METHOD.plain, SimpleNamespace())] == [
        None] * 4


@pytest.mark.parametrize("name, statement", [
    ("my_adapter", "import my_adapter as plugin"), ("a.b", "import a.b as plugin"),
    ("my-plugin", "plugin = importlib.import_module('my-plugin')"),
    ("class", "plugin = importlib.import_module('class')"),
    ("os; print(1)", "plugin = importlib.import_module('os; print(1)')")])
def test_a_name_that_no_import_takes_is_imported_all_the_same(name, statement, tmp_path):
    line = imports(name, tmp_path)
    assert line.endswith(f"; {statement}") and len(line.splitlines()) == 1


def test_a_script_finds_the_module_where_it_was_from_any_folder_and_when_both_have_moved(tmp_path, monkeypatch):
    package = tmp_path / "project" / "inside"
    package.mkdir(parents=True)
    (package / "adapter.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.chdir(tmp_path)
    script = written(Plugin(importlib.import_module("inside.adapter")), package.parent / "a" / "b", "L1")[-1]
    assert "os.path.join(os.path.dirname(__file__), '../..')" in script.read_text()
    assert "expected" in output(script, script.parent)[-1] and "expected" in output(script, tmp_path)[-1]
    package.parent.rename(tmp_path / "moved")
    assert "expected" in output(tmp_path / "moved" / "a" / "b" / script.name, "/")[-1]


def test_a_module_that_shares_no_folder_with_the_script_is_looked_for_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert found_in("my_adapter_of_no_file") == tmp_path.resolve()
    assert f"insert(0, {str(tmp_path.resolve())!r})" in imports("my_adapter_of_no_file", Path("/elsewhere/found"))


def changed(file, **fields):
    arrays, metadata = read_tensors(file)
    text = json.dumps({**json.loads(metadata["minipeft"]), **fields})
    write_tensors(file, arrays, {"minipeft": text})


@pytest.mark.parametrize("fields, message", [
    ({"schema": "other"}, "schema 'other'"), ({"method": "os"}, "unknown method 'os'"),
    ({"property": "L99"}, "no property 'L99'"), ({"property": "V z"}, "no property 'V z'"),
    ({"dtype": "float8"}, "unknown dtype 'float8'"), ({"exact": 1}, "exact is a int"),
    ({"params": {"alpha": [1]}}, "the param 'alpha'"), ({"params": {"alpha": float("nan")}}, "not valid JSON"),
    ({"conventions": {"scaling": "r"}}, "unknown convention scaling='r'"), ({"declared": {"store": "int8"}}, "int8"),
    ({"declared": {"store": []}}, "declared"), ({"more": 1}, "expected the fields"), ({"label": None}, "label"),
    ({"params": {"alpha": 7.0}}, "it was changed"), ({"case": "lora_linear-00000000"}, "it was changed")])
def test_a_file_that_is_not_as_it_was_written_is_refused_by_name(mine, tmp_path, fields, message):
    *_, file, _ = written(mine, tmp_path, "L1")
    changed(file, **fields)
    with pytest.raises(ValueError, match="safetensors: ") as error:
        read(file)
    assert message in str(error.value)


def test_arrays_that_no_case_has_are_refused(mine, tmp_path):
    *_, file, _ = written(mine, tmp_path, "L1", dtype="bfloat16")
    arrays, metadata = read_tensors(file)
    for x, message in ((numpy.zeros((2, 2), numpy.float32), "is of float32"),
                       (numpy.full((2, 2), 0.1), "numbers that are not bfloat16 numbers")):
        write_tensors(file, {**arrays, "A": x}, metadata)
        with pytest.raises(ValueError, match=message):
            read(file)
    for text in ("{", "[]", "NaN"):
        write_tensors(file, arrays, {"minipeft": text})
        with pytest.raises(ValueError, match=file.name):
            read(file)
    write_tensors(file, arrays, {"other": "{}"})
    with pytest.raises(ValueError, match="string map"):
        read(file)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=file.name):
        read(file)
    with open(file, "r+b") as large:
        large.truncate(2 ** 26 + 1)
    with pytest.raises(ValueError, match="at most"):
        read(file)


def saved(file, case, prop_id="L1"):
    """A file that says of itself what is in it: its id is right."""
    _, metadata = read_tensors(file)
    fields = {**json.loads(metadata["minipeft"]), "method": case.method, "property": prop_id, "exact": case.exact,
              "params": dict(case.params), "dtype": case.dtype, "conventions": dict(case.conventions), "case": case.id}
    write_tensors(file, dict(case.arrays), {"minipeft": json.dumps(fields)})
    return file


@pytest.mark.parametrize("change, message", [
    (lambda c: c.without("W"), "the array 'W' is missing"), (lambda c: c.without("g"), "the array 'g' is missing"),
    (lambda c: dataclasses.replace(c, params={}), "the reference cannot be computed: KeyError: 'alpha'"),
    (lambda c: c.but(params={"alpha": "much"}), "the reference cannot be computed: ValueError"),
    (lambda c: c.but({"x": numpy.array(1.0)}), "the array 'x' is of shape []; expected [N, in]"),
    (lambda c: c.but({"x": c["x"] * numpy.nan}), "the array 'x' has numbers that are NaN"),
    (lambda c: c.but({"b": numpy.ones(1)}), "the array 'b' is of shape [1], [out], but elsewhere out is 2"),
    (lambda c: c.but({"h": numpy.ones(1)}), "unknown array 'h'; lora_linear has"),
    (lambda c: c.but(params={"alpha": "inf"}), "the reference gives y with NaN or infinity")])
def test_a_case_of_which_the_reference_makes_nothing_is_refused(mine, tmp_path, change, message):
    case, _, file, _ = written(mine, tmp_path, "L1")
    assert read(saved(file, case))[1].id == case.id
    with pytest.raises(ValueError) as error:
        read(saved(file, change(case)))
    assert str(error.value).startswith(f"{file}: {message}")


def test_what_must_be_refused_makes_no_sense_and_is_read_all_the_same(mine, tmp_path):
    case, _, file, _ = written(mine, tmp_path, "L1")
    for method in all_methods().values():
        for refusal in method.refusals("float32"):
            assert read(saved(file, refusal.case, "X1"))[1].id == refusal.case.id
    with pytest.raises(ValueError, match="the array 'W' is missing"):
        read(saved(file, case.without("W"), "X1"))
    with pytest.raises(ValueError, match="the arguments of the layer cannot be computed: KeyError: 'alpha'"):
        read(saved(file, dataclasses.replace(case, params={}), "X1"))


def test_every_case_that_a_method_publishes_or_draws_is_read(mine, tmp_path):
    *_, file, _ = written(mine, tmp_path, "L1")
    rng = numpy.random.default_rng(0)
    for method in all_methods().values():
        cases: list[Case] = [*method.vectors()]
        for dtype in ("float64", "float16"):
            cases += [method.draw(rng, dtype, exact, {axis: int(rng.integers(low, high + 1)) for axis, (low, high)
                                                      in method.sizes.items()}) for exact in (False, True)] * 3
        for case in cases:
            assert read(saved(file, case, method.properties[0].id))[1].id == case.id


def without(*names, dtypes=("float64", "bfloat16"), error=False):
    """The plug-in above, which does not offer these methods, or says so when they are called."""
    text = PLUGIN.replace('["float64", "bfloat16"]', repr(list(dtypes)))
    for name in names:
        text = text.replace(f"def {name}(self", f"def {name}(self, *_):\n        raise NotImplementedError('not yet')"
                            f"\n\n    def other_{name}(self" if error else f"def other_{name}(self")
    return text


@pytest.mark.parametrize("law, text, reason", [
    ("L1", PLUGIN.replace("def lora_linear", "def lora"), "no function lora_linear()"),
    ("L1", without(dtypes=["float32"]), "float64 is not declared"),
    ("L3m", without("merge"), "not offered: merge"),
    ("L1", without("forward", error=True), "says that it is not implemented: not yet"),
    ("L3m", without("merge", error=True), "says that it is not implemented: not yet"),
    ("L3m", PLUGIN.replace("return Layer(", "raise NotImplementedError('no layer') "
                           "or Layer("), "lora_linear says that it is not implemented: no layer")])
def test_what_a_run_would_skip_is_skipped_when_it_is_run_again(mine, tmp_path, capsys, law, text, reason):
    *_, file, _ = written(mine, tmp_path / "out", law)
    assert again("my_adapter", str(file), 10.0) == 1
    (tmp_path / "other_adapter.py").write_text(text)
    capsys.readouterr()
    try:
        assert again("other_adapter", str(file), 10.0) == 3
    finally:
        del sys.modules["other_adapter"]
    out = capsys.readouterr().out
    assert "  skipped: " in out and reason in out and "expected" not in out


@pytest.mark.parametrize("x", [numpy.array([[0.1, -0.0]]), numpy.zeros((3, 7)), numpy.zeros((0, 4)), numpy.array(2.5),
                               numpy.array([numpy.inf, numpy.nan]), numpy.array([1, 2]), numpy.array([True]),
                               numpy.arange(3, dtype=numpy.uint8), -numpy.zeros(9)])
def test_a_literal_is_the_array_bit_for_bit(x):
    back = eval(literal(x), {name: getattr(numpy, name) for name in ("array", "inf", "nan", "zeros")})
    assert back.dtype == x.dtype and back.shape == x.shape and back.tobytes() == x.tobytes()


def test_names_are_those_of_the_case_and_never_two_for_one_array():
    names, w, rows = Names(), numpy.ones(2), numpy.zeros(1)
    own = {"fc1.weight": w, "in": rows}
    given = (w, rows, w, numpy.ones(2), {"k": [w, None]}, ("default",), numpy.float64(2))
    assert [names.of(x, own) for x in given] == [
        "fc1_weight", "_in", "fc1_weight", "a", "{'k': [fc1_weight, None]}", "('default',)", "2.0"]
