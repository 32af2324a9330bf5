"""The programs of this folder fail where a promise is broken, and not where it is kept."""
from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

from minipeft.files import write_atomic
from tests.attacks import damaged_files, killed_writes
from tests.attacks.damaged_files import Target, attempt, judged
from tests.attacks.killed_writes import Writer


def raising(error: BaseException) -> Callable[[Path, Any], str]:
    def load(folder: Path, _: Any) -> str:
        raise error
    return load


def named(folder: Path, ready: Any) -> str:
    raise ValueError(f"{folder}: damaged")


def too_long(folder: Path, ready: Any) -> str:
    raise ValueError(f"{folder}: {'x' * 1000}")


def change_and_raise(folder: Path, ready: list) -> str:
    ready.append(1)
    raise ValueError(f"{folder}: damaged")


def spoil_files(folder: Path, ready: Any) -> str:
    (folder / "a").write_bytes(b"another")
    return "saved"


def sleep(folder: Path, ready: Any) -> str:
    time.sleep(60)
    return "saved"


def hoard(folder: Path, ready: Any) -> str:
    return str(np.ones(600 * 2 ** 20, np.uint8).size)


def die(folder: Path, ready: Any) -> str:
    os._exit(3)


@pytest.mark.parametrize("load, outcome", [
    (lambda folder, ready: "saved", "equal"), (named, "refused"),
    (lambda folder, ready: "other", "FAILED: something else than what was saved was loaded"),
    (raising(KeyError("state")), "FAILED: raises KeyError"), (raising(IndexError()), "FAILED: raises IndexError"),
    (raising(ValueError("damaged")), "FAILED: the message does not name the path"),
    (too_long, "FAILED: a message of 1"), (change_and_raise, "FAILED: something was changed, and then it raised"),
    (spoil_files, "FAILED: files were changed"), (sleep, "FAILED: not done after"), (hoard, "FAILED: raises"),
    (die, "FAILED: the process died")],
    ids=["equal", "refused", "another", "KeyError", "IndexError", "no path", "long", "half-changed", "files", "hangs",
         "memory", "dies"])
def test_a_broken_promise_is_a_failure_and_a_kept_one_is_none(tmp_path, monkeypatch, load, outcome):
    (tmp_path / "a").write_bytes(b"saved")
    monkeypatch.setattr(damaged_files, "SECONDS", 1 if load is sleep else 60)
    target = Target("t", lambda folder: None, load, list, lambda ready: str(ready))
    assert judged(attempt(target, tmp_path), "saved", "noticed", True).startswith(outcome)


def test_what_may_be_loaded_depends_on_the_damage_and_on_digests():
    other, refused = {"loaded": "other"}, {"error": "ValueError"}
    assert judged(other, "saved", "forged", True) == judged(other, "saved", "noticed", False) == "forged"
    assert judged(other, "saved", "none", False).startswith("FAILED")
    assert judged(refused, "saved", "none", True).startswith("FAILED")
    assert judged(refused, "saved", "forged", True) == "refused"


def test_every_damage_is_done_and_every_target_of_ours_survives_some(tmp_path, capsys):
    """A few of each; the programs themselves run for as long as they are told."""
    rng, folders = np.random.default_rng(0), {}
    for target in (damaged_files.TARGETS[0], damaged_files.TARGETS[-1]):
        (folders.setdefault(target.name, tmp_path / target.name)).mkdir()
        target.make(folders[target.name])
    for damage in damaged_files.DAMAGES:
        # only adapters and checkpoints have texts to forge
        path = folders["checkpoint" if damage is damaged_files.forge_texts else damaged_files.TARGETS[0].name]
        valid = damaged_files.contents(path)
        seen = set()
        for n in range(6):
            folder = tmp_path / f"{damage.__name__} {n}"
            folder.mkdir()
            for name in valid:
                (folder / name).write_bytes((path / name).read_bytes())
            damage(folder, rng)
            seen.add(damaged_files.contents(folder) == valid)
        assert (True in seen and len(seen) == 1) if damage is damaged_files.nothing else False in seen, damage
    assert damaged_files.main(damaged_files.TARGETS, ["--tries", "24"]) == 0
    assert "0 failed" in capsys.readouterr().out


def torn(folder: Path, version: int) -> None:
    """A writer that writes in place."""
    with (folder / "a").open("wb") as file:
        for part in np.array_split(np.frombuffer(killed_writes.data(version), np.uint8), 100):
            file.write(part.tobytes())
            file.flush()


def untidy(folder: Path, version: int) -> None:
    """A writer whose temporary files stay when it is killed."""
    os.replace(named_randomly(folder, version), folder / "a")


def named_randomly(folder: Path, version: int) -> Path:
    path = folder / f".{os.urandom(4).hex()}"
    path.write_bytes(killed_writes.data(version))
    return path


@pytest.mark.parametrize("write, found, tries", [
    (torn, "neither that of write", 8), (untidy, "after the next write there are", 40),
    (lambda folder, version: write_atomic(folder / "a", killed_writes.data(version)), "", 10)],
    ids=["torn", "untidy", "write_atomic"])
def test_a_writer_that_tears_files_or_leaves_some_is_found(capsys, write, found, tries):
    status = killed_writes.main([Writer("w", write, ("a",))], ["--tries", str(tries)])
    assert status == (1 if found else 0) and found in capsys.readouterr().out


def test_a_reader_that_accepts_two_versions_is_found(capsys):
    """Weights of one version beside the configuration of another."""
    writer = dataclasses.replace(killed_writes.WRITERS[2], accepted=lambda folder: True)
    assert killed_writes.main([writer], ["--tries", "20"]) == 1
    assert "the reader accepts files of the writes" in capsys.readouterr().out
