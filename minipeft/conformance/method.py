"""What the kit knows of one method: its equation, how cases are drawn, its properties, what must be refused."""
from __future__ import annotations

import dataclasses
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.observe import Observation
from minipeft.conformance.tolerance import Value

Make = Callable[..., Any]  # case -> a handle of the implementation under test, guarded


@dataclasses.dataclass(frozen=True)
class Property:
    """id: "L3". title: a sentence. needs: what a handle must offer. run: (case, make) -> what is seen.

    kinds: which cases it is run on: "bounded", "exact", or both. where: a condition on a case, or None. examples:
    how many of the cases it wants at most; a property with 100 cycles wants few."""

    id: str
    title: str
    needs: tuple[str, ...]
    run: Callable[[Case, Make], Iterator[Observation]]
    kinds: tuple[str, ...] = ("bounded", "exact")
    where: Callable[[Case], bool] | None = None
    examples: int = 1000

    def applies(self, case: Case) -> bool:
        return ("exact" if case.exact else "bounded") in self.kinds and (self.where is None or self.where(case))


@dataclasses.dataclass(frozen=True)
class Note:
    """A bug that really happened. words: what the implementation does, after "looks like". links: public reports."""

    words: str
    effect: str = ""
    links: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A bug planted in the plain NumPy implementation of a method. id: "lora.scale_alpha". flag: of its Note. build:
    what stands in the factory's place. below: {dtype: why it cannot be seen there}; the self-test holds that it is
    not."""

    id: str
    flag: str
    build: Callable[..., Any]
    below: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A case that must be refused. what: in words. case: its inputs."""

    what: str
    case: Case


@dataclasses.dataclass(frozen=True)
class Method:
    """name: of the factory. equation: lines of text. source: paper and place. conventions: {name: its values, the
    default (the paper's) first}. later: those that came when vectors were out already: a case that says nothing of one
    means its default, and keeps its id. after: this method under another value of one, with the vectors of that.

    axes: {array: the names of its axes}, for the shrinker: deleting an index of a named axis takes it from every array
    that has it. sizes: {axis: (least, most)}, what live cases draw. draw(rng, dtype, exact, sizes) -> Case.
    arguments(case) -> (args, kwargs) of the factory. reference(case) -> {output: Value}, for the conventions of the
    case; exact(case) the same in fractions or 50 digits, rounded once, for vectors. outputs: {output: (what a handle
    must offer, (make, case) -> array)}, the same for vectors of any language.
    vectors() -> the cases that are published. refusals(dtype) -> what must raise. notes: {flag: Note}."""

    name: str
    title: str
    equation: tuple[str, ...]
    source: Mapping[str, str]
    conventions: Mapping[str, tuple[str, ...]]
    axes: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, tuple[int, int]]
    draw: Callable[[numpy.random.Generator, str, bool, Mapping[str, int]], Case]
    arguments: Callable[[Case], tuple[Sequence[Any], Mapping[str, Any]]]
    reference: Callable[[Case], dict[str, Value]]
    exact: Callable[[Case], dict[str, Value]]
    outputs: Mapping[str, tuple[tuple[str, ...], Callable[[Make, Case], Any]]]
    properties: tuple[Property, ...]
    plain: Callable[..., Any]  # the method in plain NumPy, in which the mutants are planted
    mutants: tuple[Mutant, ...]
    refusals: Callable[[str], list[Refusal]]
    vectors: Callable[[], list[Case]]
    notes: Mapping[str, Note] = dataclasses.field(default_factory=dict)
    absent: tuple[str, ...] = ()  # gradients that must not exist
    exact_when: Callable[[Case], bool] = lambda case: True  # whether dyadic data stay exact under its conventions
    in_defaults: Callable[[Case], Case] = lambda case: case  # the same function, for who knows the defaults alone
    later: tuple[str, ...] = ()
    after: Method | None = None

    def default(self) -> dict[str, str]:
        """What a case says that departs from nothing."""
        return {name: values[0] for name, values in self.conventions.items() if name not in self.later}

    def meant(self, conventions: Mapping[str, str]) -> dict[str, str]:
        """All of them, where some are said."""
        return {name: conventions.get(name, values[0]) for name, values in self.conventions.items()}


class Laws:
    """Collects the properties of a method in the order in which they are written down."""

    def __init__(self) -> None:
        self.all: list[Property] = []

    def law(self, id: str, title: str, *needs: str, **fields: Any) -> Callable:
        """A decorator: the function becomes a Property of this list."""
        def add(run: Callable) -> Callable:
            self.all.append(Property(id, title, needs, run, **fields))
            return run
        return add


class Planted:
    """Collects the mutants of a method. A decorator: the class below is the plain implementation with one bug."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.all = prefix, list[Mutant]()

    def __call__(self, id: str, flag: str, **fields: Any) -> Callable:
        def add(build: Any) -> Any:
            self.all.append(Mutant(f"{self.prefix}.{id}", flag, build, **fields))
            return build
        return add
