"""What a recorded run says: medians, ratios, shares; None where something was not measured.

Everything printed, drawn or held to a bar is computed here from the raw times of the JSON, so that a recorded run shows
what it showed when it was made.
"""
from __future__ import annotations

from typing import Any, Callable

from bench_rounds import OURS, median
from bench_sizes import LINKS, NEW_TOKENS

Value = float | None


def ratio(a: Value, b: Value) -> Value:
    return None if a is None or not b else a / b


class Figures:
    """Of one run's JSON. A measure is "lora", "full" (a step) or "generate" (a token of a whole batch)."""

    def __init__(self, run: dict[str, Any]):
        self.run = run
        self.peers = [side for side in run["settings"]["sides"] if side != OURS]

    def seconds(self, size: str, side: str, measure: str) -> Value:
        turns = self._size(size).get("times", {}).get(side, {}).get(measure)
        if not turns:
            return None
        return median([turn["seconds"] for turn in turns]) / NEW_TOKENS if measure == "generate" else step(turns)

    def rate(self, size: str, side: str) -> Value:
        """FLOPs per second of the library's own matrix product."""
        turns = self._size(size).get("times", {}).get(side, {}).get("gemm")
        return median([turn["rate"] for turn in turns]) if turns else None

    def memory(self, size: str, side: str, kind: str) -> Value:
        """Bytes of a step above the loaded model."""
        found = self._size(size).get("memory", {}).get(side, {}).get(kind)
        return found["peak"] - found["base"] if found else None

    def best(self, figure: Callable[[str], Value]) -> Value:
        """The least of the peer's settings: its best."""
        return min((value for side in self.peers if (value := figure(side)) is not None), default=None)

    def time_ratio(self, size: str, measure: str) -> Value:
        return ratio(self.seconds(size, OURS, measure), self.best(lambda side: self.seconds(size, side, measure)))

    def memory_ratio(self, size: str, kind: str) -> Value:
        return ratio(self.memory(size, OURS, kind), self.best(lambda side: self.memory(size, side, kind)))

    def lora_of_full(self, size: str, side: str) -> tuple[Value, Value]:
        """A LoRA step's time and memory, as a share of the same library's full step."""
        return (ratio(self.seconds(size, side, "lora"), self.seconds(size, side, "full")),
                ratio(self.memory(size, side, "lora"), self.memory(size, side, "full")))

    def flops(self, size: str, kind: str) -> Value:
        return self._size(size).get("flops", {}).get(kind)

    def gemm_share(self, size: str, kind: str) -> Value:
        """FLOPs of our step per second, the optimizer's time included, over the rate of a matrix product."""
        return ratio(ratio(self.flops(size, kind), self.seconds(size, OURS, kind)), self.rate(size, OURS))

    def loss_gap(self, size: str) -> Value:
        """The largest relative difference of a first loss of ours and the peer's."""
        losses = self._size(size).get("first_losses", {})
        gaps = [abs(theirs[kind] / losses[OURS][kind] - 1) for side, theirs in losses.items() if side != OURS
                for kind in theirs if kind in losses.get(OURS, {})]
        return max(gaps, default=None)

    def per_node(self, side: str) -> tuple[Value, Value]:
        """Seconds per node of the chain, and what is left of that without a bare NumPy addition."""
        turns = self.run["engine"].get(side)
        if not turns:
            return None, None
        whole, bare = (median([turn[key] for turn in turns]) / LINKS for key in ("seconds", "bare"))
        return whole, whole - bare

    def growth(self, what: str) -> list[tuple[int, dict[str, float]]]:
        """(value, {side: seconds of a LoRA step}) of each point."""
        return [(point["value"], {side: step(turns) for side, turns in point["times"].items()})
                for point in self.run["growth"].get(what, [])]

    def _size(self, size: str) -> dict[str, Any]:
        return self.run["sizes"].get(size, {})


def step(turns: list[dict[str, Any]]) -> float:
    """Seconds of a step: forward, backward and optimizer."""
    return median([[a + b for a, b in zip(turn["forward_backward"], turn["optimizer"])] for turn in turns])
