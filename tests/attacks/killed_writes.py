"""Killed writers: a program. `python tests/attacks/killed_writes.py [--seconds 20] [--seed 0]`

Again and again a child process writes one version of something after another over the same path, until it is killed by
SIGKILL: at a moment drawn at random, or just before a system call drawn at random, a write of half the bytes among
them. What has to hold after each kill:

    every file is one of its versions, whole, and none older than the last write that was finished;
    a folder of which only one of the two files was replaced is refused by the reader, or both are the same version;
    the next write leaves what it wrote and no temporary file.

At the end a table says how often each kind of writer was killed where; the exit status is 1 if anything failed. The
i-th attempt depends on the seed and on i, and on what the machine does in between.
"""
from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy  # noqa: E402

import minipeft  # noqa: E402
from minipeft.files import write_atomic  # noqa: E402

CALLS = ("open", "write", "fsync", "fchmod", "replace", "unlink", "close")
VERSIONS = 4


@dataclasses.dataclass(frozen=True)
class Writer:
    """Something that is written again and again. write: (folder, version). files: those that it leaves there, in the
    order in which it writes them. accepted: whether a reader takes the folder as it is; by default always."""

    name: str
    write: Callable[[Path, int], None]
    files: tuple[str, ...]
    accepted: Callable[[Path], bool] = lambda folder: True


def data(version: int) -> bytes:
    return numpy.random.default_rng(version).bytes(30_000 + 1000 * version)


def model(version: int) -> minipeft.Transformer:
    """Weights and configuration both say which version it is."""
    config = minipeft.TransformerConfig(23, 12, 3, 20, 1, 1, activation=("relu", "gelu", "silu", "gelu_new")[version])
    return minipeft.Transformer(config, numpy.random.default_rng(version))


def loads(folder: Path) -> bool:
    try:
        found = minipeft.Transformer.from_pretrained(folder)
    except ValueError as error:
        if "is not the configuration that" not in str(error):
            raise
        return False
    versions = [model(version) for version in range(VERSIONS)]
    return any(found.config == m.config and all(numpy.array_equal(found.state()[n], a) for n, a in m.state().items())
               for m in versions)


def save_adapter(folder: Path, version: int) -> None:
    lora = minipeft.attach(model(0), minipeft.LoRA(rank=2), numpy.random.default_rng(version), "a")
    for p in lora.parameters.values():
        p.data = p.data + p.dtype.type(version)
    lora.save(folder / "adapter.safetensors")


WRITERS = [
    Writer("write_atomic", lambda folder, version: write_atomic(folder / "a", data(version)), ("a",)),
    Writer("write_atomic, a long name", lambda folder, version: write_atomic(folder / ("n" * 250), data(version)),
           ("n" * 250,)),
    Writer("save_pretrained", lambda folder, version: model(version).save_pretrained(folder),
           ("model.safetensors", "config.json"), loads),
    Writer("attachment.save", save_adapter, ("adapter.safetensors",)),
]


# --------------------------------------------------------------------------------------------------------- one attempt

def deadly(calls: int) -> list[str]:
    """From here on, kills the process before its call number `calls` of the file system."""
    made: list[str] = []

    def counted(name: str, function: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            made.append(name)
            if len(made) == calls:
                if name == "write":  # half of it is written
                    function(arguments[0], arguments[1][:len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))
    return made


def start(writer: Writer, folder: Path, first: int, calls: int) -> tuple[int, int]:
    """A child that writes versions for ever. It says which it begins and which it has finished: (process, pipe)."""
    into, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            os.close(into)
            say = os.write
            if calls:
                deadly(calls)
            for n in range(first, first + 100_000):
                say(out, b"%d begun\n" % n)
                writer.write(folder, n % VERSIONS)
                say(out, b"%d done\n" % n)
        finally:
            os._exit(1)
    os.close(out)
    return pid, into


def killed(writer: Writer, folder: Path, first: int, rng: numpy.random.Generator) -> tuple[str, int, int]:
    """(where it died, the write last finished, the write last begun); first - 1 for none."""
    by_call = bool(rng.random() < 0.6)
    pid, pipe = start(writer, folder, first, int(rng.integers(1, 60)) if by_call else 0)
    ended, status = 0, 0
    deadline = time.monotonic() + (1 if by_call else rng.uniform(0.0, 0.03))
    while not ended and time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.001)
    if not ended:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    with os.fdopen(pipe, "rb") as said:
        lines = said.read().decode().splitlines()
    if not os.WIFSIGNALED(status):
        raise AssertionError(f"{writer.name}: the writer ended by itself with status {status}")
    numbers = {what: max((int(line.split()[0]) for line in lines if line.endswith(what)), default=first - 1)
               for what in ("done", "begun")}
    return "before a call" if by_call else "at any time", numbers["done"], numbers["begun"]


def wrong(writer: Writer, folder: Path, versions: dict[str, list[bytes]], done: int, begun: int) -> str:
    """What is not as it should be after a kill, or ""."""
    found = []
    for name in writer.files:
        raw = (folder / name).read_bytes()
        allowed = [n for n in {done, begun} if raw == versions[name][n % VERSIONS]]
        if not allowed:
            return f"{name} is neither that of write {done} nor that of write {begun}"
        found.append(allowed[0])
    try:
        accepted = writer.accepted(folder)
    except (ValueError, OSError) as error:
        return f"the reader says {type(error).__name__}: {str(error)[:200]}"
    if accepted != (len(set(found)) == 1):
        return f"the reader {'accepts' if accepted else 'refuses'} files of the writes {found}"
    return ""


def cleaned(writer: Writer, folder: Path, versions: dict[str, list[bytes]], version: int) -> str:
    """What is not as it should be after one more write, or ""."""
    writer.write(folder, version)
    if {path.name for path in folder.iterdir()} != set(writer.files):
        return f"after the next write there are {sorted(path.name[:40] for path in folder.iterdir())}"
    if any((folder / name).read_bytes() != versions[name][version] for name in writer.files):
        return "the next write did not write what it should"
    return ""


def main(writers: list[Writer], arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kills writers.")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tries", type=int, help="so many kills, however long they take")
    options = parser.parse_args(arguments)
    table: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    end, i = time.monotonic() + options.seconds, 0
    with tempfile.TemporaryDirectory() as where:
        expected: dict[str, dict[str, list[bytes]]] = {}
        for writer in writers:
            folder = Path(where) / writer.name
            folder.mkdir()
            expected[writer.name] = {name: [] for name in writer.files}
            for version in range(VERSIONS):
                writer.write(folder, version)
                for name in writer.files:
                    expected[writer.name][name].append((folder / name).read_bytes())
            if any(len(set(found)) != VERSIONS for found in expected[writer.name].values()):
                raise SystemExit(f"{writer.name}: its versions are not {VERSIONS} different ones")
        while i < options.tries if options.tries else time.monotonic() < end:
            rng = numpy.random.default_rng([options.seed, i])
            writer = writers[i % len(writers)]
            folder, versions = Path(where) / writer.name, expected[writer.name]
            writer.write(folder, 3)
            how, done, begun = killed(writer, folder, 4, rng)
            left = sum(path.name.startswith(".") for path in folder.iterdir())
            fault = wrong(writer, folder, versions, done, begun) or cleaned(writer, folder, versions,
                                                                            int(rng.integers(VERSIONS)))
            row = table[writer.name, how]
            row.update({"kills": 1, "in a write": done != begun, "files left": left, "FAILED": bool(fault)})
            if fault:
                print(f"--seed {options.seed}, attempt {i}: {writer.name}, {how}: {fault}", flush=True)
                for path in folder.iterdir():
                    path.unlink()
            i += 1
    columns = ("kills", "in a write", "files left", "FAILED")
    print(f"{'writer':28}{'killed':16}" + "".join(f"{column:>12}" for column in columns))
    for (name, how), counts in sorted(table.items()):
        print(f"{name:28}{how:16}" + "".join(f"{counts[column]:12}" for column in columns))
    failed = sum(counts["FAILED"] for counts in table.values())
    print(f"{i} kills, {failed} failed (seed {options.seed})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(WRITERS))
