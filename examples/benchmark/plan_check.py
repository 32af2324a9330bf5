"""The memory of training steps at three sizes, as `python -m minipeft plan` plans it and as the system measures it.

    python examples/benchmark/plan_check.py                    d64, d256 and T5-small: under a minute
    python examples/benchmark/plan_check.py --sizes d64        one size

The plan counts arrays. It is compared with three other counts of two training steps above the loaded model, each in a
process of its own with one thread (memory.py):

    python      the bytes that Python allocated: arrays and its own objects (tracemalloc)
    resident    the peak of the memory that the system counts for the process, where glibc gives every large array pages
                of its own (MALLOC_MMAP_THRESHOLD_=65536)
    heap        the same with glibc's own settings: freed arrays below 32 MiB leave gaps in its heap

and, for reading the model, with `resident`. The exit status is 1 if a plan of a step is more than 10 % away from
`python` or `resident`.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import memory
from ours import Ours
from sizes import ALPHA, KINDS, RANK, SIZES, Size

import minipeft

WITHIN, MIB = 0.10, 2 ** 20
COUNTS = ("python", "resident", "heap")
Row = tuple[str, int, dict[str, int], int]  # what, the step as planned, the counts, loading as planned


def planned(size: Size, kind: str) -> tuple[int, int]:
    """Bytes beside weights and adapter in a step, and of loading, as the plan has them."""
    found = minipeft.tools.plan(
        size.config(0.0), "full" if kind == "full" else minipeft.LoRA(rank=RANK, alpha=ALPHA), batch=size.batch,
        source=size.source, target=size.target, others=False).step
    return found.beside, found.totals["load"]


def measured(folder: Path, size: Size, kind: str) -> dict[str, int]:
    """{"resident", "python", "load": bytes} of the same, in this process."""
    memory.give_back()
    base, _ = memory.resident("VmRSS"), memory.reset_peak()
    library = Ours("numpy")
    library.load(folder, size, (kind,))
    load = memory.resident("VmHWM") - base
    steps = memory.of_two_steps(library, kind)
    tracemalloc.start()
    try:
        library.forward_backward(kind)
        python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    states = sum(m.nbytes for moments in (library.optimizers[kind].m, library.optimizers[kind].v)
                 for m in moments.values())
    return {"resident": steps["peak"] - steps["base"], "python": python + states, "load": load}


def in_processes(folder: Path, size: Size, kind: str) -> dict[str, int]:
    """`measured` in a fresh process, and "heap", its resident memory in another one with glibc's own settings."""
    found: list[dict[str, int]] = []
    for settings in ({"MALLOC_MMAP_THRESHOLD_": "65536"}, {}):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        done = subprocess.run(
            [sys.executable, __file__, "--measure", str(folder), "--sizes", size.name, "--kind", kind],
            stdout=subprocess.PIPE, text=True, check=True,
            env={**inherited, **settings, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"})
        found.append(json.loads(done.stdout))
    return {**found[0], "heap": found[1]["resident"]}


def rows_of(size: Size) -> list[Row]:
    """The row of each kind of step."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        size.write_model(Path(folder), 0.0)
        for kind in KINDS:
            step, load = planned(size, kind)
            name = f"{size.name:<9} {'LoRA' if kind == 'lora' else kind} step"
            rows.append((name, step, in_processes(Path(folder), size, kind), load))
    return rows


def table(rows: list[Row]) -> str:
    """The plan beside each count, in MiB, and plan / count."""
    lines = [f"{'MiB, plan / count':<19} {'plan':>7}" + "".join(f" {count:>9}      " for count in COUNTS)
             + f" {'load: plan':>11} {'resident':>9}"]
    for what, plan, found, load in rows:
        lines.append(f"{what:<19} {plan / MIB:>7.1f}" + "".join(
            f" {found[count] / MIB:>9.1f} {plan / found[count]:>5.2f}" for count in COUNTS)
            + f" {load / MIB:>11.1f} {found['load'] / MIB:>9.1f} {load / found['load']:>5.2f}")
    return "\n".join(lines)


def misses(rows: list[Row]) -> list[str]:
    """The steps whose plan is too far off."""
    return [f"{what}: {count} is {found[count]:,} bytes, the plan {plan:,}" for what, plan, found, _ in rows
            for count in ("python", "resident") if abs(plan / found[count] - 1) > WITHIN]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    args: Any = parser.parse_args()
    if args.measure:
        print(json.dumps(measured(args.measure, SIZES[args.sizes[0]], args.kind)))
        return 0
    rows = [row for name in args.sizes for row in rows_of(SIZES[name])]
    print(table(rows))
    found = misses(rows)
    print(*(found or [f"every plan of a step is within {WITHIN:.0%}"]), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
