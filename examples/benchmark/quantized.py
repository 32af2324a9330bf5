"""The parts `quantize` and `qlora`: how fast weights are quantized and dequantized, and what a quantized base costs.

`quantize` runs on one core, in a process for each library, on one matrix. `qlora` runs at every size, with all threads:
a step of a LoRA on the float32 base, on one that is quantized, and on one that keeps its dequantized weights. In each
round all of them are measured in turn, as everywhere in the benchmark (see rounds.py). Their memory is measured in a
process for each.
"""
from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from machine import last_core
from process import Absent, Failed, Process, command, environment
from rounds import MEASURES, OURS, Bench, Started
from sizes import CODERS, CODINGS, QLORA, SIZES, Size

ON_FLOAT = "lora"
OF_TORCH = (ON_FLOAT, "qlora")          # torch + peft has nothing like `keep`
RUNS = (ON_FLOAT, *QLORA)
STEPS: dict[str, dict[str, Any]] = {
    **{kind: {"do": "step", "kind": kind} for kind in OF_TORCH},
    "kept": {"do": "step", "kind": "kept", "sides": [OURS]},
    "gemm": {**MEASURES["steps"]["gemm"], "sides": [OURS]}}


def add(bench: Bench) -> None:
    """Measure these parts, as far as the plan has them, and add them to the run's result."""
    if "quantize" in bench.plan.parts:
        bench.result["quantize"] = _rates(bench)
    if "qlora" in bench.plan.parts:
        bench.result["qlora"] = {}
        with tempfile.TemporaryDirectory(prefix="minipeft-bench-") as folder:
            for name in bench.plan.sizes:
                bench.say(f"{name}: writing the weights")
                SIZES[name].write_model(Path(folder) / name, bench.plan.dropout)
                bench.result["qlora"][name] = _steps(bench, SIZES[name], Path(folder) / name)


def _rates(bench: Bench) -> dict[str, Any]:
    """{"matrix": n, "times": {coding: {library: the seconds of each round}}, "absent": {library: why}}."""
    plan, kept = bench.plan, bench.plan.sides[OURS][1]
    times: dict[str, dict[str, list[Any]]] = {}
    absent: dict[str, str] = {}
    processes = {library: Process(library, command(library, "numpy", kept, plan.turn, last_core()), environment(1),
                                  plan.timeout) for library in CODERS}
    running = dict(processes)

    def record(library: str, coding: str, turn: int, answer: dict[str, Any]) -> None:
        if turn >= plan.warmup:
            times.setdefault(coding, {}).setdefault(library, []).append(answer)

    try:
        for library, process in processes.items():
            try:
                bench.result["about"][f"{library}, one core"] = process.ask(do="about")
            except (Absent, Failed) as error:
                del running[library]
                if isinstance(error, Absent):
                    absent[library] = str(error)
                else:
                    bench.lost(library, "quantizing", error)
        measures = {coding: {"do": "coding", "name": coding, "n": plan.matrix,
                             "sides": [library for library, has in CODERS.items() if coding in has]}
                    for coding in CODINGS}
        bench.rounds(running, measures, "quantizing", record)
    finally:
        for process in processes.values():
            process.close()
    return {"matrix": plan.matrix, "times": times, "absent": absent}


def _steps(bench: Bench, size: Size, folder: Path) -> dict[str, Any]:
    """{"times": {side: {kind: the steps of each round}}, "first_losses", "flops", "memory": {side: {kind: bytes}}}."""
    out: dict[str, Any] = {"times": {}, "first_losses": {}, "flops": None, "memory": {}, "absent": {}}

    def record(side: str, what: str, turn: int, answer: dict[str, Any]) -> None:
        if "losses" in answer:
            first = answer.pop("losses")[0]
            out["first_losses"].setdefault(side, {}).setdefault(what, first)
        if turn >= bench.plan.warmup:
            out["times"].setdefault(side, {}).setdefault(what, []).append(answer)

    with Started(bench, bench.plan.growing) as processes:
        for side in list(processes):
            if side != OURS and "bitsandbytes" not in bench.result["about"][side]:
                out["absent"][side] = "bitsandbytes is not installed"
                del processes[side]
        for side in list(processes):
            bench.asked({side: processes[side]}, "load", processes, f"{size.name}, QLoRA", folder=str(folder),
                        size=dataclasses.asdict(size), kinds=RUNS if side == OURS else OF_TORCH)
        for answer in bench.asked({s: p for s, p in processes.items() if s == OURS}, "flops", processes, size.name,
                                  kind=ON_FLOAT).values():
            out["flops"] = answer["flops"]
        bench.rounds(processes, STEPS, f"{size.name}, QLoRA", record)
        jobs = [(side, kind) for side in processes for kind in (RUNS if side == OURS else OF_TORCH)]
    bench.say(f"{size.name}: memory of a QLoRA step")
    out["memory"] = bench.memory(jobs, size, folder)
    return out
