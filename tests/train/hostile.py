"""Checkpoints whose numbers were altered by somebody who can compute digests: a program, and functions for tests.

    python -m tests.train.hostile --count 900 --seed 0

`attack` alters one thing, or a few, in the metadata of a checkpoint, signs it again and resumes. Right is a ValueError
that names the file in less than 1,000 characters and leaves everything as it was, or a run to its end.
"""
from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Iterator

import numpy

import minipeft
from minipeft.files import read_tensors, write_tensors
from minipeft.train import checkpoint as checkpoints
from tests.train import tiny

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 5, 2 ** 31, 2 ** 63, 2 ** 64, 2 ** 128 + 1, -2 ** 63, 10 ** 18, 10 ** 300, 0.0,
    -0.0, 0.5, -1.5, 1e308, 5e-324, 1e18, "", "0", "step", "\0", "x" * 5000, [], [0], [[]], [[1, 2.0]],
    [[1, 0.5], [1, 0.5]], [1] * 2000, {}, {"epoch": 0}, {"epoch": 0, "position": 0},
    {"epoch": 10 ** 18, "position": 0}, {"epoch": 2 ** 70, "position": 4}, {"a": {"b": {"c": []}}}]
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "[" * 3000 + "]" * 3000,
       '{"a":' * 2000 + "1" + "}" * 2000, '{"step": 1, "step": 2}', "1 2", "", "'", "\\ud800", '"\\ud800"', "0x10",
       "01"]


class Victim:
    """A run in a folder, and its checkpoint inside the third step, which others alter."""

    def __init__(self, folder: Path):
        self.path, self.folder = folder / "run.safetensors", folder
        self.model = tiny.model()
        self.lora = minipeft.attach(self.model, minipeft.LoRA(2, dropout=0.1), numpy.random.default_rng(0))
        self.optimizer, self.batches = minipeft.AdamW(lr=1e-3), tiny.batches()

    def fit(self, evaluate: Any = lambda: 0.5) -> Any:
        return minipeft.fit(self.model, self.lora, self.batches, steps=4, optimizer=self.optimizer, accumulate=2,
                            evaluate=evaluate, eval_every=1, log=self.folder / "log.jsonl", checkpoint=self.path,
                            best=self.folder / "best")

    def stopped(self) -> "Victim":
        """With two steps made, and half of the third."""
        calls, following = iter(range(5)), self.batches.next

        def stopping() -> Any:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return following()

        self.batches.next = stopping  # type: ignore[method-assign]
        try:
            self.fit()
        except KeyboardInterrupt:
            return self
        raise AssertionError("it was not stopped")

    def bits(self) -> Any:
        return tiny.bits(self.lora.parameters, self.optimizer), self.batches.state(), tiny.files(self.folder)


def signed(path: Path, tensors: dict, texts: dict[str, str]) -> None:
    """Write a checkpoint of these texts, with the digests that they need."""
    kept = {key: text for key, text in texts.items() if key in ("state", "run")}
    write_tensors(path, tensors, {"format": "minipeft-checkpoint-2", "sha256": checkpoints._digest(
        {**{"state": "", "run": ""}, **kept}), **kept})


def paths(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Every place inside a JSON value, the whole of it first."""
    yield at
    if isinstance(value, (dict, list)):
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inside, (*at, key))


def altered(text: str, rng: numpy.random.Generator) -> str:
    """A JSON text with one to three changes: a value replaced, removed, doubled, nudged, or spoilt as text."""
    value = json.loads(text)
    for _ in range(int(rng.integers(1, 4))):
        places = list(paths(value))
        at = places[int(rng.integers(len(places)))]
        kind = rng.choice(["replace", "remove", "extra", "nudge", "raw", "retype"], p=[0.4, 0.1, 0.1, 0.25, 0.1, 0.05])
        if kind == "raw":
            raw = RAW[int(rng.integers(len(RAW)))]
            return _put(value, at, "RAW").replace('"RAW"', raw) if rng.random() < 0.8 else raw
        value = json.loads(_changed(value, at, str(kind), rng))
    return json.dumps(value)


def _put(value: Any, at: tuple, new: Any) -> str:
    copy = json.loads(json.dumps(value))
    if not at:
        return json.dumps(new)
    inside = copy
    for key in at[:-1]:
        inside = inside[key]
    inside[at[-1]] = new
    return json.dumps(copy)


def _changed(value: Any, at: tuple, kind: str, rng: numpy.random.Generator) -> str:
    copy = json.loads(json.dumps(value))
    inside, old = copy, copy
    for key in at:
        inside, old = old, old[key]
    if kind == "remove" and at:
        del inside[at[-1]]
    elif kind == "extra" and isinstance(old, dict):
        old["surplus"] = VALUES[int(rng.integers(len(VALUES)))]
    elif kind == "extra" and isinstance(old, list):
        old.insert(int(rng.integers(len(old) + 1)), VALUES[int(rng.integers(len(VALUES)))])
    elif kind == "nudge" and isinstance(old, (int, float)):
        return _put(value, at, old + [-1, 1, 2, -2, 0.5, 10 ** 6][int(rng.integers(6))])
    elif kind == "retype" and isinstance(old, (int, float)):
        return _put(value, at, [str(old), float(old), [old], {"v": old}, bool(old)][int(rng.integers(5))])
    else:
        return _put(value, at, VALUES[int(rng.integers(len(VALUES)))])
    return json.dumps(copy)


def attack(folder: Path, count: int, seed: int, keys: tuple = ("state", "run")) -> tuple[Counter, list[str]]:
    """How `count` altered checkpoints ended, and a line for each that ended wrong."""
    original = folder / "original"
    original.mkdir()
    victim = Victim(original).stopped()
    tensors, metadata = read_tensors(victim.path)
    files = tiny.files(original)
    texts = {key: metadata[key] for key in ("state", "run")}
    rng, ends, wrong = numpy.random.default_rng(seed), Counter[str](), list[str]()
    for i in range(count):
        here = folder / str(i)
        here.mkdir()
        for name, content in files.items():
            (here / name).write_bytes(content)
        key = keys[int(rng.integers(len(keys)))]
        text = altered(texts[key], rng)
        run = Victim(here)
        signed(run.path, tensors, {**texts, key: text})
        before = run.bits()
        end = _end(run, before)
        ends[end] += 1
        if end not in ("refused", "resumed"):
            wrong.append(f"{i}: {key} = {text[:300]}: {end}")
        for path in here.iterdir():
            path.unlink()
        here.rmdir()
    return ends, wrong


def _end(run: Victim, before: Any) -> str:
    try:
        history = run.fit()
    except ValueError as error:
        message = str(error)
        if run.bits() != before:
            return f"refused, but something changed: {message[:200]}"
        if len(message) >= 1000 or not ("run.safetensors" in message or "log.jsonl" in message):
            return f"refused in {len(message)} characters: {message[:200]}"
        return "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finite = all(numpy.isfinite(p.data).all() for p in run.lora.parameters.values())
    log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    return "resumed" if history.step == 4 and finite and log[-1]["step"] == 4 else f"resumed to {history}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ends, wrong = attack(Path(folder), options.count, options.seed)
    for end, n in ends.most_common():
        print(f"{n:6d}  {end}")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
