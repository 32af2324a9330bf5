"""A run that was killed or stopped and resumed ends with the bits of one that was not; on one machine, BLAS and thread
count. Its log and its best file end with the same bytes, and no other file is left.

The runs accumulate micro-batches and write a checkpoint every few, so that some fall inside an accumulation and some on
a step with an evaluation due; dropout is on.
"""
from __future__ import annotations

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest

import minipeft
from minipeft.train import checkpoint as checkpoints
from tests.train import stopped_run, tiny
from tests.train.interrupted import InterruptedAt
from tests.train.killed_run import end, outcome, start

KINDS = ["full", "LoRA"]


# ---- SIGKILL to a subprocess

@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_before_any_call_to_the_file_system_resumes_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    """From the lock to the end of the third checkpoint, which falls on a step with an evaluation, and a best file, due.
    Every fourth call, others for each kind of run (tests/attacks/killed_runs.py draws among all); to die after one is
    to die before the next one."""
    whole = tmp_path / "whole"
    assert end(start(whole, kind, "short", "trace")) == 0
    calls = json.loads((whole / "trace.json").read_text())
    saves = [i for i, call in enumerate(calls, 1) if call == "replace run.safetensors"]
    assert len(saves) == 8 and "replace best.safetensors" in calls[:saves[2]]  # of 15 micro-batches
    wanted = outcome(whole)
    assert wanted["state"]["scores"][0][0] == 2 and wanted["state"]["micro"] == 15
    assert set(wanted["files"]) == {"run.safetensors", "log.jsonl", "best.safetensors", "result.json"}

    def die_and_resume(at: int) -> None:
        folder = tmp_path / str(at)
        assert end(start(folder, kind, "short", at)) == -signal.SIGKILL
        done = sum(save < at for save in saves)  # checkpoints that reached their name
        assert (folder / "run.safetensors").exists() == (done > 0)
        if done:
            assert checkpoints.read(folder / "run.safetensors").state["micro"] == 2 * done
        assert end(start(folder, kind, "short")) == 0
        assert outcome(folder) == wanted, (at, calls[at - 1])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(die_and_resume, range(1 + 2 * KINDS.index(kind), saves[3] - 8, 4)))


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
        assert outcome(folder) == wanted[kind]
        return landed

    landed = 0
    with ThreadPoolExecutor(2) as pool:
        for seed in range(0, 40, 2):  # where the machine is slower now than it was above, ten runs are enough
            if landed < 20:
                landed += sum(pool.map(killed_twice, [seed, seed + 1]))
    assert landed >= 20


# ---- an interrupt at any line, in this process

@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> dict[str, dict[str, Any]]:
    """{kind: the outcome of a run that was never stopped}."""
    found = {}
    for kind in stopped_run.KINDS:
        run = stopped_run.StoppedRun(tmp_path_factory.mktemp("whole"), kind)
        history = run.fit()
        assert history.step == 3 and [step for step, _ in history.scores] == [1, 2, 3]
        found[kind] = run.outcome()
        assert found[kind]["files"] == stopped_run.FILES
    return found


@pytest.mark.parametrize("kind", stopped_run.KINDS)
@pytest.mark.parametrize("where, tries", [(("minipeft/train", "minipeft/atomic", "minipeft/files"), 40),
                                          (("minipeft",), 10)], ids=["train", "anywhere"])
def test_a_run_interrupted_at_any_line_resumes_to_the_same_bits(
        tmp_path: Path, whole: dict, kind: str, where: tuple, tries: int) -> None:
    """With the objects that it left, or with new ones. (tests/attacks/killed_runs.py --every-line tries all.)"""
    (tmp_path / "count").mkdir()
    lines = stopped_run.lines_of(kind, tmp_path / "count", InterruptedAt(0, *where))
    assert lines > 1000
    rng = numpy.random.default_rng(0)
    for i, n in enumerate([*range(1, 4), *rng.integers(4, lines - 9, tries), *range(lines - 9, lines + 1, 2)]):
        interrupt, folder = InterruptedAt(int(n), *where), tmp_path / str(i)
        folder.mkdir()
        found, wrong = stopped_run.stop_and_resume(folder, kind, interrupt, again=i % 2 == 0)
        assert interrupt.raised and wrong == "", (interrupt.where, wrong)
        assert found == whole[kind], interrupt.where


class Second(Exception):
    """Not the first exception, but one on the way out."""


@pytest.mark.parametrize("kind", stopped_run.KINDS)
def test_where_even_the_checkpoint_cannot_be_written_the_exception_says_so_and_nothing_is_half_made(
        tmp_path: Path, whole: dict, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stopped_run.StoppedRun(tmp_path, kind)

    def fails(*_: Any) -> None:
        raise Second("no room")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", fails)
        with pytest.raises(Second) as found:
            run.fit()
    assert found.value.history.step == 1
    assert any("could not be written: no room" in note for note in found.value.__notes__)
    made = tiny.bits(run.params, run.optimizer)
    assert set(made["steps"].values()) == {1} and set(tiny.files(tmp_path)) == {"log.jsonl", "best.safetensors"}
    run = stopped_run.StoppedRun(tmp_path, kind)
    run.fit()
    assert run.outcome() == whole[kind]


# ---- a run whose evaluation fails

class Broken(Exception):
    pass


def failing(run: Any, at: int, what: Any) -> Any:
    """The run's score, but at step `at` an exception is raised or a value returned."""
    def evaluate() -> Any:
        if run.optimizer.made == at:
            if isinstance(what, BaseException):
                raise what
            return what
        return run.score()

    return evaluate


@pytest.mark.parametrize("kind", stopped_run.KINDS)
@pytest.mark.parametrize("what, error", [
    (Broken("no data"), Broken), (KeyboardInterrupt(), KeyboardInterrupt), (SystemExit(3), SystemExit),
    (float("nan"), ValueError), (float("inf"), ValueError), (None, ValueError), ("0.5", ValueError),
    (numpy.ones(2), ValueError), (10 ** 400, ValueError)], ids=lambda what: type(what).__name__)
@pytest.mark.parametrize("at", [1, 3])
def test_a_failing_evaluation_is_made_again_when_the_run_goes_on_and_nothing_is_lost(
        tmp_path: Path, whole: dict, kind: str, what: Any, error: Any, at: int) -> None:
    run = stopped_run.StoppedRun(tmp_path, kind)
    with pytest.raises(error) as found:
        run.fit(evaluate=failing(run, at, what))
    history = found.value.history
    assert history.step == len(history.losses) == at and len(history.scores) == at - 1 and history.seconds > 0
    saved = checkpoints.read(tmp_path / "run.safetensors").state
    assert saved["step"] == at and saved["due"] is True
    run = stopped_run.StoppedRun(tmp_path, kind)
    assert run.fit().scores[:at - 1] == history.scores
    assert run.outcome() == whole[kind]


@pytest.mark.parametrize("kind", stopped_run.KINDS)
def test_stop_iteration_from_evaluate_ends_the_run_cleanly(tmp_path: Path, whole: dict, kind: str) -> None:
    run = stopped_run.StoppedRun(tmp_path, kind)
    history = run.fit(evaluate=failing(run, 2, StopIteration()))
    assert history.step == 2 and len(history.scores) == 1 and len(history.losses) == 2
    assert set(tiny.files(tmp_path)) == stopped_run.FILES
    again = run.fit(evaluate=failing(run, 2, StopIteration()))  # and again
    assert (again.step, again.scores, again.losses) == (2, history.scores, [])
    run = stopped_run.StoppedRun(tmp_path, kind)  # one that has a score now goes on
    run.fit()
    assert run.outcome() == whole[kind]


def test_an_evaluation_that_failed_is_forgotten_by_a_run_that_has_none(tmp_path: Path) -> None:
    run = stopped_run.StoppedRun(tmp_path, "LoRA")
    with pytest.raises(Broken):
        run.fit(evaluate=failing(run, 1, Broken()))
    settings = dict(evaluate=None, eval_every=None, best=None)
    with pytest.raises(KeyboardInterrupt):
        run.fit(schedule=lambda step: interrupted() if step == 3 else minipeft.cosine_decay(3)(step), **settings)
    assert checkpoints.read(tmp_path / "run.safetensors").state["due"] is False
    history = run.fit(**settings)
    assert history.step == 3 and history.scores == []


def interrupted() -> float:
    raise KeyboardInterrupt


# ---- patience, and the best weights

SCORES = [1.0, 3.0, 2.0, 3.0, 2.5, 9.0]


def patient(folder: Path, patience: int | None, steps: int = 6, **settings: Any) -> tuple[Any, Any]:
    """A run whose evaluations give SCORES, one after each step; its history and its model."""
    model, optimizer = tiny.model(), minipeft.AdamW(lr=1e-2)
    settings = {"params": tiny.everything(model), "checkpoint": folder / "run", "best": folder / "best", **settings}
    history = minipeft.fit(model, batches=tiny.batches(), steps=steps, optimizer=optimizer, patience=patience,
                           eval_every=1, evaluate=lambda: SCORES[min(optimizer.steps.values()) - 1], **settings)
    return history, model


@pytest.mark.parametrize("patience, steps", [(1, 3), (2, 4), (3, 5), (4, 6), (9, 6), (None, 6)])
def test_patience_ends_the_run_after_so_many_evaluations_without_a_new_best(
        tmp_path: Path, patience: int | None, steps: int) -> None:
    """A score that is only reached again is no new best."""
    history, _ = patient(tmp_path, patience)
    assert history.step == steps and [score for _, score in history.scores] == SCORES[:steps]
    assert history.best == max(history.scores, key=lambda at: at[1])
    again, _ = patient(tmp_path, patience)  # from the start's parameters
    assert (again.step, again.losses, again.scores) == (steps, [], history.scores)
    if patience == 2:
        assert patient(tmp_path, None)[0].scores == [(i, score) for i, score in enumerate(SCORES, 1)]


def test_the_best_file_holds_the_weights_of_the_best_step_and_restore_puts_them_back(tmp_path: Path) -> None:
    for steps, best in ((1, 1), (2, 2), (5, 2), (6, 6)):
        folder = tmp_path / str(steps)
        folder.mkdir()
        history, model = patient(folder, None, steps)
        assert history.best == (best, SCORES[best - 1])
        wanted = tiny.everything(patient(folder, None, best, checkpoint=None, best=None)[1])
        assert (tiny.bits(tiny.everything(model)) == tiny.bits(wanted)) == (steps == best)
        minipeft.restore(tiny.everything(model), folder / "best")
        assert tiny.bits(tiny.everything(model)) == tiny.bits(wanted)


def test_a_resumed_run_keeps_the_best_of_all_its_calls(tmp_path: Path) -> None:
    """The checkpoint's best counts: a later score below it does not replace the file."""
    patient(tmp_path, None, 3)
    best = (tmp_path / "best").read_bytes()
    assert patient(tmp_path, None, 5)[0].best == (2, 3.0) and (tmp_path / "best").read_bytes() == best
    assert patient(tmp_path, None, 6)[0].best == (6, 9.0) and (tmp_path / "best").read_bytes() != best


def test_a_best_file_that_is_missing_when_a_run_goes_on_is_an_error_that_says_so(tmp_path: Path) -> None:
    patient(tmp_path, None, 3)
    (tmp_path / "best").unlink()
    before = tiny.files(tmp_path)
    with pytest.raises(ValueError, match=r"best is .*best', which is missing: .*run has its best score from step 2"):
        patient(tmp_path, None, 6)
    assert tiny.files(tmp_path) == before
    assert patient(tmp_path, None, 6, best=None)[0].step == 6
    assert patient(tmp_path, None, 6, resume=False)[0].step == 6 and (tmp_path / "best").exists()


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
