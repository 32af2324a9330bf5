"""Which part of a model a dotted name belongs to: its component, its layer, and its type.

    encoder.3.attn.q.bias      attention, layer 3 of the encoder, a bias
    decoder.0.ff_norm.weight   norm, layer 0 of the decoder, a norm scale
    embedding.weight           embedding, no layer, a matrix
"""
from __future__ import annotations

import re
from typing import Iterable, Mapping, Sequence

from minipeft.nn.weight import Slot

COMPONENTS = ("attention", "feed-forward", "embedding", "norm", "position", "head")
TYPES = ("bias", "norm scale", "matrix")
_COMPONENT = ((r"norm\.", "norm"), (r"position\.", "position"), (r"\.(attn|cross)\.", "attention"),
              (r"\.ff\.", "feed-forward"), (r"^head\.", "head"))


def component(name: str) -> str:
    """One of COMPONENTS. What stands nowhere else (the table, the encoder's input) belongs to "embedding"."""
    return next((part for pattern, part in _COMPONENT if re.search(pattern, name)), "embedding")


def parameter_type(slot: Slot) -> str:
    """One of TYPES; the bias of a norm is a bias."""
    return {"bias": "bias", "norm": "norm scale"}.get(slot.kind, "matrix")


def layer(name: str) -> tuple[str, int] | None:
    """("encoder" or "decoder", index of the block); None for what stands in no block."""
    found = re.match(r"(encoder|decoder)\.(\d+)\.", name)
    return (found[1], int(found[2])) if found else None


def slots_having(slots: Mapping[str, Slot], components: Sequence[str] = (), types: Sequence[str] = (),
                 layers: Sequence[int] = (), first: int = 0, last: int = 0) -> dict[str, Slot]:
    """The slots of one of the components, one of the types, and one of the layers; what is empty asks nothing.

    layers: indices of blocks in each stack, -1 the last; first and last: so many blocks at either end of each stack.
    Raises ValueError, with what is left until then, for a condition that chooses nothing."""
    depth = _depth(slots)

    def chosen_layer(name: str) -> bool:
        stack, i = layer(name) or ("", 0)
        n = depth.get(stack, 0)
        return bool(n) and (i in layers or i - n in layers or i < first or i >= n - last)

    chosen = dict(slots)
    for what, asked, holds in (
            (f"component {components}", components, lambda name: component(name) in components),
            (f"type {types}", types, lambda name: parameter_type(slots[name]) in types),
            (f"layers {layers}, first {first}, last {last}", layers or first or last, chosen_layer)):
        if asked:
            kept = {name: slot for name, slot in chosen.items() if holds(name)}
            if not kept:
                raise ValueError(f"{what} chooses none of {len(chosen)} parameters: {', '.join(list(chosen)[:3])} ...")
            chosen = kept
    return chosen


def _depth(names: Iterable[str]) -> dict[str, int]:
    """{"encoder": number of its blocks, "decoder": ...}."""
    found: dict[str, int] = {}
    for stack, i in filter(None, map(layer, names)):
        found[stack] = max(found.get(stack, 0), i + 1)
    return found
