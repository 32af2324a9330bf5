"""The program that stops training runs finds nothing in ours, and finds what is planted."""
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from minipeft.train.log import Log
from minipeft.train.state import State
from tests.attacks import killed_runs


def test_runs_that_are_stopped_in_every_way_end_as_they_should(capsys: pytest.CaptureFixture) -> None:
    assert killed_runs.main(["--seconds", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "8 runs, 0 failed" in printed and all(how in printed for how in (
        "killed at a call", "killed at a time", "at a line", "anywhere"))


def forgets_a_step(monkeypatch: Any) -> None:
    """A step that began is not put on record when an interrupt comes."""
    settle = State.settle

    def forgetful(self: State) -> None:
        self._pending = None
        settle(self)

    monkeypatch.setattr(State, "settle", forgetful)


def forgets_the_cursor(monkeypatch: Any) -> None:
    """The data do not go back to the last micro-batch that was made."""
    def forgetful(self: State) -> None:
        if self._pending is not None and self.optimizer.made >= self._pending[1]:
            self.record = self._pending[0]
        self.record = dataclasses.replace(self.record, cursor=dict(self.batches.state()))

    monkeypatch.setattr(State, "settle", forgetful)


def appends(monkeypatch: Any) -> None:
    """A line that is written again comes twice."""
    write = Log.write
    monkeypatch.setattr(Log, "write", lambda self, at, text: write(self, at, text + text))


@pytest.mark.parametrize("plant", [forgets_a_step, forgets_the_cursor, appends])
def test_what_is_planted_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Any) -> None:
    """Lines in order, a few apart, until one is found."""
    interrupted = killed_runs.Interrupted(tmp_path / "whole")
    plant(monkeypatch)
    found = []
    for n in range(200, interrupted.lines["LoRA", killed_runs.TRAINING], 23):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        found.append(killed_runs.tried(lambda f, k, _: interrupted.at(f, k, killed_runs.TRAINING, n),
                                       tmp_path / "run", "LoRA", killed_runs.numpy.random.default_rng(0)))
        if found[-1]:
            return
    raise AssertionError(f"not found in {len(found)} runs")
