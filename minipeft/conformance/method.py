"""The description of one method: its equation, how cases are drawn, its properties, and the inputs to be refused."""
from __future__ import annotations

import dataclasses
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.observe import Observation
from minipeft.conformance.tolerance import Value

Make = Callable[..., Any]  # case -> a guarded handle of the implementation under test
TITLES = "Titles: V compares results with the reference, M compares results with each other, S checks facts."


@dataclasses.dataclass(frozen=True)
class Property:
    """A property of a method that every implementation must have.

    id: such as "L3". title: a sentence after a letter, see TITLES. needs: the calls that a handle must offer. run:
    (case, make) -> its observations. kinds: of the cases it is run on: "bounded", "exact", or both. where: a condition
    on a case, or None. examples: the largest number of cases; a property with 100 cycles takes few."""

    id: str
    title: str
    needs: tuple[str, ...]
    run: Callable[[Case, Make], Iterator[Observation]]
    kinds: tuple[str, ...] = ("bounded", "exact")
    where: Callable[[Case], bool] | None = None
    examples: int = 1000

    def applies(self, case: Case) -> bool:
        """Whether the property is meant for this case."""
        return ("exact" if case.exact else "bounded") in self.kinds and (self.where is None or self.where(case))


@dataclasses.dataclass(frozen=True)
class Note:
    """The description of a planted bug. words: completes "looks like ...". effect: its consequence. links: public
    reports of the bug in real libraries. Only some planted bugs have been reported; `links` is empty for all others."""

    words: str
    effect: str = ""
    links: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A bug planted in the plain NumPy implementation of a method. id: such as "lora.scale_alpha". flag: of its Note.
    build: the factory with the bug. below: {dtype: why it cannot be seen there}; the self-test checks that it is not.
    """

    id: str
    flag: str
    build: Callable[..., Any]
    below: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A case that an implementation must refuse. what: the fault of the inputs, in words. case: the inputs."""

    what: str
    case: Case


@dataclasses.dataclass(frozen=True)
class Method:
    """Everything that the kit knows of one method.

    name: of the factory. equation: lines of text. source: paper and place in it. conventions: {name: its values, the
    default (the paper's) first}. later: the conventions introduced after vectors were published: a case that does not
    mention one means its default, and keeps its id. after: this method under another value of a later convention, with
    the vectors for it.

    axes: {array: the names of its axes}, for the shrinker: deleting an index of a named axis deletes it in every array
    that has the axis. sizes: {axis: (least, most)}, the range for live cases. draw(rng, dtype, exact, sizes) -> Case.
    arguments(case) -> (args, kwargs) of the factory. reference(case) -> {output: Value}, under the conventions of the
    case; exact(case): the same in fractions or 50 digits, rounded once, for vectors. outputs: {output: (the calls that
    a handle must offer, (make, case) -> array)}, the same for vectors of any language. vectors() -> the published
    cases. refusals(dtype) -> the cases that must raise. notes: {flag: Note}."""

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
    plain: Callable[..., Any]  # the method in plain NumPy, in which the bugs are planted
    mutants: tuple[Mutant, ...]
    refusals: Callable[[str], list[Refusal]]
    vectors: Callable[[], list[Case]]
    notes: Mapping[str, Note] = dataclasses.field(default_factory=dict)
    absent: tuple[str, ...] = ()  # gradients that must not exist
    exact_when: Callable[[Case], bool] = lambda case: True  # whether dyadic data stay exact under its conventions
    in_defaults: Callable[[Case], Case] = lambda case: case  # the same function in terms of the default conventions
    later: tuple[str, ...] = ()
    after: Method | None = None

    def default(self) -> dict[str, str]:
        """The conventions that a case states if none departs from its default: all but the later ones."""
        return {name: values[0] for name, values in self.conventions.items() if name not in self.later}

    def meant(self, conventions: Mapping[str, str]) -> dict[str, str]:
        """The value of every convention: the one in `conventions`, or else the default."""
        return {name: conventions.get(name, values[0]) for name, values in self.conventions.items()}


class Laws:
    """Collects the properties of a method in the order of their definitions."""

    def __init__(self) -> None:
        self.all: list[Property] = []

    def law(self, id: str, title: str, *needs: str, **fields: Any) -> Callable:
        """A decorator that adds the function to this list as a Property. id, title, needs and the other fields are
        those of `Property`."""
        def add(run: Callable) -> Callable:
            self.all.append(Property(id, title, needs, run, **fields))
            return run
        return add


class Planted:
    """Collects the planted bugs of a method. prefix: of their ids. An instance is a decorator for a class that is the
    plain implementation with one bug."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.all = prefix, list[Mutant]()

    def __call__(self, id: str, flag: str, **fields: Any) -> Callable:
        """A decorator that adds the class as the planted bug `prefix.id`. flag, fields: those of `Mutant`."""
        def add(build: Any) -> Any:
            self.all.append(Mutant(f"{self.prefix}.{id}", flag, build, **fields))
            return build
        return add
