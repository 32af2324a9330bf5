"""Which known bug a failure looks like. Each planted bug (mutant) of the method is run in the implementation's place.

    suspect        a mutant that fails the same property on the same case, and whose run sees everything that the
                   failing run saw: the same facts, the same numbers
    explanation    of many failures: the mutants that explain most of them

Two numbers are the same if both could be roundings of one result: if they are at most two bounds apart, each bound
times the factor by which the numbers are larger than expected (a result r times too large is also rounded r times as
coarsely). On exact cases they must be equal bit for bit, unless a result of the mutant had to be rounded.
A shrunk case is poor evidence (with alpha = 1, "s = alpha" and "s = 1" are the same): diagnose the original case.
"""
from __future__ import annotations

import dataclasses
import types
from typing import Any, Iterable, Sequence

import numpy

from minipeft.conformance.arithmetic import on_grid
from minipeft.conformance.case import Case
from minipeft.conformance.fault import Fault, Skip
from minipeft.conformance.hints import hints
from minipeft.conformance.look import unusable
from minipeft.conformance.method import Make, Method, Mutant, Property
from minipeft.conformance.observe import Observation
from minipeft.conformance.plugin import Handle, Plugin

Seen = Observation | Fault
Failure = tuple[Property, Case, Sequence[Seen]]
BY_DEFAULT = "default_conventions"
_MANY = 8  # failures examined if no bug explains all of them: every mutant is run on each


def witness(prop: Property, case: Case, make: Make) -> list[Seen]:
    """Everything that a property sees on a case, the Fault that ended it included; it stops at a Skip. make: case -> a
    handle of the implementation."""
    seen: list[Seen] = []
    made: list[Handle] = []

    def noted(case: Case) -> Handle:
        made.append(make(case))
        return made[-1]

    try:
        for one in prop.run(case, noted):
            seen.append(one)
    except Fault as fault:
        seen.append(fault)
    except Skip:
        pass
    except Exception as error:  # a result that the property cannot use
        seen.append(unusable(error, made))
    return seen


def suspects(method: Method, prop: Property, case: Case, seen: Sequence[Seen],
             among: Sequence[Mutant] | None = None) -> list[Mutant]:
    """The mutants that fail `prop` on `case` as the implementation did. seen: the observations of its failing run, a
    final Fault included; they may end at the first failure. among: the mutants to try; None tries all.

    If conventions other than the default ones are declared, the plain implementation, which knows only the defaults, is
    tried first: if it fails in the same way, no bug is needed to explain the failure."""
    def guilty(mutant: Mutant) -> bool:
        return _alike(method, case, seen, _of_mutant(method, mutant, prop, case), must_fail=True)

    default = Mutant(f"{method.name}.{BY_DEFAULT}", BY_DEFAULT, method.plain)
    if {**method.default(), **case.conventions} != method.default() and guilty(default):
        return [default]
    return [mutant for mutant in (method.mutants if among is None else among)
            if mutant.flag != BY_DEFAULT and guilty(mutant)]


def explain(method: Method, failures: Sequence[Failure], make: Make | None = None) -> list[Mutant]:
    """The mutants that explain the most failures. failures: (property, case, observations) of each. make: case -> a
    handle of the implementation; with it, a choice of several mutants is narrowed by comparing them with the
    implementation on more cases, whether it fails there or not."""
    best = _of_all(method, failures) or _of_most(method, failures[:_MANY])
    return best if make is None or len(best) < 2 else _narrowed(method, best, failures, make)


def _of_all(method: Method, failures: Sequence[Failure]) -> list[Mutant]:
    """The mutants that explain every failure. After the first failure few are left to try."""
    left: list[Mutant] | None = None if failures else []
    for prop, case, seen in failures:
        ids = None if left is None else {mutant.id for mutant in left}
        left = [mutant for mutant in suspects(method, prop, case, seen, left) if ids is None or mutant.id in ids]
        if not left:
            break
    return left or []


def _of_most(method: Method, failures: Sequence[Failure]) -> list[Mutant]:
    counts: dict[str, int] = {}
    known: dict[str, Mutant] = {}
    for prop, case, seen in failures:
        for mutant in suspects(method, prop, case, seen):
            known[mutant.id] = mutant
            counts[mutant.id] = counts.get(mutant.id, 0) + 1
    return [known[id] for id, n in counts.items() if n == max(counts.values())]


def _narrowed(method: Method, mutants: list[Mutant], failures: Sequence[Failure], make: Make) -> list[Mutant]:
    """Those of the mutants that most often behave like the implementation."""
    agreements = dict.fromkeys((mutant.id for mutant in mutants), 0)
    for case in _more_cases(method, [case for _, case, _ in failures]):
        for prop in method.properties:
            if not prop.applies(case) or not _offered(make, case, prop):
                continue
            seen = witness(prop, case, make)
            for mutant in mutants:
                theirs = _of_mutant(method, mutant, prop, case)
                agreements[mutant.id] += _alike(method, case, seen, theirs, must_fail=False)
    return [mutant for mutant in mutants if agreements[mutant.id] == max(agreements.values())]


def _more_cases(method: Method, found: Iterable[Case]) -> list[Case]:
    """At most three cases that failed and four new ones: with the largest sizes and with equal sizes, each bounded and
    exact."""
    cases = {case.id: case for case in found}
    first = next(iter(cases.values()))
    some, drawn = list(cases.values())[:3], list[Case]()
    least, most = (pick(size[i] for size in method.sizes.values()) for i, pick in ((0, max), (1, min)))
    square = max(least, most)
    for sizes in ({axis: size[1] for axis, size in method.sizes.items()}, dict.fromkeys(method.sizes, square)):
        for exact in (False, True):
            case = method.draw(numpy.random.default_rng([len(drawn), 23]), first.dtype, exact, sizes)
            case = dataclasses.replace(case, conventions=first.conventions, declared=first.declared)
            drawn.append(dataclasses.replace(case, exact=case.exact and method.exact_when(case)))
    return some + drawn


def _offered(make: Make, case: Case, prop: Property) -> bool:
    try:
        return make(case).offers(*prop.needs)
    except (Fault, Skip):
        return False


def _of_mutant(method: Method, mutant: Mutant, prop: Property, case: Case) -> list[Seen]:
    capabilities = {"name": mutant.id, "dtypes": (case.dtype,)}
    plugin = Plugin(types.SimpleNamespace(capabilities=capabilities, **{method.name: mutant.build}))
    with numpy.errstate(all="ignore"):
        return witness(prop, case, plugin.make(method))


def _alike(method: Method, case: Case, seen: Sequence[Seen], theirs: Sequence[Seen], must_fail: bool) -> bool:
    """Whether everything in `seen` is in `theirs`, in this order. `theirs` may hold more: the plain implementation
    offers calls that others lack, and a run may have stopped at its first failure."""
    rest, failing = iter(theirs), False
    for mine in seen:
        other = next((o for o in rest if _place(o) == _place(mine)), None)
        if other is None or not _same(method, case, mine, other):
            return False
        failing |= not mine.holds and not other.holds
    ended_well = bool(seen) and seen[-1].holds
    broke = any(isinstance(o, Fault) for o in rest)
    return (failing or not must_fail) and not (ended_well and broke)


def _place(seen: Seen) -> str:
    return "" if isinstance(seen, Fault) else seen.name


def _same(method: Method, case: Case, mine: Seen, other: Seen) -> bool:
    if isinstance(mine, Fault) or isinstance(other, Fault):
        return isinstance(mine, Fault) and isinstance(other, Fault) and mine.like(other)
    if mine.level == "S":
        return mine.like(other.got)
    pairs = [(mine.got, other.got), (mine.want, other.want)]
    if any(numpy.shape(a) != numpy.shape(b) for a, b in pairs):
        return False
    bound = _bound(method, case, mine, other)
    if bound is None:
        return all(numpy.array_equal(a, b) for a, b in pairs)
    growth = max([1.0, *(_size(a) / _size(mine.want) for a, _ in pairs if _size(mine.want))])
    return all(Observation(mine.name, "B", a, b, 2 * growth * bound).holds for a, b in pairs)


def _bound(method: Method, case: Case, mine: Observation, other: Observation) -> numpy.ndarray | None:
    """The bound within which the two count as the same. Usually it is that of the observation. Where an implementation
    must repeat itself bit for bit, another one may still round otherwise: then it is the widest bound on an output of
    this shape. None asks for equal bits: on exact cases whose numbers bfloat16 holds, as it holds all numbers of a
    correct implementation there, and where no output has this shape."""
    if mine.level == "B":
        return mine.tau
    if case.exact and all(numpy.array_equal(on_grid(x, "bfloat16"), x) for x in (other.got, other.want)):
        return None
    bounds = [case.tau(value) for value in method.reference(case).values()
              if value.exact.shape == numpy.shape(mine.got)]
    return numpy.maximum.reduce(bounds) if bounds else None


def _size(x: Any) -> float:
    return float(numpy.max(abs(numpy.asarray(x, numpy.float64)), initial=0.0))


def words(method: Method, mutants: Sequence[Mutant], failures: Sequence[Failure] = ()) -> str:
    """The diagnosis as a sentence. failures: (property, case, observations), from which hints are derived if `mutants`
    is empty."""
    if mutants:
        return "looks like " + "; or ".join(dict.fromkeys(_described(method, mutant) for mutant in mutants))
    found = dict.fromkeys(hint for _, case, seen in failures for o in [next((o for o in seen if not o.holds), None)]
                          if isinstance(o, Observation) for hint in hints(method, case, o))
    return "; ".join(["no planted bug of this kit gives this output", *list(found)[:4]])


def _described(method: Method, mutant: Mutant) -> str:
    if mutant.flag == BY_DEFAULT:
        return "the default conventions, not the declared ones: " + ", ".join(
            f"{name} {value}" for name, value in method.meant({}).items())
    note = method.notes.get(mutant.flag)
    if note is None:
        return f"the planted bug {mutant.id}"
    reported = f"reported in {', '.join(note.links)}" if note.links else ""
    more = "; ".join(part for part in (note.effect, reported) if part)
    return f"{note.words} ({more})" if more else note.words
