"""A run that was killed and resumed ends with the bits of one that was not; on one machine, BLAS and thread count.

The runs accumulate 3 micro-batches per step and write a checkpoint every 2 (or every 3), so that some fall inside an
accumulation and some on a step with an evaluation due; dropout is on.
"""
from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest

import minipeft
from minipeft.train import checkpoint as checkpoints
from minipeft.train.log import Log
from tests.train import killed_run, tiny

KINDS = ["full", "LoRA"]


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind: its final checkpoint, its log, what it returned. Only `seconds` may differ."""
    saved = checkpoints.read(folder / "run.safetensors")
    assert saved.state.pop("seconds") > 0
    result = folder / "result.json"
    return {"arrays": {(group, name): (a.dtype, a.shape, a.tobytes()) for group, members in saved.arrays.items()
                       for name, a in members.items()},
            "state": saved.state, "run": saved.run, "log": (folder / "log.jsonl").read_bytes(),
            "result": json.loads(result.read_text()) if result.exists() else None}


# ---- SIGKILL to a subprocess

def start(folder: Path, kind: str, size: str, die_at: Any = "") -> subprocess.Popen:
    """The program, up to the moment when its first step begins."""
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, killed_run.__file__, folder, kind, size, str(die_at)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "go\n", process.communicate()
    return process


def end(process: subprocess.Popen) -> int:
    _, errors = process.communicate(timeout=60)
    assert errors == ""
    return process.returncode


def nothing_lies_about(folder: Path) -> bool:
    """The temporary file of a killed writer is gone after the next write."""
    return set(tiny.files(folder)) <= {"run.safetensors", "log.jsonl", "result.json", "trace.json"}


WRITE = ["write the first half", "write the second half"]
FIRST = ["fsync", "open", *WRITE, *WRITE, "fsync", "replace", "close",
         "open", "fsync", "close"]  # the log to the disk, the file (header and data), its name
LATER = [*FIRST[:6], "fchmod", *FIRST[6:]]  # a file that is replaced keeps its permissions


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_any_point_of_writing_a_checkpoint_resumes_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    """At each point of the first checkpoint, which no other one precedes, and of the third, which falls on a step with
    an evaluation due. To die after a thing is to die before the next one."""
    whole = tmp_path / "whole"
    assert end(start(whole, kind, "short", "trace")) == 0
    assert json.loads((whole / "trace.json").read_text()) == FIRST + LATER * 7  # 15 micro-batches: 7 times 2, the end
    wanted = outcome(whole)
    assert wanted["state"]["scores"][0][0] == 2 and wanted["state"]["micro"] == 15

    def die_and_resume(at: int) -> None:
        folder = tmp_path / str(at)
        assert end(start(folder, kind, "short", at)) == -signal.SIGKILL
        done = (FIRST + LATER * 7)[:at - 1].count("replace") - 1  # the last checkpoint that reached its name, from 0
        assert (folder / "run.safetensors").exists() == (done >= 0)
        if done >= 0:
            assert checkpoints.read(folder / "run.safetensors").state["micro"] == 2 * (done + 1)
        assert end(start(folder, kind, "short")) == 0
        assert outcome(folder) == wanted and nothing_lies_about(folder)

    first, second = len(FIRST), len(FIRST + LATER)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(die_and_resume, [*range(1, first + 1), *range(second + 1, second + len(LATER) + 1)]))


def test_a_run_killed_at_twenty_random_times_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Two kills per run, at times that were drawn once (from the first step on, in parts of the run's own duration)."""
    wanted, seconds = {}, {}
    for kind in KINDS:
        process = start(tmp_path / kind, kind, "long")
        begun = time.perf_counter()
        assert end(process) == 0
        wanted[kind], seconds[kind] = outcome(tmp_path / kind), time.perf_counter() - begun

    def killed_twice(seed: int) -> int:
        """How many of the kills found the run alive."""
        kind, folder, landed = KINDS[seed % 2], tmp_path / f"run {seed}", 0
        for part in numpy.random.default_rng(seed).uniform(0, 0.45, 2):
            process = start(folder, kind, "long")
            time.sleep(part * seconds[kind])
            process.kill()
            landed += end(process) == -signal.SIGKILL
        assert end(start(folder, kind, "long")) == 0
        assert outcome(folder) == wanted[kind] and nothing_lies_about(folder)
        return landed

    landed = 0
    with ThreadPoolExecutor(2) as pool:
        for seed in range(0, 40, 2):  # where the machine is slower now than it was above, ten runs are enough
            if landed < 20:
                landed += sum(pool.map(killed_twice, [seed, seed + 1]))
    assert landed >= 20


# ---- an exception at any call, in this process

class Stopping:
    """A run of 3 steps whose n-th call, of those that change something or might fail, raises KeyboardInterrupt."""

    def __init__(self, folder: Path, kind: str):
        self.folder = folder
        self.model = tiny.model()
        if kind == "LoRA":
            minipeft.attach(self.model, minipeft.LoRA(2, dropout=0.1), numpy.random.default_rng(0))
        self.params = minipeft.select(self.model, "@lora" if kind == "LoRA" else ".*")
        self.optimizer, self.batches = minipeft.AdamW(lr=1e-2), tiny.batches()

    def fit(self, stop_at: int = 0) -> list[str]:
        """The calls that were made. Stopped ones leave everything as it was at that moment."""
        calls: list[str] = []
        first = next(iter(self.params))

        def wrapped(what: str, function: Any) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                for when in ("before", "after"):
                    if what != "update" or arguments[1] == first:  # the others are still to come
                        calls.append(f"{when} {what}")
                        if len(calls) == stop_at:
                            raise KeyboardInterrupt
                    if when == "before":
                        result = function(*arguments, **options)
                return result

            return call

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.model, "loss", wrapped("loss", self.model.loss))
            patch.setattr(minipeft.AdamW, "_update", wrapped("update", minipeft.AdamW._update))
            patch.setattr(Log, "write", wrapped("log", Log.write))
            patch.setattr(checkpoints, "write", wrapped("checkpoint", checkpoints.write))
            evaluate = wrapped("evaluate", lambda: float(abs(self.params[first].data).sum()))
            try:
                minipeft.fit(self.model, self.params, self.batches, steps=3, optimizer=self.optimizer, accumulate=3,
                             evaluate=evaluate, eval_every=2, log=self.folder / "log.jsonl",
                             checkpoint=self.folder / "run.safetensors", checkpoint_every=2)
            except KeyboardInterrupt:
                assert len(calls) == stop_at
        return calls


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_at_any_call_resumes_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    """Among the calls: in the middle of an update, and between a step, its evaluation and its checkpoint. Where there
    is a checkpoint, the run goes on with the very objects that it left half changed."""
    (tmp_path / "whole").mkdir()
    whole = Stopping(tmp_path / "whole", kind)
    calls = whole.fit()
    assert [calls.count(f"after {what}") for what in ("loss", "update", "log", "evaluate", "checkpoint")] == \
        [9, 3, 5, 2, 5]
    wanted = outcome(tmp_path / "whole"), tiny.bits(whole.params, whole.optimizer)
    for stop_at in range(1, len(calls) + 1):
        folder = tmp_path / str(stop_at)
        folder.mkdir()
        run = Stopping(folder, kind)
        assert run.fit(stop_at) == calls[:stop_at]
        if not (folder / "run.safetensors").exists():
            run = Stopping(folder, kind)
        run.fit()
        assert (outcome(folder), tiny.bits(run.params, run.optimizer)) == wanted, calls[stop_at - 1]


# ---- a run that is over, one that goes further, one that starts afresh

def fit(folder: Path, steps: int, **settings: Any) -> tuple[Any, Any]:
    model, optimizer = tiny.model(), minipeft.AdamW(lr=1e-2)
    params = tiny.everything(model)
    history = minipeft.fit(model, params, tiny.batches(), steps=steps, optimizer=optimizer, checkpoint_every=2,
                           checkpoint=folder / "run.safetensors", log=folder / "log.jsonl", **settings)
    return history, tiny.bits(params, optimizer)


def test_a_finished_run_returns_at_once_with_what_it_had(tmp_path: Path) -> None:
    history, bits = fit(tmp_path, 3, evaluate=lambda: 0.5)
    files = tiny.files(tmp_path)

    def never() -> float:
        raise AssertionError("evaluated again")

    again, same = fit(tmp_path, 3, evaluate=never)
    assert same == bits and tiny.files(tmp_path) == files
    assert (again.step, again.losses, again.scores, again.best) == (3, [], history.scores, history.best)
    assert again.seconds == history.seconds > 0


def test_more_steps_than_last_time_go_on_from_where_it_ended(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole, wanted = fit(tmp_path / "whole", 7)
    losses = []
    for steps in (1, 2, 5, 7):
        history, bits = fit(tmp_path, steps)
        losses += history.losses
    assert bits == wanted and losses == whole.losses and history.step == 7
    assert (tmp_path / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_with_resume_off_a_run_starts_afresh_over_the_old_one_even_if_it_is_killed_at_once(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    _, wanted = fit(tmp_path / "new", 3, seed=1)
    fit(tmp_path, 4, seed=1)  # the same run, but further than the new one will go

    def killed(step: int) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, 3, seed=1, resume=False, schedule=killed)
    _, bits = fit(tmp_path, 3, seed=1)
    assert bits == wanted
    assert (tmp_path / "log.jsonl").read_bytes() == (tmp_path / "new" / "log.jsonl").read_bytes()


def test_a_log_left_by_another_run_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("old\n" * 1000)
    fit(tmp_path, 2)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]
