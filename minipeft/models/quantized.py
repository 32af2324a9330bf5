"""Quantized weights in the folder of a model: which tensors belong to one, and how config.json describes them.

    kind           tensors                                  quantization_config of config.json
    nf4, fp4       bitsandbytes' (`quant/bitsandbytes.py`)  bitsandbytes', where transformers can read all of them
    every other    <key>.<leaf> (`quant/described.py`)      {"quant_method": "minipeft", "weights": {key: description}}

A model with weights of both rows has the second configuration. The tensors of an nf4 or fp4 weight describe themselves,
so it lists only the others.
"""
from __future__ import annotations

import functools
import os
from typing import Any, Callable, Iterable, Mapping

import numpy

from minipeft.backend import Array
from minipeft.checks import shown
from minipeft.files import read_dtypes, read_shapes
from minipeft.models.config import listed
from minipeft.nn.module import Model
from minipeft.quant import bitsandbytes, described
from minipeft.quant.bitsandbytes import Header
from minipeft.quant.scheme import Scheme
from minipeft.quant.weight import QuantizedWeight

FIELD = "quantization_config"
_OURS = "minipeft"
_FOREIGN = (".SCB", ".weight_format", ".qweight", ".qzeros", ".scales", ".g_idx")  # of LLM.int8, GPTQ and AWQ
Wanted = Callable[[str], "tuple[int, ...] | None"]  # key -> the shape that the configuration asks for, if it has one


def headers(path: str | os.PathLike) -> dict[str, Header]:
    """{name: (shape, dtype)} of the tensors in a safetensors file. Raises as `files.read_shapes` does."""
    shapes, dtypes = read_shapes(path), read_dtypes(path)
    return {name: (shape, dtypes[name]) for name, shape in shapes.items()}


class Stored:
    """The quantized weights among tensors with the headers `found`, {name: (shape, dtype)}, beside a config.json with
    these `values`. Raises ValueError for a quantization_config of another method and for one that does not fit the
    names."""

    def __init__(self, values: Mapping[str, Any], found: Mapping[str, Header]):
        self._found = found
        self.config = values.get(FIELD)
        odd = [name for name in found if name.endswith(_FOREIGN)]
        self._descriptions = _checked(self.config, odd)
        self._four_bit = bitsandbytes.companions(found)
        self._own: dict[str, dict[str, str]] = {key: {} for key in self._descriptions}
        for name in found:
            key, _, leaf = name.rpartition(".")
            if key in self._own:
                self._own[key][leaf] = name
        if self.config is not None and self.config.get("quant_method") != _OURS and not self._four_bit:
            raise ValueError(f"{FIELD} says load_in_4bit, but no tensor is called ...absmax or ...quant_state."
                             f"bitsandbytes__nf4: expected them beside the weights in 4 bits")
        both = self._four_bit.keys() & self._descriptions.keys()
        if both:
            raise ValueError(f"{listed(sorted(both))}: stored in bitsandbytes' format, and {FIELD} describes it in "
                             f"another; expected one of the two")
        self._ways: dict[str, Scheme] = {}

    @functools.cached_property
    def keys(self) -> list[str]:
        """The keys of all weights, quantized or not; a quantized one has one key, however many tensors it has."""
        return [*self._four_bit, *self._own, *(name for name in self._found if name not in self.raw)]

    def shapes(self, wanted: Wanted) -> dict[str, tuple[int, ...]]:
        """{key: shape} of all weights. wanted: gives the shape that the configuration has for a key, or None. A
        quantized weight has the wanted shape. Raises ValueError, naming the tensor, where its headers do not fit that
        shape, and for a key that the configuration does not have."""
        found: dict[str, tuple[int, ...]] = {}
        for key in self.keys:
            if key not in self._four_bit and key not in self._own:
                found[key] = self._found[key][0]
                continue
            shape = wanted(key)
            if shape is None or len(shape) != 2:
                raise ValueError(f"{shown(key)} is quantized, but the configuration has no matrix of this name")
            found[key] = shape
            if key in self._four_bit:
                bitsandbytes.check_headers(key, self._headers(self._four_bit[key]), (shape[0], shape[1]))
            else:
                way = self._ways[key] = described.described(key, self._descriptions[key], (shape[0], shape[1]))
                if key in self._found:
                    raise ValueError(f"{key} is stored, and {FIELD} says that it is {way}; expected {key}.<leaf> alone")
                described.check_headers(key, way, self._headers(self._own[key]), (shape[0], shape[1]))
        return found

    @functools.cached_property
    def raw(self) -> frozenset[str]:
        """The names of the tensors that make up quantized weights; they are read as bytes."""
        groups = [*self._four_bit.values(), *self._own.values()]
        return frozenset(name for leaves in groups for name in leaves.values())

    def weights(self, tensors: Mapping[str, numpy.ndarray], shapes: Mapping[str, tuple[int, ...]], dtype: str
                ) -> dict[str, Any]:
        """{key: array [...], or a QuantizedWeight that computes in `dtype`} of the `tensors`, {name: array}, of which
        those called `raw` are bytes. shapes: as `shapes` gave them. Raises ValueError, naming the tensor, for numbers
        and states that no such weight can have."""
        found: dict[str, Any] = {name: array for name, array in tensors.items() if name not in self.raw}
        for key, names in self._four_bit.items():
            found[key] = bitsandbytes.weight_of(key, {leaf: tensors[name] for leaf, name in names.items()},
                                                (shapes[key][0], shapes[key][1]), dtype)
        for key, names in self._own.items():
            raw = {leaf: tensors[name] for leaf, name in names.items()}
            found[key] = described.weight_of(key, self._ways[key], raw, self._headers(names),
                                             (shapes[key][0], shapes[key][1]), dtype)
        return found

    def _headers(self, names: Mapping[str, str]) -> dict[str, Header]:
        return {leaf: self._found[name] for leaf, name in names.items()}


def _checked(config: Any, odd: list[str]) -> dict[str, Any]:
    """{key: description} in a quantization_config; {} for bitsandbytes' and for none. odd: names of tensors that other
    methods have. Raises ValueError for every other configuration."""
    expected = f"expected 4 bits of bitsandbytes (load_in_4bit), or what save_pretrained writes ({_OURS!r})"
    if config is None:
        if odd:
            raise ValueError(f"{shown(odd[0])} belongs to LLM.int8, GPTQ or AWQ, which are not read; {expected}")
        return {}
    method = config.get("quant_method", "bitsandbytes") if isinstance(config, dict) else None
    if method == _OURS:
        weights = config.get("weights")
        if set(config) != {"quant_method", "weights"} or not isinstance(weights, dict):
            raise ValueError(f"{FIELD} is {shown(config)}; expected quant_method and weights")
        return weights
    if method != "bitsandbytes":
        raise ValueError(f"{FIELD} has quant_method {shown(method)}, which is not read; {expected}")
    if config.get("load_in_8bit") or odd and not config.get("load_in_4bit"):
        raise ValueError(f"{FIELD} says load_in_8bit = {shown(config.get('load_in_8bit'))} (LLM.int8), which is not "
                         f"read; {expected}")
    if config.get("load_in_4bit") is not True:
        raise ValueError(f"{FIELD} says load_in_4bit = {shown(config.get('load_in_4bit'))}; expected true")
    if config.get("bnb_4bit_quant_type", "nf4") not in bitsandbytes.KINDS:
        raise ValueError(f"{FIELD} says bnb_4bit_quant_type = {shown(config['bnb_4bit_quant_type'])}; expected one of "
                         f"{', '.join(bitsandbytes.KINDS)}")
    return {}


def fill(model: Model, arrays: Mapping[str, Any]) -> None:
    """Load `arrays`, {our name: array or QuantizedWeight}, into a `model` that was built for them and is not used yet.
    Raises as `Module.load_state` does."""
    slots, state = model.slots, {}
    for name, value in arrays.items():
        if isinstance(value, QuantizedWeight):
            slots[name].base = value
            state.update({f"{name}.{leaf}": array.data for leaf, array in value.arrays.items()})
        else:
            state[name] = value
    model.load_state(state)


def same(a: Any, b: Any) -> bool:
    """Whether two entries `a` and `b` of `Stored.weights` are equal: arrays with equal numbers, or one object."""
    if isinstance(a, QuantizedWeight) or isinstance(b, QuantizedWeight):
        return a is b
    return numpy.array_equal(a, b)


def expanded(weights: Mapping[str, Any], dtype: str | None, modules: Iterable[str] = ()
             ) -> tuple[dict[str, Array], frozenset[str], dict[str, Any] | None]:
    """({name: tensor}, the names of those that are stored exactly as they are, quantization_config or None) for
    `weights`, {key: array or QuantizedWeight}.

    dtype: how the other tensors are stored, None for their own. modules: the keys of all weights that are linear
    modules for transformers. Raises ValueError for a scheme that cannot be described."""
    tensors: dict[str, Array] = {}
    exact: set[str] = set()
    descriptions: dict[str, Any] = {}
    quantized = {key: value for key, value in weights.items() if isinstance(value, QuantizedWeight)}
    for key, value in weights.items():
        if key not in quantized:
            tensors[key] = value
            continue
        if value.scheme.kind in bitsandbytes.KINDS:
            made = bitsandbytes.tensors_of(key, value, dtype)
        else:
            descriptions[key], made = described.description(value), described.tensors_of(key, value)
        exact |= made.keys()
        tensors.update(made)
    if not quantized:
        return tensors, frozenset(), None
    theirs = None
    if not descriptions and quantized.keys() <= set(modules):
        theirs = bitsandbytes.configuration(quantized.values(), _skipped(quantized, modules))
    return tensors, frozenset(exact), theirs or {"quant_method": _OURS, "weights": descriptions}


def _skipped(quantized: Iterable[str], modules: Iterable[str]) -> list[str] | None:
    """The linear modules that transformers must leave alone; None where they are the ones that it leaves alone by
    itself: the head, and T5's wo, which it keeps in float32."""
    names = {key.removesuffix(".weight") for key in modules}
    left = names - {key.removesuffix(".weight") for key in quantized}
    by_itself = {name for name in names if name == "lm_head" or name.endswith(".wo")}
    head = {"lm_head"} - (names - left)  # it is a module there, also where it is tied
    return None if left == by_itself else sorted(left | head)
