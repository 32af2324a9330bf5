"""A module is a tree of attributes: modules, lists of modules, slots, sites. Names follow the attributes.

    model.encoder.blocks[0].attn.q.weight   ->   "encoder.0.attn.q.weight"      (a list adds its index alone)

A place that is reached twice (a tied weight) is one object with one name, that of the first path to it. Attachments
add names of their own, `place@attachment.leaf`, and rename nothing.
"""
from __future__ import annotations

import copy
import types
from typing import Any, Iterator, Mapping, Self

import numpy

from minipeft.backend import Array, resolve, to_device, to_host
from minipeft.nn.absent import is_absent
from minipeft.nn.place import Place
from minipeft.nn.site import Site
from minipeft.nn.state import Host
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Fixed, Parameter


class Module:
    """A node of the tree of modules."""

    def named_places(self) -> Iterator[tuple[str, Place]]:
        """Every slot and site with its dotted name, in the order of the attributes, each object once."""
        found: dict[Place, str] = {}
        self._walk("", found)
        return iter([(name, place) for place, name in found.items()])

    def _walk(self, prefix: str, found: dict[Place, str]) -> None:
        """Add the places below this module to `found`, {place: its name}, each under the first path to it."""
        for attribute, value in list(vars(self).items()):
            if isinstance(value, Place):
                found.setdefault(value, prefix + attribute)
            elif isinstance(value, Module):
                value._walk(f"{prefix}{attribute}.", found)
            elif isinstance(value, list):
                for i, item in enumerate(value):
                    if isinstance(item, Module):
                        item._walk(f"{prefix}{i}.", found)

    @property
    def slots(self) -> dict[str, Slot]:
        """{name: Slot} of the model's own weights, in the order of the attributes: without places of absent biases."""
        return {name: place for name, place in self.named_places() if isinstance(place, Slot) and not is_absent(place)}

    @property
    def sites(self) -> dict[str, Site]:
        """{name: Site}, in the order of the attributes."""
        return {name: place for name, place in self.named_places() if isinstance(place, Site)}

    @property
    def base_parameters(self) -> dict[str, Parameter]:
        """{name: Parameter} of the model itself, without those of attachments."""
        return {name: p for name, p in self.base_arrays.items() if isinstance(p, Parameter)}

    @property
    def base_arrays(self) -> dict[str, Parameter | Fixed]:
        """{name: array} of the model itself. A base that is a Parameter has the name of its slot; the arrays of a base
        of another kind are called "slot.leaf"."""
        return {f"{name}.{leaf}" if leaf else name: p for name, slot in self.slots.items()
                for leaf, p in slot.base.arrays.items()}

    def state(self) -> dict[str, Array]:
        """{name: array} of the model itself: the arrays, not copies."""
        return {name: p.data for name, p in self.base_arrays.items()}

    def load_state(self, arrays: Mapping[str, Array]) -> None:
        """Replaces every base array by the one of its name among `arrays`, {name: array}, in the dtype of the model.

        Raises ValueError, before anything is replaced, for missing or unexpected names, other shapes, dtypes of another
        kind (integers in place of floating-point numbers), codes of any other dtype, NaN and infinities, and while an
        attachment is merged: its constant was computed from the old base. Raises TypeError unless `arrays` is a
        mapping."""
        if not isinstance(arrays, Mapping):
            raise TypeError(f"arrays is {type(arrays).__name__}; expected {{name: array}}, as state() gives it")
        params = self.base_arrays
        for name, slot in self.slots.items():
            for entry in slot.merged:
                raise ValueError(f"{name} cannot be replaced while {entry.name!r} is merged: unmerge first")
        missing, extra = [n for n in params if n not in arrays], [n for n in arrays if n not in params]
        if missing or extra:
            raise ValueError("; ".join(f"{len(names)} {what}: {', '.join(names[:5])}{' ...' if names[5:] else ''}"
                                       for what, names in (("missing", missing), ("unexpected", extra)) if names))
        for name, p in params.items():
            if tuple(arrays[name].shape) != p.shape:
                raise ValueError(f"{name} has shape {list(arrays[name].shape)}; expected {list(p.shape)}")
            found = arrays[name].dtype
            if found.kind != p.dtype.kind:
                raise ValueError(f"{name} has dtype {found}; expected a kind of {p.dtype}")
            if p.dtype.kind in "iub" and found != p.dtype:  # numbers beyond it would wrap
                raise ValueError(f"{name} has dtype {found}; expected {p.dtype}")
            if p.dtype.kind == "f" and not numpy.isfinite(to_host(arrays[name])).all():
                raise ValueError(f"{name} holds numbers that are not finite")
        for host in {place.host for _, place in self.named_places()}:
            host.differentiated(frozenset(self.base_parameters.values()))
        for name, p in params.items():
            p.data = to_device(arrays[name].astype(p.dtype, copy=True))

    def clone(self) -> Self:
        """A copy with arrays of its own, attachments included."""
        return copy.deepcopy(self)

    def to(self, backend: Any) -> Self:
        """Moves every array in place to `backend` ("numpy", "cupy" or a namespace): the base, and the arrays of all
        attachments, plugged, merged or off. Run the model inside `with minipeft.use(backend)`. Returns the model."""
        target = resolve(backend)
        for _, place in self.named_places():
            for piece in place.pieces():
                for p in getattr(piece, "arrays", {}).values():
                    p.data = to_device(p.data, target)
        return self


class Model(Module):
    """A whole model: the root of the tree, to which methods are attached."""

    _host: Host | None = None

    @property
    def host(self) -> Host:
        """The object that all places of this model share, with its state. It is made when first asked for."""
        host = self._host
        if host is None:  # several threads may ask at once: setdefault gives all of them the first one
            host = vars(self).setdefault("_host", Host(tuple(place for _, place in self.named_places())))
        if not host.is_known:
            for place in host.places:
                place.host = host
            host.is_known = True
        return host

    @property
    def attachments(self) -> Mapping[str, Any]:
        """{name: Attachment}: all of them, plugged or not, in the order of attaching. Read-only."""
        return types.MappingProxyType(self.host.now.attached)

    @property
    def plugged(self) -> tuple[str, ...]:
        """The names of the attachments that are plugged or merged, bottom first."""
        return tuple(self.host.now.plugged)


def whole(model: Any) -> Model:
    """`model` itself. Raises TypeError for a part of a model and for anything else."""
    if not isinstance(model, Model):
        raise TypeError(f"{type(model).__name__} is not a whole model; pass the model, and choose with `where`")
    return model
