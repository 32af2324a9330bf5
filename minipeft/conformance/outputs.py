"""Properties that every method has: each output against its value, published or computed, and what must be refused."""
from __future__ import annotations

from typing import Iterator

from minipeft.conformance.case import Case
from minipeft.conformance.method import Make, Method, Property
from minipeft.conformance.observe import Observation, near, refused
from minipeft.conformance.tolerance import Value
from minipeft.conformance.vectors.read import read
from minipeft.conformance.vectors.run import ABSENT, observed

REFUSALS = "X1"       # the property of what must be refused
ABSENCE = "V absent"  # of gradients that must not exist, on the vectors


def output_property(method: Method, name: str, stored: Case | None = None, value: Value | None = None) -> Property:
    """"V y": the output `y`. On the case `stored` it is held against the published `value`, on others, smaller ones
    that a failure was cut to, against the reference."""
    needs, compute = method.outputs[name]

    def run(case: Case, make: Make) -> Iterator[Observation]:
        published = value is not None and stored is not None and case.arrays is stored.arrays
        yield near(case, name, compute(make, case), value if value is not None and published
                   else method.reference(case)[name])

    return Property(f"V {name}", f"V: {name} of the vectors", needs, run)


def refusal_property(method: Method) -> Property:
    """REFUSALS: a case that must raise, when the layer is made or when it computes its first output."""
    first = next(iter(method.outputs.values()))[1]

    def run(case: Case, make: Make) -> Iterator[Observation]:
        yield refused(case, lambda: first(make, case))

    return Property(REFUSALS, "S: what makes no sense is refused", (), run)


def absence_property(method: Method) -> Property:
    """ABSENCE: gradients that must not exist, on the vectors."""
    def run(case: Case, make: Make) -> Iterator[Observation]:
        for vector in read(method.name).vectors:
            if vector.case.digest == case.digest:
                yield from (seen.what for seen in observed(method, vector, make)
                            if seen.output == ABSENT and isinstance(seen.what, Observation))

    return Property(ABSENCE, "S: gradients that must not exist do not", ("vjp",), run)


def property_named(method: Method, id: str) -> Property:
    """The property of this id. Raises ValueError if there is none."""
    for prop in method.properties:
        if prop.id == id:
            return prop
    if id.startswith("V ") and id[2:] in method.outputs:
        return output_property(method, id[2:])
    if id == ABSENCE:
        return absence_property(method)
    if id == REFUSALS:
        return refusal_property(method)
    known = [*(prop.id for prop in method.properties), *(f"V {name}" for name in method.outputs), ABSENCE, REFUSALS]
    raise ValueError(f"{method.name} has no property {id!r}; it has {', '.join(known)}")
