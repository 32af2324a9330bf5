"""Training runs that are killed and interrupted, and resumed: each ends with the bits of one that was never stopped.

    python tests/attacks/killed_runs.py --seconds 20 --seed 0

For so many seconds, in turn:

    killed at a call    SIGKILL before the n-th call to the file system, n drawn; up to three times in one run
    killed at a time    SIGKILL after a time that was drawn; twice in one run
    at a line           KeyboardInterrupt before a line of training code, drawn; the run goes on with its own objects or
                        with new ones
    anywhere            KeyboardInterrupt before any line of minipeft

Parameters, moments, counters, log and best file are compared bit for bit, and no temporary or lock file may be left. A
table says how often each was tried; the exit status is 1 if one of them failed. With --every-line, every line of the
training code is tried, however long it takes.
"""
from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Iterator

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy  # noqa: E402

from tests.train import stopped_run  # noqa: E402
from tests.train.interrupted import InterruptedAt  # noqa: E402
from tests.train.killed_run import end, outcome, start  # noqa: E402

TRAINING, ANYWHERE = ("minipeft/train", "minipeft/atomic", "minipeft/files"), ("minipeft",)
Attempt = Callable[[Path, str, numpy.random.Generator], str]  # (an empty folder, kind, rng) -> what is wrong, or ""


class Killed:
    """Runs in processes of their own."""

    def __init__(self, folder: Path):
        self.wanted, self.calls, self.seconds = {}, {}, {}
        for kind in stopped_run.KINDS:
            whole = folder / f"whole {kind}"
            assert end(start(whole, kind, "short", "trace")) == 0
            self.calls[kind] = (whole / "trace.json").read_text().count(",") + 1
            process = start(folder / f"timed {kind}", kind, "short")
            begun = time.perf_counter()
            assert end(process) == 0
            self.seconds[kind], self.wanted[kind] = time.perf_counter() - begun, outcome(whole)

    def at_a_call(self, folder: Path, kind: str, rng: numpy.random.Generator) -> str:
        points = rng.integers(1, self.calls[kind] + 1, rng.integers(1, 4)).tolist()
        for n in points:
            if end(start(folder, kind, "short", n)) not in (0, -signal.SIGKILL):
                return f"the run ended otherwise, after kills at {points}"
        return self._finished(folder, kind, f"killed before the calls {points}")

    def at_a_time(self, folder: Path, kind: str, rng: numpy.random.Generator) -> str:
        times = (rng.uniform(0, 1, 2) * self.seconds[kind]).tolist()
        for seconds in times:
            process = start(folder, kind, "short")
            time.sleep(seconds)
            process.kill()
            end(process)
        return self._finished(folder, kind, f"killed after {times} seconds")

    def _finished(self, folder: Path, kind: str, how: str) -> str:
        if end(start(folder, kind, "short")) != 0:
            return f"does not resume, {how}"
        return differences(outcome(folder), self.wanted[kind], how)


class Interrupted:
    """Runs in this process."""

    def __init__(self, folder: Path):
        self.wanted, self.lines = {}, {}
        for kind in stopped_run.KINDS:
            run = stopped_run.StoppedRun(empty(folder / f"{kind}"), kind)
            run.fit()
            self.wanted[kind] = run.outcome()
            for where in (TRAINING, ANYWHERE):
                counting = InterruptedAt(0, *where)
                self.lines[kind, where] = stopped_run.lines_of(kind, empty(folder / f"{kind} count"), counting)

    def at_a_line(self, folder: Path, kind: str, rng: numpy.random.Generator) -> str:
        return self.at(folder, kind, TRAINING, int(rng.integers(1, self.lines[kind, TRAINING] + 1)))

    def anywhere(self, folder: Path, kind: str, rng: numpy.random.Generator) -> str:
        return self.at(folder, kind, ANYWHERE, int(rng.integers(1, self.lines[kind, ANYWHERE] + 1)))

    def at(self, folder: Path, kind: str, where: tuple[str, ...], n: int) -> str:
        interrupt = InterruptedAt(n, *where)
        found, wrong = stopped_run.stop_and_resume(folder, kind, interrupt, again=n % 2 == 0)
        how = f"interrupted at line {n}, {interrupt.where}"
        return f"{wrong}, {how}" if wrong else differences(found, self.wanted[kind], how)


def differences(found: dict[str, Any], wanted: dict[str, Any], how: str) -> str:
    odd = [key for key in wanted if found[key] != wanted[key]]
    return f"other {', '.join(odd)}, {how}" if odd else ""


def empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def tried(attempt: Attempt, folder: Path, kind: str, rng: numpy.random.Generator) -> str:
    try:
        return attempt(empty(folder), kind, rng)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"


def attempts(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str, str]]:
    """(how, kind, what was wrong), for as long as the options say."""
    interrupted = Interrupted(folder / "interrupted")
    if options.every_line:
        for kind in stopped_run.KINDS:
            for n in range(1, interrupted.lines[kind, TRAINING] + 1):
                yield "at a line", kind, tried(lambda f, k, _: interrupted.at(f, k, TRAINING, n), folder / "run", kind,
                                               numpy.random.default_rng())
        return
    killed = Killed(folder)
    ways: dict[str, Attempt] = {"killed at a call": killed.at_a_call, "killed at a time": killed.at_a_time,
                                "at a line": interrupted.at_a_line, "anywhere": interrupted.anywhere}
    until, i = time.monotonic() + options.seconds, 0
    while time.monotonic() < until:
        rng = numpy.random.default_rng([options.seed, i])
        for how, attempt in ways.items():
            for kind in stopped_run.KINDS:
                yield how, kind, tried(attempt, folder / "run", kind, rng)
        i += 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every-line", action="store_true")
    options = parser.parse_args(arguments)
    counts: dict[tuple[str, str], list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for how, kind, wrong in attempts(options, Path(folder)):
            count = counts.setdefault((how, kind), [0, 0])
            count[0] += 1
            count[1] += bool(wrong)
            if wrong:
                print(f"FAILED {how}, {kind}: {wrong}", flush=True)
    print(f"{'stopped':<20}{'trained':<10}{'runs':>8}{'failed':>8}")
    for (how, kind), (runs, failed) in counts.items():
        print(f"{how:<20}{kind:<10}{runs:>8}{failed:>8}")
    failures = sum(failed for _, failed in counts.values())
    print(f"{sum(runs for runs, _ in counts.values())} runs, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
