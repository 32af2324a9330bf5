"""One property on one case."""
from __future__ import annotations

from typing import Callable, Sequence

from minipeft.conformance.case import Case
from minipeft.conformance.fault import NO_USE, Fault, Skip
from minipeft.conformance.guard import last_lines
from minipeft.conformance.method import Property
from minipeft.conformance.observe import Observation
from minipeft.conformance.plugin import Handle, Plugin


def look(prop: Property, case: Case, plugin: Plugin, make: Callable) -> tuple[list[Observation | Fault], list]:
    """What a property sees on a case, up to a Fault; and the handles that were made. Raises Skip
    where the implementation refuses what the property needs."""
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
    except Exception as error:  # an answer that the property cannot use, such as trainable() = None
        seen.append(unusable(error, [handle for _, handle in plugin.made]))
    return seen, list(plugin.made)


def unusable(error: Exception, made: Sequence[Handle]) -> Fault:
    """What a property could not compute with, and the last call before: it gave that."""
    call = next((handle.last for handle in reversed(made) if handle.last), "")
    return Fault(NO_USE, f"{call}: {last_lines(error)}" if call else last_lines(error))


def fails(seen: list[Observation | Fault]) -> bool:
    """Whether anything that was seen is wrong."""
    return any(not o.holds for o in seen)
