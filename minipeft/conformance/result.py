"""The result of one property in one dtype, and the job that asks for it; both in values that JSON can hold."""
from __future__ import annotations

import dataclasses
import math
from typing import Any

STAGES = ("vectors", "live")
AFTERMATH = ""  # stands for the property in messages while failures are examined


@dataclasses.dataclass(frozen=True)
class Job:
    """A request for a run. The first fields are the arguments of `hold.check`.

    done: [method, dtype, stage] that need not be run again. dead: [method, dtype, stage, property] in which the process
    died, and that are not tried again. hung: calls that did not return, and that are not made again."""

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
    """The result of a property in one dtype and stage.

    status: "pass", "fail" or "skip". rho: the worst error over its bound (level B); None if nothing was bounded. sees:
    the smallest error that would have been found wherever it occurs, as a share of the largest number; None if that
    number is 0. exact, facts: how many values were compared bit for bit, and how many facts were checked. cases: how
    many it was run on. reason: of a skip. failure: in words. gist: of a Fault, the part that is the same from case to
    case. minimal, diagnosis, links, script, replay: of a failure, the smallest case, the likely cause, public reports
    of it, and the two files."""

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
        """By which a later result replaces an earlier one."""
        return self.method, self.dtype, self.stage, self.id

    @property
    def level(self) -> str:
        """The levels that were checked: "B+E", "S", ..."""
        return "+".join(level for level, seen in (("B", self.rho is not None), ("E", self.exact), ("S", self.facts))
                        if seen)

    def as_json(self) -> dict[str, Any]:
        """The fields and the level. An infinite rho, which JSON lacks, is a string."""
        fields = {**dataclasses.asdict(self), "level": self.level}
        if self.rho is not None and not math.isfinite(self.rho):
            fields["rho"] = "inf"
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Result":
        """The Result whose `as_json` is `fields`."""
        rho = fields.get("rho")
        return cls(**{**{k: v for k, v in fields.items() if k != "level"}, "rho": None if rho is None else float(rho)})
