"""A weight is anything you can multiply by.

    dense()            W, [d_out, d_in]                    the definition
    project(x, rng)    x W^T, [..., d_in] -> [..., d_out]  may be faster than through dense()
    rows(ids)          W[ids], [...] -> [..., d_in]        W as an embedding table
    vector()           W where it is [d] (a bias, a norm's weight)

`Parameter` is the trivial weight. A `Reparam` is a weight built on another one: a method writes its paper's equation
once, as dense(), and gets a correct product, lookup, merge and gradient from it. A `Slot` (slot.py) is the place in a
model that holds a weight.
"""
from __future__ import annotations

import copy
from typing import Any, ClassVar, Mapping, Protocol, Self

from minipeft.backend import Array
from minipeft.engine.ops import embedding, linear
from minipeft.engine.tensor import Leaf, Tensor


class Weight(Protocol):
    """The interface of a weight: slots hold weights and layers use them. `dense`, `project`, `rows` and `vector` are in
    the table above. Called with an `rng`, `project` computes for training, with dropout. shape, dtype: of dense().

    arrays: {leaf: array}, by which a weight is saved, moved and counted. drops: whether dropout acts somewhere in
    `project`, in this weight or in one below it."""

    drops: bool

    @property
    def arrays(self) -> Mapping[str, "Parameter | Fixed"]: ...
    @property
    def shape(self) -> tuple: ...
    @property
    def dtype(self) -> Any: ...
    def dense(self) -> Tensor: ...
    def project(self, x: Any, rng: Any = None) -> Tensor: ...
    def rows(self, ids: Array) -> Tensor: ...
    def vector(self) -> Tensor: ...


class Parameter(Leaf):
    """A Leaf (a tensor that may be trained) with a place in a module, and the trivial weight: it is its own W."""

    __slots__ = ()
    drops = False

    @property
    def arrays(self) -> dict[str, "Parameter | Fixed"]:
        """Itself, under the empty name: a base parameter has the name of its place."""
        return {"": self}

    def dense(self) -> Tensor:
        """W, of any shape: itself."""
        return self

    def project(self, x: Any, rng: Any = None) -> Tensor:
        """x W^T.   x [..., d_in] -> [..., d_out]."""
        return linear(x, self)

    def rows(self, ids: Array) -> Tensor:
        """W[ids].   ids [...] -> [..., d_in]."""
        return embedding(self, ids)

    def vector(self) -> Tensor:
        """W [d]."""
        return self


class Fixed(Tensor):
    """An array, `data`, that is saved and moved with its piece and never trained, such as the indices of a mask. It can
    stand in an equation like any other tensor."""

    __slots__ = ()

    def __init__(self, data: Array):
        super().__init__(data)


class Piece:
    """The part of a method at one place. The keyword arguments become attributes; those that are a Parameter or Fixed
    are the arrays of the piece. A piece for a slot is a `Reparam`. A piece for a site defines `__call__` with the
    signature of the site's kind (`nn/site.py`). strength: the attribute, if there is one, that multiplies the whole
    change that the piece makes (`nn/scaled.py`)."""

    strength: ClassVar[str | None] = None

    def __init__(self, **attributes: Any):
        vars(self).update(attributes)

    @property
    def arrays(self) -> dict[str, Parameter | Fixed]:
        """{attribute: array}, without the arrays of the weight below the piece."""
        return {name: value for name, value in vars(self).items()
                if isinstance(value, (Parameter, Fixed)) and name != "base"}


class Reparam(Piece):
    """A weight built on the weight below it, `base`. A subclass writes `dense`, and the rest goes through it. It may
    override `project` or `rows` by something faster (law 1, definition, checks that they agree with `dense`).

    `base` exists once a slot has put the piece over a weight, so a constructor cannot use it. `dense` sees no input to
    apply dropout to, so dropout in a weight below would be lost: a subclass that writes `dense` alone is refused above
    such a weight. One that writes `project` hands `rng` on to `base.project` (law 14, dropout reaches every weight)."""

    base: Weight

    @property
    def drops(self) -> bool:
        """Whether dropout acts in `project`. A piece with dropout of its own overrides this."""
        return self.base.drops

    @property
    def shape(self) -> tuple:
        """The shape of the weight below: a method changes no shape."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the weight below."""
        return self.base.dtype

    def dense(self) -> Tensor:
        """W [d_out, d_in] or [d], as `base`: the method's equation. Raises TypeError unless a subclass defines it."""
        raise TypeError(f"{type(self).__name__} does not define dense()")

    def project(self, x: Any, rng: Any = None) -> Tensor:
        """x W^T.   x [..., d_in] -> [..., d_out]."""
        return linear(x, self.dense())

    def rows(self, ids: Array) -> Tensor:
        """W[ids].   ids [...] -> [..., d_in]."""
        return embedding(self.dense(), ids)

    def vector(self) -> Tensor:
        """W [d], of a bias or a norm."""
        return self.dense()

    def merged(self) -> Weight:
        """The weight that merging puts in place of this one and of all below it: by default dense(), as a constant. A
        subclass that merges into another kind of weight overrides this, and raises ValueError where the weight below
        does not allow it."""
        return Parameter(self.dense().data)

    def over(self, base: Weight) -> Self:
        """The same piece over the weight `base`, with the same arrays. Raises ValueError for a base with dropout where
        this class has no `project` of its own to hand `rng` on."""
        if base.drops and type(self).project is Reparam.project:
            name = type(self).__name__
            raise ValueError(f"a weight below asks for dropout, and {name} defines dense() alone, where dropout is "
                             f"lost: write {name}.project(x, rng), which hands rng on to self.base.project(x, rng), or "
                             f"set the dropout below to 0")
        twin = copy.copy(self)
        twin.base = base
        return twin
