"""A weight is anything you can multiply by.

    dense()            W, [d_out, d_in]                    the definition
    project(x, rng)    x W^T, [..., d_in] -> [..., d_out]  may be faster than through dense()
    rows(ids)          W[ids], [...] -> [..., d_in]        W as an embedding table
    vector()           W where it is [d] (a bias, a norm's scale)

`Parameter` is the trivial weight. A `Reparam` is a weight built on another one: a method writes its paper's equation
once, as dense(), and gets a correct product, lookup, merge and gradient from it. A `Slot` is the place in a model
that holds a weight, and the fold of whatever is plugged there.
"""
from __future__ import annotations

import copy
from typing import Any, Protocol

from minipeft.engine.tensor import Leaf, Tensor, array_of
from minipeft.backend import Array
from minipeft.nn.place import Place
from minipeft.nn.state import Entry, Names
from minipeft.engine.ops import embedding, linear, reshape


class Weight(Protocol):
    """What a slot holds and a layer uses. `rng` makes a product one of training (dropout), as everywhere.

    drops: whether dropout acts somewhere in `project`, in this weight or in one below it."""

    drops: bool

    @property
    def shape(self) -> tuple: ...
    @property
    def dtype(self) -> Any: ...
    def dense(self) -> Tensor: ...
    def project(self, x: Any, rng: Any = None) -> Tensor: ...
    def rows(self, ids: Array) -> Tensor: ...
    def vector(self) -> Tensor: ...


class Parameter(Leaf):
    """A leaf with a place in a module, and the trivial weight: W is itself."""

    __slots__ = ()
    drops = False

    def dense(self) -> Tensor:
        return self

    def project(self, x: Any, rng: Any = None) -> Tensor:
        return linear(x, self)

    def rows(self, ids: Array) -> Tensor:
        return embedding(self, ids)

    def vector(self) -> Tensor:
        return self


class Constant:
    """An array of a piece that is saved and moved with it and never trained, such as the indices of a mask."""

    __slots__ = ("data",)

    def __init__(self, data: Array):
        self.data = data


class Reparam:
    """A weight built on `base`, with Parameters of its own as attributes. Subclasses write `dense`; `project` and
    `rows` go through it unless they override them with something faster (law 1 holds the two together).

    A dense weight has no input to drop, so that dropout below is lost in it: a subclass that writes `dense` alone is
    refused above a weight with dropout, and one that writes `project` hands `rng` on to `base.project` (law 14)."""

    base: Weight

    @property
    def drops(self) -> bool:
        return self.base.drops

    @property
    def shape(self) -> tuple:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def dense(self) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define dense()")

    def project(self, x: Any, rng: Any = None) -> Tensor:
        return linear(x, self.dense())

    def rows(self, ids: Array) -> Tensor:
        return embedding(self.dense(), ids)

    def vector(self) -> Tensor:
        return self.dense()

    def over(self, base: Weight) -> "Reparam":
        """The same reparametrization, parameters shared, of another base. ValueError for one with dropout where this
        class has no `project` of its own that could hand `rng` on."""
        if base.drops and type(self).project is Reparam.project:
            raise ValueError(f"a weight below asks for dropout, and {type(self).__name__} defines dense() alone, where "
                             f"dropout is lost: write {type(self).__name__}.project(x, rng), which hands rng on to "
                             f"self.base.project(x, rng), or set the dropout below to 0")
        twin = copy.copy(self)
        twin.base = base
        return twin


def arrays_of(piece: Any) -> dict[str, Parameter | Constant]:
    """The arrays that a piece (a Reparam, or what a site holds) has of its own, by attribute name."""
    return {name: value for name, value in vars(piece).items()
            if isinstance(value, (Parameter, Constant)) and name != "base"}


class Slot(Place):
    """A place for a weight. Kinds: "linear" and "embedding" [d_out, d_in], "bias" and "norm" [d], "position" tables.

    Its weight is the fold of its list: the base, then each plugged entry in order; a merged entry is a constant that
    was computed from what lies below it. The base array itself is never touched."""

    def __init__(self, kind: str, base: Array):
        super().__init__(kind)
        self.base: Weight = Parameter(base)

    def compose(self, entries: tuple[Entry, ...]) -> Weight:
        """The base, then each entry over what lies below it; a merged entry is its constant."""
        weight = self.base
        for entry in entries:
            weight = entry.merged if entry.merged is not None else entry.piece.over(weight)
        return weight

    def fold(self, names: Names | None = None) -> Weight:
        """The weight with what is plugged (None), or with just the attachments `names`, over the base."""
        state = self.host.now
        entries = state.entries if names is None else state.laid((name, None) for name in names)
        return self.compose(entries.get(self, ()))

    def project(self, x: Any, rng: Any = None) -> Tensor:
        """x [batch, time, d_in] -> x W^T [batch, time, d_out]."""
        return self.by_row(lambda weight, x: weight.project(x, rng), x)

    def rows(self, ids: Any) -> Tensor:
        """ids [batch, time] -> W[ids] [batch, time, d_in]."""
        return self.by_row(lambda weight, ids: weight.rows(array_of(ids)), ids)

    def table(self, ids: Array) -> Tensor:
        """W[ids] for ids [...] that all rows of the batch share: [..., d_in], or [batch, ..., d_in] when routed."""
        return self.per_row(lambda weight: weight.rows(ids))

    def vector(self) -> Tensor:
        """[d], or [batch, 1, d] when rows see different entries."""
        v = self.per_row(lambda weight: weight.vector())
        return v if v.ndim == 1 else reshape(v, shape=(v.shape[0], 1, v.shape[1]))
