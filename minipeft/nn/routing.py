"""Which attachments each row of a batch sees: `adapter=["a", None, ("a", "b")]`.

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
from minipeft.nn.state import Entry, Host, Names, State

Groups = list[tuple[tuple[Entry, ...], Any]]  # (entries that its rows see, bottom first; their numbers, None: all)


class View:
    """The `state` of the model `host` that one forward reads. rows: the names that each row sees; None: as plugged."""

    def __init__(self, host: Host, state: State, rows: list[Names] | None = None):
        self.host, self.state, self.rows = host, state, rows
        orders = frozenset([tuple(self.state.plugged)] if rows is None else rows)
        self._laid: dict[Names, Mapping[Any, tuple[Entry, ...]]] = {
            names: self.state.laid((name, None) for name in names) for names in (() if rows is None else orders)}
        self._groups: dict[Any, Groups] = {}
        if host.recorder is not None:
            when_differentiated(self.state, orders, functools.partial(host.recorder, host, self.state))

    def groups(self, place: Any) -> Groups:
        """The rows of the batch, grouped by the entries that they see at this place. If all rows see the same, there is
        one group, with None for the row numbers."""
        if self.rows is None:
            return [(self.state.entries.get(place, ()), None)]
        if place not in self._groups:
            here: dict[Names, tuple[tuple[Entry, ...], list[int]]] = {}
            for row, names in enumerate(self.rows):
                entries = self._laid[names].get(place, ())
                here.setdefault(tuple(e.name for e in entries), (entries, []))[1].append(row)
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

    adapter: None keeps the plugged attachments. A name, or a tuple of names (bottom first), holds for all rows. A list
    has an item for each row: a name, a tuple of names, or None for the base alone. Before it begins, raises ValueError
    for a list of another length, an unknown name, a name twice in one item, and attachments that cannot lie above each
    other; TypeError for another kind of item."""
    view = _view.get()
    state = view.state if view is not None and view.host is host else host.now  # read once: a thread may replace it
    token = _view.set(View(host, state, None if adapter is None else _per_row(adapter, batch, state.attached)))
    try:
        yield
    finally:
        _view.reset(token)


def _per_row(adapter: Any, batch: int, attachments: Mapping[str, Any]) -> list[Names]:
    entries = adapter if isinstance(adapter, list) else [adapter] * batch
    if len(entries) != batch:
        raise ValueError(f"adapter lists {len(entries)} entries for a batch of {batch} rows; expected one per row")
    for e in entries:
        if not (e is None or isinstance(e, str) or isinstance(e, tuple) and all(isinstance(n, str) for n in e)):
            raise TypeError(f"adapter holds {type(e).__name__}; expected names, tuples of names, or None")
    rows = [() if e is None else (e,) if isinstance(e, str) else e for e in entries]
    for name in {n for names in rows for n in names}:
        if name not in attachments:
            raise ValueError(f"adapter {name!r} is not attached to this model; "
                             f"attached: {', '.join(attachments) or 'none'}")
    if any(len(set(names)) != len(names) for names in rows):
        raise ValueError("adapter names one attachment twice for a row")
    return rows


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
