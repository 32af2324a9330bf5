"""The pages' promises: their code runs, their commands exist, their tables are what the programs printed."""
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import minipeft

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text("utf-8") for name in (
    "README.md", "examples/README.md", "examples/benchmark/README.md", "examples/conformance/README.md",
    "minipeft/conformance/README.md")}
README, EXAMPLES, BENCHMARK, PLUG_INS, KIT = PAGES.values()


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
    code = re.search(r"<!-- plug-in -->\n```python\n(.*?)```", KIT, re.DOTALL).group(1)
    shown = re.search(r"<!-- its report -->\n```text\n(.*?)```", KIT, re.DOTALL).group(1)
    wrong = "Layer(W, b, A, B, alpha, dtype)"
    assert wrong in code
    (tmp_path / "mine.py").write_text(code, "utf-8")
    (tmp_path / "mended.py").write_text(code.replace(wrong, "Layer(W, b, A, B, alpha / len(A), dtype)"), "utf-8")
    mine, mended = (subprocess.run([sys.executable, "-m", "minipeft.conformance", "--impl", name], cwd=tmp_path,
                                   capture_output=True, text=True, timeout=120) for name in ("mine", "mended"))
    assert mine.returncode == 1 and shown in mine.stdout, mine.stdout + mine.stderr
    assert mended.returncode == 0 and "Conforms to lora_linear, levels B+E+S, float64, float32" in mended.stdout


def test_the_plug_in_of_the_page_on_real_implementations_conforms(tmp_path):
    code = re.search(r"   ```python\n(.*?)   ```", PLUG_INS, re.DOTALL).group(1)
    (tmp_path / "mymodule.py").write_text("\n".join(line[3:] for line in code.splitlines()), "utf-8")
    done = subprocess.run([sys.executable, "-m", "minipeft.conformance", "--impl", "mymodule", "--vectors-only"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Conforms to lora_linear" in done.stdout, done.stdout + done.stderr


def test_every_block_of_python_on_a_page_is_one_that_a_test_runs():
    """The tests above find each by the marker or the heading before it."""
    found = {name: page.count("```python") for name, page in PAGES.items()}
    tested = re.findall(r"(?:<!-- [\w -]+ -->|## One base, many tasks\n)\n```python", README)
    assert found.pop("README.md") == len(tested)
    assert list(found.values()) == [0, 0, 1, 1]


def commands() -> dict[str, list[str]]:
    """{a command on a page: its words}: the lines of sh blocks, and what stands between single backticks."""
    found = {}
    for page in PAGES.values():
        lines = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
        lines += re.findall(r"(?<!`)`((?:python|pip install -e|pytest) [^`]+)`(?!`)", page)
        for line in lines:
            for command in line.split("  #")[0].split(" && "):
                found[command] = shlex.split(command)
    return found


@pytest.mark.parametrize("command", commands())
def test_every_command_on_a_page_exists_with_its_options(command):
    """A program is asked for its help with the same arguments, and its help names every option."""
    words = commands()[command]
    if words[0] == "pip":
        extras = re.findall(r"^(\w+) =$", (ROOT / "setup.cfg").read_text("utf-8"), re.MULTILINE)
        assert words[:3] == ["pip", "install", "-e"] and words[3] in [f".[{extra}]" for extra in extras]
    elif words[0] == "pytest":
        assert words in (["pytest"], ["pytest", "-m", "quick"])
    else:
        assert words[0] == "python"
        arguments = [word.strip("[]") for word in words[1:] if word not in ("[NAME", "...]")]
        done = subprocess.run([sys.executable, *arguments, "--help"], cwd=ROOT, capture_output=True, text=True,
                              timeout=60)
        assert done.returncode == 0, done.stderr
        options = [word for word in arguments[2 if arguments[0] == "-m" else 1:] if word.startswith("-")]
        assert all(re.search(rf"{option}\b", done.stdout) for option in options), done.stdout


@pytest.mark.parametrize("extra", ["examples", "test"])
def test_both_commands_stand_on_a_line_of_their_own_and_name_an_extra_that_exists(extra):
    assert re.search(rf"^pip install -e '\.\[{extra}\]' && ", README, re.MULTILINE)
    assert re.search(rf"^{extra} =$", (ROOT / "setup.cfg").read_text("utf-8"), re.MULTILINE)


def recorded(name: str) -> dict:
    return json.loads((ROOT / "examples" / "recorded" / f"{name}.json").read_text("utf-8"))


def test_the_results_tables_are_those_of_the_recorded_run(monkeypatch):
    """The page holds, letter for letter, what the example's own columns make of the run that it recorded, which has
    every method on three seeds."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    accents, comparison, tables, variants = map(importlib.import_module,
                                                ("accents", "lab.comparison", "lab.tables", "lab.variants"))
    run = recorded("accents")
    rows = [comparison.Row(**row) for row in run.pop("rows")]
    assert run == {"steps": 300, "pairs": 1000, "words": 2000, "side": 500}
    seeds = {name: {row.seed for row in rows if row.method == name} for name in dict.fromkeys(r.method for r in rows)}
    assert seeds == {"base": {None}, "copy American": {None}, **dict.fromkeys(variants.NAMES, {0, 1, 2})}
    for columns in (accents.LEARNED, accents.COST):
        assert tables.as_markdown(rows, columns) in EXAMPLES


def test_the_benchmarks_tables_and_figures_are_those_of_the_recorded_run(monkeypatch):
    """And every bar holds but those of decoding at the two larger sizes, whose ratios the page gives."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmark"))
    bars, tables = importlib.import_module("bars"), importlib.import_module("tables")
    run = recorded("benchmark")
    shown = re.search(r"<!-- benchmark -->\n```text\n(.*?)\n```", BENCHMARK, re.DOTALL).group(1)
    assert len(shown.splitlines()) == 20 and shown in tables.report(run)
    figures = {row["what"]: row["figure"] for row in bars.judged(run)}
    for what, form in (("LoRA step's FLOPs / GEMM rate, t5-small", "{:.0%}"),
                       ("LoRA step / our full step, t5-small", "{:.2f}"),
                       ("LoRA's peak memory / our full step's, t5-small", "{:.2f}"),
                       *((f"generation / torch, {size}", "{:.2f}") for size in ("d64", "d256", "t5-small"))):
        assert form.format(figures[what]).replace("%", " %") in BENCHMARK
    assert [row["what"] for row in bars.missed(bars.judged(run))] == ["generation / torch, d256",
                                                                      "generation / torch, t5-small"]
    assert run["settings"]["rounds"] >= 7 and run["settings"]["dropout"] == 0 and not run["failures"]


def test_the_long_run_of_the_page_is_the_recorded_one(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    accents, comparison, tables = map(importlib.import_module, ("accents", "lab.comparison", "lab.tables"))
    run = recorded("accents_8000")
    rows = [comparison.Row(**row) for row in run.pop("rows")]
    assert run["pairs"] == 8000 and run["steps"] == 1200
    assert {row.method for row in rows} >= {"base", "full", "LoRA r=8", "scratch"}
    assert tables.as_markdown(rows, accents.LEARNED[:3]) in EXAMPLES


@pytest.mark.parametrize("name, pairs, steps, missed", [
    ("accents", 1000, 300, []), ("accents_8000", 8000, 1200, ["LoRA r=8"])])
def test_the_recorded_runs_reach_the_prototype_within_4_points_as_the_mean_of_three_seeds(monkeypatch, name, pairs,
                                                                                          steps, missed):
    """All but LoRA r=8 at 8,000 pairs, which misses it by half a point."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    accents = importlib.import_module("accents")
    short = {}
    for method, there in accents.YARDSTICK[pairs, steps].items():
        found = [row["british"] for row in recorded(name)["rows"] if row["method"] == method]
        assert len(found) == (1 if method == "base" else 3)
        if (by := there - 4 - sum(found) / len(found)) > 0:
            short[method] = by
    assert list(short) == missed and all(by <= 0.5 + 0.05 for by in short.values())


def test_the_past_tense_table_is_that_of_its_recorded_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    past_tense, tables = importlib.import_module("past_tense"), importlib.import_module("lab.tables")
    run = recorded("past_tense")
    assert run["steps"] == 500 and {row["seed"] for row in run["rows"]} == {None, 0, 1, 2}
    assert tables.as_markdown([past_tense.Row(**row) for row in run["rows"]], past_tense.LEARNED) in EXAMPLES


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_links_to_exists(name):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGES[name]):
        assert ((ROOT / name).parent / target).exists(), target
