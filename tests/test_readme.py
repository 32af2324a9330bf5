"""The README's promises: its code runs, its table is what the example printed, its reading path is short."""
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import minipeft

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_the_sample_runs_and_has_fifteen_lines(tmp_path):
    code = re.search(r"<!-- sample -->\n```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "percentage of trainable model parameters" in done.stdout and (tmp_path / "reverse.safetensors").is_file()


def test_the_lines_about_one_base_and_many_tasks_run(tmp_path, monkeypatch, capsys):
    code = re.search(r"## One base, many tasks\n\n```python\n(.*?)```", README, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    rng = numpy.random.default_rng(0)
    model = minipeft.T5(minipeft.T5Config(32, 16, 4, 4, 32, 1, 1), rng)
    lora = minipeft.attach(model, minipeft.LoRA(rank=2), rng, "british")
    lora.save("british.safetensors")
    lora.remove()
    ids = rng.integers(2, 32, (3, 4))
    exec(code, {"minipeft": minipeft, "model": model, "rng": rng, "ids": ids, "decoder_ids": ids,
                "batch": {"input_ids": ids, "labels": ids}})
    assert "low_rank_linear" in capsys.readouterr().out and list(model.attachments) == ["british", "prompt"]


def test_the_reading_path_is_eight_files_and_1200_lines_ending_in_lora():
    path = re.findall(r"^\| `(minipeft/[\w/]+\.py)` \|", README, re.MULTILINE)
    assert len(path) == 8 and path[-1] == "minipeft/methods/lora.py"
    assert sum(len((ROOT / file).read_text("utf-8").splitlines()) for file in path) <= 1200


def test_the_plug_in_that_is_shown_gets_the_report_that_is_shown_and_conforms_once_it_is_mended(tmp_path):
    code = re.search(r"<!-- plug-in -->\n```python\n(.*?)```", README, re.DOTALL).group(1)
    shown = re.search(r"<!-- its report -->\n```text\n(.*?)```", README, re.DOTALL).group(1)
    wrong = "Layer(W, b, A, B, alpha, dtype)"
    assert wrong in code
    (tmp_path / "mine.py").write_text(code, "utf-8")
    (tmp_path / "mended.py").write_text(code.replace(wrong, "Layer(W, b, A, B, alpha / len(A), dtype)"), "utf-8")
    mine, mended = (subprocess.run([sys.executable, "-m", "minipeft.conformance", "--impl", name], cwd=tmp_path,
                                   capture_output=True, text=True, timeout=120) for name in ("mine", "mended"))
    assert mine.returncode == 1 and shown in mine.stdout, mine.stdout + mine.stderr
    assert mended.returncode == 0 and "Conforms to lora_linear, levels B+E+S, float64, float32" in mended.stdout


@pytest.mark.parametrize("extra", ["examples", "test"])
def test_both_commands_stand_on_a_line_of_their_own_and_name_an_extra_that_exists(extra):
    assert re.search(rf"^pip install -e '\.\[{extra}\]' && ", README, re.MULTILINE)
    assert re.search(rf"^{extra} =$", (ROOT / "setup.cfg").read_text("utf-8"), re.MULTILINE)


def recorded(name: str) -> dict:
    return json.loads((ROOT / "examples" / f"{name}.json").read_text("utf-8"))


def test_the_results_tables_are_those_of_the_recorded_run(monkeypatch):
    """The README holds, letter for letter, what the example's own columns make of the run that it recorded, which has
    every method of the issue's list on three seeds."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    accents, comparison, tables, variants = map(importlib.import_module,
                                                ("accents", "comparison", "tables", "variants"))
    run = recorded("accents")
    rows = [comparison.Row(**row) for row in run.pop("rows")]
    assert run == {"steps": 300, "pairs": 1000, "words": 2000, "side": 500}
    seeds = {name: {row.seed for row in rows if row.method == name} for name in dict.fromkeys(r.method for r in rows)}
    assert seeds == {"base": {None}, "copy American": {None}, **dict.fromkeys(variants.NAMES, {0, 1, 2})}
    for columns in (accents.LEARNED, accents.COST):
        assert tables.as_markdown(rows, columns) in README


def test_the_benchmarks_tables_and_figures_are_those_of_the_recorded_run(monkeypatch):
    """And every bar that the README does not own up to holds."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    bars, tables = importlib.import_module("bench_bars"), importlib.import_module("bench_tables")
    run = recorded("benchmark")
    shown = re.search(r"<!-- benchmark -->\n```text\n(.*?)\n```", README, re.DOTALL).group(1)
    assert len(shown.splitlines()) == 20 and shown in tables.report(run)
    figures = {row["what"]: row["figure"] for row in bars.judged(run)}
    for what, form in (("LoRA step's FLOPs / GEMM rate, t5-small", "{:.0%}"),
                       ("LoRA step / our full step, t5-small", "{:.2f}"),
                       ("LoRA's peak memory / our full step's, t5-small", "{:.2f}")):
        assert form.format(figures[what]).replace("%", " %") in README
    assert [row["what"] for row in bars.missed(bars.judged(run))] == ["generation / torch, d256",
                                                                      "generation / torch, t5-small"]
    assert run["settings"]["rounds"] >= 7 and run["settings"]["dropout"] == 0 and not run["failures"]


def test_the_long_run_of_the_readme_is_the_recorded_one(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    accents, comparison, tables = map(importlib.import_module, ("accents", "comparison", "tables"))
    run = recorded("accents_8000")
    rows = [comparison.Row(**row) for row in run.pop("rows")]
    assert run["pairs"] == 8000 and run["steps"] == 1200
    assert {row.method for row in rows} >= {"base", "full", "LoRA r=8", "scratch"}
    assert tables.as_markdown(rows, accents.LEARNED[:3]) in README


@pytest.mark.parametrize("name, pairs, steps, missed", [
    ("accents", 1000, 300, []), ("accents_8000", 8000, 1200, ["LoRA r=8"])])
def test_the_recorded_runs_reach_the_prototype_within_4_points_as_the_mean_of_three_seeds(monkeypatch, name, pairs,
                                                                                          steps, missed):
    """All but LoRA r=8 at 8,000 pairs, which misses it by half a point, as the README says."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    accents = importlib.import_module("accents")
    short = {}
    for method, there in accents.YARDSTICK[pairs, steps].items():
        found = [row["british"] for row in recorded(name)["rows"] if row["method"] == method]
        assert len(found) == (1 if method == "base" else 3)
        if (by := there - 4 - sum(found) / len(found)) > 0:
            short[method] = by
    assert list(short) == missed and all("misses its bar by half a point" in README and by <= 0.5 + 0.05
                                         for by in short.values())


def test_the_past_tense_table_is_that_of_its_recorded_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    past_tense, tables = importlib.import_module("past_tense"), importlib.import_module("tables")
    run = recorded("past_tense")
    assert run["steps"] == 500 and {row["seed"] for row in run["rows"]} == {None, 0, 1, 2}
    assert tables.as_markdown([past_tense.Row(**row) for row in run["rows"]], past_tense.LEARNED) in README


def test_what_the_readme_links_to_exists():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
