"""Where AdapterHub puts things in a T5, and how it calls these places.

    site       "encoder.0.ff.out"              "encoder.block.0.layer.1"
    slot       "encoder.0.attn.q.weight"       "encoder.block.0.layer.0.SelfAttention.q"
    layer      0 ... L - 1 are the blocks of the encoder, L, L + 1, ... those of the decoder; leave_out lists some

A switch of a configuration, such as mh_adapter, stands for one place in each layer. So a configuration chooses the
places of some switches, in all layers but those that are left out. A key is the path of a place with the name of the
adapter in it; HERE stands for that name until a file is read or written.
"""
from __future__ import annotations

import re
from typing import Any, Iterable, Mapping

from minipeft.checks import is_integer, shown

HERE = "{}"
Switches = Mapping[str, str]  # {its name: regular expression that finds the places which it stands for}

_SUBLAYERS = {"encoder": ("attn", "ff"), "decoder": ("attn", "cross", "ff")}


def path_of(model: Any, name: str) -> str:
    """The path of the place called `name`: a site at the output of a sublayer, or the slot of a linear layer."""
    stack, block, sublayer, leaf, *_ = name.split(".")
    if leaf == "out":
        return f"{stack}.block.{block}.layer.{_SUBLAYERS[stack].index(sublayer)}"
    return model.to_hf_name(name).removesuffix(".weight")


def layer_of(model: Any, name: str) -> int:
    """The number of the layer in which the place called `name` is."""
    stack, block = name.split(".")[:2]
    return int(block) + (model.config.num_layers if stack == "decoder" else 0)


def places(model: Any, switches: Switches, on: Iterable[str], left_out: Iterable[int]) -> list[str]:
    """The names of the places that the switches `on` choose, in all layers but those `left_out`. Raises ValueError
    where there are none."""
    on, left_out = set(on), set(left_out)
    found = [name for name, _ in model.named_places()
             if _switch(switches, name) in on and layer_of(model, name) not in left_out]
    if not found:
        raise ValueError(f"its configuration chooses no place of this model; expected one of {', '.join(switches)} to "
                         f"be on, and layers that leave_out does not list")
    return found


def choice(model: Any, switches: Switches, names: Iterable[str]) -> tuple[set[str], list[int]]:
    """(the switches that are on, leave_out) of a configuration that chooses exactly the places `names`. Raises
    ValueError where there is none."""
    names = list(names)
    for name in names:
        if _switch(switches, name) is None:
            raise ValueError(f"AdapterHub has nothing at {name}; expected places of {', '.join(switches)}")
    on = {str(_switch(switches, name)) for name in names}
    used = {layer_of(model, name) for name in names}
    left_out = sorted({layer_of(model, name) for name in places(model, switches, on, ())} - used)
    odd = sorted(set(names) ^ set(places(model, switches, on, left_out)))
    if odd:
        raise ValueError(f"AdapterHub has the same places in each layer that it does not leave out, and this adapter "
                         f"has none at {odd[0]}")
    return on, left_out


def left_out(config: Mapping[str, Any]) -> list[int]:
    """The layers in leave_out, a field of `config`. Raises ValueError unless it is null or a list of numbers."""
    layers = config.get("leave_out")
    if layers is None:
        return []
    if not isinstance(layers, list) or not all(is_integer(layer) for layer in layers):
        raise ValueError(f"leave_out is {shown(layers)}; expected a list of integers >= 0")
    return layers


def switch(config: Mapping[str, Any], field: str, usual: bool = False) -> bool:
    """The boolean in a `field` of `config`. usual: the one that AdapterHub takes if it is missing. Raises ValueError
    for anything else."""
    value = config.get(field, usual)
    if type(value) is not bool:
        raise ValueError(f"{field} is {shown(value)}; expected true or false")
    return value


def _switch(switches: Switches, name: str) -> str | None:
    return next((switch for switch, pattern in switches.items() if re.search(pattern, name)), None)
