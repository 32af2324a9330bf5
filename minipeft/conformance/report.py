"""The results of a run, for people and programs: a table of rho per property and dtype, the failures in words, JSON.

"Conforms" is claimed only for what ran: spec, vectors, methods, levels and dtypes are named with it.
"""
from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any, Iterable

import numpy

from minipeft.conformance.live import MISSING
from minipeft.conformance.method import TITLES
from minipeft.conformance.methods import all_methods
from minipeft.conformance.outputs import REFUSALS
from minipeft.conformance.result import Job, Result
from minipeft.conformance.survival import RATIOS
from minipeft.files import write_atomic

LEGEND = ("rho (level B) = worst error / derived bound: conforms up to 1.  E: bit for bit, on exact data or where "
          "nothing may\nchange.  S: a fact.  -: skipped, see --skips.  ~: the bound would hide an error of a tenth "
          f"of the largest number.\n{TITLES}")
BLUNT = 0.1  # a bound that hides an error above this share of the largest number is marked with ~


class Report:
    """The results of one run. messages: those of the run so far (see `stages.py`). job: the request; None if the report
    is put together from messages alone.

    found: {(method, dtype, stage, property): Result}. about: the implementation's description of itself. interrupted:
    whether the run ended before it was complete."""

    def __init__(self, messages: Iterable[dict[str, Any]] = (), job: Job | None = None):
        self.job, self.begun = job, datetime.datetime.now(datetime.timezone.utc)
        self.interrupted = False
        self.about: dict[str, Any] = {}
        self.found: dict[tuple, Result] = {}
        self.survival: list[dict[str, Any]] = []
        self.troubles: list[str] = []
        for message in messages:
            self.take(message)

    def take(self, message: dict[str, Any]) -> None:
        """Note one message of the run."""
        if "about" in message:
            self.about = self.about or message["about"]
        elif "result" in message:
            result = Result.from_json(message["result"])
            self.found[result.key] = result
        elif "trouble" in message:
            self.troubles.append(message["trouble"])
        elif "survival" in message and message["survival"] not in self.survival:
            self.survival.append(message["survival"])

    @property
    def results(self) -> list[Result]:
        """All results, by method, stage and property in the order of their definition."""
        order = {(m.name, id): i for m in all_methods().values()
                 for i, id in enumerate([*(f"V {name}" for name in m.outputs), *(p.id for p in m.properties)])}
        return sorted(self.found.values(), key=lambda r: (
            list(all_methods()).index(r.method), r.stage != "vectors", order.get((r.method, r.id), len(order)), r.id))

    @property
    def failures(self) -> list[Result]:
        """The results that failed."""
        return [r for r in self.results if r.status == "fail"]

    @property
    def exit_code(self) -> int:
        """0 conforms, 1 failures, 3 nothing ran, 130 interrupted."""
        if self.interrupted:
            return 130
        if self.failures:
            return 1
        return 0 if self._ran() else 3

    def _ran(self) -> list[Result]:
        """The results that passed, of methods that computed something: to refuse invalid input is not enough."""
        passed = [r for r in self.results if r.status == "pass"]
        computed = {r.method for r in passed if r.id != REFUSALS}
        return [r for r in passed if r.method in computed]

    def raise_for_failures(self) -> None:
        """Raises AssertionError with the report if something failed, if nothing ran, or if the run was interrupted."""
        if self.exit_code:
            raise AssertionError(f"\n{self}")

    def as_json(self) -> dict[str, Any]:
        """The request and the results as JSON values: equal for two runs in which both are equal."""
        from minipeft.conformance.vectors.read import PACK
        from minipeft.conformance.vectors.schema import SPEC

        counts = {status: sum(r.status == status for r in self.results) for status in ("pass", "fail", "skip")}
        return {"pack": PACK, "spec": SPEC, "impl": self.about, "run": self._asked(), "interrupted": self.interrupted,
                "summary": counts,
                "env": {"python": platform.python_version(), "numpy": numpy.__version__,
                        "machine": platform.machine()},
                "merge_survival": self.survival,
                "results": [r.as_json() for r in self.results]}

    def write_json(self, path: str | os.PathLike) -> None:
        """Write the report, with the date and time at which the run began, atomically as JSON to the file `path`."""
        found = {"date": self.begun.isoformat(timespec="seconds"), **self.as_json()}
        write_atomic(Path(path), (json.dumps(found, indent=1) + "\n").encode())

    def _asked(self) -> dict[str, Any] | None:
        """The arguments that repeat the run; None for a report that was put together from messages."""
        if self.job is None:
            return None
        job = self.job
        return {"impl": job.impl, "methods": list(job.methods), "dtypes": job.dtypes and list(job.dtypes),
                "stages": list(job.stages), "cases": job.cases, "seed": job.seed, "time_limit": job.limit}

    def __str__(self) -> str:
        return "\n".join([*self._head(), *self._tables(), LEGEND, "", *self._survival(), *self._failures(),
                          *(f"TROUBLE  {line}" for line in self.troubles),
                          self.verdict])

    def _head(self) -> list[str]:
        from minipeft.conformance.vectors.read import PACK
        from minipeft.conformance.vectors.schema import SPEC

        about = self.about
        lines = [f"minipeft conformance: spec {SPEC}, vectors {PACK}",
                 f"implementation: {about.get('name')} {about.get('version')} ({about.get('impl')})" if about else
                 f"implementation: {self.job and self.job.impl} (its capabilities were not read yet)"]
        for method, conventions in about.get("conventions", {}).items():
            if conventions:
                lines.append(f"  {method}: " + ", ".join(f"{k} {v}" for k, v in conventions.items()))
        for dtype, fields in about.get("arith", {}).items():
            lines.append(f"  {dtype}, declared arithmetic: " + ", ".join(f"{k} {v}" for k, v in fields.items()))
        return [*lines, ""]

    def _tables(self) -> list[str]:
        lines = []
        dtypes = list(self.about.get("dtypes", []))
        for name, method in all_methods().items():
            mine = [r for r in self.results if r.method == name]
            if not any(r.status != "skip" for r in mine):
                continue
            lines.append(f"{name}: {method.title} ({method.source['paper']}, {method.source['where']})")
            lines.append(" " * 82 + "".join(f"{dtype:>12}" for dtype in dtypes))
            rows: dict[str, dict[str, Result]] = {}
            for r in mine:
                rows.setdefault(r.id, {})[r.dtype] = r
            for id, by in rows.items():
                if any(r.status != "skip" for r in by.values()):
                    title = next((r.title for r in by.values() if r.title), "")
                    lines.append(f"  {id:<12}{title[:67]:<68}" + "".join(f"{cell(by.get(d)):>12}" for d in dtypes))
            hidden = [id for id, by in rows.items() if all(r.status == "skip" for r in by.values())]
            if hidden:
                lines.append(f"  skipped (see --skips): {', '.join(hidden)}")
            lines.append("")
        return lines

    def _survival(self) -> list[str]:
        """The share of a small update that a half-precision merge keeps, beside that after one correct rounding."""
        if not self.survival:
            return []
        lines = ["of an update D, a merge keeps (in brackets: one correct rounding keeps)",
                 "  |D| / |W|   " + "".join(f"{ratio:>14g}" for ratio in RATIOS)]
        for dtype in dict.fromkeys(line["dtype"] for line in self.survival):
            mine = [line for line in self.survival if line["dtype"] == dtype]
            lines.append(f"  {dtype:<12}" + "".join(f"{line['share']:>8.0%} ({line['best']:.0%})".rjust(14)
                                                    for line in mine))
        return [*lines, ""]

    def _failures(self) -> list[str]:
        """For each cause: the cause, the properties that found it, and the first of these in full."""
        groups: dict[tuple[str, str], list[Result]] = {}
        for r in self.failures:
            groups.setdefault((r.method, r.diagnosis or r.gist or r.failure), []).append(r)
        lines = []
        for (method, _), group in groups.items():
            found_by: dict[str, list[str]] = {}
            for r in group:
                found_by.setdefault(r.id, []).append(r.dtype)
            first = group[0]
            lines += [f"FAILED  {method}: {first.diagnosis or first.failure}",
                      "  found by   " + "; ".join(f"{id} ({', '.join(dict.fromkeys(dtypes))})"
                                                  for id, dtypes in found_by.items()),
                      f"  {first.id + ',':<10} {self._title(first)}; {first.dtype}"]
            lines += [f"  {name:<10} {text}" for name, text in (
                ("seen", first.failure), ("smallest", first.minimal), ("script", first.script),
                ("replay", first.replay)) if text]
            lines.append("")
        return lines

    def _title(self, result: Result) -> str:
        return result.title or next((p.title for p in all_methods()[result.method].properties if p.id == result.id), "")

    def skips(self) -> list[str]:
        """Every skip with its reason, as lines; a line covers all dtypes with the same reason."""
        reasons: dict[tuple[str, str, str], list[str]] = {}
        for r in self.results:
            if r.status == "skip":
                reasons.setdefault((r.method, r.id, r.reason), []).append(r.dtype)
        return [f"  {method} {id}: {reason} ({', '.join(dtypes)})" for (method, id, reason), dtypes in reasons.items()]

    @property
    def verdict(self) -> str:
        """A sentence on the outcome that claims only what ran."""
        results = self.results
        counts = {status: sum(r.status == status for r in results) for status in ("pass", "fail", "skip")}
        numbers = f"{counts['pass']} passed, {counts['fail']} failed, {counts['skip']} skipped"
        if self.interrupted:
            wrong = ", ".join(dict.fromkeys(r.method for r in self.failures))
            failed = f" It does not conform in {wrong}." if wrong else ""
            return f"Interrupted: {numbers} until then; the rest did not run.{failed}"
        if self.exit_code == 3:
            return f"Nothing ran: {numbers}. {' '.join(sorted({r.reason for r in results if r.reason}))}"
        ran = self._ran()
        what = ", ".join(dict.fromkeys(r.method for r in ran)) if not self.failures else \
            ", ".join(dict.fromkeys(r.method for r in self.failures))
        if self.failures:
            return f"Does not conform in {what}: {numbers}."
        levels = "+".join(level for level in "BES" if any(level in r.level for r in ran))
        dtypes = ", ".join(dict.fromkeys(r.dtype for r in ran))
        vectors_alone = " Only the vectors were run: " + MISSING if any(r.reason == MISSING for r in results) else ""
        return f"Conforms to {what}, levels {levels}, {dtypes}: {numbers}.{vectors_alone}"


def cell(result: Result | None) -> str:
    """One entry of the table: "-" for a skip or None, "FAIL" with rho, or rho and the levels E and S."""
    if result is None or result.status == "skip":
        return "-"
    if result.status == "fail":
        return "FAIL" if result.rho is None or result.rho <= 1 else f"FAIL {result.rho:.1g}"
    rho = "" if result.rho is None else f"{result.rho:.3f}" if result.rho >= 0.0005 else "0"
    rho += "~" if result.sees is not None and result.sees > BLUNT else ""
    letters = "".join(letter for letter, seen in (("E", result.exact), ("S", result.facts)) if seen)
    return f"{rho} {letters}".strip()
