"""examples/: programs at the top, their parts below, and no name that hides another module."""
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAMS = sorted(path for path in EXAMPLES.glob("*.py")) + [EXAMPLES / "benchmark" / "run.py"]


def test_only_programs_lie_at_the_top_and_the_page_names_each():
    page = (EXAMPLES / "README.md").read_text("utf-8")
    files = [path for path in EXAMPLES.iterdir() if path.is_file()]
    assert {path.suffix for path in files} == {".py", ".md"}
    assert all(f"]({path.name})" in page for path in files if path.name != "README.md")
    assert {path.name for path in EXAMPLES.iterdir() if path.is_dir()} - {"out", "__pycache__"} == {
        "lab", "data", "benchmark", "recorded", "conformance"}


def test_no_module_that_a_program_finds_by_its_folder_hides_another():
    """Of the standard library, or of a package that is installed."""
    names = {path.stem for folder in (EXAMPLES, EXAMPLES / "benchmark") for path in folder.iterdir()
             if path.suffix == ".py" or path.is_dir()} - {"__pycache__", "out"}
    assert not names & set(sys.stdlib_module_names)
    assert not names & set(importlib.metadata.packages_distributions())


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_explains_itself_from_any_folder(program, tmp_path):
    done = subprocess.run([sys.executable, str(program), "--help"], cwd=tmp_path, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout and f"python examples/{program.relative_to(EXAMPLES)}" in done.stdout
