"""The contract of a method: an author writes a class, and the library does all the rest."""
from __future__ import annotations

import abc
import dataclasses
import json
from typing import Any, Callable, ClassVar, Mapping, Self, TypeVar

import numpy

from minipeft.attaching.fields import check_settings, file_fields, is_plain, plain
from minipeft.backend import Array
from minipeft.checks import shown
from minipeft.nn.init import Init, zeros
from minipeft.nn.place import Place
from minipeft.nn.weight import Fixed, Parameter, Piece
from minipeft.nn.where import Where, matching

M = TypeVar("M", bound="type[Method]")
_HINT = " (lists and arrays become tuples in Method.__post_init__: a __post_init__ of your own calls it by super())"
METHODS: dict[str, type["Method"]] = {}  # by name, those that `register` has seen and `load` can make
_NOUNS = {"linear": "matrix", "embedding": "matrix", "bias": "bias", "norm": "norm weight",
          "absent bias": "absent bias", "position": "position table", "sublayer": "sublayer site",
          "input": "input site", "keys_values": "keys and values site"}


@dataclasses.dataclass(frozen=True)
class Declared:
    """An array that a method asks for at a place. A method writes it as `trained(...)` or `fixed(...)`.

    shape: a tuple of integers. init: a function of (shape, dtype, rng) that gives the array. `attach` calls it; `load`
    does not, and takes the array from the file. kind: Parameter (trained) or Fixed (saved and never trained). shared: a
    name; the same leaf under the same name is one array, however many places ask for it. dtype: that of the place, by
    default."""

    shape: tuple[int, ...]
    init: Init
    kind: type
    shared: str | None = None
    dtype: Any = None

    def key(self, place: str, leaf: str) -> str:
        """The array's name in a file: "place.leaf", or "shared.leaf"."""
        return f"{self.shared or place}.{leaf}"


def trained(shape: tuple[int, ...], init: Init = zeros, shared: str | None = None) -> Declared:
    """A trained array, in the dtype of its place. shape, init, shared: as in `Declared`."""
    return Declared(_tuple(shape), init, Parameter, shared)


def fixed(shape: tuple[int, ...], init: Init, shared: str | None = None, dtype: Any = None) -> Declared:
    """An array that is saved with the attachment and never trained, such as random projections or indices. shape, init,
    shared, dtype: as in `Declared`."""
    return Declared(_tuple(shape), init, Fixed, shared, None if dtype is None else numpy.dtype(dtype))


def _tuple(shape: Any) -> Any:
    return tuple(shape) if isinstance(shape, list) else shape


def setting(default: Any, holds: Callable[[Any], Any], expected: str, in_file: bool = True,
            optional: bool = False) -> Any:
    """A field of a method with the value `default` and a check: the method raises ValueError unless `holds(value)`, and
    `expected` completes the message. With in_file=False, no file holds the field, and it is ignored when methods are
    compared. optional: a file omits the field where it has its default, so that a field which is added later changes
    no file, and older files can still be read."""
    return dataclasses.field(default=default, compare=in_file,
                             metadata={"holds": holds, "expected": expected, "in_file": in_file, "optional": optional})


class Method(abc.ABC):
    """A method of parameter-efficient fine-tuning: its hyper-parameters, its places, its arrays, and its pieces.

        from dataclasses import dataclass
        import minipeft
        from minipeft import Where, ones, trained

        @minipeft.register                                 # so that `load` knows the method
        @dataclass(frozen=True)
        class Rescale(minipeft.Method):                    # two thirds of (IA)^3, methods/ia3.py
            where: Where = r"\\.(k|v)\\.weight$"

            def arrays(self, name, slot, model):           # which arrays a place gets, and how they start
                return {"l": trained((slot.shape[0], 1), ones)}

            def make(self, name, slot, arrays):            # the piece that is made of them
                return Rescaled(**arrays)

        class Rescaled(minipeft.Reparam):
            def dense(self):                               # the paper's equation; self.base is the weight below
                return self.base.dense() * self.l

    A method is a frozen dataclass with a field `where`. The other fields hold numbers, strings, booleans, None, and
    lists of these, which become tuples, so that JSON can hold them. `setting` gives a field its check. Fields are
    checked in `__post_init__`; a class with a `__post_init__` of its own calls `super().__post_init__()` first.

    kinds: the kinds of places that the method is for. Slots: "linear" and "embedding" [d_out, d_in], "bias", "norm" and
    "absent bias" (of a linear layer that has none) [d], "position" [positions, d] or T5's [buckets, heads]. Sites:
    "sublayer", "input", "keys_values". transparent: whether attaching leaves all outputs as they were (law 2,
    transparency); where a field decides, make it a property.

    arrays(name, place, model) declares arrays, {leaf: trained(...) or fixed(...)}. It draws nothing, and raises
    ValueError for a place that does not fit. A slot has `shape` and `dtype`, a site has `width` and `dtype`. Inits:
    `zeros` (the default of `trained`), `ones`, `normal(std)` and `uniform(bound)` of minipeft, or your own. One that
    needs the weight reads `slot.fold().dense()`: the weight as it is now, with everything that is plugged.

    make(name, place, arrays) gives the piece: at a slot a `Reparam`, at a site a `Piece` that defines `__call__`. Every
    array must be an attribute of the piece, which may hold no other Parameter or Fixed. Pieces are pickled and copied,
    so they hold no lambdas. A piece for a slot has no `base` yet when it is made. If one
    of its attributes multiplies its whole change, as LoRA's s does, `strength` names it (`nn/scaled.py`).

    The library does the rest. `attach` checks the declarations and the pieces before it touches the model, draws the
    arrays, names them "place@name.leaf" (a shared one "shared@name.leaf") and plugs the pieces. `save` and `load` need
    nothing more. `minipeft.laws.check(method)` checks the rest, such as pickling, and the laws of the library."""

    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding")
    transparent: ClassVar[bool] = True
    where: Any  # a Where, as `nn/where.py` has it

    def __post_init__(self) -> None:
        if isinstance(self.where, list):  # which cannot be hashed, and which the caller may change
            object.__setattr__(self, "where", tuple(self.where))
        plain(self)
        check_settings(self)

    def places(self, model: Any) -> dict[str, Place]:
        """{name: place} of the `kinds` that `where` chooses. Raises ValueError where it chooses nothing."""
        found = {name: place for name, place in model.named_places() if place.kind in self.kinds}
        noun = " or ".join(dict.fromkeys(_NOUNS.get(kind, kind) for kind in self.kinds))
        return {name: found[name] for name in matching(found, self.where, noun)}

    @abc.abstractmethod
    def arrays(self, name: str, place: Any, model: Any) -> dict[str, Declared]:
        """The arrays of the place called `name`, {leaf: Declared}. Raises ValueError for a place that does not fit."""

    @abc.abstractmethod
    def make(self, name: str, place: Any, arrays: Mapping[str, Any]) -> Piece:
        """The piece of the place called `name`, made of its arrays {leaf: Parameter or Fixed}."""

    def fields(self) -> dict[str, Any]:
        """{field: value} for a file: all except `where`, which a file replaces by the names that it chose, those with
        `setting(..., in_file=False)`, and those with `setting(..., optional=True)` that have their default."""
        optional = {f.name: f.default for f in dataclasses.fields(self)  # type: ignore[arg-type]
                    if f.metadata.get("optional")}
        return {name: getattr(self, name) for name in file_fields(type(self))
                if name not in optional or getattr(self, name) != optional[name]}

    @classmethod
    def from_file(cls, fields: Mapping[str, Any], where: Where, tensors: Mapping[str, Array]) -> Self:
        """The method that a file with these `fields` describes. where: a pattern for the file's places. tensors: the
        file's arrays, for a method that is described in part by some of them; `attach` makes a trial call with none.
        Raises ValueError for fields out of range."""
        return cls(**fields, where=where)  # type: ignore[call-arg]

    def described_where(self) -> Any:
        """`where`, as the file of a `Union` holds it for each of its parts. A method that is described in part by
        arrays names its places one by one: `from_file` is given the arrays of these places."""
        return self.where


def register(cls: M) -> M:
    """Class decorator: `attach` accepts the method from now on, and `load` makes it from files that name its class.

    Raises TypeError unless it is a subclass of `Method` and a frozen dataclass with a field `where`, keeps to the
    contract in `kinds` and fields, and defines `arrays` and `make`; ValueError for a name that another class has."""
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise TypeError(f"{shown(cls)} is not a method; expected a subclass of minipeft.Method")
    what = cls.__name__
    parameters = vars(cls).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise TypeError(f"{what} is not a frozen dataclass; write @minipeft.register above @dataclass(frozen=True)")
    if "where" not in {field.name for field in dataclasses.fields(cls)}:  # type: ignore[arg-type]
        raise TypeError(f"{what} has no field `where`; expected one, such as where: Where = r\"\\.(q|v)\\.weight$\"")
    if not isinstance(cls.kinds, tuple) or not set(cls.kinds) <= set(_NOUNS) or not cls.kinds:
        raise TypeError(f"{what}.kinds is {shown(cls.kinds)}; expected a tuple of some of {', '.join(_NOUNS)}")
    late = [field.name for field in dataclasses.fields(cls) if not field.init]  # type: ignore[arg-type]
    if late:
        raise TypeError(f"{what}: the field `{late[0]}` has init=False, so a file could not give it back; make it a "
                        f"property")
    taken = [name for name in file_fields(cls) if name == "kind" or hasattr(Method, name)]
    if taken:
        raise TypeError(f"{what} has a field `{taken[0]}`, a name that the contract uses; expected another name")
    for name in ("arrays", "make"):
        if getattr(cls, name) is getattr(Method, name):
            raise TypeError(f"{what} does not define {name}(); see minipeft.Method")
    known = METHODS.get(what)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"a method named {what} is registered already, from {known.__module__}; expected another name")
    METHODS[what] = cls
    return cls


def class_of(kind: Any, fields: Mapping[str, Any], absent: frozenset[str] = frozenset()) -> type[Method]:
    """The class of the method that a file calls `kind`. fields: {field: value} in the file. absent: fields that the
    file may lack, beside those that are `optional`. Raises ValueError for a kind that is not known, and for fields that
    are missing or unknown."""
    if not isinstance(kind, str) or kind not in METHODS:
        raise ValueError(f"method {shown(kind)} is not known; known are {', '.join(METHODS)} (a method of your own is "
                         f"known once its module was imported, with @minipeft.register above its class)")
    expected = set(file_fields(METHODS[kind]))
    optional = {field.name for field in dataclasses.fields(METHODS[kind])  # type: ignore[arg-type]
                if field.metadata.get("optional")}
    missing = sorted(expected - set(fields) - optional - absent)
    if missing:
        raise ValueError(f"{kind}: the field {missing[0]!r} is missing")
    unknown = sorted(set(fields) - expected)
    if unknown:
        raise ValueError(f"{kind}: the field {shown(unknown[0])} is unknown; expected {', '.join(sorted(expected))}")
    return METHODS[kind]


def checked(method: Any) -> Method:
    """`method`, if it is one that can be attached, saved and loaded again.

    Raises TypeError for something else, for a class in place of an object, and for one that is not registered;
    ValueError for fields that a file would not give back."""
    if not isinstance(method, Method):
        hint = f"an object of it, {method.__name__}(...)" if isinstance(method, type) and issubclass(method, Method) \
            else "one such as LoRA(rank=8); a method of your own is a subclass of minipeft.Method"
        raise TypeError(f"method is {shown(method)}; expected {hint}")
    what = type(method).__name__
    if METHODS.get(what) is not type(method):
        raise TypeError(f"{what} is not registered, so that load() could not make it; write @minipeft.register above "
                        f"its class (and make the method anew, if its class was defined again)")
    check_settings(method)  # again, for a __post_init__ that does not call this one
    fields = method.fields()
    for name, value in fields.items():
        if not is_plain(value):
            raise ValueError(f"{what}: {name} is {shown(value)}, which a file cannot hold; expected numbers, strings, "
                             f"booleans, None, or tuples of these{_HINT}")
    try:
        again = type(method).from_file(json.loads(json.dumps(fields)), method.where, {}).fields()
    except Exception as error:
        raise ValueError(f"{what}.from_file(fields, where, {{}}) fails for the method's own fields: "
                         f"{type(error).__name__}: {error}") from error
    for name, value in fields.items():
        if again.get(name) != value:
            raise ValueError(f"{what}: {name} is {shown(value)}; expected {shown(again.get(name))}, as a file would "
                             f"give it back{_HINT}")
    return method
