"""Which codec reads a configuration of AdapterHub's, and the codec of those that hold several others.

    no architecture                       a bottleneck adapter
    "lora"                                LoRA; with use_dora, DoRA; with composition_mode "scale", (IA)^3
    "prefix_tuning"                       prefix tuning
    "union"                               all of its configs, as one Union: MAM is a prefix and a parallel adapter
"""
from __future__ import annotations

from typing import Any, Iterator

from minipeft.attaching.method import Method
from minipeft.checks import shown
from minipeft.formats.adapterhub.bottleneck import BottleneckFile
from minipeft.formats.adapterhub.lora import DoRAFile, IA3File, LoRAFile
from minipeft.formats.adapterhub.prefix import PrefixFile
from minipeft.formats.peft.codec import Codec, Config, Shapes
from minipeft.formats.peft.directory import check_fields
from minipeft.formats.row import Row
from minipeft.methods.union import Union


class UnionFile(Codec):
    """AdapterHub's ConfigUnion."""

    used = frozenset({"architecture", "configs"})

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        return Union(*(codec_for(part).method(part, shapes, model) for part in parts(config)))

    def rows(self, method: Any, model: Any, config: Config) -> list[Row]:
        return [row for part, said in zip(method.parts, parts(config))
                for row in codec_for(said).rows(part, model, said)]

    def writes(self, method: Any) -> bool:
        return isinstance(method, Union)

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        chosen = {name for part in method.parts for name in part.places(model)}
        if chosen != set(method.places(model)):
            raise ValueError(f"where is {shown(method.where)}, and AdapterHub's unions have the places of all of their "
                             f"parts")
        return {"architecture": "union", "configs": [writer(part).config(part, model) for part in method.parts]}


_NAMES: dict[str, Codec] = {"a bottleneck adapter": BottleneckFile(), "LoRA": LoRAFile(), "DoRA": DoRAFile(),
                            "(IA)^3": IA3File(), "prefix tuning": PrefixFile(), "a union": UnionFile()}


def codec_for(config: Config) -> Codec:
    """The codec of a configuration, whose fields are checked. Raises ValueError for an architecture that is not
    supported, and as `check_fields` does."""
    kind = config.get("architecture")
    if kind is None:
        name = "a bottleneck adapter"
    elif kind == "lora" and config.get("composition_mode", "add") in ("add", "scale"):
        name = "(IA)^3" if config.get("composition_mode") == "scale" else "DoRA" if config.get("use_dora") else "LoRA"
    elif kind in ("prefix_tuning", "union"):
        name = "prefix tuning" if kind == "prefix_tuning" else "a union"
    else:
        raise ValueError(f"architecture is {shown(kind)} and composition_mode {shown(config.get('composition_mode'))}; "
                         f"expected no architecture (a bottleneck adapter), 'lora' with 'add' or 'scale', "
                         f"'prefix_tuning' or 'union'")
    check_fields(_NAMES[name], config, name)
    return _NAMES[name]


def writer(method: Any) -> Codec:
    """The codec that writes such a method. Raises ValueError where there is none."""
    found = [codec for codec in _NAMES.values() if codec.writes(method)]
    if not found:
        raise ValueError(f"it cannot be written for AdapterHub, which has nothing like {shown(method)} on a T5")
    return found[0]


def parts(config: Config) -> Iterator[Config]:
    """The configurations of which `config` consists: those of a union, or itself. Raises ValueError for a union that is
    malformed, and for one in another."""
    if config.get("architecture") != "union":
        yield config
        return
    configs = config.get("configs")
    if not isinstance(configs, list) or not configs or not all(isinstance(part, dict) for part in configs):
        raise ValueError(f"configs is {shown(configs)}; expected a list of configurations")
    for part in configs:
        if part.get("architecture") == "union":
            raise ValueError("a union is a part of a union; expected its parts instead")
        yield part
