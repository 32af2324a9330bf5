"""The measuring: all libraries side by side, in rounds, each measurement once a round in every process.

A machine does not run at one speed: it heats up, and others use it. Two libraries timed one after the other meet two
machines. In rounds they meet the same machine, and the median over the rounds ignores what disturbed only a few of
them. The order is reversed from round to round. A process waits a moment before its turn, in which the threads of the
one before it stop spinning.
"""
from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

from process import Absent, Failed, Process, command, environment
from sizes import GROWTH, KINDS, MATRIX, MODELS, NEW_TOKENS, SIZES, Size, grown

OURS, TORCH, TORCH_KEPT = "ours", "torch", "torch, heap kept"
SETTLE = 0.05           # seconds before a turn
AT_ONCE = 2             # processes that run together while only memory is measured
MEASURES: dict[str, dict[str, dict[str, Any]]] = {
    "steps": {**{kind: {"do": "step", "kind": kind} for kind in KINDS}, "gemm": {"do": "gemm"}},
    "generation": {"generate": {"do": "generate", "new": NEW_TOKENS}},
    "engine": {"chain": {"do": "chain"}},       # independent of the size: measured with the first one
    "memory": {}, "growth": {},                 # in processes of their own
    "quantize": {}, "qlora": {}}                # in quantized.py
PARTS = tuple(MEASURES)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run measures. sides: {name: (library, whether the allocator keeps freed memory)}. matrix: rows of the
    square matrix that is quantized."""

    sizes: tuple[str, ...]
    parts: tuple[str, ...]
    rounds: int
    warmup: int
    threads: int
    dropout: float
    backend: str
    sides: dict[str, tuple[str, bool]]
    timeout: float
    turn: float             # seconds for which a short step is repeated in one turn
    matrix: int = MATRIX

    def start(self, side: str) -> Process:
        library, kept = self.sides[side]
        return Process(side, command(library, self.backend, kept, self.turn), environment(self.threads), self.timeout)

    @property
    def growing(self) -> list[str]:
        """The sides whose growth is measured: ours, and torch + peft in our setting of the allocator if it is there."""
        peers = [side for side in self.sides if side != OURS]
        alike = [side for side in peers if self.sides[side][1] == self.sides[OURS][1]]
        return [OURS, *(alike or peers)]


def in_order(items: Iterable[Any], turn: int) -> list[Any]:
    """The items in order in even rounds, and reversed in odd ones."""
    return list(items)[::-1 if turn % 2 else 1]


def median(turns: Sequence[Sequence[float]]) -> float:
    """The median of the rounds, each of which is the median of its times."""
    return statistics.median(statistics.median(turn) for turn in turns)


class Bench:
    """A run. `result` becomes the JSON. say: gets a line about the current measurement."""

    def __init__(self, plan: Plan, say: Callable[[str], None]):
        self.plan, self.say = plan, say
        self.result: dict[str, Any] = {"about": {}, "sizes": {}, "engine": {}, "growth": {}, "failures": [],
                                       "absent": None}
        self.result["settings"] = dataclasses.asdict(plan)

    def run(self) -> dict[str, Any]:
        parts = self.plan.parts
        with tempfile.TemporaryDirectory(prefix="minipeft-bench-") as folder:
            for i, name in enumerate(self.plan.sizes):
                size, path = SIZES[name], Path(folder) / name
                self.result["sizes"][name] = {"shape": dataclasses.asdict(size), "flops": {}, "times": {},
                                              "first_losses": {}, "ids_equal": {}, "memory": {}}
                measures = {k: m for part in parts for k, m in MEASURES[part].items() if part != "engine" or i == 0}
                if measures or "memory" in parts:
                    self.say(f"{size}: writing the weights")
                    size.write_model(path, self.plan.dropout)
                if measures:
                    self._size(size, path, measures)
                if "memory" in parts:
                    self.say(f"{size.name}: memory of a step")
                    jobs = [(side, kind) for side in self.plan.sides for kind in KINDS]
                    self.result["sizes"][name]["memory"] = self.memory(jobs, size, path)
            if "growth" in parts:
                self._growth(Path(folder))
        return self.result

    def _size(self, size: Size, folder: Path, measures: dict[str, dict[str, Any]]) -> None:
        out = self.result["sizes"][size.name]
        ids: dict[str, Any] = {}

        def record(side: str, what: str, turn: int, answer: dict[str, Any]) -> None:
            if "losses" in answer:
                out["first_losses"].setdefault(side, {}).setdefault(what, answer["losses"][0])
                answer.pop("losses")
            if "ids" in answer:
                ids[side] = answer.pop("ids")
            if turn < self.plan.warmup:
                return
            if what == "chain":
                medians = {key: [statistics.median(seconds)] for key, seconds in answer.items()}  # of hundreds
                self.result["engine"].setdefault(side, []).append(medians)
            else:
                out["times"].setdefault(side, {}).setdefault(what, []).append(answer)

        with Started(self, self.plan.sides) as processes:
            self.asked(processes, "load", folder=str(folder), size=dataclasses.asdict(size), kinds=list(MODELS))
            self.rounds(processes, measures, size.name, record)
            if OURS in processes and "steps" in self.plan.parts:
                for kind in KINDS:
                    found = self.asked({OURS: processes[OURS]}, "flops", kind=kind) if OURS in processes else {}
                    out["flops"].update({kind: answer["flops"] for answer in found.values()})
        out["ids_equal"] = {side: _share_equal(ids[OURS], rows) for side, rows in ids.items()
                            if side != OURS and OURS in ids}

    def memory(self, jobs: list[tuple[str, str]], size: Size, folder: Path) -> dict[str, dict[str, Any]]:
        """{side: {kind: the memory of its step}} of each (side, kind) among `jobs`, in a process of its own. Two run at
        a time, because nothing is timed."""
        out: dict[str, dict[str, Any]] = {}

        def measured(job: tuple[str, str]) -> tuple[str, str, Any]:
            side, kind = job
            with self.plan.start(side) as process:
                try:
                    loaded = process.ask(do="load", folder=str(folder), size=dataclasses.asdict(size), kinds=[kind])
                    return side, kind, {**loaded, **process.ask(do="memory", kind=kind)}
                except (Absent, Failed) as error:
                    return side, kind, error

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for side, kind, found in pool.map(measured, jobs):
                if isinstance(found, Exception):
                    self.lost(side, f"{size.name}, memory", found)
                else:
                    out.setdefault(side, {})[kind] = found
        return out

    def _growth(self, folder: Path) -> None:
        """Time LoRA steps of growing shapes."""
        with Started(self, self.plan.growing) as processes:
            for what in GROWTH:
                points = self.result["growth"][what] = []
                for value, size in grown(what):
                    times: dict[str, list[Any]] = {}

                    def record(side: str, _: str, turn: int, answer: dict[str, Any]) -> None:
                        answer.pop("losses")
                        if turn >= self.plan.warmup:
                            times.setdefault(side, []).append(answer)

                    path = folder / size.name.replace(" ", "-")
                    size.write_model(path, self.plan.dropout)
                    self.asked(processes, "load", folder=str(path), size=dataclasses.asdict(size), kinds=["lora"])
                    self.rounds(processes, {"lora": MEASURES["steps"]["lora"]}, f"growth with {size.name}", record)
                    points.append({"value": value, "times": times})

    def rounds(self, processes: dict[str, Process], measures: dict[str, dict[str, Any]], label: str,
               record: Callable[[str, str, int, dict[str, Any]], None]) -> None:
        """Measure everything once in every process in each round. A process that fails is taken out of `processes`.

        measures: {name: message}, with "sides" where only these are asked. label: for the progress line. record: called
        with (side, name, round, answer)."""
        for turn in range(self.plan.warmup + self.plan.rounds):
            for what, message in measures.items():
                self.say(f"{label}: {what}, round {turn + 1} of {self.plan.warmup + self.plan.rounds}")
                among = message.get("sides", processes)
                for side in in_order([side for side in processes if side in among], turn):
                    time.sleep(SETTLE)
                    for answer in self.asked({side: processes[side]}, message["do"], processes, label,
                                             **{k: v for k, v in message.items() if k not in ("do", "sides")}).values():
                        record(side, what, turn, answer)

    def asked(self, processes: dict[str, Process], do: str, among: dict[str, Process] | None = None, label: str = "",
              **arguments: Any) -> dict[str, dict[str, Any]]:
        """The answers of `processes` to a command. Those that fail are taken out of `among` (default: `processes`)."""
        answers = {}
        for side, process in list(processes.items()):
            try:
                answers[side] = process.ask(do=do, **arguments)
            except (Absent, Failed) as error:
                del (processes if among is None else among)[side]
                self.lost(side, label or arguments.get("size", {}).get("name", do), error)
        return answers

    def lost(self, side: str, doing: str, error: Exception) -> None:
        if isinstance(error, Absent):
            self.result["absent"] = str(error)
            return
        self.result["failures"].append({"side": side, "doing": doing, "what": str(error),
                                        "stderr": getattr(error, "lines", [])})
        self.say(f"{side} failed at {doing}: {error}")


class Started:
    """A context with {side: process}, all started together and always ended. Those that do not start are left out."""

    def __init__(self, bench: Bench, sides: Iterable[str]):
        self.bench = bench
        self.all = {side: bench.plan.start(side) for side in sides}

    def __enter__(self) -> dict[str, Process]:
        ready = dict(self.all)
        self.bench.result["about"].update(self.bench.asked(ready, "about"))
        return ready

    def __exit__(self, *_: Any) -> None:
        for process in self.all.values():
            process.close()


def _share_equal(a: list[list[int]], b: list[list[int]]) -> float:
    """The share of positions at which two answers have the same id."""
    same = [x == y for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)]
    return sum(same) / len(same)
