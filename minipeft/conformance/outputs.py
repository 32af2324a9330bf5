"""Properties that every method has: each output agrees with its published or computed value, and invalid input is
refused."""
from __future__ import annotations

from typing import Iterator

from minipeft.conformance.case import Case
from minipeft.conformance.method import Make, Method, Property
from minipeft.conformance.observe import Observation, near, refused
from minipeft.conformance.tolerance import Value
from minipeft.conformance.vectors.read import read
from minipeft.conformance.vectors.run import ABSENT, observed

REFUSALS = "X1"       # the property that invalid input is refused
ABSENCE = "V absent"  # the property that gradients do not exist where the vectors say so


def output_property(method: Method, name: str, stored: Case | None = None, value: Value | None = None) -> Property:
    """The property "V y" of the output `y`, here `name`. On the case `stored` the output is compared with the published
    `value`; on other cases, to which a failure was shrunk, with the method's reference."""
    needs, compute = method.outputs[name]

    def run(case: Case, make: Make) -> Iterator[Observation]:
        published = value is not None and stored is not None and case.arrays is stored.arrays
        yield near(case, name, compute(make, case), value if value is not None and published
                   else method.reference(case)[name])

    return Property(f"V {name}", f"V: {name} of the vectors", needs, run)


def refusal_property(method: Method) -> Property:
    """The property REFUSALS: the case must raise, when the layer is made or when it computes its first output."""
    first = next(iter(method.outputs.values()))[1]

    def run(case: Case, make: Make) -> Iterator[Observation]:
        yield refused(case, lambda: first(make, case))

    return Property(REFUSALS, "S: invalid input is refused", (), run)


def absence_property(method: Method) -> Property:
    """The property ABSENCE: gradients that must not exist do not, on the vectors."""
    def run(case: Case, make: Make) -> Iterator[Observation]:
        for vector in read(method.name).vectors:
            if vector.case.digest == case.digest:
                yield from (seen.what for seen in observed(method, vector, make)
                            if seen.output == ABSENT and isinstance(seen.what, Observation))

    return Property(ABSENCE, "S: gradients of frozen arrays do not exist", ("vjp",), run)


def property_named(method: Method, id: str) -> Property:
    """The property of the method with this id. Raises ValueError if there is none."""
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
