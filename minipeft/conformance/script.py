"""A failure as a script of a few lines that needs only NumPy and the plug-in: inputs, calls, got, expected.

The property is run once more with handles that record every call and its result, in chronological order, up to the
first wrong observation. The wrong value is then looked for among the results (as it is, or as some rows, a sum or a
difference of them), and only the calls that lead to it are written: a wrong forward takes three lines, whatever else
the property does. If the value is not found, all calls are written and their results printed.
"""
from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any, Callable, Iterator, Sequence

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.fault import HANGS, NO_USE, WRITES, WRONG_SHAPE, WRONG_TYPE, Fault
from minipeft.conformance.guard import last_lines
from minipeft.conformance.literals import Names, numbers_of, printed, result_of, rows_of
from minipeft.conformance.method import Make, Method, Property
from minipeft.conformance.observe import Observation
from minipeft.conformance.plugin import Handle

Seen = Observation | Fault
_LATEST = 24  # results among which the wrong value is looked for


@dataclasses.dataclass(eq=False)
class Event:
    """A call of a handle, or its making if `name` is "". handle: its number. case: that it was made for. result: the
    returned value, or the Fault that it raised."""

    handle: int
    name: str
    args: Sequence[Any]
    kwargs: dict[str, Any]
    case: Case
    result: Any = None


class Recorded(Handle):
    """A handle that appends its calls to `tape`. handle: the one that it replaces. number, case: of its Events."""

    def __init__(self, handle: Handle, number: int, case: Case, tape: list[Event]):
        super().__init__(handle._plugin, handle._method, handle._inner, handle._dtype)
        self._number, self._case, self._tape = number, case, tape

    def __getattr__(self, name: str) -> Callable:
        inner = super().__getattr__(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            event = Event(self._number, name, args, kwargs, self._case)
            self._tape.append(event)
            event.result = _result(lambda: inner(*args, **kwargs))
            if isinstance(event.result, Fault):
                raise event.result
            return event.result
        return call


def _result(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Fault as fault:
        return fault


def taped(prop: Property, case: Case, make: Make) -> tuple[list[Event], Seen | None]:
    """(calls, wrong): the calls that `prop` makes on `case` up to the first wrong observation, and that observation;
    None if nothing is wrong this time. make: case -> a handle."""
    tape: list[Event] = []
    numbers = itertools.count()

    def recorded(case: Case) -> Handle:
        event = Event(next(numbers), "", (), {}, case)
        tape.append(event)
        event.result = _result(lambda: make(case))
        if isinstance(event.result, Fault):
            raise event.result
        return Recorded(event.result, event.handle, case, tape)

    try:
        for seen in prop.run(case, recorded):
            if not seen.holds:
                return tape, seen
    except Fault as fault:
        return tape, fault
    except Exception as error:  # a result that the property cannot use
        return tape, Fault(NO_USE, last_lines(error))
    return tape, None


def listed(calls: Sequence[tuple[Case, Handle]]) -> list[Event]:
    """The calls of (case, handle) pairs as events. Their results and the order between handles are unknown."""
    tape = []
    for number, (case, handle) in enumerate(calls):
        tape.append(Event(number, "", (), {}, case))
        tape += [Event(number, name, args, kwargs, case) for name, args, kwargs in handle._calls]
    return tape


def script(imports: str, method: Method, title: str, tape: Sequence[Event], wrong: Seen) -> str:
    """The text of the script. imports: statements, in one line, that import the plug-in as `plugin`. title: the failure
    in words. tape, wrong: as from `taped`."""
    draft, clean = (Writer(imports, method, tape, wrong) for _ in range(2))
    draft.text(title)
    for event in tape:                                         # so that results are numbered chronologically
        if event in draft.names.results:
            clean.names.result(event, result_of(event.name))
    return clean.text(title)


class Writer:
    """Builds a script backwards: first the lines that print the failure, then the calls that lead to it, then their
    inputs. The arguments are those of `script`."""

    def __init__(self, imports: str, method: Method, tape: Sequence[Event], wrong: Seen):
        self.imports, self.method, self.wrong, self.tape = imports, method, wrong, list(tape)
        self.names, self.used = Names(), dict[Event, str]()
        self.lines: list[str] = []

    def text(self, title: str) -> str:
        """The script, with `title` as its docstring. To be called once."""
        last = self._fault() if isinstance(self.wrong, Fault) else self._difference(self.wrong)
        self._calls()
        quoted = title.replace("\\", "/").replace('"', "'")
        body = [*self.names.definitions, *self.lines, *last]
        names = [name for name in ("array", "inf", "nan", "zeros") if re.search(rf"\b{name}\b", "\n".join(body))]
        numpy_too = [f"from numpy import {', '.join(names)}"] if names else []
        return "\n".join([f'"""{quoted}"""', "; ".join([self.imports, *numpy_too]), *body, ""])

    def _difference(self, seen: Observation) -> list[str]:
        got = self._expression(seen.got)
        if got is None and seen.level == "S":                  # a fact is about the last call
            self._use(self.tape[-1])
            self._keep()
            return [f"print('got', {numbers_of(seen.got)}, 'expected', {numbers_of(seen.want)})"]
        if got is None:                                        # all calls are shown, with their results
            for event in self.tape:
                if event.name and not isinstance(event.result, (Fault, type(None))):
                    self._use(event)
            self._keep()
            self.shown = True
            return [f"# the property computes from these: {seen.name}",
                    f"print('got', {numbers_of(seen.got)}, 'expected', {numbers_of(seen.want)})"]
        want = None if self._is_reference(seen.want) else self._expression(seen.want)
        self._keep()
        return [f"print('got', {printed(got, seen.got)}, 'expected', "
                f"{printed(want, seen.want) if want else numbers_of(seen.want)})"]

    def _is_reference(self, want: Any) -> bool:
        case = self.tape[0].case
        return any(v.exact.shape == numpy.shape(want) and numpy.array_equal(v.exact, want)
                   for v in self.method.reference(case).values())

    def _fault(self) -> list[str]:
        """The lines that print a Fault, of which the last call is the cause."""
        assert isinstance(self.wrong, Fault)
        kind, detail = self.wrong.kind, self.wrong.detail
        self.names.locked = kind == WRITES
        if not self.tape:
            return [f"print('got', {str(self.wrong)!r}, 'expected no error')"]
        event = self.tape[-1]
        self.used[event] = ""
        if not isinstance(event.result, Fault):                # it returned, but nothing usable
            name = self._use(event)
            self._keep()
            got = {WRONG_SHAPE: f"{name}.shape", WRONG_TYPE: f"type({name})"}.get(kind, printed(name, event.result))
            if isinstance(event.result, dict):
                got = f"{{k: getattr(v, 'shape', v) for k, v in {name}.items()}}"
            return [f"print('got', {got}, 'expected', {detail.partition('; expected ')[2] or detail!r})"]
        self._keep()
        self.tape.remove(event)
        last = self._call(event)
        hang = ["print('expected an answer in time, got none')"] if kind == HANGS else []
        return [*hang, "try:", f"    {last}", "except Exception as error:",
                "    print('got', repr(error), 'expected no error')"]

    def _keep(self) -> None:
        """Cuts the tape to the calls of the handles in use, each up to its last use, and the saves that they load."""
        blobs = {}
        for event in self.tape:
            if event.name == "save" and isinstance(event.result, bytes):
                blobs[event.result] = event
        last: dict[int, int] = {}
        for i in reversed(range(len(self.tape))):
            event = self.tape[i]
            if event in self.used:
                last.setdefault(event.handle, i)
            if i <= last.get(event.handle, -1):
                for arg in event.args:
                    if isinstance(arg, bytes) and arg in blobs and blobs[arg] is not event:
                        saved = blobs[arg]
                        self.used[saved] = self.names.result(saved, "blob")
                        last[saved.handle] = max(last.get(saved.handle, -1), self.tape.index(saved))
        self.tape = [event for i, event in enumerate(self.tape) if i <= last.get(event.handle, -1)]

    shown = False  # whether every result is printed

    def _calls(self) -> None:
        rest = list(self.tape)
        while rest:
            times, block = self._repeated(rest)
            if times > 2:
                self.lines += [f"for _ in range({times}):", *(f"    {self._call(event)}" for event in block)]
                rest = rest[times * len(block):]
                continue
            self._one(rest.pop(0))

    def _one(self, event: Event) -> None:
        name = self.used.get(event, "") if event.name else self._handle(event)
        line = f"{name} = {self._call(event)}" if name else self._call(event)
        if isinstance(event.result, Fault):                    # the property expects an error here
            self.lines += ["try:", f"    {line}", "except Exception as error:", "    print(repr(error))"]
            return
        self.lines.append(line)
        if self.shown and event.name and name and not isinstance(event.result, bytes):
            self.lines.append(f"print({name!r}, {name})")

    def _repeated(self, rest: list[Event]) -> tuple[int, list[Event]]:
        """(n, block): `rest` begins with n repetitions of this block of at most three calls without arguments."""
        for size in (1, 2, 3):
            block, times = rest[:size], 0
            plain = all(e.name and not e.args and not e.kwargs and e not in self.used for e in block)
            while plain and [(e.handle, e.name) for e in rest[times * size:(times + 1) * size]] == [
                    (e.handle, e.name) for e in block] and not any(
                        e in self.used for e in rest[times * size:(times + 1) * size]):
                times += 1
            if times > 2:
                return times, block
        return 1, rest[:1]

    def _handle(self, event: Event) -> str:
        return "layer" if event.handle == 0 else f"layer{event.handle + 1}"

    def _call(self, event: Event) -> str:
        args, kwargs = (event.args, event.kwargs) if event.name else self.method.arguments(event.case)
        own = event.case.arrays
        saved = {e.result: name for e, name in self.used.items() if isinstance(e.result, bytes) and name}
        given = [saved[arg] if isinstance(arg, bytes) and arg in saved else self.names.of(arg, own) for arg in args]
        given += [f"{key}={self.names.of(value, own)}" for key, value in kwargs.items()]
        function = f"{self._handle(event)}.{event.name}" if event.name else f"plugin.{self.method.name}"
        return f"{function}({', '.join(given)})"

    def _expression(self, value: Any) -> str | None:
        """`value` as an expression in results of the tape, of which the latest are tried first; None if not found."""
        if not isinstance(value, numpy.ndarray):
            found = [event for event in self.tape if event.name and type(event.result) is type(value)
                     and not isinstance(value, str) and event.result == value]
            return self._use(found[-1]) if found else None
        results = list(itertools.islice(self._arrays(), _LATEST))
        for event, key, array in results:
            if array.shape == value.shape and numpy.array_equal(array, value):
                return self._use(event, key)
        for event, key, array in results:
            rows = rows_of(array, value)
            if rows is not None:
                return f"{self._use(event, key)}[{rows}]"
        for (e1, k1, a), (e2, k2, b) in itertools.product(results, repeat=2):
            if a.shape == b.shape == value.shape:
                for sign, both in (("-", a - b), ("+", a + b)):
                    if (value.any() or e1 is not e2) and numpy.array_equal(both, value):
                        return f"({self._use(e1, k1)} {sign} {self._use(e2, k2)})"
        return None

    def _arrays(self) -> Iterator[tuple[Event, str, numpy.ndarray]]:
        for event in reversed(self.tape):
            found = event.result.items() if isinstance(event.result, dict) else [("", event.result)]
            yield from ((event, key, array) for key, array in found if isinstance(array, numpy.ndarray))

    def _use(self, event: Event, key: str = "") -> str:
        """The expression of a result, or of its entry `key`; the script will then keep the result."""
        if event.result is None or isinstance(event.result, Fault) or not event.name:
            self.used.setdefault(event, "")
        elif not self.used.get(event):
            self.used[event] = self.names.result(event, result_of(event.name))
        return f"{self.used[event]}[{key!r}]" if key else self.used[event]
