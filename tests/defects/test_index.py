"""Each defect of the list has a test named after it, and a planted bug that reproduces it here and turns that test red.

D: peft 0.21.2. A: adapters 1.3.0 (AdapterHub). L: loralib 0.1.2.
"""
from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.test_planted_bugs import BUGS

NOT_HERE = {"D16": "multitask prompt tuning", "D21": "AdaLoRA"}  # methods that the library lacks
DEFECTS = [defect for letter, last in (("D", 25), ("A", 6), ("L", 4)) for i in range(1, last + 1)
           if (defect := f"{letter}{i}") not in NOT_HERE]
TESTS = {f"{path.name}::{node.name}" for path in Path(__file__).parent.glob("test_*.py")
         for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_has_a_test_and_a_planted_bug_that_turns_it_red(defect):
    own = {name for name in TESTS if f"::test_{defect}_" in name}
    assert own, f"no test is named test_{defect}_..."
    planted = [bug for bug in BUGS if bug.what.startswith(f"{defect}: ")]
    assert planted, f"no planted bug is called '{defect}: ...'"
    assert all(any(bug.test.split("[")[0].endswith(name) for name in own) for bug in planted)
