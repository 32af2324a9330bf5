"""One process of the benchmark: a library, its models, and a clock. run.py starts it.

    python worker.py ours --backend numpy --kept

It reads commands from standard input, one JSON object on a line, such as {"do": "step", "kind": "lora"}. It carries out
each and answers with a line on standard output. Between two commands it sleeps on the pipe, so that it takes nothing
from the process whose turn it is. The output of libraries goes to standard error.
"""
from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Callable

import numpy

import memory
from sizes import CODERS, CODINGS, LINKS, MATRIX, Size
from minipeft.backend import keep_heap

PEERS = ("torch", "transformers", "peft", "bitsandbytes", "gguf")
SPREAD = 0.05           # of the numbers that are quantized


class Worker:
    """The commands, one method each, over a library (see ours.py). turn: seconds for which a turn repeats its work."""

    def __init__(self, library: Any, turn: float):
        self.measured, self.turn = library, turn
        self.made: dict[str, Callable[[], Any]] = {}

    def about(self) -> dict[str, Any]:
        return self.measured.about()

    def load(self, folder: str, size: dict, kinds: list[str]) -> dict[str, Any]:
        gc.collect()
        before = memory.resident("VmRSS")
        self.measured.load(Path(folder), Size(**size), tuple(kinds))
        memory.give_back()
        return {"loaded": memory.resident("VmRSS") - before}

    def step(self, kind: str) -> dict[str, Any]:
        """A turn of training steps: {"forward_backward": seconds of each, "optimizer": ..., "losses": ...}."""
        losses: list[float] = []
        parts = self._turn([lambda: losses.append(self.measured.forward_backward(kind)),
                            lambda: self.measured.update(kind)])
        return {"forward_backward": parts[0], "optimizer": parts[1], "losses": losses}

    def generate(self, new: int) -> dict[str, Any]:
        answers: list[Any] = []
        seconds = self._turn([lambda: answers.append(self.measured.generate(new))])[0]
        made = {len(row) for row in answers[-1]}
        if made != {new}:
            raise RuntimeError(f"decoding made rows of {sorted(made)} tokens; expected {new} in each")
        return {"seconds": seconds, "ids": answers[-1]}

    def gemm(self) -> dict[str, Any]:
        """FLOPs per second of a product of two matrices [2048, 2048]."""
        product = self._once("gemm", lambda: self.measured.matmul(MATRIX))
        return {"rate": [2 * MATRIX ** 3 / seconds for seconds in self._turn([product])[0]]}

    def chain(self) -> dict[str, Any]:
        """Seconds of a chain of 2,000 additions with its gradient, and of the same additions of bare NumPy arrays."""
        run = self._once("chain", lambda: self.measured.chain(LINKS))
        return {"seconds": self._turn([run])[0], "bare": self._turn([bare_additions])[0]}

    def flops(self, kind: str) -> dict[str, Any]:
        return {"flops": self.measured.flops(kind)}

    def memory(self, kind: str) -> dict[str, Any]:
        """The memory of a step (see memory.py), and the bytes of the weights."""
        return {**memory.of_two_steps(self.measured, kind), "weights": self.measured.weight_bytes(kind)}

    def coding(self, name: str, n: int) -> dict[str, Any]:
        """A turn of quantizing and dequantizing a matrix [n, n], and of copying it: processor seconds of each. Other
        programs may take the core meanwhile, and their time does not count."""
        values = numpy.random.default_rng(0).normal(0, SPREAD, (n, n)).astype("float32")
        kind, options = CODINGS[name]
        matrix, copy = self.measured.matrix(values), numpy.zeros_like(values)
        encode, decode = self.measured.coder(kind, options)
        codes = encode(matrix)
        encoding, decoding, copying = self._turn(
            [lambda: encode(matrix), lambda: decode(codes), lambda: numpy.copyto(copy, values)], time.process_time)
        return {"encode": encoding, "decode": decoding, "copy": copying}

    def _once(self, name: str, make: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
        """The result of `make` at the first call under this name."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def _turn(self, parts: list[Callable[[], Any]], clock: Callable[[], float] = time.perf_counter
              ) -> list[list[float]]:
        """The seconds of each part, each time, when `parts` are done in order until a turn's seconds are over.

        The first of several times is left out: after another process's turn the caches are full of other data."""
        times: list[list[float]] = [[] for _ in parts]
        begun = time.perf_counter()
        while True:
            for part, seconds in zip(parts, times):
                self.measured.synchronize()
                before = clock()
                part()
                self.measured.synchronize()
                seconds.append(clock() - before)
            if time.perf_counter() - begun >= self.turn:
                return [seconds[1:] or seconds for seconds in times]


def bare_additions() -> None:
    p = y = numpy.ones(1, numpy.float32)
    for _ in range(LINKS):
        y = y + p


def made(library: str, backend: str) -> Any:
    """The side of a library. torch, bitsandbytes and gguf are imported only here, and only in their own processes."""
    if library in CODERS:
        from coders import made as coder
        return coder(library)
    if library == "ours":
        from ours import Ours
        return Ours(backend)
    from torch_peft import Torch
    return Torch(backend)


def serve(worker: Worker, answer: Any) -> None:
    """Answer commands until the other end closes the pipe."""
    for line in sys.stdin:
        command = json.loads(line)
        try:
            reply = json.dumps(getattr(worker, command.pop("do"))(**command))
        except Exception as error:
            traceback.print_exc()
            reply = json.dumps({"error": f"{type(error).__name__}: {error}"})
        print(reply, file=answer, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("ours", "torch", *CODERS))
    parser.add_argument("--backend", choices=("numpy", "cupy"), default="numpy")
    parser.add_argument("--kept", action="store_true", help="ask the allocator to keep freed memory")
    parser.add_argument("--turn", type=float, default=0.3, help="seconds for which a short measurement is repeated")
    parser.add_argument("--core", type=int, default=None, help="run on this core alone, where the system can")
    args = parser.parse_args()
    if args.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {args.core})
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        library = made(args.which, args.backend)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in PEERS:
            raise
        print(json.dumps({"absent": str(error)}), file=answer, flush=True)
        return 0
    kept = args.kept and keep_heap()
    print(json.dumps({"ready": True, "kept": kept}), file=answer, flush=True)
    with library.running():
        serve(Worker(library, args.turn), answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
