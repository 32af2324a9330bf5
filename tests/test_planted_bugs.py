"""Every planted bug is caught by the test named for it, unmodified; and on the sources as they are, all of them pass.

Each bug is planted in a copy of the package, beside a copy of the tests, and its test is run there by a process of its
own, on a few examples without shrinking. Without the clean baseline a failure would mean nothing.
"""
from __future__ import annotations

import concurrent.futures
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.planted.bug import plant
from tests.planted_bugs import BUGS as OLD

# each file of tests/planted has a list of its own
BUGS = [*OLD, *(bug for path in sorted((Path(__file__).parent / "planted").glob("*.py"))
                for bug in getattr(importlib.import_module(f"tests.planted.{path.stem}"), "BUGS", ()))]

ROOT = Path(__file__).parent.parent
PROCESSES, EXAMPLES, TIMEOUT = 2, 10, 300
RUNNER = f"""
import sys
import minipeft
import pytest

assert minipeft.__file__.startswith(sys.argv[1]), minipeft.__file__


class FewExamples:
    def pytest_configure(self):
        import hypothesis
        hypothesis.settings.register_profile(
            "few", max_examples={EXAMPLES}, deadline=None, derandomize=True, database=None,
            phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
            suppress_health_check=list(hypothesis.HealthCheck))
        hypothesis.settings.load_profile("few")


sys.exit(pytest.main(["-x", "-p", "no:cacheprovider", *sys.argv[2:]], plugins=[FewExamples()]))
"""


def copy_of(source: Path, target: Path) -> Path:
    """The package and the tests; fixtures are linked."""
    target.mkdir()
    shutil.copy(source / "setup.cfg", target)
    shutil.copytree(source / "minipeft", target / "minipeft", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(source / "tests", target / "tests", ignore=shutil.ignore_patterns("__pycache__", "fixtures"))
    (target / "tests" / "fixtures").symlink_to(ROOT / "tests" / "fixtures")
    return target


def run(folder: Path, tests: list[str]) -> subprocess.CompletedProcess:
    """pytest in a copy. Its exit status is 0 if all passed and 1 if a test failed; collection errors are others.

    What these processes compile is kept in a folder of their own, whatever the caller's settings: most of the time of
    such a run would go into compiling pytest's plugins again."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(folder),
                   "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(folder.parent / "compiled")}
    return subprocess.run([sys.executable, "-c", RUNNER, str(folder), *(f"tests/{test}" for test in tests)],
                          cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, subprocess.CompletedProcess]:
    """{bug: outcome of its test}, after a clean baseline."""
    folder = tmp_path_factory.mktemp("planted").resolve()
    clean = copy_of(ROOT, folder / "clean")
    baseline = run(clean, list(dict.fromkeys(bug.test for bug in BUGS)))
    assert baseline.returncode == 0, f"not clean to begin with:\n{baseline.stdout}{baseline.stderr}"

    def outcome(i: int) -> subprocess.CompletedProcess:
        planted = copy_of(clean, folder / str(i))
        plant(planted / "minipeft", BUGS[i])
        try:
            return run(planted, [BUGS[i].test])
        finally:
            shutil.rmtree(planted)

    with concurrent.futures.ThreadPoolExecutor(PROCESSES) as pool:
        return dict(zip([bug.what for bug in BUGS], pool.map(outcome, range(len(BUGS)))))


def test_there_are_at_least_75_bugs_and_no_two_are_the_same():
    assert len({bug.what for bug in BUGS}) == len({(bug.file, bug.old, bug.new) for bug in BUGS}) == len(BUGS) >= 75


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_a_bug_matches_the_sources_exactly_once_and_changes_them(bug):
    text = (ROOT / "minipeft" / bug.file).read_text("utf-8")
    assert text.count(bug.old) == 1 and bug.new != bug.old
    compile(text.replace(bug.old, bug.new), bug.file, "exec")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_a_planted_bug_is_caught_by_the_test_named_for_it(bug, results):
    found = results[bug.what]
    assert found.returncode == 1 and "1 failed" in found.stdout, (
        f"{bug.what}: {bug.test} should have failed\n{found.stdout}{found.stderr}")
