"""After a failure: the smallest case that still fails, its likely cause, and files that reproduce it.

The run calls this once all properties of a stage have run: a bug that explains all failures is the better guess.
"""
from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.diagnose import explain, suspects, words
from minipeft.conformance.fault import HANGS, Fault
from minipeft.conformance.look import fails, look
from minipeft.conformance.method import Make, Method, Property
from minipeft.conformance.observe import Observation
from minipeft.conformance.outputs import REFUSALS
from minipeft.conformance.plugin import Plugin
from minipeft.conformance.replay import write
from minipeft.conformance.result import Result
from minipeft.conformance.shrink import shrink

_BUDGET = 20.0  # seconds for shrinking all failures together
_SHOWN = 6  # arrays of at most so many rows and columns are shown whole


@dataclasses.dataclass(frozen=True)
class Failed:
    """A property that failed on a case. seen: its observations. made: the (case, handle) pairs that it made."""

    prop: Property
    case: Case
    seen: list[Observation | Fault]
    made: list[Any]

    @property
    def worst(self) -> Observation | Fault:
        """The first observation that is wrong."""
        return next(o for o in self.seen if not o.holds)

    @property
    def words(self) -> str:
        """The first wrong observation, in one line."""
        o = self.worst
        if isinstance(o, Fault):
            return str(o)
        why = f" ({o.why})" if o.why else ""
        if o.level == "S":
            return f"{o.name}: got {o.got}, expected {o.want}{why}"
        got, want = (numpy.asarray(x) + 0 for x in (o.got, o.want))  # + 0: masks become numbers
        if got.shape != want.shape:
            return f"{o.name}: got shape {list(got.shape)}, expected {list(want.shape)}{why}"
        error = abs(got - want) / (o.tau if o.level == "B" else 1)
        at = numpy.unravel_index(int(numpy.argmax(error)), error.shape)
        size = f"rho {o.rho:.3g}" if o.level == "B" else "must be equal bit for bit"
        digits = 10 if f"{float(got[at]):.10g}" != f"{float(want[at]):.10g}" else 17
        numbers = f"got {float(got[at]):.{digits}g}, expected {float(want[at]):.{digits}g}"
        return f"{o.name}{list(map(int, at))}: {numbers}, {size}{why}"


def explained(plugin: Plugin, method: Method, failures: list[tuple[Result, Failed]], folder: str | None,
              alive: Callable[[], None]) -> Iterator[Result]:
    """The results of failures, with their smallest cases, likely causes and files filled in.

    failures: each result with the failure behind it. folder: for the files; None writes none. alive: called before each
    layer of the implementation is made, so that a watching process sees that the kit is still at work."""
    if not failures:
        return

    def make(case: Case, build: Make = plugin.make(method)) -> Any:
        alive()
        return build(case)

    begun = time.monotonic()
    likely = explain(method, [(f.prop, f.case, f.seen) for _, f in failures], make)
    for result, failed in failures:
        if any(isinstance(o, Fault) and o.kind == HANGS for o in failed.seen):
            yield result  # every attempt would take the time limit again
            continue

        def still_fails(case: Case, prop: Property = failed.prop) -> bool:
            if time.monotonic() - begun > _BUDGET:
                return False  # for a slow implementation the case stays larger
            return prop.applies(case) and fails(look(prop, case, plugin, make)[0])

        case = shrink(failed.case, method, still_fails) if failed.prop.id != REFUSALS else failed.case
        small = Failed(failed.prop, case, *look(failed.prop, case, plugin, make))
        if not fails(small.seen):
            small = failed  # it does not fail every time
        result.minimal = f"{shown(small.case)}: {small.words}"
        mine = suspects(method, failed.prop, failed.case, failed.seen, among=likely)
        wrong = failed.worst
        if not mine and isinstance(wrong, Observation) and wrong.why:
            result.diagnosis = f"{wrong.name}: {wrong.why}"  # no planted bug explains it, but the property does
        elif mine or isinstance(wrong, Observation) and wrong.level != "S":
            result.diagnosis = words(method, mine, [(failed.prop, failed.case, failed.seen)])
        result.links = sorted({link for m in mine if m.flag in method.notes for link in method.notes[m.flag].links})
        if folder is not None:
            calls = small.made
            file, script = write(Path(folder), plugin, method, small.prop.id, small.case, small.seen, calls)
            result.replay, result.script = str(file), str(script)
        yield result


def shown(case: Case) -> str:
    """A case in one line: its dtype, params and arrays; a large array is given by its shape."""
    parts = [f"{name}={value}" for name, value in case.params.items()]
    for name, array in case.arrays.items():
        small = array.ndim <= 2 and all(n <= _SHOWN for n in array.shape)
        text = "".join(numpy.array2string(array, separator=",", floatmode="unique").split()) if small else ""
        parts.append(f"{name}={text}" if text else f"{name} {list(array.shape)}")
    return f"{case.dtype}, {', '.join(parts)}"
