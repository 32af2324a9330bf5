"""The page on writing a method: how long it is, that it uses public names alone, and that its claims can fail."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import minipeft

PROGRAM = Path(__file__).parents[2] / "examples" / "your_own_method.py"


def code_lines(tree, lines):
    """The numbers of the lines of some statements that are neither blank nor comment nor docstring."""
    numbers = {n for node in tree for n in range(min(d.lineno for d in [node, *getattr(node, "decorator_list", [])]),
                                                 node.end_lineno + 1)}
    for node in (inner for outer in tree for inner in ast.walk(outer)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            numbers -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return {n for n in numbers if lines[n - 1].strip() and not lines[n - 1].strip().startswith("#")}


def test_the_method_has_at_most_40_lines_of_code_and_the_page_says_how_many():
    text = PROGRAM.read_text("utf-8")
    statements = [node for node in ast.parse(text).body
                  if getattr(node, "name", None) in ("Mixed", "svd", "left", "right", "LoRAXS")]
    assert len(statements) == 5
    count = len(code_lines(statements, text.splitlines()))
    assert count <= 40
    pages = text, (PROGRAM.parent / "README.md").read_text("utf-8")
    assert [re.search(r"LoRA-XS, in (\d+) lines", page).group(1) for page in pages] == [str(count)] * 2


def test_the_method_is_written_with_public_names_alone():
    imported = {alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"
                for node in ast.walk(ast.parse(PROGRAM.read_text("utf-8")))
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    ours = {name for name in imported if name.split(".")[0] == "minipeft"}
    assert ours <= {"minipeft"} | {f"minipeft.{name}" for name in minipeft.__all__}


def test_it_learns_merges_saves_and_loads_and_after_one_step_only_the_claim_that_it_learned_fails(tmp_path):
    for steps, code, failing in (("40", 0, 0), ("1", 1, 1)):
        done = subprocess.run([sys.executable, str(PROGRAM), "--steps", steps, "--out", str(tmp_path)],
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        assert done.stdout.count("FAILS") == failing and done.stdout.count("FAILS it learns") == failing
        assert done.stdout.count("holds on 8 models") == 11 and "all laws hold" in done.stdout
    assert (tmp_path / "past_tense.safetensors").is_file()
