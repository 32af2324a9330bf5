"""The benchmark program: what it measures, what it says of a run, and that a process which fails does not stop it.

No test asserts on a time. Where torch is there, both libraries are held to the same losses; the runs from end to end
see none, by a module of that name on the path.
"""
import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest

import minipeft
from tests.strict_namespace import strict

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS_TORCH = pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in
                                     ("torch", "transformers", "peft")), reason="torch + peft are not installed")
ABSENT = 'raise ModuleNotFoundError("No module named {0!r}", name={0!r})\n'
DYING = 'import os, sys\nprint("noise", flush=True)\nprint("last words", file=sys.stderr, flush=True)\nos._exit(3)\n'


def run_quick(folder, modules, *arguments):
    """run.py --quick in a process that finds `modules`, {name: source}, before the installed ones."""
    path = folder / "modules"
    path.mkdir()
    for name, source in modules.items():
        (path / f"{name}.py").write_text(source)
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "benchmark" / "run.py"), "--quick", "--rounds", "1", "--threads", "1",
         "--check", "--out", str(folder / "out"), *arguments], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{EXAMPLES.parent}", "OPENBLAS_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(the finished process, its JSON, its folder) of a quick run without torch and without matplotlib."""
    folder = tmp_path_factory.mktemp("alone")
    noise = 'print("a library may say anything on standard output")\n'
    done = run_quick(folder, {"torch": noise + ABSENT.format("torch"), "matplotlib": ABSENT.format("matplotlib")})
    assert done.returncode == 0, done.stdout + done.stderr
    return done, json.loads((folder / "out" / "benchmark.json").read_text("utf-8")), folder / "out"


def test_without_torch_it_prints_our_own_figures_and_no_bar_is_missed_for_that(alone):
    done, run, _ = alone
    assert run["absent"] == "No module named 'torch'" and run["failures"] == []
    assert run["quantize"]["absent"]["bitsandbytes"] and "bitsandbytes was not measured: No module named" in done.stdout
    assert "torch + peft were not measured: No module named 'torch'" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    for start in (["d64", "LoRA", "step"], ["d64", "full", "step"], ["d64", "token"]):
        found = next(row for row in rows if row[:len(start)] == start)[len(start):]
        assert float(found[0].replace(",", "")) > 0 and set(found[1:]) == {"-"}
    assert not any(row[:1] == ["FAILS"] for row in rows)
    assert [row["excused"] for row in run["bars"] if "d64" in row["what"]] == ["torch + peft are not installed"] * 5


def test_the_json_holds_the_raw_times_and_all_that_is_derived(alone):
    _, run, _ = alone
    assert set(run) == {"program", "date", "machine", "settings", "about", "sizes", "engine", "growth", "quantize",
                        "qlora", "failures", "absent", "bars"}
    size = run["sizes"]["d64"]
    assert set(size) == {"shape", "flops", "times", "first_losses", "ids_equal", "memory"}
    assert set(size["times"]) == {"ours"} and set(size["times"]["ours"]) == {"lora", "full", "gemm", "generate"}
    assert all(len(turns) == 1 for turns in size["times"]["ours"].values()), "a round to warm up was counted"
    assert all(seconds > 0 for part in ("forward_backward", "optimizer")
               for seconds in size["times"]["ours"]["lora"][0][part])
    assert 0 < size["flops"]["lora"] < size["flops"]["full"]
    assert size["first_losses"]["ours"]["lora"] == size["first_losses"]["ours"]["full"]
    assert all(kind["peak"] > kind["base"] > 0 for kind in size["memory"]["ours"].values())
    assert set(run["engine"]["ours"][0]) == {"seconds", "bare"} and run["growth"] == {}
    rates, qlora = run["quantize"], run["qlora"]["d64"]
    assert rates["matrix"] == 512 and all(len(sides["minipeft"]) == 1 for sides in rates["times"].values())
    assert all(seconds > 0 for sides in rates["times"].values() for seconds in sides["minipeft"][0]["decode"])
    assert set(qlora["times"]["ours"]) == {"lora", "qlora", "kept", "gemm"} and qlora["flops"] == size["flops"]["lora"]
    assert qlora["first_losses"]["ours"]["qlora"] == qlora["first_losses"]["ours"]["kept"]
    assert qlora["first_losses"]["ours"]["lora"] == size["first_losses"]["ours"]["lora"]
    weights = {kind: found["weights"] for kind, found in qlora["memory"]["ours"].items()}
    assert weights["qlora"] < weights["lora"] < weights["kept"]


def test_it_says_what_machine_it_ran_on(alone):
    done, run, _ = alone
    machine = run["machine"]
    assert machine["cores"] >= 1 and machine["cpu"] and machine["system"] and "3." in machine["python"]
    for text in (machine["cpu"], f"{machine['cores']} cores", "GiB", "load average before the run",
                 f"NumPy {numpy.__version__}", "BLAS", "1 threads", "dropout 0", "heap that is kept", run["date"]):
        assert text in done.stdout.replace("\n    ", " ")


def test_without_matplotlib_it_says_that_it_drew_no_picture(alone):
    done, _, folder = alone
    assert "No picture was drawn, because matplotlib is not installed" in done.stdout
    assert [file.name for file in folder.iterdir()] == ["benchmark.json"]


def test_a_line_for_each_stage_goes_to_standard_error_and_no_cursor_moves_off_a_terminal(alone):
    done, _, _ = alone
    assert "\r" not in done.stderr and "memory of a step" in done.stderr
    assert [line.split(":")[0].split("s  ")[1] for line in done.stderr.splitlines() if "round" in line] == [
        "d64", "quantizing", "d64, QLoRA"]


def test_a_recorded_run_is_shown_as_it_was_and_drawn(alone, bench, tmp_path, capsys):
    done, run, folder = alone
    assert bench("run").main(["--show", str(folder / "benchmark.json"), "--out", str(tmp_path)]) == 0
    shown, end = capsys.readouterr().out.rsplit("\n\n", 1)
    assert shown == done.stdout.rsplit("\n\n", 1)[0] and "figures and picture" in end
    assert json.loads((tmp_path / "benchmark.json").read_text("utf-8")) == run
    assert (tmp_path / "benchmark.png").read_bytes()[:4] == b"\x89PNG"


def test_a_peer_that_dies_is_reported_with_its_last_words_and_fails_a_checked_run(tmp_path):
    done = run_quick(tmp_path, {"torch": DYING, "matplotlib": ABSENT.format("matplotlib")})
    assert done.returncode == 1, done.stderr
    run = json.loads((tmp_path / "out" / "benchmark.json").read_text("utf-8"))
    assert run["absent"] is None and {failure["side"] for failure in run["failures"]} - {"bitsandbytes"} == {
        "torch, heap kept"}
    assert "the process ended with exit status 3" in done.stdout and "    last words" in done.stdout
    assert run["sizes"]["d64"]["times"]["ours"]["lora"] and run["sizes"]["d64"]["memory"]["ours"]["full"]
    assert "5 of 23 limits are not met" in done.stderr


FAKE = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    if "about" in line:
        print(json.dumps({"cheese": 1}), flush=True)
        continue
    """


@pytest.mark.parametrize("answer, what, tail", [
    ("sys.exit('out of cheese')", "step lora: the process ended with exit status 1", ["out of cheese"]),
    ("print('cheese', flush=True)", "step lora: answered 'cheese'; expected a JSON object", []),
    ("print('[1]', flush=True)", "step lora: answered '[1]'; expected a JSON object", []),
    ("print(json.dumps({'error': 'ValueError: cheese'}), flush=True)", "step lora: ValueError: cheese", []),
    ("import time; time.sleep(60)", "step lora: no answer within 0.5 s", [])])
def test_a_process_that_fails_raises_with_what_happened(bench, answer, what, tail):
    module = bench("process")
    with module.Process("fake", [sys.executable, "-c", FAKE + answer], dict(os.environ), 30) as process:
        assert process.ask(do="about") == {"cheese": 1}
        process.timeout = 0.5 if "within" in what else 30
        with pytest.raises(module.Failed) as raised:
            process.ask(do="step", kind="lora")
    assert str(raised.value) == what and raised.value.lines == tail
    assert process.process.returncode is not None, "it was left running"


class Answering:
    """A process that notes who was asked what, and fails at its n-th question."""

    def __init__(self, name, notes, failure=None):
        self.name, self.notes, self.failure, self.asked = name, notes, failure, 0

    def ask(self, do, **arguments):
        self.notes.append((self.name, do))
        self.asked += 1
        if self.failure and self.asked == self.failure[0]:
            raise self.failure[1]
        return {"seconds": [1.0]}


def bench_of(bench, monkeypatch, rounds=2, warmup=1):
    module = bench("rounds")
    monkeypatch.setattr(module, "SETTLE", 0)
    plan = module.Plan(sizes=("d64",), parts=module.PARTS, rounds=rounds, warmup=warmup, threads=1, dropout=0.0,
                       backend="numpy", sides={"ours": ("ours", True), "torch": ("torch", False)}, timeout=9, turn=0.0)
    return module, module.Bench(plan, lambda text: None)


def test_each_round_measures_everything_in_every_process_and_the_order_is_reversed(bench, monkeypatch):
    _, bench = bench_of(bench, monkeypatch)
    notes, recorded = [], []
    processes = {name: Answering(name, notes) for name in ("ours", "torch")}
    bench.rounds(processes, {"a": {"do": "step"}, "b": {"do": "gemm"}}, "d64",
                 lambda side, what, turn, answer: recorded.append((side, what, turn)))
    forth = [(side, do) for do in ("step", "gemm") for side in ("ours", "torch")]
    back = [(side, do) for do in ("step", "gemm") for side in ("torch", "ours")]
    assert notes == [*forth, *back, *forth]
    assert sorted(recorded) == sorted((s, w, t) for s in ("ours", "torch") for w in "ab" for t in range(3))


def test_a_measure_for_some_sides_is_not_asked_of_the_others(bench, monkeypatch):
    _, bench = bench_of(bench, monkeypatch)
    notes = []
    processes = {name: Answering(name, notes) for name in ("ours", "torch")}
    bench.rounds(processes, {"a": {"do": "step"}, "b": {"do": "gemm", "sides": ["ours", "nobody"]}}, "d64",
                 lambda *_: None)
    assert ("torch", "gemm") not in notes and notes.count(("ours", "gemm")) == 3 == notes.count(("torch", "step"))


def test_a_process_that_fails_is_left_out_from_then_on_and_the_others_go_on(bench, monkeypatch):
    module, bench = bench_of(bench, monkeypatch)
    notes = []
    failed = module.Failed("step: no answer within 9 s", ["last words"])
    processes = {"ours": Answering("ours", notes), "torch": Answering("torch", notes, (2, failed))}
    bench.rounds(processes, {"a": {"do": "step"}}, "d64", lambda *_: None)
    assert [name for name, _ in notes].count("torch") == 2 and [name for name, _ in notes].count("ours") == 3
    assert list(processes) == ["ours"]
    assert bench.result["failures"] == [{"side": "torch", "doing": "d64", "what": "step: no answer within 9 s",
                                         "stderr": ["last words"]}]


def test_a_peer_that_is_not_installed_is_no_failure(bench, monkeypatch):
    module, bench = bench_of(bench, monkeypatch)
    processes = {"torch": Answering("torch", [], (1, module.Absent("No module named 'peft'")))}
    assert bench.asked(processes, "about") == {} and processes == {}
    assert bench.result["failures"] == [] and bench.result["absent"] == "No module named 'peft'"


def test_medians_are_of_the_rounds_and_each_round_is_one_number(bench):
    figures, rounds = bench("figures"), bench("rounds")
    assert rounds.median([[1, 2, 9], [5], [3, 4]]) == 3.5
    assert rounds.median([[1] * 99, [5], [6]]) == 5
    turns = [{"forward_backward": [1, 2, 3], "optimizer": [30, 20, 10]}, {"forward_backward": [1], "optimizer": [2]}]
    assert figures.step(turns) == (22 + 3) / 2
    assert rounds.in_order("abc", 0) == list("abc") and rounds.in_order("abc", 1) == list("cba")


SIDES = ("ours", "torch", "torch, heap kept")


def recorded_run(bench, **changes):
    """A run by hand in which every bar holds. changes: {"size.side.figure": value}; figures lora, full, qlora, kept,
    generate in seconds (of a step, of a token), gemm in FLOP/s, lora_bytes, full_bytes, lora_weights, loss, flops; and
    {"coding.library.figure": bytes per second}."""
    sizes, rounds = bench("sizes"), bench("rounds")
    values = {"lora": 0.6, "full": 1.0, "gemm": 1e11, "lora_bytes": 40.0, "full_bytes": 100.0, "loss": 5.0,
              "flops": 3.6e10, "qlora": 0.66, "kept": 0.63, "qlora_bytes": 42.0, "kept_bytes": 41.0,
              "lora_weights": 100.0, "qlora_weights": 30.0, "kept_weights": 130.0, "encode": 2e8, "decode": 2e9,
              "copy": 8e9}

    def of(size, side, figure):
        default = (0.5 if side == "ours" else 1.0) if figure == "generate" else values.get(figure)
        return changes.get(f"{size}.{side}.{figure}", default)

    def figures_of(size):
        return {
            "shape": {}, "ids_equal": {}, "flops": {"lora": of(size, "ours", "flops"), "full": 6e10},
            "first_losses": {side: {kind: of(size, side, "loss") for kind in sizes.KINDS} for side in SIDES},
            "memory": {side: {kind: {"base": 0.0, "peak": of(size, side, f"{kind}_bytes"), "counted": "resident memory"}
                              for kind in sizes.KINDS} for side in SIDES},
            "times": {side: {
                **{kind: [{"forward_backward": [of(size, side, kind)], "optimizer": [0.0]}] for kind in sizes.KINDS},
                "generate": [{"seconds": [sizes.NEW_TOKENS * of(size, side, "generate")]}],
                "gemm": [{"rate": [of(size, side, "gemm")]}]} for side in SIDES}}

    def qlora_of(size):
        kinds = ("lora", *sizes.QLORA)
        return {"flops": of(size, "ours", "flops"), "absent": {},
                "first_losses": {"ours": {"lora": 5.0, "qlora": 5.1, "kept": 5.1},
                                 "torch": {"lora": 5.0, "qlora": 5.2}},
                "times": {"ours": {**{kind: [{"forward_backward": [of(size, "ours", kind)], "optimizer": [0.0]}]
                                      for kind in kinds}, "gemm": [{"rate": [of(size, "ours", "gemm")]}]}},
                "memory": {"ours": {kind: {"base": 0.0, "peak": of(size, "ours", f"{kind}_bytes"),
                                           "weights": of(size, "ours", f"{kind}_weights"),
                                           "counted": "resident memory"} for kind in kinds}}}

    return {
        "program": "benchmark.py", "date": "a day", "absent": None, "failures": [], "about": {}, "growth": {},
        "engine": {side: [{"seconds": [sizes.LINKS * 5e-6], "bare": [sizes.LINKS * 1e-6]}] for side in SIDES},
        "machine": {"cpu": "a processor", "cores": 2, "memory_bytes": None, "system": "a system", "python": "a python",
                    "load_before": 0.5},
        "settings": {"sizes": list(sizes.SIZES), "parts": list(rounds.PARTS), "rounds": 9, "warmup": 1, "threads": 2,
                     "dropout": 0.0, "backend": "numpy", "timeout": 9, "turn": 0.3, "matrix": sizes.MATRIX,
                     "sides": {"ours": ["ours", True], "torch": ["torch", False], SIDES[2]: ["torch", True]}},
        "sizes": {size: figures_of(size) for size in sizes.SIZES},
        "quantize": {"matrix": sizes.MATRIX, "absent": {}, "times": {coding: {library: [
            {what: [4 * sizes.MATRIX ** 2 / of(coding, library, what)] for what in ("encode", "decode", "copy")}]
            for library, has in sizes.CODERS.items() if coding in has} for coding in sizes.CODINGS}},
        "qlora": {size: qlora_of(size) for size in sizes.SIZES}}


# {how a bar begins: the changes to a run, of the bar's size, that make its figure f}
MADE = {
    "LoRA step / torch": lambda f: {f"{side}.lora": 0.6 / f for side in SIDES[1:]},
    "full step": lambda f: {f"{side}.full": 1.0 / f for side in SIDES[1:]},
    "generation": lambda f: {f"{side}.generate": 0.5 / f for side in SIDES[1:]},
    "LoRA's peak memory / torch": lambda f: {f"{side}.lora_bytes": 40 / f for side in SIDES[1:]},
    "first losses": lambda f: {f"{SIDES[2]}.loss": 5 * (1 + f)},
    "LoRA step / our": lambda f: {"ours.full": 0.6 / f},
    "LoRA's peak memory / our": lambda f: {"ours.full_bytes": 40 / f},
    "LoRA step's FLOPs": lambda f: {"ours.flops": f * 0.6 * 1e11},
    "the slowest kind's quantizing": lambda f: {"minipeft.encode": f * 1e6},
    "the slowest kind's dequantizing": lambda f: {"minipeft.decode": f * 1e9},
    "QLoRA step": lambda f: {"ours.qlora": 0.6 * f},
    "QLoRA's weights / ": lambda f: {"ours.qlora_weights": 100 * f},
    "QLoRA's weights and step": lambda f: {"ours.qlora_bytes": (100 + 40) * f - 30}}


@pytest.mark.parametrize("at", range(23))
def test_each_bar_holds_just_within_it_and_fails_just_beyond(bench, monkeypatch, tmp_path, capsys, at):
    bars, program = bench("bars"), bench("run")
    monkeypatch.setattr(program, "draw", lambda run, file: None)
    bar = bars.BARS[at]
    make = next(make for start, make in MADE.items() if bar.what.startswith(start))
    for within in (True, False):
        figure = bar.limit * (1 + 1e-4 * (1 if within == bar.at_least else -1))
        run = recorded_run(bench, **{f"{bar.size or 'int3'}.{name}": value for name, value in make(figure).items()})
        rows = bars.judged(run)
        assert rows[at]["figure"] == pytest.approx(figure, rel=1e-6)
        assert [row["what"] for row in rows if row["verdict"] != bars.HOLDS] == ([] if within else [bar.what])
        (tmp_path / "run.json").write_text(json.dumps(run))
        arguments = ["--show", str(tmp_path / "run.json"), "--out", str(tmp_path)]
        assert program.main(arguments) == 0 and program.main([*arguments, "--check"]) == (not within)
        assert ("FAILS" in capsys.readouterr().out) == (not within)


def test_every_bar_is_there(bench):
    bars = bench("bars").BARS
    assert len(bars) == 23
    assert {(bar.limit, bar.at_least) for bar in bars} == {
        (1.15, False), (1.3, False), (0.7, False), (1.0, False), (0.45, False), (1e-5, False), (0.55, True),
        (100, True), (1, True), (0.4, False), (0.8, False)}


def test_the_ratio_is_to_the_better_of_the_peers_settings_in_each_figure(bench):
    figures = bench("figures")
    run = recorded_run(bench, **{"d64.torch.lora": 0.5, "d64.torch, heap kept.full": 0.8,
                                 "d64.torch.lora_bytes": 160.0, "d64.torch, heap kept.lora_bytes": 80.0})
    f = figures.Figures(run)
    assert f.time_ratio("d64", "lora") == 0.6 / 0.5 and f.time_ratio("d64", "full") == 1 / 0.8
    assert f.memory_ratio("d64", "lora") == 0.5 and f.lora_of_full("d64", "torch") == (0.5, 1.6)


def test_a_loss_that_is_no_number_is_not_passed_over(bench):
    """Whichever of the losses it is; the largest of some numbers and NaN depends on their order."""
    bars = bench("bars")
    for side in SIDES[1:]:
        run = recorded_run(bench, **{f"d64.{side}.loss": float("nan")})
        assert [row["what"] for row in bars.missed(bars.judged(run))] == ["first losses differ by, relatively, d64"]


def test_a_peak_that_may_lie_before_the_steps_is_no_figure(bench):
    """Two processes whose loading took the most would both have taken nothing: a ratio of 0 that holds."""
    bars, run = bench("bars"), recorded_run(bench)
    for kind in run["sizes"]["d64"]["memory"]["ours"].values():
        kind["counted"] = "the process's own peak since it began, which may lie before the steps"
    assert {row["what"]: row["verdict"] for row in bars.judged(run)}[
        "LoRA's peak memory / torch + peft, d64"] == bars.MISSING


@pytest.mark.parametrize("break_it, excused, missed", [
    (lambda run: run["sizes"]["t5-small"]["memory"].clear(), None, 2),
    (lambda run: [run["sizes"].pop("t5-small"), run["settings"]["sizes"].remove("t5-small")], "not asked for", 0),
    (lambda run: [run["settings"]["parts"].remove("memory"), *(s["memory"].clear() for s in run["sizes"].values())],
     "not asked for", 0),
    (lambda run: [run.update(absent="no torch"), *(s["times"].pop(side) for s in run["sizes"].values()
                                                   for side in SIDES[1:])], "torch + peft are not installed", 0),
    (lambda run: run["settings"].update(dropout=0.1), None, 0)])
def test_what_was_not_measured_fails_a_checked_run_only_if_it_was_asked_for(bench, break_it, excused, missed):
    bars = bench("bars")
    run = recorded_run(bench)
    break_it(run)
    rows = bars.judged(run)
    assert len(bars.missed(rows)) == missed
    assert {row["excused"] for row in rows if row["verdict"] == bars.MISSING} == (
        set() if not missed and excused is None else {excused})
    text = "\n".join(bars.lines(rows))
    assert text.count("not measured") == sum(row["verdict"] == bars.MISSING for row in rows)


def test_a_ratio_is_that_of_each_round_and_how_much_they_differ_is_said_with_it(bench):
    """To the peer's better setting. A machine that is ten times slower for a while moves no ratio."""
    figures, tables = bench("figures"), bench("tables")
    run = recorded_run(bench)
    for side, seconds in (("ours", (1, 20, 3, 40, 5)), ("torch", (1, 10, 1, 10, 1)), (SIDES[2], (9, 90, 9, 90, 9))):
        run["sizes"]["d64"]["times"][side]["lora"] = [{"forward_backward": [s], "optimizer": [0]} for s in seconds]
    assert figures.Figures(run).time_ratio("d64", "lora") == 3
    assert figures.Figures(run).quartiles("d64", "lora") == (2.0, 4.0)
    assert figures.Figures(run).quartiles("d256", "lora") is None
    assert "2.00 .. 4.00" in tables.report(run)


def test_the_slowest_kind_counts_and_no_rate_is_told_while_one_is_missing(bench):
    figures = bench("figures")
    run = recorded_run(bench, **{"q5_1.minipeft.decode": 5e8, "nf4.bitsandbytes.decode": 1e8})
    assert figures.Figures(run).slowest("decode") == pytest.approx(5e8)
    assert figures.Figures(run).of_copy("q5_1", "decode") == pytest.approx(5e8 / 8e9)
    run["quantize"]["matrix"] -= 1
    assert figures.Figures(run).slowest("decode") is None
    run["quantize"]["matrix"] += 1
    del run["quantize"]["times"]["int2"]["minipeft"]
    assert figures.Figures(run).slowest("decode") is None
    assert [row["what"] for row in bench("bars").missed(bench("bars").judged(run))] == [
        "the slowest kind's quantizing, MB/s of float32 on one core",
        "the slowest kind's dequantizing, GB/s of float32 on one core"]


def test_losses_on_a_quantized_base_are_compared_with_the_peers_and_those_of_kept_weights_with_ours(bench):
    figures = bench("figures").Figures(recorded_run(bench))
    assert figures.qlora_gap("d64", "torch", "qlora") == pytest.approx(5.2 / 5.1 - 1)
    assert figures.qlora_gap("d64", "ours", "kept") == figures.qlora_gap("d64", "torch", "lora") == 0
    assert figures.qlora_gap("d64", "ours", "qlora") is figures.qlora_gap("d64", "torch", "kept") is None


def test_a_run_without_the_parts_of_quantization_is_shown_without_their_tables(bench, tmp_path):
    """As the runs that were recorded before there were any."""
    run = recorded_run(bench)
    whole = bench("tables").report(run)
    for part in ("quantize", "qlora"):
        del run[part]
        run["settings"]["parts"].remove(part)
    shown = bench("tables").report(run)
    assert "on one core; NumPy copies" in whole and "NF4, kept" in whole
    assert "on one core; NumPy copies" not in shown and "NF4, kept" not in shown
    assert bench("bars").missed(bench("bars").judged(run)) == []


def test_growth_is_told_relative_to_proportional_growth(bench):
    tables = bench("tables")
    run = recorded_run(bench)
    turns = {side: lambda s: [{"forward_backward": [s], "optimizer": [0.0]}] for side in ("ours", SIDES[2])}
    run["growth"] = {"batch": [
        {"value": 4, "times": {side: make(0.1) for side, make in turns.items()}},
        {"value": 8, "times": {"ours": turns["ours"](0.2), SIDES[2]: turns["ours"](0.4)}},
        {"value": 16, "times": {"ours": turns["ours"](0.2)}}]}
    rows = [line.split() for line in tables.report(run).splitlines()]
    assert ["4", "100", "100", "1.00", "1.00", "1.00"] in rows
    assert ["8", "200", "400", "1.00", "2.00", "0.50"] in rows
    assert ["16", "200", "-", "0.50", "-", "-"] in rows


def test_a_picture_is_drawn_of_a_full_run_and_of_an_empty_one(bench, tmp_path):
    draw = bench("picture").draw
    run = recorded_run(bench)
    run["growth"] = {"depth": [{"value": v, "times": {"ours": [{"forward_backward": [v], "optimizer": [0]}]}}
                               for v in (1, 2)]}
    draw(run, tmp_path / "full.png")
    draw({**run, "sizes": {}, "growth": {}, "quantize": {}, "qlora": {}}, tmp_path / "empty.png")
    assert (tmp_path / "full.png").stat().st_size > (tmp_path / "empty.png").stat().st_size > 0
    run["settings"]["parts"] = ["qlora"]
    draw(run, tmp_path / "part.png")
    assert 0 < (tmp_path / "part.png").stat().st_size < (tmp_path / "full.png").stat().st_size


@pytest.mark.parametrize("arguments, message", [
    (["--rounds", "6"], "--rounds is 6; expected at least 7"),
    (["--quick", "--rounds", "0"], "--rounds is 0; expected at least 1"),
    (["--threads", "0"], "--threads is 0; expected at least 1"),
    (["--dropout", "1"], "--dropout is 1.0; expected a rate in [0, 1)"),
    (["--timeout", "0"], "--timeout is 0.0; expected seconds > 0"),
    (["--sizes", "d65"], "invalid choice: 'd65'"),
    (["--quick", "--sizes", "d64"], "--quick chooses sizes and parts itself")])
def test_wrong_arguments_are_named_with_what_was_expected(bench, capsys, arguments, message):
    with pytest.raises(SystemExit) as raised:
        bench("run").main(arguments)
    assert raised.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "not json", "[]", "{}"])
def test_a_file_that_is_no_recorded_run_is_refused_by_name(bench, tmp_path, text):
    if text is not None:
        (tmp_path / "odd.json").write_text(text)
    with pytest.raises(SystemExit, match="--show .*odd.json: "):
        bench("run").main(["--show", str(tmp_path / "odd.json"), "--out", str(tmp_path / "out")])


def test_without_cupy_that_backend_is_refused_with_the_remedy_before_any_work(bench, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(SystemExit, match="needs CuPy: pip install"):
        bench("run").main(["--backend", "cupy", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_plan_follows_the_arguments(bench):
    program = bench("run")

    def plan(*arguments):
        return program.plan(program.arguments(list(arguments)))

    assert plan().sides == {"ours": ("ours", True), "torch": ("torch", False), "torch, heap kept": ("torch", True)}
    assert plan("--allocator", "system").sides["ours"] == ("ours", False)
    assert list(plan("--backend", "cupy").sides) == ["ours", "torch"]
    assert plan("--backend", "cupy").growing == plan("--allocator", "system").growing == ["ours", "torch"]
    assert plan().growing == ["ours", "torch, heap kept"]
    assert list(plan("--quick").sides) == ["ours", "torch, heap kept"]
    assert list(plan("--quick", "--allocator", "system").sides) == ["ours", "torch"]
    assert plan().rounds == 9 and plan().parts == bench("rounds").PARTS
    assert plan("--only", "memory", "steps").parts == ("steps", "memory")
    assert plan("--sizes", "d256", "d64").sizes == ("d64", "d256")


def test_a_process_gets_its_threads_and_neither_our_backend_nor_a_network(bench, monkeypatch):
    monkeypatch.setenv("MINIPEFT_BACKEND", "cupy")
    found = bench("process").environment(3)
    assert {found[name] for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")} == {"3"}
    assert "MINIPEFT_BACKEND" not in found and found["HF_HUB_OFFLINE"] == "1"


def test_the_sizes_and_that_the_large_one_is_t5_small(bench):
    sizes = bench("sizes")
    assert sizes.SIZES["t5-small"].config(0.1) == minipeft.T5Config()
    assert [(s.d_model, s.layers, s.vocab_size, s.batch, s.source, s.target) for s in sizes.SIZES.values()] == [
        (64, 2, 128, 32, 32, 32), (256, 4, 2048, 16, 64, 64), (512, 6, 32128, 8, 128, 64)]
    assert [[value for value, _ in sizes.grown(what)] for what in sizes.GROWTH] == [
        [4, 8, 16, 32], [16, 32, 64, 128, 256], [1, 2, 4, 8]]
    long = sizes.grown("length")[-1][1]
    assert (long.batch, long.source, long.target, long.layers) == (4, 256, 256, 4)


def test_decoding_makes_every_step_because_the_end_token_cannot_win(bench, tmp_path):
    sizes = bench("sizes")
    size = sizes.SIZES["d64"]
    size.write_model(tmp_path, 0.0)
    model, batch = minipeft.T5.from_pretrained(tmp_path), size.ids()
    assert all(ids.min() >= 2 for ids in batch.values()) and batch["input_ids"].shape == (32, 32)
    logits = model(batch["input_ids"], batch["labels"]).data
    assert (logits[..., 1] == 0).all() and (logits.max(axis=-1) > 0).all()
    answers = model.generate(batch["input_ids"], max_new_tokens=sizes.NEW_TOKENS)
    assert answers.shape == (32, 1 + sizes.NEW_TOKENS) and not (answers == 1).any()


class Greedy:
    """A library whose step takes 48 MiB for a moment."""

    def tiny(self, kind):
        pass

    def device_bytes(self):
        return None

    def forward_backward(self, kind):
        self.held = numpy.ones(48 * 2 ** 20, numpy.uint8)
        return 1.0

    def update(self, kind):
        del self.held


def test_the_peak_of_a_step_is_what_it_took_above_the_loaded_model(bench):
    memory = bench("memory")
    if not memory.REFERENCES.exists():
        pytest.skip("the system cannot start a high-water mark anew")
    found = memory.of_two_steps(Greedy(), "lora")
    assert 47 <= (found["peak"] - found["base"]) / 2 ** 20 <= 60 and found["losses"] == [1.0, 1.0]


class Waiting:
    """A library that waits while it quantizes, as one does whose core others use."""

    def matrix(self, values):
        return values

    def coder(self, kind, options):
        return lambda W: time.sleep(0.05), lambda codes: None

    def synchronize(self):
        pass


def test_the_time_of_other_programs_does_not_count_in_the_rates_of_one_core(bench):
    found = bench("worker").Worker(Waiting(), 0.0).coding("nf4", 8)
    assert set(found) == {"encode", "decode", "copy"} and 0 <= found["encode"][0] < 0.04


def test_what_is_quantized_is_what_the_library_puts_into_a_model(bench):
    """And each kind of the table is one that `minipeft.quantize` knows."""
    sizes, coders = bench("sizes"), bench("coders")
    assert set(sizes.CODERS) == {"minipeft", "bitsandbytes", "gguf"}
    assert all(set(has) <= set(sizes.CODINGS) for has in sizes.CODERS.values())
    side = coders.made("minipeft")
    W = side.matrix(numpy.random.default_rng(0).normal(0, 0.05, (8, 64)).astype("float32"))
    for kind, options in sizes.CODINGS.values():
        encode, decode = side.coder(kind, options)
        assert encode(W).nbytes < W.nbytes / 2
        assert 0 < numpy.linalg.norm(decode(encode(W)) - W) < numpy.linalg.norm(W) / 2


@pytest.mark.parametrize("library", ["bitsandbytes", "gguf"])
def test_the_peers_quantize_the_same_numbers_to_the_same_numbers(bench, library):
    pytest.importorskip(library)
    sizes, coders = bench("sizes"), bench("coders")
    values = numpy.random.default_rng(0).normal(0, 0.05, (64, 256)).astype("float32")
    for name in sizes.CODERS[library]:
        decoded = {}
        for side in map(coders.made, ("minipeft", library)):
            encode, decode = side.coder(*sizes.CODINGS[name])
            decoded[type(side)] = numpy.asarray(decode(encode(side.matrix(values)))).reshape(64, 256)
        ours, theirs = decoded.values()
        assert abs(ours - theirs).max() <= 1e-6 * abs(values).max(), name


def test_the_weights_of_a_quantized_model_are_its_codes_and_those_that_are_kept(bench, tmp_path):
    sizes, ours = bench("sizes"), bench("ours")
    size = sizes.SIZES["d64"]
    size.write_model(tmp_path, 0.0)
    side = ours.Ours("numpy")
    side.load(tmp_path, size, ("lora", *sizes.QLORA))
    bytes_of = {kind: side.weight_bytes(kind) for kind in side.models}
    quantized = [slot.base for slot in side.models["qlora"].slots.values() if hasattr(slot.base, "scheme")]
    numbers = sum(W.shape[0] * W.shape[1] for W in quantized)
    assert bytes_of["kept"] - bytes_of["qlora"] == 4 * numbers
    assert bytes_of["lora"] - bytes_of["qlora"] == 4 * numbers - sum(W.nbytes for W in quantized)
    losses = {kind: side.forward_backward(kind) for kind in side.models}
    assert losses["kept"] == losses["qlora"] != losses["lora"]


def test_where_the_mark_cannot_be_reset_it_says_how_the_peak_was_counted(bench, monkeypatch, tmp_path):
    memory = bench("memory")
    for name in ("STATUS", "REFERENCES"):
        monkeypatch.setattr(memory, name, tmp_path / "nowhere" / name)
    found = memory.of_two_steps(Greedy(), "lora")
    assert "since it began" in found["counted"] and found["peak"] >= found["base"] > 0


def test_the_first_step_of_an_installation_runs_and_its_sources_are_complete(bench, tmp_path):
    install = bench("install")
    exec(install.OURS, {})
    compile(install.TORCH, "TORCH", "exec")
    copied = install.sources(tmp_path / "sources")
    assert (copied / "minipeft" / "py.typed").exists() and (copied / "setup.cfg").exists()
    (tmp_path / "counted").mkdir()
    (tmp_path / "counted" / "seven").write_text("7 bytes")
    (tmp_path / "counted" / "link").symlink_to(copied, target_is_directory=True)
    assert install.size_of(tmp_path / "counted") == 7
    assert install.pinned("peft") == "peft" or install.pinned("peft").startswith("peft==")


@NEEDS_TORCH
def test_both_libraries_read_the_same_model_and_compute_the_same(bench, tmp_path):
    sizes, process = bench("sizes"), bench("process")
    size = sizes.SIZES["d64"]
    size.write_model(tmp_path, 0.0)
    quantized = ("qlora",) if importlib.util.find_spec("bitsandbytes") else ()
    answers = {}
    for library in ("ours", "torch"):
        argv = process.command(library, "numpy", True, 0.0)
        with process.Process(library, argv, process.environment(1), 120) as worker:
            worker.ask(do="load", folder=str(tmp_path), size=vars(size), kinds=(*sizes.MODELS, *quantized))
            answers[library] = {
                "losses": [worker.ask(do="step", kind=kind)["losses"][0]
                           for kind in ("full", "full", "full", "lora", *quantized)],
                "ids": worker.ask(do="generate", new=sizes.NEW_TOKENS)["ids"],
                "trained": worker.ask(do="memory", kind="lora")["losses"]}
    assert answers["torch"]["losses"] == pytest.approx(answers["ours"]["losses"], rel=1e-5)
    assert numpy.mean(numpy.array(answers["torch"]["ids"]) == answers["ours"]["ids"]) > 0.9
    assert answers["torch"]["losses"][2] < answers["torch"]["losses"][0], "the optimizer did not step"


class FakeCuPy:
    """The strict namespace, with the few names of CuPy that concern a device. It counts how often it was waited for."""

    def __init__(self):
        self.waits, self.held = 0, 0
        runtime = SimpleNamespace(getDeviceCount=lambda: 1, getDeviceProperties=lambda device: {"name": b"a GPU"})
        self.cuda = SimpleNamespace(runtime=runtime, get_current_stream=lambda: SimpleNamespace(synchronize=self.wait))
        self.__version__ = "14"

    def wait(self):
        self.waits += 1

    def get_default_memory_pool(self):
        """Of a pool that has grown by a hundred bytes whenever it is asked."""
        self.held += 100
        return SimpleNamespace(total_bytes=lambda: self.held, free_all_blocks=lambda: None)

    def __getattr__(self, name):
        return getattr(strict, name)


def test_on_a_gpu_our_side_stays_on_the_device_and_waits_for_it_at_each_reading_of_the_clock(
        bench, monkeypatch, tmp_path):
    cupy, sizes, worker = FakeCuPy(), bench("sizes"), bench("worker")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(worker, "bare_additions", lambda: None)
    monkeypatch.setattr(worker, "MATRIX", 8)
    size = dataclasses.replace(sizes.SIZES["d64"], batch=2, source=4, target=3)
    size.write_model(tmp_path, 0.0)
    answers = {}
    for backend in ("cupy", "numpy"):
        side = worker.made("ours", backend)
        served = worker.Worker(side, 0.0)
        with side.running():
            served.load(str(tmp_path), vars(size), list(sizes.MODELS))
            before = cupy.waits
            answers[backend] = [served.step("full")["losses"], served.step("lora")["losses"],
                                served.generate(5)["ids"]]
            assert cupy.waits - before == (10 if backend == "cupy" else 0)    # around five parts of turns
            assert served.gemm()["rate"][0] > 0 and served.chain()["seconds"][0] > 0
            about, memory = served.about(), served.memory("lora")
        assert (about.get("GPU"), "CuPy" in about) == (("a GPU", True) if backend == "cupy" else (None, False))
        if backend == "cupy":
            assert memory["counted"] == "the device's pool" and memory["peak"] > memory["base"]
            assert all(isinstance(p.data, strict.ndarray) for p in side.params["lora"].values())
    assert answers["cupy"] == answers["numpy"]
