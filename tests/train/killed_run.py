"""A training run to be killed: a program. `python killed_run.py FOLDER full|LoRA SIZE [DIE_AT | trace]`

It goes on from FOLDER/run.safetensors, if that is there, and at the end writes FOLDER/result.json; on the way it keeps
the best weights and a log. DIE_AT = n kills it with SIGKILL before the n-th thing that it does to the file system;
"trace" writes the list of these things to FOLDER/trace.json. It prints a line when the first step begins.
"""
from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import numpy

import minipeft
from minipeft.train import checkpoint as checkpoints

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

VOCAB, SIZES = 12, {"short": (5, 2), "long": (36, 3)}  # optimizer steps, micro-batches between checkpoints


# ---- for those who kill it

def start(folder: Path, kind: str, size: str, die_at: Any = "") -> subprocess.Popen:
    """The program, up to the moment when its first step begins."""
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, __file__, folder, kind, size, str(die_at)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "go\n", process.communicate()
    return process


def end(process: subprocess.Popen) -> int:
    _, errors = process.communicate(timeout=60)
    assert errors == "", errors
    return process.returncode


def outcome(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves behind: its files, and what it returned. Only `seconds` may differ."""
    saved = checkpoints.read(folder / "run.safetensors")
    assert saved.state.pop("seconds") > 0
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "trace.json"}
    found["run.safetensors"] = b""
    return {"arrays": {(group, name): (a.dtype, a.shape, a.tobytes()) for group, members in saved.arrays.items()
                       for name, a in members.items()}, "state": saved.state, "run": saved.run, "files": found}


# ---- the program

def main(folder: Path, kind: str, size: str, writer: Any = None) -> None:
    steps, every = SIZES[size]
    config = minipeft.TransformerConfig(VOCAB, 8, 2, 16, 1, 1, dropout_rate=0.1, pre_norm=True)
    model = minipeft.Transformer(config, numpy.random.default_rng(0))
    where = ".*"
    if kind == "LoRA":
        minipeft.attach(model, minipeft.LoRA(2, dropout=0.1), numpy.random.default_rng(1))
        where = "@lora"
    params, optimizer = minipeft.select(model, where), minipeft.AdamW(lr=1e-2)
    rng = numpy.random.default_rng(2)
    sources = [rng.integers(3, VOCAB, rng.integers(2, 6)).tolist() for _ in range(10)]
    batches = minipeft.Batches([(source, source + [1]) for source in sources], 4)
    batch = minipeft.batch_of(batches.pairs)
    print("go", flush=True)
    if writer is not None:
        writer.begin()
    history = minipeft.fit(
        model, params, batches, steps=steps, optimizer=optimizer, schedule=minipeft.cosine_decay(steps, 2), clip=0.5,
        accumulate=3, seed=4, evaluate=lambda: -float(model.loss(**batch)), eval_every=2, log=folder / "log.jsonl",
        best=folder / "best.safetensors", checkpoint=folder / "run.safetensors", checkpoint_every=every)
    arrays = {"p": {name: p.data for name, p in params.items()}, "m": optimizer.m, "v": optimizer.v,
              "frozen": {name: a for name, a in model.state().items() if name not in params}}
    if writer is not None:
        writer.die_at = None
    (folder / "result.json").write_text(json.dumps({
        "step": history.step, "scores": history.scores, "best": history.best, "steps": optimizer.steps,
        **{group: {name: hashlib.sha256(a.tobytes()).hexdigest() for name, a in members.items()}
           for group, members in arrays.items()}}))


class Writer:
    """Counts, and may die before, what is done to the file system from here on. A file is written in two halves, so
    that one may be missing."""

    CALLS = ("open", "fsync", "ftruncate", "replace", "unlink", "close", "fchmod")

    def __init__(self, die_at: int | None):
        self.die_at, self.done = die_at, list[str]()
        self._write = os.write

    def begin(self) -> None:
        for name in self.CALLS:
            setattr(os, name, self.counted(name, getattr(os, name)))
        os.write = self.in_halves
        if fcntl is not None:
            fcntl.flock = self.counted("flock", fcntl.flock)

    def about_to(self, what: str) -> None:
        self.done.append(what)
        if len(self.done) == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, name: str, function: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            to = f" {Path(arguments[1]).name}" if name == "replace" else ""
            self.about_to(name + to)
            return function(*arguments, **options)

        return call

    def in_halves(self, handle: int, data: Any) -> int:
        half = len(data) // 2
        for what, part in (("write the first half", data[:half]), ("write the second half", data[half:])):
            self.about_to(what)
            while part:
                part = part[self._write(handle, part):]
        return len(data)


if __name__ == "__main__":
    target, last = Path(sys.argv[1]), sys.argv[4] if len(sys.argv) > 4 else ""
    writer = Writer(int(last) if last.isdigit() else None) if last else None
    main(target, *sys.argv[2:4], writer)
    if writer is not None:
        (target / "trace.json").write_text(json.dumps(writer.done))
