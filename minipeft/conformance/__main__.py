"""`python -m minipeft.conformance`: check an implementation against the reference.

  --impl mypkg.adapter            check this plug-in: prints a table of rho, and every failure in words
  --self-test                     test the kit itself: the reference must pass, every planted bug must be found
  vectors generate [--check]      write the published vectors again; with --check, only compare the bytes
  compare MINE REF                compare two traces of a whole model: names the first tensor that differs

rho is the worst error divided by the bound derived for it: at most 1 conforms.

A plug-in is a module with one function for each method that it implements, over NumPy arrays:

  capabilities = dict(name="mine", version="1", dtypes=["float64"])
  class Layer:
      def __init__(self, W, b, A, B, s): self.W, self.b, self.A, self.B, self.s = W, b, A, B, s
      def forward(self, x): return x @ self.W.T + self.b + self.s * (x @ self.A.T) @ self.B.T
  def lora_linear(W, b, A, B, alpha, dtype, *, dropout=0.0):
      return Layer(W, b, A, B, alpha / len(A))

Each further call that the returned object offers (vjp, merge, unmerge, weight, save, load, ...) lets the kit test more
properties. Properties whose calls are missing are skipped and counted. --list shows every call with its arguments and
result, and every property.

Exit status: 0 conforms, 1 failures, 2 wrong usage or the plug-in cannot be imported, 3 nothing ran, 130 interrupted.
"""
from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from minipeft.conformance.hold import Interrupted, check
from minipeft.conformance.listing import listing
from minipeft.conformance.progress import Progress
from minipeft.conformance.report import Report
from minipeft.conformance.writable import file_trouble


def main(argv: list[str]) -> int:
    """The command with the arguments `argv`. Returns its exit status; argparse raises SystemExit for wrong usage."""
    if argv[:1] == ["vectors"]:
        from minipeft.conformance.vectors.generate import main as vectors
        return vectors(argv[1:])
    if argv[:1] == ["compare"]:
        from minipeft.conformance.compare import main as compare
        return compare(argv[1:])
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if args.self_test:
            from minipeft.conformance.selftest import self_test
            return self_test(args.method, args.dtype)
        if args.list:
            return _print(*listing(args.method))
        if args.impl is None:
            parser.error("nothing to run: give --impl MODULE, --self-test, --list, vectors, or compare")
        _dotted(args.impl)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the plug-in's process ends with this one
        if args.replay:
            from minipeft.conformance.apart import again_apart
            return again_apart(args.impl, args.replay, args.time_limit)
        return _told(_run(args), args)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> Report:
    """The report of a run, complete or interrupted."""
    if args.json and (trouble := file_trouble(args.json)):
        raise ValueError(f"--json {args.json} cannot be written: {trouble}")
    try:
        with Progress(not args.quiet and sys.stderr.isatty()) as progress:
            return check(args.impl, args.method, args.dtype, vectors=not args.live_only, live=not args.vectors_only,
                         cases=args.cases, seed=args.seed, limit=args.time_limit, folder=args.save_failures,
                         watch=progress.take)
    except Interrupted as stop:
        return stop.report


def _told(report: Report, args: argparse.Namespace) -> int:
    """Prints the report, writes it to the --json file if there is one, and returns the exit status."""
    _print(report, *(["skipped:", *report.skips()] if args.skips else []))
    if args.json:
        report.write_json(args.json)
    return report.exit_code


def _print(*lines: object) -> int:
    """Prints the lines. A reader that closes the pipe early (`| head`) changes neither exit status nor later work."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        _hush()
    return 0


def _hush() -> None:
    """Discards all further output: at its exit the interpreter would complain of a pipe without a reader."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _command(argv: list[str]) -> int:
    """`main`, ending quietly if the reader of the output has gone."""
    try:
        status = main(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _hush()
        return 128 + 13  # the status of a program ended by SIGPIPE


def _dotted(impl: str) -> None:
    """Raises ValueError if a file is given instead of a module's name."""
    if impl.endswith(".py") and Path(impl).is_file():
        name = Path(impl).with_suffix("")
        inside = not name.is_absolute() and ".." not in name.parts
        raise ValueError(f"--impl {impl} is a file; expected the name of a module, without .py: "
                         + (f"--impl {'.'.join(name.parts)}" if inside else f"in {name.parent}, --impl {name.name}"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m minipeft.conformance", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--impl", metavar="MODULE", help="dotted name of the plug-in module, importable from the current folder")
    add("--method", action="append", metavar="NAME", help="only this method (may be repeated; see --list)")
    add("--dtype", action="append", metavar="DTYPE", help="only this dtype (may be repeated)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--vectors-only", action="store_true", help="only the published vectors: seconds, no hypothesis")
    only.add_argument("--live-only", action="store_true", help="only cases drawn at random")
    add("--cases", type=int, default=50, help="drawn cases per method, dtype and kind (default 50)")
    add("--seed", type=int, default=0, help="seed of the drawn cases (default 0)")
    add("--time-limit", type=float, default=10.0, metavar="S", help="seconds for one call of the plug-in (default 10)")
    add("--json", metavar="FILE", help="write the report as JSON")
    add("--skips", action="store_true", help="list the skipped properties, with the reasons")
    add("--save-failures", metavar="DIR", default="conformance-failures",
        help="folder for the smallest case and the script of each failure (default conformance-failures)")
    add("--replay", metavar="FILE", help="run one saved failure (.safetensors) again")
    add("--list", action="store_true", help="list the methods, the calls of a plug-in for each, and the properties")
    add("--self-test", action="store_true", help="test the kit itself")
    add("--quiet", action="store_true", help="show no progress line")
    return parser


if __name__ == "__main__":
    sys.exit(_command(sys.argv[1:]))
