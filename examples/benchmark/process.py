"""A benchmark process seen from outside: start worker.py, send a command, wait for the answer, and report failures.

A worker that dies, hangs, or answers with anything but JSON raises `Failed`, with the last lines of its standard error.
The benchmark goes on without it.
"""
from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Sequence

SCRIPT = Path(__file__).parent / "worker.py"
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
LINES = 12              # of standard error that are shown


class Failed(Exception):
    """A worker failed. what: what happened. lines: the end of the worker's standard error."""

    def __init__(self, what: str, lines: Sequence[str] = ()):
        super().__init__(what)
        self.lines = list(lines)


class Absent(Exception):
    """torch, transformers or peft is not installed."""


def command(library: str, backend: str, kept: bool, turn: float, core: int | None = None) -> list[str]:
    """The command that starts a worker. core: the only one that it may use."""
    return [sys.executable, str(SCRIPT), library, "--backend", backend, "--turn", str(turn),
            *(["--kept"] if kept else []), *([] if core is None else ["--core", str(core)])]


def environment(threads: int) -> dict[str, str]:
    """This process's environment with the threads set, without our backend variable, and with downloads off."""
    kept = {name: value for name, value in os.environ.items() if name != "MINIPEFT_BACKEND"}
    return {**kept, **dict.fromkeys(THREADS, str(threads)), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
            "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}


class Process:
    """A worker. It starts at once; the first `ask` waits until it is ready. timeout: seconds for one answer."""

    def __init__(self, name: str, argv: Sequence[str], env: dict[str, str], timeout: float):
        self.name, self.timeout, self.ready = name, timeout, False
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                                        text=True, encoding="utf-8", errors="replace", env=env)
        self.lines: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def ask(self, **message: Any) -> dict[str, Any]:
        """The answer to a command. Raises Failed, or Absent if the library is not installed."""
        if not self.ready:
            if "absent" in (first := self._answer("starting")):
                raise Absent(first["absent"])
            self.ready = True
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass        # it is dead: reading says so
        return self._answer(" ".join(str(message[key]) for key in ("do", "kind") if key in message))

    def close(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.wait()
        self.reader.join()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            assert stream is not None
            try:
                stream.close()
            except OSError:
                pass    # of what was written and never read

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def _answer(self, doing: str) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=self.timeout)
        except queue.Empty:
            raise Failed(f"{doing}: no answer within {self.timeout:g} s", self._tail()) from None
        if not line:
            raise Failed(f"{doing}: the process ended with exit status {self.process.wait()}", self._tail())
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Failed(f"{doing}: answered {line.strip()[:80]!r}; expected a JSON object", self._tail())
        if "error" in answer:
            raise Failed(f"{doing}: {answer['error']}", self._tail())
        return answer

    def _tail(self) -> list[str]:
        self.errors.seek(0)
        return self.errors.read().splitlines()[-LINES:]
