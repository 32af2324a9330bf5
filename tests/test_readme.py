"""The pages' promises: their code runs, their commands exist, their tables are what the programs printed."""
import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy
import pytest

import minipeft
from minipeft.attaching.method import METHODS
from tests.attaching.test_merging import losses
from tests.methods.golden import FIXTURES
from tests.planted.bug import Bug
from tests.test_planted_bugs import BUGS

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text("utf-8") for name in (
    "README.md", "examples/README.md", "examples/benchmark/README.md", "examples/conformance/README.md",
    "minipeft/conformance/README.md", "docs/coming_from_peft.md", "docs/glossary.md", "docs/methods.md",
    "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/memory.md", "docs/quantization.md")}
README, EXAMPLES, BENCHMARK, PLUG_INS, KIT, DICTIONARY, GLOSSARY, ALL_METHODS, CONTRIBUTING, CHANGES = \
    list(PAGES.values())[:10]
QUANTIZATION = PAGES["docs/quantization.md"]


def block(page: str, marker: str) -> str:
    """The code or text of the block under <!-- marker -->, without the indentation of a list."""
    found = re.search(rf"<!-- {re.escape(marker)} -->\n *```\w+\n(.*?)^ *```$", page, re.DOTALL | re.MULTILINE)
    assert found, marker
    return textwrap.dedent(found[1])


# ---- the README


def test_the_readme_has_at_most_150_lines():
    assert len(README.splitlines()) <= 150


def without_docstrings(tree: ast.AST) -> str:
    """A dump of the tree, in which comments and docstrings do not count."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def test_the_class_that_is_shown_is_that_of_the_page_of_lora():
    source = ast.parse((ROOT / "minipeft/methods/lora.py").read_text("utf-8"))
    low_rank = next(node for node in source.body if isinstance(node, ast.ClassDef) and node.name == "LowRank")
    shown = ast.parse(block(README, "LowRank")).body
    assert [without_docstrings(node) for node in shown] == [without_docstrings(low_rank)]


def test_the_lines_of_the_first_program_that_are_shown_are_its_own_in_order():
    program = (ROOT / "examples/first_look.py").read_text("utf-8").splitlines()
    rest = iter(program)
    assert all(line in rest for line in block(README, "from first_look.py").splitlines())


def test_the_reading_path_is_at_most_ten_files_and_1300_lines_beginning_with_lora():
    path = re.findall(r"^\| \[(minipeft/[\w/]+\.py)\]\(\1\) \|", README, re.MULTILINE)
    assert path[0] == "minipeft/methods/lora.py" and 8 <= len(path) <= 10
    assert sum(len((ROOT / file).read_text("utf-8").splitlines()) for file in path) <= 1300


def test_the_gradient_of_lora_is_where_the_page_says():
    fused = (ROOT / "minipeft/engine/ops/fused.py").read_text("utf-8")
    assert "In `low_rank_linear` of\n[minipeft/engine/ops/fused.py](minipeft/engine/ops/fused.py)" in README
    for formula in ("dA = s (g B)^T x", "dB = s g^T (x A^T)", "s (g B) A"):
        assert formula in README and formula in fused


def test_there_are_more_planted_bugs_than_the_page_says():
    assert int(re.search(r"of more than (\d+) planted bugs", README)[1]) < len(BUGS)


# ---- code on the pages


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


def test_the_programs_beside_those_of_peft_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = numpy.random.default_rng(0)
    tiny = minipeft.T5(minipeft.T5Config(32, 16, 4, 4, 32, 1, 1), rng)
    tiny.save_pretrained("t5-folder")
    pairs = [(rng.integers(2, 32, 5).tolist(), rng.integers(2, 32, 4).tolist()) for _ in range(9)]
    names = {"pairs": pairs, "ids": rng.integers(2, 32, (3, 5))}
    for marker in ("worked example", "loop by hand", "together"):
        exec(block(DICTIONARY, marker), names)
    assert "percentage of trainable model parameters" in capsys.readouterr().out
    assert list(names["fresh"].attachments) == ["lora", "norms"]
    assert numpy.array_equal(names["before"], tiny.generate(names["ids"]))
    merged = minipeft.T5.from_pretrained("merged")
    assert numpy.array_equal(merged.generate(names["ids"]), names["after"])


def test_a_folder_of_peft_is_loaded_merged_and_written_back_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t5-folder").symlink_to(FIXTURES / "t5" / "v11")
    (tmp_path / "lora-folder").symlink_to(FIXTURES / "adapters" / "lora_qv")
    exec(block(README, "a folder of peft"), names := {"minipeft": minipeft})
    written, merged = names["minipeft"].T5.from_pretrained("t5-folder"), minipeft.T5.from_pretrained("merged-folder")
    minipeft.load(written, "written-back")
    ids = numpy.array([[5, 6, 7, 1]])
    plugged = names["model"](ids, ids).data
    assert written(ids, ids).data.tobytes() == plugged.tobytes()
    assert abs(merged(ids, ids).data - plugged).max() <= 1e-5 * abs(plugged).max()
    with names["lora"].off():
        assert abs(names["model"](ids, ids).data - plugged).max() > 1e-2 * abs(plugged).max()


def test_folders_of_other_libraries_are_compared_and_written_as_the_dictionary_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, there in (("t5-folder", "t5/v11"), ("lora-folder", "adapters/lora_qv"),
                        ("adapterhub-folder", "bottleneck/seq_bn")):
        (tmp_path / name).symlink_to(FIXTURES / there)
    with numpy.load(tmp_path / "lora-folder" / "golden.npz") as g:
        names = {name: g[name] for name in ("input_ids", "labels", "attention_mask")}
        names["expected"] = {name.removeprefix("grad/"): g[name] / g["n_label_tokens"] for name in g.files
                             if name.startswith("grad/")}
    exec(block(DICTIONARY, "files of peft"), names)
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    largest = max(abs(array).max() for array in names["expected"].values())
    assert set(printed) == set(names["expected"]) and max(map(float, printed.values())) < 1e-5 * largest
    first, again = (minipeft.files.read_tensors(f"{name}/adapter_model.safetensors")[0]
                    for name in ("lora-folder", "written-back"))
    assert {key: array.tobytes() for key, array in first.items()} == {
        key: array.tobytes() for key, array in again.items()}
    merged, ids = minipeft.T5.from_pretrained("merged-folder"), names["input_ids"]
    assert numpy.allclose(merged(ids, ids).data, names["model"](ids, ids).data, rtol=0, atol=1e-5)
    exec(block(DICTIONARY, "files of adapterhub"), names)
    assert {key.split(".adapters.")[1][:2] for key in names["theirs"]} == {"a."}
    assert minipeft.load(merged, "for-adapterhub").tensors.keys() == names["adapter"].tensors.keys()


CALLS = sorted({call.replace("\\|", "|") for page in (README, DICTIONARY, ALL_METHODS) for call in re.findall(
    rf"`((?:AdamW|{'|'.join(METHODS)})\([^`]*\))`", page) if "..." not in call})


@pytest.mark.parametrize("call", CALLS)
def test_a_method_on_a_page_can_be_made(call):
    eval(call, {**vars(minipeft), "ids": (3, 5)})


SETTINGS = {"norm": "DoRA", "detach": "DoRA", "placement": "IA3", "cayley": "OFT", "full": "LoKr", "key": "VeRA",
            "pooling": "QALoRA", "bias": "PrefixTuning", "slices": "PrefixTuning", "init": "Bottleneck"}


def test_the_conventions_on_the_page_of_methods_are_settings():
    table = ALL_METHODS[ALL_METHODS.index("## Conventions"):ALL_METHODS.index("## Operations")]
    found = re.findall(r"`(\w+)=([^`]+)`", table)
    assert {name for name, _ in found} == set(SETTINGS)
    for name, value in found:
        eval(f"{SETTINGS[name]}({name}={value})", vars(minipeft))


def test_the_page_of_methods_lists_all_of_them_with_the_counts_of_their_pages():
    rows = re.findall(r"^\| \[(\w+)\]\(\.\./minipeft/methods/(\w+)\.py\) \|.*\| ([\d,]+) \| ", ALL_METHODS,
                      re.MULTILINE)
    assert {name for name, *_ in rows} == {name for name, kind in METHODS.items()
                                           if kind.__module__.startswith("minipeft.")}
    for name, page, count in rows:
        assert METHODS[name].__module__ == f"minipeft.methods.{page}"
        source = (ROOT / f"minipeft/methods/{page}.py").read_text("utf-8")
        assert re.search(rf"^On T5-small, .*: {count} parameters of 60,506,624\.$", source, re.MULTILINE), name


def test_the_use_that_is_shown_for_every_method_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = numpy.random.default_rng(0)
    model = minipeft.T5(minipeft.T5Config(32, 16, 4, 4, 32, 1, 1), rng)
    model.save_pretrained("t5-folder")
    pairs = [(rng.integers(2, 32, 5).tolist(), rng.integers(2, 32, 4).tolist()) for _ in range(9)]
    names = {"minipeft": minipeft, "numpy": numpy, "model": model, "pairs": pairs,
             "sources": rng.integers(2, 32, (3, 5))}
    exec(block(ALL_METHODS, "use"), names)
    assert numpy.array_equal(names["ids"], names["again"].model.generate(names["sources"], num_beams=4))


def test_the_operations_that_are_shown_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = numpy.random.default_rng(0)
    model = minipeft.T5(minipeft.T5Config(32, 16, 4, 4, 32, 1, 1), rng)
    tuned = minipeft.T5(model.config, rng)
    a, b = (minipeft.attach(model, minipeft.LoRA(2, init="pissa"), rng, name) for name in "ab")
    names = {"minipeft": minipeft, "model": model, "tuned": tuned, "a": a, "b": b, "ids": rng.integers(2, 32, (3, 5)),
             "targets": rng.integers(2, 32, (3, 4))}
    *first, extract, save = block(ALL_METHODS, "operations").splitlines()
    exec("\n".join(first), names)
    assert names["half"].shape == names["mixed"].shape == (3, 4, 32) and model.plugged == ("combined",)
    names["both"].unplug()
    exec("\n".join((extract, save)), names)
    assert model.plugged == ("extracted",) and "bfloat16" in capsys.readouterr().out


def test_a_base_is_quantized_trained_on_and_merged_as_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = numpy.random.default_rng(0)
    config = minipeft.T5Config(32, 256, 64, 4, 256, 1, 1, tie_word_embeddings=False)
    minipeft.T5(config, rng).save_pretrained("t5-folder")
    pairs = [(rng.integers(2, 32, 5).tolist(), rng.integers(2, 32, 4).tolist()) for _ in range(9)]
    names = {"minipeft": minipeft, "numpy": numpy, "pairs": pairs}
    for marker in ("quantize", "qlora"):
        exec(block(QUANTIZATION, marker), names)
    base = {name: array.copy() for name, array in names["model"].state().items()}
    capsys.readouterr()
    exec(block(QUANTIZATION, "merge"), names)
    assert [next(kind for kind in ("nf4", "float32") if kind in table) for table in capsys.readouterr().out.split(
        "merged weight")[1:]] == ["float32", "nf4", "float32"]
    assert all((array == base[name]).all() for name, array in names["model"].state().items())
    with pytest.warns(UserWarning, match="trained on this base quantized"):
        minipeft.load(minipeft.T5.from_pretrained("t5-folder"), "task.safetensors")
    exec(block(QUANTIZATION, "qa-lora"), names)
    printed = capsys.readouterr().out.splitlines()[1:-1]
    assert len(printed) == 6 and all("int4" in line and float(line.split()[-1]) < 1e-5 for line in printed)


def test_the_losses_of_merges_on_the_page_are_those_that_a_merge_reports():
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| (\S+) \| (\S+) \| (\S+) \|$", QUANTIZATION, re.MULTILINE)
    assert len(rows) == 6
    for kind, ratio, *said in rows:
        _, found = losses(kind, float(ratio))
        assert [f"{found[0]:.0e}", f"{found[1]:.2f}", f"{found[2]:.2f}"] == said, kind


@pytest.mark.parametrize("where", sorted(set(re.findall(r'`?where=((?:r"[^"`]+")|\[[^\]`.]+\])', DICTIONARY))))
def test_a_pattern_on_the_dictionary_finds_weights(where):
    model = minipeft.T5(minipeft.T5Config(32, 16, 4, 4, 32, 1, 1), numpy.random.default_rng(0))
    method = eval(f"LoRA(rank=1, where={where})".replace("\\|", "|"), vars(minipeft))
    assert method.places(model)


def test_the_laws_of_a_method_are_printed_and_all_hold(capsys):
    exec(block(CONTRIBUTING, "laws of a method"), {})
    assert "all laws hold" in capsys.readouterr().out


def test_the_planted_bug_that_is_shown_is_one():
    shown = eval(block(CONTRIBUTING, "a planted bug").partition("\n\n")[2], {"Bug": Bug})
    assert shown in BUGS and f'[{shown.what}]"' in CONTRIBUTING


def test_the_program_that_tries_a_release_runs_in_another_folder(tmp_path):
    program = re.search(r'echo "(.*?)" >', block(CONTRIBUTING, "release"), re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(minipeft.__version__) and "all laws hold" in done.stdout


TESTED = {"README.md": ["LowRank", "from first_look.py", "a folder of peft"], "examples/conformance/README.md": [None],
          "minipeft/conformance/README.md": ["plug-in"],
          "docs/coming_from_peft.md": ["worked example", "loop by hand", "together", "files of peft",
                                       "files of adapterhub"],
          "docs/methods.md": ["use", "operations"],
          "docs/quantization.md": ["quantize", "qlora", "merge", "qa-lora"],
          "CONTRIBUTING.md": ["laws of a method", "a planted bug"]}


@pytest.mark.parametrize("name", PAGES)
def test_every_block_of_python_on_a_page_is_one_that_a_test_runs(name):
    """The tests above find each by its marker. (Blocks of `py` are programs of other libraries.)"""
    found = re.findall(r"(?:<!-- ([^\n]+) -->\n)? *```python\n", PAGES[name])
    assert [marker or None for marker in found] == TESTED.get(name, [])


# ---- commands


def commands() -> dict[str, list[str]]:
    """{a command on a page: its words}: the lines of sh blocks, and what stands between single backticks. A release is
    not made here."""
    found = {}
    for page in PAGES.values():
        page = re.sub(r"<!-- release -->.*?```sh.*?```", "", page, flags=re.DOTALL)
        lines = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
        lines += re.findall(r"(?<!`)`((?:python|pip install -e|pytest) [^`]+)`(?!`)", page)
        for line in lines:
            for command in line.split("  #")[0].split(" && "):
                if command.strip():
                    found[command.strip()] = shlex.split(command)
    return found


def is_known_to_pytest(words: list[str]) -> bool:
    """Whether these are options that the pages use, with values, and paths that exist; `-k` must choose something, and
    so must the name of a test, with that of a planted bug in brackets."""
    at, text = 0, ""
    while at < len(words):
        if words[at] in ("-n", "-m"):
            assert words[at:at + 2] in (["-n", "0"], ["-m", "quick"])
            at += 1
        elif words[at] == "-k":
            assert words[at + 1] in text
            at += 1
        else:
            file, _, test = words[at].partition("::")
            text = "" if (ROOT / file).is_dir() else (ROOT / file).read_text("utf-8")
            name, _, bug = test.partition("[")
            assert f"def {name}(" in text or not test
            assert bug.removesuffix("]") in {planted.what for planted in BUGS} or not bug
        at += 1
    return True


@pytest.mark.parametrize("command", commands())
def test_every_command_on_a_page_exists_with_its_options(command):
    """A program is asked for its help with the same arguments, and its help names every option."""
    words = commands()[command]
    if words[0] == "pip":
        extras = re.findall(r"^(\w+) =$", (ROOT / "setup.cfg").read_text("utf-8"), re.MULTILINE)
        assert words[:3] == ["pip", "install", "-e"] and words[3] in [f".[{extra}]" for extra in extras]
        assert set(words[4:]) <= {"flake8", "mypy"}
    elif words[0] == "pytest":
        assert is_known_to_pytest(words[1:])
    elif words[0] in ("git", "cd", "flake8", "mypy"):
        assert words[1:] in (["clone", "URL-OF-THIS-REPOSITORY", "minipeft"], ["minipeft"], [])
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


# ---- results


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


def test_the_tables_and_figures_of_quantized_weights_are_those_of_their_recorded_run(monkeypatch):
    """And every limit of these parts holds."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmark"))
    bars, tables, sizes = map(importlib.import_module, ("bars", "tables", "sizes"))
    run = recorded("quantization")
    shown = re.search(r"<!-- quantization -->\n```text\n(.*?)\n```", BENCHMARK, re.DOTALL).group(1)
    assert shown in tables.report(run) and all(f"\n  {name} " in shown for name in sizes.CODINGS)
    assert run["settings"]["parts"] == ["quantize", "qlora"] and run["settings"]["matrix"] == sizes.MATRIX
    assert run["settings"]["rounds"] >= 7 and not run["failures"] and not run["absent"] and not bars.missed(
        bars.judged(run))
    figures = {row["what"]: row["figure"] for row in bars.judged(run) if row["verdict"] == bars.HOLDS}
    assert len(figures) == 5
    rates = "the slowest kind's {}, {} of float32 on one core".format
    for what, said in ((rates("quantizing", "MB/s"), "quantized at {:.0f} MB/s or more"),
                       (rates("dequantizing", "GB/s"), "at {:.2f} GB/s or more"),
                       ("QLoRA step / LoRA step, t5-small", "takes {:.2f} of the time"),
                       ("QLoRA's weights / LoRA's, t5-small", "its weights {:.2f} of the bytes"),
                       ("QLoRA's weights and step / LoRA's, t5-small", "together {:.2f} (0.8)")):
        assert said.format(figures[what]) in " ".join(BENCHMARK.split())
    assert f"load average before the run was {run['machine']['load_before']:.1f}" in " ".join(BENCHMARK.split())


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


def test_the_tables_of_quantized_bases_are_those_of_their_recorded_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    qlora, tables = importlib.import_module("qlora"), importlib.import_module("lab.tables")
    run = qlora.recorded([qlora.RECORDED])
    assert tables.as_markdown(run["rows"], qlora.bases(run["rows"], run["words"])) in EXAMPLES
    assert tables.as_markdown(qlora.lines_of(run["rows"]), qlora.merges(run["rows"])) in EXAMPLES


# ---- words, changes, pictures and links


def test_the_glossary_has_every_law_by_the_name_that_the_library_gives_it():
    rows = re.findall(r"^\| (\d+) ([^|]+) \|", GLOSSARY, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 15))
    names = [f"{number} {name}" for number, name in rows]
    of_methods = [law for law in minipeft.laws.LAWS if any(name.startswith(law) for name in names)]
    assert len(of_methods) == len(minipeft.laws.LAWS) == 14 - 3  # 9, 10 and 11 concern ops, LoRA and backends


def test_the_changes_name_the_version_and_every_old_name():
    assert re.search(r"^## ([\d.]+)", CHANGES, re.MULTILINE)[1] == minipeft.__version__
    settings = (ROOT / "setup.cfg").read_text("utf-8")
    assert re.search(r"^version = (.+)$", settings, re.MULTILINE)[1] == minipeft.__version__
    for old in ("start=", '"norm scale"', "minipeft.autograd", "minipeft.ops", "minipeft.peft", "swap", "pullback",
                "Constant", "nn.weight.Slot", "memory"):
        assert old in CHANGES, old


def test_the_pictures_can_be_drawn_and_the_committed_one_shows_the_imports_as_they_are(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "docs/pictures.py"), "--out", str(tmp_path)], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name for path in (ROOT / "docs").glob("*.svg")} == {"imports.svg", "lora.svg", "slot.svg"}
    said = [re.search(r"<dc:description>(.*?)</dc:description>", (folder / "imports.svg").read_text("utf-8"))[1]
            for folder in (tmp_path, ROOT / "docs")]
    assert said[0] == said[1], "run python docs/pictures.py, and look at docs/imports.svg"


def anchors(page: str) -> set[str]:
    """What the headings of a page are called in links."""
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.+)$", page, re.MULTILINE)}


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_links_to_exists(name):
    for target, _, anchor in re.findall(r"\]\((?!http)([^)#]*)(#?)([^)]*)\)", PAGES[name]):
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text("utf-8")), f"{target}#{anchor}"
