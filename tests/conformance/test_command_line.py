"""The command: what is asked before a run, what is told after it or when it is cut short, and what `--list` says."""
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from minipeft.conformance import apart, check, listing
from minipeft.conformance.fault import Skip
from minipeft.conformance.look import look
from minipeft.conformance.methods import all_methods
from minipeft.conformance.selftest import drawn, plugin_of
from minipeft.conformance.writable import file_trouble, folder_trouble
from tests.conformance.plugins import module

QUICK = ["--cases", "2", "--method", "lora_linear", "--vectors-only"]
WRONG = "def forward(self, x):\n    return x @ self.W.T + 7\nLayer.forward = forward\n"


def run(folder, *options, **fields):
    return subprocess.run([sys.executable, "-m", "minipeft.conformance", *options], cwd=folder, capture_output=True,
                          text=True, timeout=120, **fields)


def saved(tmp_path, monkeypatch):
    """A case on which L1 fails."""
    name = module(tmp_path, monkeypatch, "wrong", WRONG)
    report = check(name, ["lora_linear"], cases=2, vectors=False, folder=str(tmp_path / "found"))
    return next(r.replay for r in report.failures if r.id == "L1")


@pytest.mark.parametrize("option, path, words", [
    ("--json", ".", "it is a folder"), ("--json", "no/such.json", "there is no such folder: no"),
    ("--json", "file/a.json", "file is not a folder"), ("--json", "pipe", "not a regular file"),
    ("--json", "x" * 300, "too long"), ("--save-failures", "file", "it is not a folder"),
    ("--save-failures", "file/below/it", "file is not a folder"), ("--save-failures", "x" * 300, "too long")])
def test_a_path_that_cannot_be_written_is_said_before_anything_runs(option, path, words, tmp_path, monkeypatch):
    name = module(tmp_path, monkeypatch, "unasked", "open('it-ran', 'w')\n")
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    done = run(tmp_path, "--impl", name, *QUICK, option, path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stdout == "" and not (tmp_path / "it-ran").exists()


def test_a_folder_that_may_not_be_written_is_said_and_nothing_is_left_by_asking(tmp_path, monkeypatch):
    def refused(*_, dir=None):
        raise PermissionError(13, "Permission denied")

    assert file_trouble(tmp_path / "a.json") == folder_trouble(tmp_path / "a" / "b") == "" and not [*tmp_path.iterdir()]
    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    assert "Permission denied" in file_trouble(tmp_path / "a.json")
    assert "Permission denied" in folder_trouble(tmp_path / "a" / "b")
    with pytest.raises(ValueError, match="failures cannot be saved in .*Permission denied"):
        check("never_imported", folder=str(tmp_path))


def test_a_report_is_printed_even_if_it_cannot_be_written_in_the_end(tmp_path, monkeypatch):
    name = module(tmp_path, monkeypatch, "blocks", "os.path.isdir('r.json') or os.mkdir('r.json')\n")
    done = run(tmp_path, "--impl", name, *QUICK, "--json", "r.json")
    assert done.returncode == 2 and "Conforms to lora_linear" in done.stdout and "error: " in done.stderr


def test_the_json_report_says_how_to_run_it_again(tmp_path, monkeypatch):
    name = module(tmp_path, monkeypatch, "told")
    options = ["--method", "lora_linear", "--dtype", "float64", "--cases", "3", "--seed", "7", "--time-limit", "9"]
    assert run(tmp_path, "--impl", name, *options, "--json", "r.json").returncode == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["run"] == {"impl": "told", "methods": ["lora_linear"], "dtypes": ["float64"], "cases": 3, "seed": 7,
                            "stages": ["vectors", "live"], "time_limit": 9.0}
    assert found["date"].endswith("+00:00") and found["interrupted"] is False
    repeated = check(name, found["run"]["methods"], found["run"]["dtypes"], cases=3, seed=7, limit=9.0)
    assert repeated.as_json() == {key: value for key, value in found.items() if key != "date"}


def test_a_run_that_is_interrupted_tells_what_it_found(tmp_path, monkeypatch):
    name = module(tmp_path, monkeypatch, "stops", WRONG + """
capabilities["dtypes"] = ["float64", "float32"]
factory = lora_linear
def lora_linear(W, b, A, B, alpha, dtype, *, dropout=0.0):
    if dtype == "float32":
        open("in-float32", "w").close()
        time.sleep(100)
    return factory(W, b, A, B, alpha, dtype)
""")
    command = [sys.executable, "-m", "minipeft.conformance", "--impl", name, *QUICK, "--time-limit", "90",
               "--json", "r.json"]
    process = subprocess.Popen(  # a shell that runs the tests in the background has them ignore interrupts
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    end = time.monotonic() + 100
    while not (tmp_path / "in-float32").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert "FAILED  lora_linear" in out and "V y" in out
    last = out.strip().splitlines()[-1]
    assert last.startswith("Interrupted: ") and last.endswith("It does not conform in lora_linear.")
    assert json.loads((tmp_path / "r.json").read_text())["interrupted"] is True


def test_a_saved_failure_is_run_again_in_a_process_of_its_own(tmp_path, monkeypatch, capfd):
    file = saved(tmp_path, monkeypatch)
    assert apart.again_apart("wrong", file, 10.0) == 1 and "expected" in capfd.readouterr().out
    assert apart.again_apart(module(tmp_path, monkeypatch, "right"), file, 10.0) == 0
    assert "holds now" in capfd.readouterr().out
    assert apart.again_apart("no_such_module", file, 10.0) == 2 and "error: --impl" in capfd.readouterr().err
    assert apart.again_apart("right", str(tmp_path / "none"), 10.0) == 2 and "error: " in capfd.readouterr().err
    assert "right" not in sys.modules and "wrong" not in sys.modules
    with pytest.raises(ValueError, match="finite limit"):
        apart.again_apart("right", file, float("nan"))


@pytest.mark.parametrize("what, words", [
    ("os.abort()", "ended by SIGABRT"), ("os._exit(0)", "status 0"), ("os._exit(3)", "status 3"),
    ("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM]) or time.sleep(100)", "did not answer in 0.5 s")])
def test_a_plug_in_that_dies_or_hangs_when_it_is_run_again_is_said_in_a_line(what, words, tmp_path, monkeypatch, capfd):
    file = saved(tmp_path, monkeypatch)
    name = module(tmp_path, monkeypatch, "dies", f"import signal\ndef forward(self, x):\n    {what}\n"
                                                 "Layer.forward = forward\n")
    if "0.5" in words:
        monkeypatch.setattr(apart, "PATIENCE", 0.4)
    assert apart.again_apart(name, file, 0.1 if "0.5" in words else 10.0) == 1
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.strip().startswith("the process of the implementation died: ") and words in last


def test_the_threads_of_a_plug_in_are_not_waited_for(tmp_path, monkeypatch):
    file = saved(tmp_path, monkeypatch)
    name = module(tmp_path, monkeypatch, "thread", "import threading\n"
                                                   "threading.Thread(target=time.sleep, args=(1000,)).start()\n")
    begun = time.monotonic()
    assert apart.again_apart(name, file, 10.0) == 0 and time.monotonic() - begun < 30


def test_a_plug_in_whose_name_is_no_identifier_has_a_script_that_runs_from_anywhere(tmp_path, monkeypatch):
    name = module(tmp_path, monkeypatch, "my-plugin", WRONG)
    done = run(tmp_path, "--impl", name, *QUICK)
    assert done.returncode == 1 and "FAILED" in done.stdout and "Traceback" not in done.stderr, done.stderr
    script, = (tmp_path / "conformance-failures").glob("V_y-*.py")
    assert "plugin = importlib.import_module('my-plugin')" in script.read_text().splitlines()[1]
    for folder in (tmp_path, script.parent, Path("/")):
        shown = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True,
                               env={**os.environ, "PYTHONPATH": ""})
        assert shown.returncode == 0 and "expected" in shown.stdout, shown.stderr


def test_an_object_that_is_no_module_has_a_report_and_a_case_and_no_script(tmp_path):
    plain = all_methods()["lora_linear"].mutants[0].build
    plugin = SimpleNamespace(capabilities={"name": "my lora"}, lora_linear=plain)
    report = check(plugin, ["lora_linear"], live=False, folder=str(tmp_path))
    first = report.failures[0]
    assert report.exit_code == 1 and first.script.startswith("none: ") and first.script in str(report)
    assert Path(first.replay).is_file() and not [*tmp_path.glob("*.py")]


@pytest.mark.parametrize("path, words", [
    ("mine.py", "expected the name of a module, without .py: --impl mine\n"), ("sub/mine.py", "--impl sub.mine\n")])
def test_a_file_in_the_place_of_a_modules_name_is_told_what_to_write(path, words, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / path).write_text("")
    done = run(tmp_path, "--impl", path)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    done = run(tmp_path, "--impl", str(tmp_path / path))
    assert done.returncode == 2 and f"in {(tmp_path / path).parent}, --impl mine" in done.stderr


def test_a_reader_that_has_read_enough_ends_it_quietly(tmp_path, monkeypatch):
    name = module(tmp_path, monkeypatch, "piped", WRONG)
    for options, status in ((["--list"], 0), (["--impl", name, *QUICK, "--json", "r.json"], 1)):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([sys.executable, "-m", "minipeft.conformance", *options], cwd=tmp_path, stdout=write,
                              stderr=subprocess.PIPE, text=True, timeout=120)
        os.close(write)
        assert done.returncode == status and done.stderr == ""
    assert (tmp_path / "r.json").is_file()


def test_the_self_test_without_hypothesis_does_not_say_that_all_is_well(tmp_path):
    code = ("import sys\nsys.modules['hypothesis'] = None\nfrom minipeft.conformance.__main__ import main\n"
            "sys.exit(main(['--self-test', '--method', 'soft_prompt', '--dtype', 'float32']))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "needs hypothesis" in done.stderr and "well" not in done.stdout


def test_the_list_is_that_of_the_methods_that_are_asked_for(capsys):
    from minipeft.conformance.__main__ import main
    assert main(["--list", "--method", "lora_linear"]) == 0
    out = capsys.readouterr().out
    assert "lora_embedding" not in out and "L9r" in out
    for line in ("lora_linear(W: array, b: array, A: array, B: array, alpha: float, dtype: str, *, dropout: float = 0",
                 ".vjp(x: array, g: array) -> dict", ".forward_train(x: array, keep: array) -> array",
                 ".save() -> bytes", ".load(blob: bytes) ", ".activate(names: Sequence[str])",
                 ".add(name: str, A: array, B: array, alpha: float)", ".step(x: array, g: array, lr: float)"):
        assert line in out
    assert main(["--list", "--method", "dora"]) == 2 and "lora_linear" in capsys.readouterr().err


def test_the_part_of_the_list_that_the_examples_show_is_what_is_printed():
    page = (Path(__file__).parents[2] / "examples" / "conformance" / "README.md").read_text("utf-8")
    shown = re.search(r"   ```text\n(.*?)   ```", page, re.DOTALL).group(1)
    assert textwrap.dedent(shown) in textwrap.dedent("\n".join(list(listing.listing(["lora_linear"]))[4:]))


@pytest.mark.parametrize("name", all_methods())
def test_the_list_has_every_call_that_the_kit_makes_and_no_other_and_says_what_it_does(name):
    method = all_methods()[name]
    plugin, made = plugin_of(method, method.plain, "float64"), set()
    make = plugin.make(method)
    for case in (plugin.settle(case, method) for seed in range(2) for case in drawn(method, "float64", seed)):
        for prop in method.properties:
            try:
                seen = look(prop, case, plugin, make)[1] if prop.applies(case) else []
            except Skip:
                continue
            made |= {call for _, handle in seen for call, *_ in handle._calls}
    assert made == set(listing.calls(method))
    assert all(listing.words(method, call) for call in made)
    said = {call for which in ("", name) for call in listing.WORDS.get(which, ())}
    assert made <= said and set(listing.WORDS.get(name, ())) <= made


def test_no_words_of_the_list_are_about_what_is_not():
    calls = {call for method in all_methods().values() for call in listing.calls(method)}
    assert set(listing.WORDS) - {""} <= set(all_methods()) and set(listing.WORDS[""]) <= calls
    assert set(listing.GIVEN) <= set(all_methods())
