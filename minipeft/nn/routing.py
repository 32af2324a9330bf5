"""Which attachments each row of a batch sees: `adapter=["a", None, ("a", "b"), {"a": 0.5}]`.

A *view* is set for one forward and read by every place of the model. It holds the state of the model when the forward
began and, if `adapter` was given, the names that each row sees instead of the plugged ones. A place computes once for
each group of rows that see the same attachments there.
"""
from __future__ import annotations

import contextlib
import contextvars
import functools
from typing import Any, Callable, Iterator, Mapping

import numpy

from minipeft.backend import to_device
from minipeft.engine.afterwards import when_differentiated
from minipeft.engine.ops import concat, embedding, index, reshape
from minipeft.engine.tensor import Tensor
from minipeft.nn.asked import asked_by_row
from minipeft.nn.state import Asked, Entry, Host, State

Groups = list[tuple[tuple[Entry, ...], Any]]  # (entries that its rows see, bottom first; their numbers, None: all)


class View:
    """The `state` of the model `host` that one forward reads. rows: the attachments that each row sees, with their
    factors; None: as plugged."""

    def __init__(self, host: Host, state: State, rows: list[Asked] | None = None):
        self.host, self.state, self.rows = host, state, rows
        self._laid: dict[Asked, Mapping[Any, tuple[Entry, ...]]] = {row: state.laid(row) for row in set(rows or ())}
        self._groups: dict[Any, Groups] = {}
        if host.recorder is not None:
            orders = frozenset([tuple(state.plugged)] if rows is None else [tuple(n for n, _ in row) for row in rows])
            when_differentiated(self.state, orders, functools.partial(host.recorder, host, self.state))

    def groups(self, place: Any) -> Groups:
        """The rows of the batch, grouped by the entries that they see at this place. If all rows see the same, there is
        one group, with None for the row numbers."""
        if self.rows is None:
            return [(self.state.entries.get(place, ()), None)]
        if place not in self._groups:
            here: dict[Asked, tuple[tuple[Entry, ...], list[int]]] = {}
            for row, asked in enumerate(self.rows):
                entries = self._laid[asked].get(place, ())
                here.setdefault(tuple((e.name, e.factor) for e in entries), (entries, []))[1].append(row)
            self._groups[place] = [(entries, numpy.array(rows) if len(here) > 1 else None)
                                   for entries, rows in here.values()]
        return self._groups[place]


_view: contextvars.ContextVar[View | None] = contextvars.ContextVar("view", default=None)


def view_of(host: Host) -> View:
    """The view of the present forward on the model `host`; outside of a forward, a view of the plugged attachments."""
    view = _view.get()
    return view if view is not None and view.host is host else View(host, host.now)


@contextlib.contextmanager
def routed(host: Host, adapter: Any = None, batch: int = 0) -> Iterator[None]:
    """Run a forward of `batch` rows on the present state of the model `host`; within another one, on the state of that.

    adapter: None keeps the plugged attachments. A name, a tuple of names (bottom first), or a dict {name: factor of its
    change} holds for all rows. A list has an item for each row: one of these, or None for the base alone. Before
    anything is computed, raises ValueError for a list of another length, an unknown name, a name twice in one item, a
    factor that is not finite, and a change that cannot be multiplied; TypeError for another kind of item."""
    view = _view.get()
    state = view.state if view is not None and view.host is host else host.now  # read once: a thread may replace it
    token = _view.set(View(host, state, None if adapter is None else asked_by_row(adapter, batch, state.attached)))
    try:
        yield
    finally:
        _view.reset(token)


def by_row(place: Any, run: Callable[..., Any], *streams: Any) -> Any:
    """run(composed, *streams), where composed is `place.compose` of the entries that the rows see at `place`. streams:
    arrays [batch, ...], or None. Where rows see different attachments, `run` is called once for each group of rows that
    see the same, with these rows of every stream. The rows of the results are then put back in order."""
    groups = view_of(place.host).groups(place)
    if len(groups) == 1:
        return run(place.compose(groups[0][0]), *streams)
    parts = [run(place.compose(here), *(None if s is None else index(s, key=to_device(rows)) for s in streams))
             for here, rows in groups]
    back = to_device(numpy.argsort(numpy.concatenate([rows for _, rows in groups])))
    return index(concat(*parts, axis=0), key=back)


def per_row(place: Any, run: Callable[[Any], Tensor]) -> Tensor:
    """run(composed) -> [...], composed as in `by_row`. Where rows see different attachments at `place`, each row gets
    the result of its group: [batch, ...]."""
    groups = view_of(place.host).groups(place)
    if len(groups) == 1:
        return run(place.compose(groups[0][0]))
    results = [run(place.compose(here)) for here, _ in groups]
    table = concat(*(reshape(r, shape=(1, -1)) for r in results), axis=0)
    order = numpy.argsort(numpy.concatenate([rows for _, rows in groups]))
    group_of_row = numpy.repeat(numpy.arange(len(groups)), [len(rows) for _, rows in groups])[order]
    return reshape(embedding(table, to_device(group_of_row)), shape=(len(group_of_row), *results[0].shape))
