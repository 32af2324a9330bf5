"""The figures of a recorded run: medians, ratios, shares; None where something was not measured.

All printed, drawn and checked figures are computed here from the raw times in the JSON, so a recorded run shows the
same figures as on the day it was made. A ratio of times is taken in each round, of times that were measured side by
side; then the median of the rounds is taken. A machine that is slow for some rounds slows both parts of these ratios.
"""
from __future__ import annotations

import math
import statistics
from typing import Any, Callable

from memory import COUNTED
from rounds import OURS, median
from sizes import CODERS, CODINGS, LINKS, MATRIX, MINIPEFT, NEW_TOKENS

Value = float | None


def ratio(a: Value, b: Value) -> Value:
    return None if a is None or not b else a / b


def scaled(value: Value, factor: float) -> Value:
    return None if value is None else factor * value


def middle(values: list[float]) -> Value:
    return statistics.median(values) if values else None


def of_rounds(a: list[float], b: list[float]) -> list[float]:
    """a / b, round by round. A process that failed has only the first rounds."""
    return [x / y for x, y in zip(a, b)]


class Figures:
    """The figures of one run's JSON. A measure is "lora", "full" (a step) or "generate" (a token of a whole batch)."""

    def __init__(self, run: dict[str, Any]):
        self.run = run
        self.peers = [side for side in run["settings"]["sides"] if side != OURS]

    def seconds(self, size: str, side: str, measure: str) -> Value:
        return middle(self.rounds(size, side, measure))

    def rounds(self, size: str, side: str, measure: str) -> list[float]:
        """The seconds of each round, in order; fewer than the run had if a process failed."""
        turns = self._size(size).get("times", {}).get(side, {}).get(measure, [])
        if measure == "generate":
            return [median([turn["seconds"]]) / NEW_TOKENS for turn in turns]
        return [step([turn]) for turn in turns]

    def rate(self, size: str, side: str) -> Value:
        """FLOPs per second of the library's own matrix product."""
        return middle(self.rates(size, side))

    def rates(self, size: str, side: str) -> list[float]:
        """The same for each round."""
        return [median([turn["rate"]]) for turn in self._size(size).get("times", {}).get(side, {}).get("gemm", [])]

    def memory(self, size: str, side: str, kind: str) -> Value:
        """Bytes of a step above the loaded model; None where the system cannot tell a peak that began after loading."""
        found = self._size(size).get("memory", {}).get(side, {}).get(kind)
        return found["peak"] - found["base"] if found and found["counted"] in COUNTED else None

    def best(self, figure: Callable[[str], Value]) -> Value:
        """The least figure among the settings of torch + peft, which is their best."""
        return min((value for side in self.peers if (value := figure(side)) is not None), default=None)

    def time_ratios(self, size: str, measure: str) -> list[float]:
        """In each round, our time over that of torch + peft, in the setting in which they do best."""
        ours = self.rounds(size, OURS, measure)
        found = [of_rounds(ours, self.rounds(size, side, measure)) for side in self.peers]
        return max((ratios for ratios in found if ratios), key=statistics.median, default=[])

    def time_ratio(self, size: str, measure: str) -> Value:
        return middle(self.time_ratios(size, measure))

    def quartiles(self, size: str, measure: str) -> tuple[float, float] | None:
        """The ends of the middle half of these ratios; None with a single round."""
        ratios = self.time_ratios(size, measure)
        if len(ratios) < 2:
            return None
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high

    def memory_ratio(self, size: str, kind: str) -> Value:
        return ratio(self.memory(size, OURS, kind), self.best(lambda side: self.memory(size, side, kind)))

    def lora_of_full(self, size: str, side: str) -> tuple[Value, Value]:
        """A LoRA step's time and memory, as a share of the same library's full step."""
        return (middle(of_rounds(self.rounds(size, side, "lora"), self.rounds(size, side, "full"))),
                ratio(self.memory(size, side, "lora"), self.memory(size, side, "full")))

    def flops(self, size: str, kind: str) -> Value:
        return self._size(size).get("flops", {}).get(kind)

    def gemm_share(self, size: str, kind: str) -> Value:
        """FLOPs of our step per second, over the rate of a matrix product. The optimizer's time counts."""
        flops = self.flops(size, kind)
        seconds_of_gemm = [flops / rate for rate in self.rates(size, OURS)] if flops else []
        return middle(of_rounds(seconds_of_gemm, self.rounds(size, OURS, kind)))

    def loss_gap(self, size: str) -> Value:
        """The largest relative difference between a first loss of ours and one of torch + peft; NaN if any is."""
        losses = self._size(size).get("first_losses", {})
        gaps = [abs(theirs[kind] / losses[OURS][kind] - 1) for side, theirs in losses.items() if side != OURS
                for kind in theirs if kind in losses.get(OURS, {})]
        return next((gap for gap in gaps if math.isnan(gap)), max(gaps, default=None))

    def ids_equal(self, size: str) -> Value:
        """The share of decoded ids that both libraries have in common, in the worse setting of torch + peft."""
        return min(self._size(size).get("ids_equal", {}).values(), default=None)

    def per_node(self, side: str) -> tuple[Value, Value]:
        """(seconds per node of the chain, the same without a bare NumPy addition)."""
        turns = self.run["engine"].get(side)
        if not turns:
            return None, None
        whole, bare = (median([turn[key] for turn in turns]) / LINKS for key in ("seconds", "bare"))
        return whole, whole - bare

    def growth(self, what: str) -> list[tuple[int, dict[str, float], Value]]:
        """(value, {side: seconds of a LoRA step}, ratio of ours to the peer's) of each point."""
        points = []
        for point in self.run["growth"].get(what, []):
            rounds = {side: [step([turn]) for turn in turns] for side, turns in point["times"].items()}
            ratios = [of_rounds(rounds.get(OURS, []), theirs) for side, theirs in rounds.items() if side != OURS]
            points.append((point["value"], {side: statistics.median(r) for side, r in rounds.items()},
                           middle(sum(ratios, []))))
        return points

    def coding(self, name: str, library: str, what: str) -> Value:
        """Bytes of float32 numbers per second of one core. name: of a coding. what: "encode", "decode" or "copy"."""
        return middle(self._coding(name, library, what))

    def peers_coding(self, name: str, what: str) -> Value:
        """The same of the fastest other library that has the coding."""
        rates = [self.coding(name, library, what) for library in CODERS if library != MINIPEFT]
        return max((rate for rate in rates if rate is not None), default=None)

    def slowest(self, what: str) -> Value:
        """The lowest such rate of ours among all codings; None if one is missing, or with a smaller matrix."""
        rates = [self.coding(name, MINIPEFT, what) for name in CODINGS]
        return None if None in rates or self.run["quantize"]["matrix"] < MATRIX else min(rates)

    def of_copy(self, name: str, what: str) -> Value:
        """The rate of ours as a share of the rate at which NumPy copies the matrix."""
        return middle(of_rounds(self._coding(name, MINIPEFT, what), self._coding(name, MINIPEFT, "copy")))

    def _coding(self, name: str, library: str, what: str) -> list[float]:
        part = self.run.get("quantize", {})
        return [4 * part["matrix"] ** 2 / median([turn[what]])
                for turn in part.get("times", {}).get(name, {}).get(library, [])]

    def qlora_rounds(self, size: str, side: str, kind: str) -> list[float]:
        """Seconds of a step of the part `qlora` in each round. kind: "lora", "qlora" or "kept"."""
        return [step([turn]) for turn in self._qlora(size).get("times", {}).get(side, {}).get(kind, [])]

    def qlora_time(self, size: str, side: str, kind: str) -> Value:
        """A step's time, over that of a LoRA step on the float32 base of the same library in the same round."""
        return middle(of_rounds(self.qlora_rounds(size, side, kind), self.qlora_rounds(size, side, "lora")))

    def qlora_share(self, size: str, kind: str) -> Value:
        """As `gemm_share`, of our step of this kind, with the FLOPs of a LoRA step: dequantizing counts as none."""
        flops = self._qlora(size).get("flops")
        turns = self._qlora(size).get("times", {}).get(OURS, {}).get("gemm", [])
        seconds_of_gemm = [flops / median([turn["rate"]]) for turn in turns] if flops else []
        return middle(of_rounds(seconds_of_gemm, self.qlora_rounds(size, OURS, kind)))

    def qlora_bytes(self, size: str, side: str, kind: str) -> tuple[Value, Value]:
        """(bytes of the weights, bytes of a step above the loaded model); the second as `memory` has it."""
        found = self._qlora(size).get("memory", {}).get(side, {}).get(kind)
        if not found:
            return None, None
        return found["weights"], found["peak"] - found["base"] if found["counted"] in COUNTED else None

    def qlora_memory(self, size: str, side: str, kind: str) -> tuple[Value, Value]:
        """(the weights, the weights and a step together), as shares of those of a LoRA on float32."""
        weights, step = self.qlora_bytes(size, side, kind)
        dense, dense_step = self.qlora_bytes(size, side, "lora")
        together, dense_together = (None if a is None or b is None else a + b
                                    for a, b in ((weights, step), (dense, dense_step)))
        return ratio(weights, dense), ratio(together, dense_together)

    def qlora_gap(self, size: str, side: str, kind: str) -> Value:
        """The relative difference of a first loss from ours on the same base; with weights that are kept, from ours
        without keeping them."""
        losses = self._qlora(size).get("first_losses", {})
        ours = losses.get(OURS, {}).get("qlora" if kind == "kept" else kind)
        theirs = losses.get(side, {}).get(kind)
        return None if None in (ours, theirs) or (side == OURS and kind != "kept") else abs(theirs / ours - 1)

    def _qlora(self, size: str) -> dict[str, Any]:
        return self.run.get("qlora", {}).get(size, {})

    def _size(self, size: str) -> dict[str, Any]:
        return self.run["sizes"].get(size, {})


def step(turns: list[dict[str, Any]]) -> float:
    """Seconds of a step: forward, backward and optimizer."""
    return median([[a + b for a, b in zip(turn["forward_backward"], turn["optimizer"])] for turn in turns])
