"""The README's promises: its code runs, its table is what the example printed, its reading path is short."""
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_the_sample_runs_and_has_fifteen_lines(tmp_path):
    code = re.search(r"<!-- sample -->\n```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "percentage of trainable model parameters" in done.stdout and (tmp_path / "reverse.safetensors").is_file()


def test_the_reading_path_is_eight_files_and_1200_lines_ending_in_lora():
    path = re.findall(r"^\| `(minipeft/[\w/]+\.py)` \|", README, re.MULTILINE)
    assert len(path) == 8 and path[-1] == "minipeft/peft/lora.py"
    assert sum(len((ROOT / file).read_text("utf-8").splitlines()) for file in path) <= 1200


@pytest.mark.parametrize("extra", ["examples", "test"])
def test_both_commands_stand_on_a_line_of_their_own_and_name_an_extra_that_exists(extra):
    assert re.search(rf"^pip install -e '\.\[{extra}\]' && ", README, re.MULTILINE)
    assert re.search(rf"^{extra} =$", (ROOT / "setup.cfg").read_text("utf-8"), re.MULTILINE)


def test_the_results_tables_are_those_of_the_recorded_run(monkeypatch):
    """The README holds, letter for letter, what the example's own columns make of the run that it recorded."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    past_tense, tables = importlib.import_module("past_tense"), importlib.import_module("tables")
    recorded = json.loads((ROOT / "examples" / "past_tense.json").read_text("utf-8"))
    assert recorded["steps"] == 500 and {row["seed"] for row in recorded["rows"]} == {None, 0, 1, 2}
    rows = [past_tense.Row(**row) for row in recorded["rows"]]
    for columns in (past_tense.LEARNED, past_tense.COST):
        assert tables.as_markdown(rows, columns) in README


def test_what_the_readme_links_to_exists():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
