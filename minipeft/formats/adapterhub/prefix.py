"""Prefix tuning in AdapterHub's files, on T5.

    POOL.KIND.control_trans                   [P * 2 L * heads * d_k]            flat: K and V of all L layers, as
                                                                                 [P, 2 L, heads * d_k]: layer l has the
                                                                                 slices 2 l (K) and 2 l + 1 (V)
    POOL.KIND.wte.weight                      [P, d]                             not flat: the network that makes them
    POOL.KIND.control_trans.0.{weight,bias}   [m, d], [m]
    POOL.KIND.control_trans.2.{weight,bias}   [2 L * heads * d_k, m], [2 L * heads * d_k]     rows in slices, as above

KIND is encoder_prefix, self_prefix or cross_prefix, and L counts the layers of its stack. All attentions share one
pool, and the file repeats it under each of them: POOL is prefix_tuning.prefix_tunings.NAME, and also
PATH.prefix_tuning.pool.prefix_tunings.NAME for every attention PATH.

AdapterHub's T5 looks up the bias of all keys at the positions 0, 1, ..., P + T - 1, with the prefix first, and of the
queries at 0, ..., T - 1. So each token of the text seems to be P positions later than it is. That is part of the
numbers of such an adapter, and is reproduced as PrefixTuning(bias="adapterhub").

leave_out is refused. In AdapterHub's T5 a layer without the prefix between layers that have it, and the layers after
it, lose the bias of relative positions altogether.
"""
from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Iterator

import numpy

from minipeft.attaching.method import Method
from minipeft.checks import is_integer, shown
from minipeft.formats.adapterhub.names import HERE, switch
from minipeft.formats.peft.codec import Codec, Config, Shapes
from minipeft.formats.row import Row
from minipeft.methods.prefix import SITES, PrefixTuning

_SWITCHES = {"encoder": "encoder_prefix", "cross": "cross_prefix"}
_KINDS = {"encoder": "encoder_prefix", "decoder": "self_prefix", "cross": "cross_prefix"}
_POOL = f"prefix_tuning.prefix_tunings.{HERE}"
_COPY = f"prefix_tuning.pool.prefix_tunings.{HERE}"


class PrefixFile(Codec):
    """AdapterHub's PrefixTuningConfig."""

    used = frozenset({"architecture", "flat", "prefix_length", "bottleneck_size", "non_linearity",
                      *_SWITCHES.values()})
    needed = ("flat", "prefix_length")
    harmless = frozenset({"dropout", "init_weights_seed", "shared_gating"})
    neutral = {"use_gating": (False,), "leave_out": ([], None)}

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        length, m = config["prefix_length"], None
        if not is_integer(length, 1):
            raise ValueError(f"prefix_length is {shown(length)}; expected an integer >= 1")
        if not switch(config, "flat"):
            m, f = config.get("bottleneck_size"), config.get("non_linearity")
            if not is_integer(m, 1) or f != "tanh":
                raise ValueError(f"bottleneck_size is {shown(m)} and non_linearity {shown(f)}; expected an integer >= "
                                 f"1 and 'tanh' where flat is false")
        sites = tuple(kind for kind in SITES if kind not in _SWITCHES or switch(config, _SWITCHES[kind], True))
        most = max(math.prod(shape) for shape in shapes.values())
        if length > most:  # before anything of this length is made
            raise ValueError(f"prefix_length is {length}, and no tensor of the file has more than {most} numbers")
        return PrefixTuning(length, sites, "adapterhub", m)

    def rows(self, method: Any, model: Any, config: Config) -> list[Row]:
        pools = [_POOL, *(f"{path}.{_COPY}" for path in _attentions(model))]
        found = []
        for kind, names in _by_kind(method, model).items():
            for ours, theirs, shape, at in _kind(method, model, kind, names):
                found += [Row(ours, f"{pool}.{_KINDS[kind]}.{theirs}", shape, at=at) for pool in pools]
        return found

    def writes(self, method: Any) -> bool:
        return isinstance(method, PrefixTuning)

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        found, kinds = method.places(model), _by_kind(method, model)
        every = dataclasses.replace(method, sites=tuple(kinds), where=None).places(model) if kinds else {}
        if method.bias != "adapterhub" or set(found) != set(every) or "decoder" not in kinds:
            raise ValueError(f"it has bias {method.bias!r} and {len(found)} places; AdapterHub's prefixes have the "
                             f"bias 'adapterhub', stand in every self-attention of the decoder, and in all or none of "
                             f"those of the encoder and of the cross-attentions")
        return {"architecture": "prefix_tuning", "flat": method.mlp is None, "prefix_length": method.length,
                "bottleneck_size": method.mlp or 512, "non_linearity": "tanh",
                **{name: kind in kinds for kind, name in _SWITCHES.items()}, "leave_out": [],
                "dropout": 0.0, "use_gating": False, "shared_gating": True, "init_weights_seed": None}


def _by_kind(method: Any, model: Any) -> dict[str, list[str]]:
    """{kind: the names of its places}, of the kinds that the method has."""
    found = {kind: [name for name in method.places(model) if re.search(pattern, name)]
             for kind, pattern in SITES.items()}
    return {kind: names for kind, names in found.items() if names}


def _attentions(model: Any) -> list[str]:
    """The paths of all attentions."""
    return [model.to_hf_name(name).removesuffix(".q.weight") for name in model.slots if name.endswith(".q.weight")]


def _kind(method: Any, model: Any, kind: str, names: list[str]) -> Iterator[tuple[str, str, tuple[int, ...], Any]]:
    """(our key, the rest of theirs, the shape of theirs, the part of theirs) of all arrays of one kind."""
    site, m, P = model.sites[names[0]], method.mlp, method.length
    slices, width, d = 2 * len(names), site.width, model.config.d_model
    if m is not None:
        yield f"{kind}.P", "wte.weight", (P, d), ...
        yield f"{kind}.W", "control_trans.0.weight", (m, d), ...
        yield f"{kind}.b", "control_trans.0.bias", (m,), ...
    for number, name in enumerate(names):
        for at, leaf in zip((2 * number, 2 * number + 1), "KV"):
            if m is None:
                flat = (numpy.arange(P)[:, None] * slices + at) * width + numpy.arange(width)       # [P, width]
                yield f"{name}.{leaf}", "control_trans", (P * slices * width,), flat
            else:
                rows = slice(at * width, (at + 1) * width)
                yield f"{name}.W_{leaf}", "control_trans.2.weight", (slices * width, m), rows
                yield f"{name}.b_{leaf}", "control_trans.2.bias", (slices * width,), rows
