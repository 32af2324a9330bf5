"""Every planted bug is caught by the test named for it, unmodified; and on the sources as they are, all of them pass.

Each bug is planted in a copy of the package, beside a copy of the tests, and its test is run there on a few examples
without shrinking. Without the clean run a failure would mean nothing.
"""
from __future__ import annotations

import importlib
from pathlib import Path
from typing import Iterator

import pytest

from tests.planted.bench import ROOT, Bench

BUGS = [bug for path in sorted((Path(__file__).parent / "planted").glob("*.py"))
        for bug in getattr(importlib.import_module(f"tests.planted.{path.stem}"), "BUGS", ())]


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("planted"))
    yield made
    made.close()


def test_there_are_at_least_500_bugs_and_no_two_are_the_same():
    assert len({bug.what for bug in BUGS}) == len({(bug.file, bug.old, bug.new) for bug in BUGS}) == len(BUGS) >= 500


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_a_bug_matches_the_sources_exactly_once_and_changes_them(bug):
    text = (ROOT / "minipeft" / bug.file).read_text("utf-8")
    assert text.count(bug.old) == 1 and bug.new != bug.old
    compile(text.replace(bug.old, bug.new), bug.file, "exec")


def test_on_the_sources_as_they_are_the_named_tests_pass(bench):
    """In the copy, with the first of their parameters; the suite itself runs them with all."""
    code, output = bench.run(list(dict.fromkeys(bug.test for bug in BUGS)), first=True)
    assert code == 0, f"not clean to begin with:\n{output}"


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_a_planted_bug_is_caught_by_the_test_named_for_it(bug, bench):
    with bench.planted(bug):
        code, output = bench.run([bug.test])
    assert code == 1 and "1 failed" in output, f"{bug.what}: {bug.test} should have failed\n{output}"
