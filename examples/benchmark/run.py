"""Time this library beside torch + peft in one run, and check the figures against limits.

It measures a training step, in full and with a LoRA, and greedy decoding, at three sizes from a toy to T5-small; the
peak memory of a step; the cost of the engine for each operation; how a step grows with batch, length and depth; the
share of the matrix product's speed that a whole step reaches; and how fast weights are quantized and dequantized, and
what a step on quantized weights costs, beside bitsandbytes and gguf where these are installed. Both libraries read the
same weights from the same files and compute the same losses. Without torch it measures only this library; without
matplotlib it draws no picture.

    python examples/benchmark/run.py                          everything: about fifteen minutes on two cores
    python examples/benchmark/run.py --quick                  the smallest size, a few rounds: under 20 seconds
    python examples/benchmark/run.py --check                  exit status 1 if a limit is not met
    python examples/benchmark/run.py --sizes d64 d256 --only steps memory
    python examples/benchmark/run.py --only quantize qlora
    python examples/benchmark/run.py --backend cupy           the same on a GPU
    python examples/benchmark/run.py --install                also from `pip install` to a first step (downloads)
    python examples/benchmark/run.py --show                   tables, limits and picture of the recorded run

Do not use the machine meanwhile: oversubscribed threads make any library look slow. The figures go to benchmark.json
and benchmark.png in examples/out/benchmark.
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import quantized
from bars import judged, missed
from install import measured as installed
from machine import cores, machine
from picture import draw
from rounds import OURS, PARTS, TORCH, TORCH_KEPT, Bench, Plan
from sizes import MATRIX, SIZES
from tables import report
from minipeft.backend import resolve
from minipeft.files import write_atomic

EXAMPLES = Path(__file__).parents[1]
RECORDED = EXAMPLES / "recorded" / "benchmark.json"
PROGRAM = "benchmark.py"                # how the JSON of a run is marked
ROUNDS, LEAST, QUICK = 9, 7, 3
QUICK_MATRIX = 512
BUSY = 0.5              # load average above which a machine is not left alone
KEPT, SYSTEM = "kept", "system"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=None, metavar="SIZE",
                        help=f"sizes, of: {', '.join(SIZES)} (default: all)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=None, metavar="PART",
                        help=f"parts, of: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=None,
                        help=f"rounds that count, at least {LEAST} (default: {ROUNDS}; {QUICK} with --quick)")
    parser.add_argument("--quick", action="store_true",
                        help=f"d64, {QUICK} short rounds, torch in one setting of the allocator, no growth")
    parser.add_argument("--threads", type=int, default=2, help="threads of each library (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.0, help="rate in training (default: %(default)s, so that "
                        "both libraries compute the same losses)")
    parser.add_argument("--allocator", choices=(KEPT, SYSTEM), default=KEPT, help="whether ours asks glibc to keep "
                        "freed memory, as the examples do; torch runs with and without (default: %(default)s)")
    parser.add_argument("--backend", choices=("numpy", "cupy"), default="numpy",
                        help="cupy: ours on CuPy, torch on CUDA (default: %(default)s)")
    parser.add_argument("--install", action="store_true", help="also install both into fresh environments; with "
                        "--show, only do that, and add it to the recorded figures")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one answer of a process; then the run "
                        "goes on without it (default: %(default)g)")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a limit is not met, or if one that was "
                        "asked for was not measured (unless torch + peft are not installed)")
    parser.add_argument("--show", type=Path, metavar="FILE", nargs="?", const=RECORDED, help="measure nothing: show "
                        "the benchmark.json of a run (default: the recorded one)")
    parser.add_argument("--out", type=Path, default=EXAMPLES / "out" / "benchmark",
                        help="folder for the results (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.rounds is None:
        args.rounds = QUICK if args.quick else ROUNDS
    least = 1 if args.quick else LEAST
    for name, value, holds, expected in (
            ("rounds", args.rounds, args.rounds >= least, f"at least {least}"),
            ("threads", args.threads, args.threads >= 1, "at least 1"),
            ("dropout", args.dropout, 0 <= args.dropout < 1, "a rate in [0, 1)"),
            ("timeout", args.timeout, args.timeout > 0, "seconds > 0")):
        if not holds:
            parser.error(f"--{name} is {value}; expected {expected}")
    if args.quick and (args.sizes or args.only):
        parser.error("--quick chooses sizes and parts itself; leave out --sizes and --only")
    return args


def plan(args: argparse.Namespace) -> Plan:
    kept = args.allocator == KEPT
    sides = {OURS: ("ours", kept), TORCH: ("torch", False), TORCH_KEPT: ("torch", True)}
    if args.quick or args.backend == "cupy":
        del sides[TORCH if kept and args.backend == "numpy" else TORCH_KEPT]
    parts = [part for part in PARTS if not (args.quick and part == "growth")]
    return Plan(sizes=tuple(name for name in SIZES if name in (args.sizes or (["d64"] if args.quick else SIZES))),
                parts=tuple(part for part in parts if part in (args.only or parts)), rounds=args.rounds, warmup=1,
                threads=args.threads, dropout=args.dropout, backend=args.backend, sides=sides, timeout=args.timeout,
                turn=0.1 if args.quick else 0.3, matrix=QUICK_MATRIX if args.quick else MATRIX)


class Progress:
    """Shows the current measurement on standard error: one changing line on a terminal, else a line for each stage."""

    def __init__(self) -> None:
        self.terminal, self.stage, self.begun = sys.stderr.isatty(), "", time.monotonic()

    def __call__(self, text: str) -> None:
        if self.terminal:
            print(f"\r\033[K{time.monotonic() - self.begun:4.0f} s  {text}"[:120], end="", file=sys.stderr, flush=True)
        elif (stage := text.split(":")[0] if ", round" in text else text) != self.stage:
            self.stage = stage
            print(f"{time.monotonic() - self.begun:4.0f} s  {text}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def measured(args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """The JSON of a new run or, with --show, of a recorded one."""
    if args.show:
        return recorded(args.show)
    host = {"program": PROGRAM, "date": datetime.date.today().isoformat(), "machine": machine()}
    bench = Bench(plan(args), progress)
    bench.run()
    quantized.add(bench)
    return {**host, **bench.result}


def recorded(file: Path) -> dict[str, Any]:
    try:
        run = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"--show {file}: {error}") from None
    if not isinstance(run, dict) or run.get("program") != PROGRAM:
        raise SystemExit(f"--show {file}: expected a benchmark.json that this program wrote")
    return run


def rounded(value: Any) -> Any:
    """The value with nine digits of every number. A float32 loss has no more, and no printed figure changes."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        resolve(args.backend)
    except (ImportError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
    if args.threads > cores() and not args.show:
        print(f"{args.threads} threads on {cores()} cores: the figures will show more waiting than work",
              file=sys.stderr)
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    if busy > BUSY and not args.show:
        print(f"the load average is {busy:.2f}: other programs use this machine, and the figures will show it",
              file=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    run = measured(args, progress)
    if args.install:
        run["install"], failures = installed(progress)
        run["failures"] += failures
    progress.end()
    run["bars"] = judged(run)
    print(report(run))
    write_atomic(args.out / "benchmark.json", (json.dumps(rounded(run), separators=(",", ":")) + "\n").encode())
    try:
        draw(run, args.out / "benchmark.png")
        print(f"\nfigures and picture: {args.out}/benchmark.json, {args.out}/benchmark.png")
    except ImportError:
        print(f"\nfigures: {args.out}/benchmark.json. No picture was drawn, because matplotlib is not installed: "
              f"pip install 'minipeft[examples]', then --show")
    bad = missed(run["bars"])
    if args.check and bad:
        print(f"{len(bad)} of {len(run['bars'])} limits are not met", file=sys.stderr)
    return 1 if args.check and bad else 0


if __name__ == "__main__":
    sys.exit(main())
