"""The run itself: for every method and dtype the vectors, then the drawn cases. It reports by messages:

    {"about": ...}    the implementation, once             {"now": [method, dtype, stage, property]}   begins to run
    {"result": ...}   of one property; a later one, with the cause and files of a failure, replaces it
    {"survival": ...} the share of a small update that a half-precision merge keeps
    {"trouble": ...}  an error of the kit itself while it examined failures
    {"done": [method, dtype, stage]}                       the stage is complete

Messages hold only JSON values, so that the run can have a process of its own: see `worker.py`.
"""
from __future__ import annotations

import dataclasses
import math
from typing import Any, Callable

from minipeft.conformance import live
from minipeft.conformance.aftermath import Failed, explained
from minipeft.conformance.case import Case
from minipeft.conformance.fault import RAISES as RAISED
from minipeft.conformance.fault import Fault, Skip
from minipeft.conformance.guard import last_lines
from minipeft.conformance.look import fails, look
from minipeft.conformance.method import Method, Property
from minipeft.conformance.methods import all_methods
from minipeft.conformance.observe import Observation
from minipeft.conformance.outputs import ABSENCE, REFUSALS, absence_property, output_property, refusal_property
from minipeft.conformance.plugin import Plugin
from minipeft.conformance.result import AFTERMATH, Job, Result
from minipeft.conformance.survival import survival
from minipeft.conformance.vectors.read import Vector, read
from minipeft.conformance.vectors.run import ABSENT, RAISES, judged, observed, skipped

Message = dict[str, Any]
Say = Callable[[Message], None]


def conduct(plugin: Plugin, job: Job, say: Say) -> None:
    """Run everything that `job` asks for on the plug-in. say: called with every message. Raises ValueError for declared
    conventions that do not exist."""
    methods = [m for name, m in all_methods().items() if name in job.methods]
    dtypes = [d for d in plugin.dtypes if job.dtypes is None or d in job.dtypes]
    say({"about": {"name": plugin.name, "version": plugin.version, "impl": job.impl, "dtypes": dtypes,
                   "arith": plugin.arith, "conventions": {m.name: plugin.conventions(m) for m in methods
                                                          if plugin.offers(m)}}})
    for method in methods:
        if not plugin.offers(method):
            say({"result": Result(method.name, "-", method.title, "-", "-", "skip",
                                  reason=f"the plug-in has no function {method.name}()").as_json()})
            continue
        for dtype in job.dtypes or ():
            if dtype not in dtypes:
                say({"result": Result(method.name, "-", method.title, dtype, "-", "skip", reason=(
                    f"{dtype} is not among its capabilities['dtypes'] ({', '.join(plugin.dtypes)})")).as_json()})
        for dtype in dtypes:
            for stage in job.stages:
                if (method.name, dtype, stage) not in job.done:
                    Stage(plugin, method, dtype, stage, job, say).run()
                    say({"done": [method.name, dtype, stage]})


class Tally:
    """The result of one property while its cases run, and the first case on which it failed."""

    def __init__(self, method: Method, prop: Property, dtype: str, stage: str):
        self.prop = prop
        self.result = Result(method.name, prop.id, prop.title, dtype, stage)
        self.failed: Failed | None = None

    def add(self, case: Case, seen: list[Observation | Fault], made: list) -> float:
        """Counts the observations `seen` on a case. made: its (case, handle) pairs. Returns the worst rho."""
        result, worst = self.result, 0.0
        result.cases += 1
        for o in seen:
            if isinstance(o, Fault):
                continue
            result.exact += o.level == "E"
            result.facts += o.level == "S"
            if o.level == "B":
                worst = max(worst, o.rho)
                result.rho = max(result.rho or 0.0, o.rho)
                result.sees = min((s for s in (result.sees, o.sees) if s is not None and s < math.inf), default=None)
        if fails(seen) and self.failed is None:
            result.status = "fail"
            self.failed = Failed(self.prop, case, seen, made)
            result.failure = self.failed.words
            result.gist = self.failed.worst.gist if isinstance(self.failed.worst, Fault) else ""
        elif fails(seen) and self.prop.id == REFUSALS and case.label not in result.failure:
            result.failure += f"; {Failed(self.prop, case, seen, made).words}"  # lists everything that is not refused
        return worst


class Stage:
    """The run of one method in one dtype. stage: "vectors" or "live"."""

    def __init__(self, plugin: Plugin, method: Method, dtype: str, stage: str, job: Job, say: Say):
        self.plugin, self.method, self.dtype, self.stage, self.job, self.say = plugin, method, dtype, stage, job, say
        self.make = plugin.make(method)
        self.tallies: dict[str, Tally] = {}
        self.reasons: dict[str, str] = {}
        self.handle: Any = None

    def run(self) -> None:
        """Runs the stage, reports its results, then examines the failures."""
        if self.stage == "vectors":
            self._vectors()
        elif live.available():
            self._live()
        else:
            self.skip(Property("live", "properties on drawn cases", (), lambda *_: iter(())), live.MISSING)
        self.tallies = {id: tally for id, tally in self.tallies.items() if not self._dead(id)}
        for tally in self.tallies.values():
            if tally.result.cases == 0:
                tally.result.status = "skip"
                tally.result.reason = self.reasons.get(tally.prop.id, "the property applies to no case of this run")
            self.say({"result": tally.result.as_json()})
        failures = [(tally.result, tally.failed) for tally in self.tallies.values() if tally.failed]
        self._now(AFTERMATH)
        try:
            self._aftermath(failures)
        except Exception as error:  # the results are reported; an error of the kit in explaining them loses none
            self.say({"trouble": f"{self.method.name}, {self.dtype}: failures could not be examined: "
                                 f"{last_lines(error)}"})

    def _aftermath(self, failures: list[tuple[Result, Failed]]) -> None:
        """Reports what a half-precision merge keeps, and the likely causes of failures."""
        if self.stage == "live" and self.method.name == "lora_linear" and self.dtype in ("float16", "bfloat16"):
            for line in survival(self.plugin, self.method, self.dtype):
                self.say({"survival": {"dtype": self.dtype, **line}})
        for result in explained(self.plugin, self.method, failures, self.job.folder, lambda: self._now(AFTERMATH)):
            self.say({"result": result.as_json()})

    def tally(self, prop: Property) -> "Tally":
        """The tally of the property, a new one at the first call."""
        return self.tallies.setdefault(prop.id, Tally(self.method, prop, self.dtype, self.stage))

    def skip(self, prop: Property, reason: str) -> None:
        """Notes why the property could not be run on a case; it is reported if no case could be run."""
        self.tally(prop)
        self.reasons[prop.id] = reason

    def judge(self, prop: Property, case: Case) -> float:
        """Run a property on a case, unless it failed before or the process died in it. Returns the worst rho."""
        if self._dead(prop.id):
            return 0.0
        tally = self.tally(prop)
        if tally.failed and prop.id != REFUSALS or tally.result.cases >= prop.examples or not prop.applies(case):
            return 0.0
        if not self._offers(prop, case):
            self.skip(prop, f"not offered: {', '.join(n for n in prop.needs if not self._has(n))}")
            return 0.0
        self._now(prop.id)
        try:
            return tally.add(case, *look(prop, case, self.plugin, self.make))
        except Skip as reason:
            self.skip(prop, str(reason))
            return 0.0

    def _has(self, name: str) -> bool:
        return self.handle is None or self.handle.offers(name)

    def _offers(self, prop: Property, case: Case) -> bool:
        """Whether the object that the factory returns has the calls that the property needs. True if the factory fails:
        the property will report that."""
        if self.handle is None and prop.needs:
            try:
                self.handle = self.make(case)
            except (Fault, Skip):
                return True
        return all(map(self._has, prop.needs))

    def _vectors(self) -> None:
        declared = self.plugin.conventions(self.method)
        for vector in read(self.method.name).vectors:
            if vector.case.dtype != self.dtype:
                continue
            reason = skipped(self.method, vector, self.plugin.dtypes, declared)
            if reason:
                for name in vector.outputs:
                    self.tally(output_property(self.method, name))
                    self.reasons.setdefault(f"V {name}", f"no vector for this plug-in; {reason}")
                continue
            if vector.result == "must_raise" and (broken := self._broken()):
                self.skip(refusal_property(self.method), broken)
                continue
            vector = judged(self.method, vector, self.plugin.arith.get(self.dtype, {}))
            alive = {name: value for name, value in vector.outputs.items() if not self._dead(f"V {name}")}
            if alive or vector.result == "must_raise" and not self._dead(REFUSALS):
                self._observe(dataclasses.replace(vector, outputs=alive))

    def _observe(self, vector: Vector) -> None:
        """Checks every output of a vector, and reports which one is about to be computed."""
        ids = [*(f"V {name}" for name in vector.outputs), *([ABSENCE] if vector.outputs else [REFUSALS])]
        self._now(ids[0])
        self.plugin.made.clear()
        for i, seen in enumerate(observed(self.method, vector, self.make), 1):
            prop = self._property(vector, seen.output)
            if isinstance(seen.what, str):
                self.skip(prop, seen.what)
            else:
                self.tally(prop).add(vector.case, [seen.what], list(self.plugin.made))
            self.plugin.made.clear()
            self._now(ids[min(i, len(ids) - 1)])

    def _broken(self) -> str:
        """Why it cannot be tested whether invalid input is refused: the first output is unusable even on valid input.
        "" if it is usable."""
        needs = next(iter(self.method.outputs.values()))[0]
        calls = {f"{self.method.name}()", *(f"{self.method.name}.{need}" for need in needs)}
        wrong = [t.failed.worst for t in self.tallies.values() if t.failed is not None]
        return next((f"even valid input gives no usable result: {fault.gist}" for fault in wrong
                     if isinstance(fault, Fault) and fault.kind != RAISED and fault.gist.split()[-1] in calls), "")

    def _now(self, id: str) -> None:
        self.say({"now": [self.method.name, self.dtype, self.stage, id]})

    def _dead(self, id: str) -> bool:
        """Whether the process died in this property before."""
        return (self.method.name, self.dtype, self.stage, id) in self.job.dead

    def _property(self, vector: Vector, output: str) -> Property:
        """The property that checks this output of a vector."""
        if output == RAISES:
            return refusal_property(self.method)
        if output == ABSENT:
            return absence_property(self.method)
        return output_property(self.method, output, vector.case, vector.outputs[output])

    def _live(self) -> None:
        def check(case: Case) -> dict[str, float]:
            case = self.plugin.settle(case, self.method)
            return {prop.id: self.judge(prop, case) for prop in self.method.properties}

        for prop in self.method.properties:
            self.tally(prop)
        for exact in (False, True):
            live.search(self.method, self.dtype, exact, self.job.cases, self.job.seed, check)
        if broken := self._broken():
            self.skip(refusal_property(self.method), broken)
            return
        for refusal in self.method.refusals(self.dtype):
            case = self.plugin.settle(refusal.case, self.method)
            self.judge(refusal_property(self.method), dataclasses.replace(case, label=refusal.what))
