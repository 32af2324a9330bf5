"""Runs one property on one case."""
from __future__ import annotations

from typing import Callable, Sequence

from minipeft.conformance.case import Case
from minipeft.conformance.fault import NO_USE, Fault, Skip
from minipeft.conformance.guard import last_lines
from minipeft.conformance.method import Property
from minipeft.conformance.observe import Observation
from minipeft.conformance.plugin import Handle, Plugin


def look(prop: Property, case: Case, plugin: Plugin, make: Callable) -> tuple[list[Observation | Fault], list]:
    """(observations, handles): everything that `prop` sees on `case`, a final Fault included, and the (case, handle)
    pairs that were made. make: case -> a handle of `plugin`. Raises Skip if the implementation does not offer something
    that the property needs, unless a failure was seen before."""
    seen: list[Observation | Fault] = []
    plugin.made.clear()
    try:
        for observation in prop.run(case, make):
            seen.append(observation)
    except Fault as fault:
        seen.append(fault)
    except Skip:
        if not fails(seen):
            raise
    except Exception as error:  # a result that the property cannot use, such as trainable() = None
        seen.append(unusable(error, [handle for _, handle in plugin.made]))
    return seen, list(plugin.made)


def unusable(error: Exception, made: Sequence[Handle]) -> Fault:
    """The Fault for a result that a property could not use. error: raised when it tried. made: the handles, the last of
    whose calls returned that result."""
    call = next((handle.last for handle in reversed(made) if handle.last), "")
    return Fault(NO_USE, f"{call}: {last_lines(error)}" if call else last_lines(error))


def fails(seen: list[Observation | Fault]) -> bool:
    """Whether any of these observations is wrong."""
    return any(not o.holds for o in seen)
