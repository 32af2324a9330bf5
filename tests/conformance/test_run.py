"""The run: a table and an exit status for what conforms, and whatever a plug-in does wrong is its own failure."""
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

import numpy as np

from minipeft.conformance import check, worker
from minipeft.conformance.methods import all_methods
from minipeft.conformance.observe import same
from tests.conformance.plugins import module

FEW = {"cases": 6, "methods": ["lora_linear"]}


def run(name, folder, *options):
    return subprocess.run([sys.executable, "-m", "minipeft.conformance", "--impl", name, "--cases", "5", *options],
                          cwd=folder, capture_output=True, text=True, timeout=300)


def failed(report, id):
    return next(r for r in report.failures if r.id == id)


def test_what_conforms_has_exit_status_0_a_table_and_counted_skips(tmp_path, monkeypatch):
    name = module(tmp_path, monkeypatch, "right")
    report = check(name, folder=None, cases=10)
    assert report.exit_code == 0, str(report)
    report.raise_for_failures()
    text = str(report)
    assert "Conforms to lora_linear, levels B+E+S, float64" in text and "L1 " in text
    by = {r.id: r for r in report.results if r.method == "lora_linear"}
    assert by["L1"].status == "pass" and 0 < by["L1"].rho < 1 and by["L1"].exact > 0
    assert by["L9r"].status == "skip" and "forward_rows" in by["L9r"].reason
    assert {r.method for r in report.results if r.id == "-"} == set(all_methods()) - {"lora_linear"}
    assert not (tmp_path / "conformance-failures").exists()


def test_a_wrong_scale_is_named_in_words_with_the_smallest_layer_and_a_script_that_runs(tmp_path, monkeypatch):
    change = "factory = lora_linear\ndef lora_linear(W, b, A, B, alpha, dtype, *, dropout=0.0):\n" \
             "    layer = factory(W, b, A, B, alpha, dtype)\n    layer.s = alpha\n    return layer\n"
    name = module(tmp_path, monkeypatch, "scaled", change)
    report = check(name, folder=str(tmp_path / "found"), cases=10)
    assert report.exit_code == 1
    with pytest.raises(AssertionError, match="alpha, not alpha / r"):
        report.raise_for_failures()
    first = failed(report, "L1")
    assert "s = alpha, not alpha / r" in first.diagnosis and "Blaizzy/mlx-vlm #845" in first.links
    assert first.rho > 10 and "W=[[" in first.minimal
    done = subprocess.run([sys.executable, first.script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "expected" in done.stdout, done.stderr
    again = run(name, tmp_path, "--replay", first.replay)
    assert again.returncode == 1 and "expected" in again.stdout, again.stderr


@pytest.mark.parametrize("what, change, kind", [
    ("raises", "def forward(self, x):\n    raise RuntimeError('broken on purpose')\n", "broken on purpose"),
    ("shape", "def forward(self, x):\n    return (x @ self.W.T).T.copy()[None]\n", "wrong shape"),
    ("nan", "def forward(self, x):\n    return x @ self.W.T * np.nan\n", "not finite"),
    ("narrow", "def forward(self, x):\n    return (x @ self.W.T).astype(np.float32)\n", "wrong type"),
    ("writes", "def forward(self, x):\n    x += 1\n    return x @ self.W.T\n", "writes into its inputs"),
    ("exits", "def forward(self, x):\n    raise SystemExit(0)\n", "SystemExit"),
    ("nothing", "def forward(self, x):\n    return None\n", "wrong type")])
def test_what_a_plug_in_does_wrong_is_its_failure_and_the_run_goes_on(what, change, kind, tmp_path, monkeypatch):
    name = module(tmp_path, monkeypatch, f"bad_{what}", change + "Layer.forward = forward\n")
    report = check(name, folder=None, **FEW)
    assert kind in failed(report, "L1").failure
    assert next(r for r in report.results if r.id == "L2").status == "pass"  # gradients are right


def test_a_plug_in_that_writes_behind_the_read_only_flag_is_seen(tmp_path, monkeypatch):
    change = """
        def forward(self, x):
            y = x @ self.W.T
            x.flags.writeable = True
            x[...] = 0
            return y
        Layer.forward = forward
    """
    name = module(tmp_path, monkeypatch, "sly", change)
    assert "writes into its inputs" in failed(check(name, folder=None, **FEW), "L1").failure


def test_what_is_not_implemented_is_a_skip_and_not_a_failure(tmp_path, monkeypatch):
    change = "def merge(self):\n    raise NotImplementedError('no merging yet')\nLayer.merge = merge\n"
    report = check(module(tmp_path, monkeypatch, "partly", change), folder=None, **FEW)
    assert report.exit_code == 0, str(report)
    by = {r.id: r for r in report.results}
    for id in ("L3", "L4", "V W_merged"):
        assert by[id].status == "skip" and "no merging yet" in by[id].reason


@pytest.mark.parametrize("how", ["while True: pass", "time.sleep(1000)"])
def test_a_plug_in_that_hangs_is_interrupted_and_the_run_goes_on(how, tmp_path, monkeypatch):
    name = module(tmp_path, monkeypatch, "slow", f"def merge(self):\n    {how}\nLayer.merge = merge\n")
    report = check(name, folder=None, limit=0.5, **FEW)
    assert "does not return" in failed(report, "L3").failure
    assert next(r for r in report.results if r.id == "L1").status == "pass"


def test_a_plug_in_that_kills_its_process_is_recorded_and_the_run_goes_on_in_another(tmp_path, monkeypatch):
    name = module(tmp_path, monkeypatch, "crash", "def merge(self):\n    os.abort()\nLayer.merge = merge\n")
    report = check(name, folder=None, **FEW)
    assert "died" in failed(report, "L3").failure and "signal" in failed(report, "L3").failure
    by = {(r.stage, r.id): r.status for r in report.results}
    assert by["live", "L1"] == by["live", "L2"] == "pass" and by["live", "L4"] == "fail"


def test_what_it_prints_does_not_disturb_the_report(tmp_path, monkeypatch):
    name = module(tmp_path, monkeypatch, "loud", "print('{\"end\": true}')\nos.write(1, b'noise')\n")
    assert check(name, folder=None, **FEW).exit_code == 0


def test_nothing_that_runs_is_exit_status_3(tmp_path, monkeypatch):
    name = module(tmp_path, monkeypatch, "empty", "del lora_linear\n")
    done = run(name, tmp_path)
    assert done.returncode == 3 and "Nothing ran" in done.stdout and "no function lora_linear()" in done.stdout


@pytest.mark.parametrize("change, words", [
    ("capabilities = dict(dtypes=['float8'])\n", "float8"),
    ("capabilities = dict(speed=3)\n", "'speed'"),
    ("capabilities['conventions'] = {'lora_linear': {'scaling': 'alpha*r'}}\n", "alpha*r"),
    ("capabilities['arith'] = {'float64': {'store': 'int4'}}\n", "int4"),
    ("import no_such_thing\n", "no_such_thing")])
def test_wrong_declarations_are_exit_status_2_and_say_what_is_expected(change, words, tmp_path, monkeypatch):
    done = run(module(tmp_path, monkeypatch, "declares", change), tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("options, words", [
    (["--impl", "no.such.module"], "no.such.module"), ([], "nothing to run"),
    (["--impl", "math", "--method", "dora"], "lora_linear"), (["--impl", "math", "--cases", "0"], "at least 1"),
    (["--self-test", "--dtype", "int8"], "float64")])
def test_wrong_usage_is_exit_status_2_in_one_line(options, words):
    done = subprocess.run([sys.executable, "-m", "minipeft.conformance", *options], capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_the_json_report_has_every_result_and_no_infinity(tmp_path, monkeypatch):
    name = module(tmp_path, monkeypatch, "bad_json", "def forward(self, x):\n    return x @ self.W.T * 1e300\n"
                                                     "Layer.forward = forward\n")
    done = run(name, tmp_path, "--json", "out.json", "--method", "lora_linear", "--skips")
    assert done.returncode == 1 and "skipped:" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert found["summary"]["fail"] == sum(r["status"] == "fail" for r in found["results"]) > 0
    assert {"pack", "spec", "impl", "env"} <= set(found) and found["impl"]["name"] == "bad"


def test_a_run_is_the_same_for_the_same_seed(tmp_path, monkeypatch):
    name = module(tmp_path, monkeypatch, "again")
    first, second = (check(name, folder=None, seed=3, **FEW).as_json() for _ in range(2))
    assert first == second


def test_an_object_is_run_in_this_process(tmp_path):
    plain = all_methods()["lora_linear"].plain
    plugin = SimpleNamespace(capabilities={"dtypes": ["bfloat16"]}, lora_linear=plain)
    report = check(plugin, folder=None, **FEW)
    assert report.exit_code == 0, str(report)
    assert "of an update D, a merge keeps" in str(report)
    shares = [line["share"] for line in report.survival]
    assert shares[0] > 0.98 and shares[-1] < 0.3 and shares == sorted(shares, reverse=True)


def test_a_convention_is_declared_and_a_wrong_declaration_fails():
    mutants = {m.id: m.build for m in all_methods()["lora_linear"].mutants}
    for id, scaling in (("lora.scale_sqrt", "alpha/sqrt(r)"), ("lora.scale_alpha", "alpha")):
        for declared in ("alpha/r", "alpha/sqrt(r)", "alpha"):
            plugin = SimpleNamespace(capabilities={"conventions": {"lora_linear": {"scaling": declared}}},
                                     lora_linear=mutants[id])
            report = check(plugin, ["lora_linear"], folder=None, cases=2)
            assert report.exit_code == (declared != scaling), f"{id} declared {declared}\n{report}"


def test_a_plug_in_that_implements_nothing_does_not_conform(tmp_path, monkeypatch):
    change = "def nothing(self, x):\n    raise NotImplementedError\nLayer.forward = nothing\n" \
             "Layer.vjp = Layer.weight = Layer.merge = None\n"
    assert check(module(tmp_path, monkeypatch, "nothing", change), folder=None, **FEW).exit_code == 3


def test_results_that_have_more_digits_than_the_dtype_were_computed_in_another(tmp_path, monkeypatch):
    name = module(tmp_path, monkeypatch, "upcast", "capabilities['dtypes'] = ['float64', 'bfloat16']\n")
    report = check(name, folder=None, **FEW)
    assert "off the grid" in failed(report, "L1").failure and failed(report, "L1").dtype == "bfloat16"
    assert next(r for r in report.results if r.id == "L1" and r.dtype == "float64").status == "pass"


def test_every_call_is_announced_so_that_a_slow_plug_in_is_looked_into_and_nothing_else_is_blamed(
        tmp_path, monkeypatch):
    """A child counts as dead when it says nothing for longer than one call may take. Looking into a failure takes
    hundreds of calls, so each must be announced. They are counted here, and no clock is asked."""
    change = "from pathlib import Path\ncalls = Path(__file__).with_suffix('.calls').open('a', buffering=1)\n" \
             "def forward(self, x):\n    calls.write('.\\n')\n    return x @ self.W.T + 1\n" \
             "Layer.forward = forward\nLayer.merge = None\n"
    said, read = [], worker._messages

    def listening(*arguments):
        for message in read(*arguments):
            said.append(message)
            yield message

    monkeypatch.setattr(worker, "_messages", listening)
    report = check(module(tmp_path, monkeypatch, "slower", change), folder=None, cases=2, methods=["lora_linear"],
                   dtypes=["float64"])
    assert "died" not in str(report) and failed(report, "L1").minimal
    assert next(r for r in report.results if r.id == "L2").status == "pass"
    made = sum(len(path.read_text().split()) for path in tmp_path.glob("*.calls"))
    assert 100 < made <= sum("call" in message for message in said)


@pytest.mark.parametrize("change", [
    "import threading\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n",
    "import subprocess\nsubprocess.Popen(['sleep', '1000'])\n"])
def test_threads_and_children_of_a_plug_in_are_not_waited_for(change, tmp_path, monkeypatch):
    report = check(module(tmp_path, monkeypatch, "leaves", change), folder=None, **FEW)
    assert report.exit_code == 0


@pytest.mark.parametrize("options, code, words", [
    (["--dtype", "float99"], 2, "float99"), (["--dtype", "bfloat16"], 3, "bfloat16 is not among"),
    (["--json", "no/such/folder.json"], 2, "no such folder"), (["--time-limit", "nan"], 2, "finite limit")])
def test_options_that_cannot_be_are_said_before_anything_runs(options, code, words, tmp_path, monkeypatch):
    done = run(module(tmp_path, monkeypatch, "fine"), tmp_path, *options)
    assert done.returncode == code and words in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_vectors_alone_need_neither_hypothesis_nor_mpmath_and_less_than_ten_seconds(tmp_path, monkeypatch):
    code = ("import sys\nsys.modules.update(hypothesis=None, mpmath=None)\nfrom minipeft.conformance import check\n"
            "import plain\nreport = check(plain, live=False, folder=None)\n"
            "assert report.exit_code == 0 and len({r.method for r in report.results if r.status == 'pass'}) == 1\n"
            "assert check(plain, vectors=False, folder=None).exit_code == 3  # these need hypothesis\n"
            "assert 'Only the vectors were run' in check(plain, folder=None).verdict\n")
    module(tmp_path, monkeypatch, "plain")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=10)
    assert done.returncode == 0, done.stderr


def test_one_last_digit_is_a_difference_where_nothing_may_move():
    x = np.array([1.0, -3.0])
    assert same("x", x, x + 0).holds and not same("x", np.nextafter(x, 2), x).holds and same("x", 0 * x, -0 * x).holds
