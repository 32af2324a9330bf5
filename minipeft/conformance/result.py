"""What came out of one property in one dtype, and the job that asks for it; both as JSON can hold them."""
from __future__ import annotations

import dataclasses
import math
from typing import Any

STAGES = ("vectors", "live")
AFTERMATH = ""  # the property that is said to run while failures are looked into


@dataclasses.dataclass(frozen=True)
class Job:
    """What to run. done: [method, dtype, stage] that need not be run again. dead: [method, dtype, stage, property] in
    which the process died: not to be tried again. hung: calls that did not return: not to be made again."""

    impl: str
    methods: tuple[str, ...]
    dtypes: tuple[str, ...] | None = None
    stages: tuple[str, ...] = STAGES
    cases: int = 50
    seed: int = 0
    limit: float = 10.0
    folder: str | None = "conformance-failures"
    done: tuple[tuple[str, ...], ...] = ()
    dead: tuple[tuple[str, ...], ...] = ()
    hung: tuple[str, ...] = ()


@dataclasses.dataclass
class Result:
    """status: "pass", "fail" or "skip". rho: the worst error over its bound (level B), None where nothing was
    bounded. sees: the smallest error that would have shown there wherever it is, as a share of the largest number,
    None where that is 0. exact, facts: how many values were compared bit for bit, and how many facts. reason: of a
    skip. failure: in words. gist: of a Fault, what is the same from case to case. minimal, diagnosis, links, script,
    replay: what the kit found out about a failure."""

    method: str
    id: str
    title: str
    dtype: str
    stage: str
    status: str = "pass"
    rho: float | None = None
    sees: float | None = None
    exact: int = 0
    facts: int = 0
    cases: int = 0
    reason: str = ""
    failure: str = ""
    gist: str = ""
    minimal: str = ""
    diagnosis: str = ""
    links: list[str] = dataclasses.field(default_factory=list)
    script: str = ""
    replay: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.method, self.dtype, self.stage, self.id

    @property
    def level(self) -> str:
        """Which levels took part: "B+E", "S", ..."""
        return "+".join(level for level, seen in (("B", self.rho is not None), ("E", self.exact), ("S", self.facts))
                        if seen)

    def as_json(self) -> dict[str, Any]:
        """Its fields; an infinite rho, which JSON lacks, as a string."""
        fields = {**dataclasses.asdict(self), "level": self.level}
        if self.rho is not None and not math.isfinite(self.rho):
            fields["rho"] = "inf"
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Result":
        rho = fields.get("rho")
        return cls(**{**{k: v for k, v in fields.items() if k != "level"}, "rho": None if rho is None else float(rho)})
