"""Which part of a model a dotted name belongs to: its component, its layer, and its type.

    encoder.3.attn.q.bias      attention, layer 3 of the encoder, a bias
    decoder.0.ff_norm.weight   norm, layer 0 of the decoder, a norm weight
    embedding.weight           embedding, no layer, a matrix
"""
from __future__ import annotations

import re
from typing import Any, Iterable, Mapping, Sequence

from minipeft.nn.slot import Slot

COMPONENTS = ("attention", "feed-forward", "embedding", "norm", "position", "head")
TYPES = ("bias", "norm weight", "matrix")
_COMPONENT = ((r"norm\.", "norm"), (r"position\.", "position"), (r"\.(attn|cross)\.", "attention"),
              (r"\.ff\.", "feed-forward"), (r"^head\.", "head"))


def component(name: str) -> str:
    """One of COMPONENTS, for the dotted `name` of a place. Places of no other component, such as the encoder's input,
    belong to "embedding"."""
    return next((part for pattern, part in _COMPONENT if re.search(pattern, name)), "embedding")


def parameter_type(slot: Slot) -> str:
    """One of TYPES, for a slot. The bias of a norm is a bias."""
    return {"bias": "bias", "norm": "norm weight"}.get(slot.kind, "matrix")


def layer(name: str) -> tuple[str, int] | None:
    """("encoder" or "decoder", index of the block) of the place `name`; None for a place in no block."""
    found = re.match(r"(encoder|decoder)\.(\d+)\.", name)
    return (found[1], int(found[2])) if found else None


def slots_having(slots: Mapping[str, Slot], components: Sequence[str] | None = None,
                 types: Sequence[str] | None = None, layers: Sequence[int] | None = None, first: int | None = None,
                 last: int | None = None) -> dict[str, Slot]:
    """The slots that have one of the `components`, one of the `types`, and one of the layers; None sets no condition.

    slots: {name: Slot} of a model. layers: indices of blocks in each stack, -1 the last. first, last: how many blocks
    at the beginning and at the end of each stack. Raises ValueError for a component, type or layer that no slot has,
    and for conditions that no slot meets together."""
    chosen = dict(slots)
    for what, asked, part in (("component", components, component),
                              ("type", types, lambda name: parameter_type(slots[name]))):
        if asked is not None:
            _all_there(what, asked, dict.fromkeys(map(part, slots)))
            chosen = {name: slot for name, slot in chosen.items() if part(name) in asked}
    if not (layers is first is last is None):
        depth = _depth(slots)
        deepest = max(depth.values(), default=0)
        if any(not -deepest <= i < deepest for i in layers or ()) or max(first or 0, last or 0) > deepest:
            there = ", ".join(f"{stack} 0 to {n - 1}" for stack, n in depth.items())
            raise ValueError(f"{_said(layers=layers, first=first, last=last)}: the model has no such block; it has "
                             f"{there or 'none'}")
        chosen = {name: slot for name, slot in chosen.items() if (at := layer(name)) and _asked(
            at[1], depth[at[0]], layers or (), first or 0, last or 0)}
    if not chosen:
        said = _said(component=components, type=types, layers=layers, first=first, last=last)
        raise ValueError(f"{said}: no parameter of the model meets {'all of these' if ', ' in said else 'this'}")
    return chosen


def _said(**conditions: Any) -> str:
    """The given conditions, as an error says them: component 'norm', layers 0 or -1."""
    listed = {name: " or ".join(map(repr, asked)) or "none" if isinstance(asked, Sequence) else asked
              for name, asked in conditions.items() if asked is not None}
    return ", ".join(f"{name} {asked}" for name, asked in listed.items())


def _all_there(what: str, asked: Sequence[str], there: Iterable[str]) -> None:
    """Raises ValueError for a name that the model lacks, with a list of those that it has."""
    there = list(there)
    for one in asked:
        if one not in there:
            tied = "; its head is tied to the embedding" if one == "head" else ""
            raise ValueError(f"{what} {one!r}: the model has none{tied}; it has {', '.join(there)}")


def _asked(i: int, n: int, layers: Sequence[int], first: int, last: int) -> bool:
    """Whether block i of a stack of n is asked for."""
    return i in layers or i - n in layers or i < first or i >= n - last


def _depth(names: Iterable[str]) -> dict[str, int]:
    """{"encoder": number of its blocks, "decoder": ...}."""
    found: dict[str, int] = {}
    for stack, i in filter(None, map(layer, names)):
        found[stack] = max(found.get(stack, 0), i + 1)
    return found
