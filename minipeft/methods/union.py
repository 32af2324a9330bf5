"""Union: several methods as one attachment, each on places of its own.

    W = f_i(W0)     at a weight that part i chooses: LoRA's W0 + s B A, Selective's W0 + d
    F' = g_i(F)     at a site that part i chooses: a bottleneck adapter, a prefix

    x [.., d] -- part 1: q and v [d_out, d_in] -- .. -- part 2: norms [d] -- y [.., d]      no place is chosen twice

The Mix-And-Match adapter (MAM) of He et al., 2021, arXiv:2110.04366, sec. 4.6, is built in this way: a prefix at every
attention, and a scaled parallel adapter beside every feed-forward layer,

    Union(PrefixTuning(30, mlp=512), Bottleneck("parallel", size=512, input="norm"))

In AdapterHub such a mix is a ConfigUnion. In PEFT it is LoRA with modules_to_save or trainable_token_indices.

One method rarely fits all places of a model: a product of low rank can adapt an attention, while a new head or a new
token needs its whole weight. As one attachment they have one name, one state and one file, so no part is left behind.

    adapter = attach(model, Union(LoRA(rank=8), Selective(component="norm")), numpy.random.default_rng(0))
    fit(model, adapter, batches, steps=300, optimizer=AdamW(1e-3))
    adapter.save("task.safetensors")

On T5-small, LoRA with r = 8 on q and v, and all norms: 311,296 parameters of 60,506,624.

Each part declares its arrays and makes its pieces as it would alone. The whole can be merged if all parts act on
weights. Its adapter file holds the class, the fields and the `where` of each part. Two methods at one place are two
attachments, of which one lies above the other.
"""
from __future__ import annotations

import dataclasses
import weakref
from typing import Any, Mapping, MutableMapping, Self, Sequence

from minipeft.attaching.method import Declared, Method, checked, class_of, register
from minipeft.backend import Array
from minipeft.checks import shown
from minipeft.nn.place import Place
from minipeft.nn.weight import Piece
from minipeft.nn.where import Where, exactly, matching


@register
@dataclasses.dataclass(frozen=True)
class Union(Method):
    """Several methods as one. parts: the methods, as arguments or as a list. where: which of the places that the parts
    choose; by default all.

    Raises TypeError for a part that is no registered method; ValueError for no part, a part that is a Union, and a part
    whose `where` is a function. On a model, raises ValueError where two parts choose the same place or share an array
    under the same name, and for a part that is left without a place."""

    kinds = ("linear", "embedding", "bias", "norm", "absent bias", "position", "sublayer", "input", "keys_values")
    parts: tuple[Method, ...]
    where: Where = ""

    def __init__(self, *methods: Method, parts: Sequence[Method] = (), where: Where = ""):
        object.__setattr__(self, "parts", (*methods, *parts))
        object.__setattr__(self, "where", where)
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise ValueError("Union: it has no part; expected methods, as in Union(LoRA(8), Selective(type='bias'))")
        for part in self.parts:
            if isinstance(checked(part), Union):
                raise ValueError("Union: one of its parts is a Union; expected the parts of that one instead, as in "
                                 "Union(*union.parts, LoRA(8))")
        object.__setattr__(self, "parts", tuple(map(self._as_from_file, range(len(self.parts)))))
        kinds = tuple(kind for kind in Union.kinds if any(kind in part.kinds for part in self.parts))
        object.__setattr__(self, "kinds", kinds)

    @property
    def transparent(self) -> bool:  # type: ignore[override]
        """Whether attaching leaves all outputs as they were: whether it does for every part."""
        return all(part.transparent for part in self.parts)

    def places(self, model: Any) -> dict[str, Place]:
        """{name: place}, part by part. Raises ValueError as the parts do; where two of them choose one place or share
        an array, and where `where` leaves a part no place."""
        found: dict[str, Place] = {}
        owner: dict[str, int] = {}
        for i, part in enumerate(self.parts):
            for name, place in part.places(model).items():
                if name in found:
                    raise ValueError(f"Union: {self._said(owner[name])} and {self._said(i)} both choose {name}; "
                                     f"expected places of its own for each part")
                found[name], owner[name] = place, i
        chosen = matching(found, self.where, "place")
        idle = set(owner.values()) - {owner[name] for name in chosen}
        if idle:
            raise ValueError(f"Union: where={shown(self.where)} leaves no place to {self._said(min(idle))}")
        self._owners.update({found[name]: self.parts[owner[name]] for name in chosen})
        shared: dict[str, int] = {}
        for name in chosen:
            for leaf, declared in self.arrays(name, found[name], model).items():
                if declared.shared and shared.setdefault(key := declared.key(name, leaf), owner[name]) != owner[name]:
                    raise ValueError(f"Union: {self._said(shared[key])} and {self._said(owner[name])} both have an "
                                     f"array called {key}, which would be one; expected two attachments")
        return {name: found[name] for name in chosen}

    def arrays(self, name: str, place: Any, model: Any) -> dict[str, Declared]:
        if place not in self._owners:
            self.places(model)
        return self._owners[place].arrays(name, place, model)

    def make(self, name: str, place: Any, arrays: Mapping[str, Any]) -> Piece:
        return self._owners[place].make(name, place, arrays)

    def fields(self) -> dict[str, Any]:
        """{"parts": ((kind, where, ((field, value), ...)), ...)}."""
        return {"parts": tuple((type(part).__name__, part.where, tuple(part.fields().items())) for part in self.parts)}

    @classmethod
    def from_file(cls, fields: Mapping[str, Any], where: Where, tensors: Mapping[str, Array]) -> Self:
        """The union that a file with these `fields` describes. A part gets those of the `tensors` whose places its own
        `where` names one by one. Raises ValueError for fields that are malformed or out of range."""
        parts = []
        for said in _listed(fields["parts"]):
            kind, own_where, own_fields = _listed(said, 3)
            named = [] if own_where is None or isinstance(own_where, str) else _listed(own_where)
            own = {key: array for key, array in tensors.items() if exactly([key.rpartition(".")[0]])[0] in named}
            values = {str(name): value for name, value in (_listed(pair, 2) for pair in _listed(own_fields))}
            parts.append(class_of(kind, values).from_file(values, own_where, own))
        return cls(*parts, where=where)

    def _as_from_file(self, i: int) -> Method:
        """Part i with the `where` that a file has for it. Raises ValueError for one that no file can hold."""
        part: Any = self.parts[i]
        where = part.described_where()
        if not all(isinstance(p, str) for p in (where if isinstance(where, tuple) else [where or ""])):
            raise ValueError(f"Union: the `where` of {self._said(i)} is {shown(where)}; expected a pattern or a list "
                             f"of patterns, because a file has to say which places are whose, and holds no function")
        return part if where == part.where else dataclasses.replace(part, where=where)

    def _said(self, i: int) -> str:
        return f"part {i + 1} ({type(self.parts[i]).__name__})"

    @property
    def _owners(self) -> MutableMapping[Place, Method]:
        """{place: its part}, of every model that `places` was asked for: make() sees no model to look in."""
        return vars(self).setdefault("_known", weakref.WeakKeyDictionary())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_known"}


def _listed(value: Any, length: int | None = None) -> Sequence[Any]:
    """`value`, a list in a file, of that length. Raises ValueError for anything else."""
    if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
        raise ValueError(f"Union: parts holds {shown(value)}; expected [[kind, where, [[field, value], ...]], ...]")
    return value


# Mistakes that people make
#
# * A new head is trained beside LoRA, and the configuration that is saved does not name it: the file loads without it
#   (huggingface/peft, modules_to_save missing in adapter_config.json). Here one file has all parts.
# * A weight is trained in full and has a low-rank product, too, and one of the two is lost on merging. Here an overlap
#   is refused; two attachments, one above the other, say which comes first.
# * The parts are switched off one by one, and one of them stays on. Here they are one attachment.
# * A mix of adapters is trained with one learning rate, though a prefix needs a larger one than a matrix:
#   AdamW(lr_ratio={pattern: factor}) sets them by name.
#
# Next: `methods/selective.py`, a part for whole weights and rows; `methods/bottleneck.py` and `methods/prefix.py`, the
# parts of a Mix-And-Match adapter; `attaching/method.py`, on the contract.
