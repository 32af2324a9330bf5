"""One run at a time on a checkpoint, and no lock file after it."""
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import minipeft
from minipeft.train import lock as locks
from minipeft.train.lock import Lock, lock_file
from tests.train import tiny

HOLD = """
import sys
from minipeft.train.lock import Lock
lock = Lock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


class Holder:
    """Another process that holds the lock of a checkpoint until it is killed."""

    def __init__(self, path: Path):
        self.process = subprocess.Popen([sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None and self.process.stdout.readline() == "held\n"

    def __enter__(self) -> int:
        return self.process.pid

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.communicate()


def fit(path: Path, **settings: Any) -> Any:
    model = tiny.model()
    return minipeft.fit(model, tiny.everything(model), tiny.batches(), steps=2, checkpoint=path, **settings)


@pytest.mark.parametrize("through", ["its name", "a symlink", "another spelling"])
def test_a_second_run_is_refused_with_the_process_and_host_of_the_first(tmp_path: Path, through: str) -> None:
    path = {"its name": tmp_path / "run", "a symlink": tmp_path / "link",
            "another spelling": tmp_path / ".." / tmp_path.name / "run"}[through]
    if through == "a symlink":
        path.symlink_to(tmp_path / "run")
    with Holder(tmp_path / "run") as pid:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(RuntimeError, match=f"process {pid} on host '{socket.gethostname()}'.*: wait until it ends"):
            fit(path, log=tmp_path / "log")
        assert sorted(tmp_path.iterdir()) == before and lock_file(path) in before  # it is still the first one's
    assert fit(path).step == 2  # the lock of a killed process is taken over
    assert {p.name for p in tmp_path.iterdir()} == {"run", *(["link"] if through == "a symlink" else [])}


def test_a_run_inside_a_run_on_one_checkpoint_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=f"in use by another run .process {os.getpid()} on host"):
        fit(tmp_path / "run", evaluate=lambda: len(fit(tmp_path / "run").losses))
    assert {p.name for p in tmp_path.iterdir()} == {"run"}  # the outer one was saved
    assert fit(tmp_path / "run", evaluate=lambda: len(fit(tmp_path / "other").losses)).best == (2, 2.0)
    assert {p.name for p in tmp_path.iterdir()} == {"run", "other"}


@pytest.mark.parametrize("content", ["", "x", "12 ", "0 0 0", "9" * 4000 + " host", "\0" * 300])
def test_a_lock_file_that_nobody_holds_is_taken_over_whatever_is_in_it(tmp_path: Path, content: str) -> None:
    lock_file(tmp_path / "run").write_text(content)
    assert fit(tmp_path / "run").step == 2
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_names_too_long_for_a_lock_file_of_their_own_get_a_short_one(tmp_path: Path) -> None:
    for name in ("n" * 200, "n" * 248, "n" * 249, "n" * 255, "ü" * 127):
        lock = Lock(tmp_path / name)
        lock.acquire()
        assert len(list(tmp_path.iterdir())) == 1
        with pytest.raises(RuntimeError, match="in use by another run"):
            Lock(tmp_path / name).acquire()
        assert len(list(tmp_path.iterdir())) == 1
        lock.release()
        lock.release()
        assert not list(tmp_path.iterdir())
    assert lock_file(tmp_path / ("n" * 255)) != lock_file(tmp_path / ("n" * 254))


def test_a_lock_whose_file_was_removed_between_opening_and_locking_it_is_taken_again(
        tmp_path: Path, monkeypatch: Any) -> None:
    """Otherwise it would be one on a file that nobody else can find."""
    first, second, flock, calls = Lock(tmp_path / "run"), Lock(tmp_path / "run"), locks.fcntl.flock, []
    first.acquire()

    def meanwhile(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            first.release()
        flock(*arguments)

    monkeypatch.setattr(locks.fcntl, "flock", meanwhile)
    second.acquire()
    with pytest.raises(RuntimeError, match="in use by another run"):
        Lock(tmp_path / "run").acquire()
    second.release()
    assert not list(tmp_path.iterdir())


def test_of_many_that_try_at_once_exactly_one_gets_the_lock_each_time(tmp_path: Path) -> None:
    """The file is removed and made again all the while."""
    inside, got, worst = [], [], []

    def run() -> None:
        for _ in range(200):
            lock = Lock(tmp_path / "run")
            try:
                lock.acquire()
            except RuntimeError:
                continue
            inside.append(1)
            worst.append(len(inside))
            got.append(1)
            inside.pop()
            lock.release()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got and max(worst) == 1 and not list(tmp_path.iterdir())


def test_without_locks_in_the_system_runs_are_made_all_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    assert fit(tmp_path / "run").step == 2
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_without_locks_in_the_file_system_too(tmp_path: Path, monkeypatch: Any) -> None:
    def refuses(*_: Any) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(locks.fcntl, "flock", refuses)
    assert fit(tmp_path / "run").step == 2
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("what", ["log", "best"])
def test_two_runs_do_not_share_a_log_or_a_best_file(what, tmp_path):
    held = Lock(tmp_path / "shared")
    held.acquire()
    model = tiny.model()
    with pytest.raises(RuntimeError, match=f"shared is in use by another run .process {os.getpid()} on host"):
        minipeft.fit(model, minipeft.select(model, "."), tiny.batches(), steps=1, progress=False, evaluate=lambda: 1.0,
                     **{what: tmp_path / "shared"})
    held.release()
    minipeft.fit(model, minipeft.select(model, "."), tiny.batches(), steps=1, progress=False, evaluate=lambda: 1.0,
                 **{what: tmp_path / "shared"})
    assert [p.name for p in tmp_path.iterdir()] == ["shared"]
