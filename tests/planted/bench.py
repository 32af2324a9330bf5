"""A copy of the package and its tests in which one bug after the other is planted, and a process that runs the tests.

Starting Python, NumPy, Hypothesis and pytest, and compiling what nobody changed, would take most of the time. So the
process loads what the bugs cannot touch, once, and forks for every run. The copy stays where it is, so that only the
file with the bug is compiled anew. Assertions are plain: that one fails is all that counts, and explaining how long
values differ can take minutes.
"""
from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Iterator

from tests.planted.bug import Bug, plant

ROOT = Path(__file__).parent.parent.parent
EXAMPLES, TIMEOUT = 10, 300
SERVER = f"""
import gc, json, os, signal, sys, time
folder = sys.argv[1]
sys.path[0] = folder
import hypothesis, numpy, numpy.random, pytest, safetensors
import _pytest.assertion.rewrite, hypothesis.strategies, hypothesis.stateful, unittest.mock
assert "minipeft" not in sys.modules and "tests" not in sys.modules

class FewExamples:
    def pytest_configure(self):
        hypothesis.settings.register_profile(
            "few", max_examples=2 if request["first"] else {EXAMPLES}, deadline=None, derandomize=True, database=None,
            phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
            suppress_health_check=list(hypothesis.HealthCheck))
        hypothesis.settings.load_profile("few")

    def pytest_collection_modifyitems(self, items):
        if request["first"]:
            items[:] = dict((item.nodeid.partition("[")[0], item) for item in reversed(items)).values()

gc.collect(), gc.freeze(), gc.set_threshold(100_000, 50, 100)
for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if not pid:
        out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        import minipeft
        assert minipeft.__file__.startswith(folder), minipeft.__file__
        code = pytest.main(["-x", "--assert=plain", "-o", "addopts=-q --strict-markers", "-p",
                            "no:cacheprovider", "-p", "_hypothesis_pytestplugin", *request["tests"]],
                           plugins=[FewExamples()])
        sys.stdout.flush()
        os._exit(int(code))
    end, status = time.monotonic() + {TIMEOUT}, None
    while status is None and time.monotonic() < end:
        done, found = os.waitpid(pid, os.WNOHANG)
        status = found if done else time.sleep(0.005)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    print(json.dumps(-1 if status is None else os.waitstatus_to_exitcode(status)), flush=True)
"""


class Bench:
    """`run` the tests, named by file and function, in the copy as it is; `planted` has a bug in it for the block."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        for name in ("setup.cfg", "README.md"):
            shutil.copy(ROOT / name, self.folder)
        ignored = shutil.ignore_patterns("__pycache__", "fixtures")
        shutil.copytree(ROOT / "minipeft", self.folder / "minipeft", ignore=ignored)
        shutil.copytree(ROOT / "tests", self.folder / "tests", ignore=ignored)
        (self.folder / "tests" / "fixtures").symlink_to(ROOT / "tests" / "fixtures")
        (self.folder / "examples").symlink_to(ROOT / "examples")  # they import the copy of the package
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(self.folder),
                       "PYTHONDONTWRITEBYTECODE": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        environment.pop("PYTEST_XDIST_WORKER", None)
        self._server = subprocess.Popen([sys.executable, "-c", SERVER, str(self.folder)], cwd=self.folder, text=True,
                                        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        # a compiled file is known by the time of its source in whole seconds: no two versions may have the same
        self._times = itertools.count(1_000_000_000)

    def run(self, tests: list[str], first: bool = False) -> tuple[int, str]:
        """(exit status, output): 0 if all passed, 1 if a test failed; -1 for a run without an end. first: each test
        with the first of its parameters alone."""
        out = self.folder / "out.txt"
        assert self._server.stdin is not None and self._server.stdout is not None
        request = {"tests": [f"tests/{test}" for test in tests], "out": str(out), "first": first}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline()), out.read_text("utf-8", "replace")

    @contextlib.contextmanager
    def planted(self, bug: Bug) -> Iterator[None]:
        """With the bug in the copy."""
        path, package = self.folder / "minipeft" / bug.file, self.folder / "minipeft"
        clean = path.read_bytes()
        try:
            plant(package, bug)
            self._is_new(path)
            yield
        finally:
            path.write_bytes(clean)
            self._is_new(path)

    def _is_new(self, path: Path) -> None:
        at = next(self._times)
        os.utime(path, (at, at))

    def close(self) -> None:
        """End the process."""
        with self._server:  # closes the pipes, and waits
            pass
