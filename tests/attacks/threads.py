"""Moves beside a running forward: every output is that of one state of the model, never of a mixture.

    python tests/attacks/threads.py --seconds 20 --seed 0

One thread makes moves on two attachments, two others run forwards (a call, a mixed batch, a generation) and compare
each result, bit by bit, with the results of all states that the moves lead through.
"""
from __future__ import annotations

import argparse
import sys
import threading
import time

import numpy

import minipeft

IDS, TARGETS = [[5, 6, 1], [7, 1, 1]], [[0, 7], [0, 2]]
MOVES = (("b", "unplug"), ("a", "unplug"), ("a", "plug"), ("a", "merge"), ("b", "plug"), ("b", "merge"),
         ("b", "unmerge"), ("a", "unmerge"))


def forwards(model: minipeft.T5) -> dict[str, bytes]:
    """What a user may run, by name."""
    return {"call": model(IDS, TARGETS).data.tobytes(),
            "mixed": model(IDS, TARGETS, adapter=["a", ("b", "a")]).data.tobytes(),
            "generate": model.generate(IDS, max_new_tokens=4).tobytes()}


def attack(seconds: float, seed: int) -> dict[str, list[int]]:
    """{forward: [runs, of which torn]}, and "moves": [moves, 0]."""
    rng = numpy.random.default_rng(seed)
    model = minipeft.T5(minipeft.T5Config(16, 8, 4, 2, 8, 2, 2), rng)
    for name, method in (("a", minipeft.LoRA(2, where=r"\.(attn|cross|ff)\.")), ("b", minipeft.Selective())):
        for p in minipeft.attach(model, method, rng, name).parameters.values():
            p.data = p.data + (0.3 * rng.standard_normal(p.shape)).astype(p.dtype)
    legal: dict[str, set[bytes]] = {kind: {out} for kind, out in forwards(model).items()}
    for name, move in MOVES:
        getattr(model.attachments[name], move)()
        for kind, out in forwards(model).items():
            legal[kind].add(out)
    counts = {kind: [0, 0] for kind in [*legal, "moves"]}
    over, lock = threading.Event(), threading.Lock()

    def run() -> None:
        while not over.is_set():
            for kind, out in forwards(model).items():
                with lock:
                    counts[kind][0] += 1
                    counts[kind][1] += out not in legal[kind]

    threads, interval = [threading.Thread(target=run) for _ in range(2)], sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for name, move in MOVES:
                getattr(model.attachments[name], move)()
                counts["moves"][0] += 1
    finally:
        over.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="how long to go on (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default 0)")
    arguments = parser.parse_args()
    counts = attack(arguments.seconds, arguments.seed)
    print(f"{'':10} {'made':>8} {'torn':>8}")
    for kind, (made, torn) in counts.items():
        print(f"{kind:10} {made:8} {torn:8}")
    return 1 if any(torn for _, torn in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
