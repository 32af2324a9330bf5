"""Quantized weights in files of our own: the arrays under "<key>.<leaf>", and a description of each weight as JSON.

    {"kind": "int4", "options": {"group": 32}, "shape": [64, 64]}       what `scheme(kind, **options)` makes again

The description comes from a file that nobody vouches for. So the kind and its options pass through `scheme`, and the
arrays must have exactly the shapes and dtypes that `Scheme.leaves` gives for the shape that the model wants.
"""
from __future__ import annotations

import inspect
from typing import Any, Mapping

import numpy

from minipeft.backend import to_device, to_host
from minipeft.checks import shown
from minipeft.quant.bitsandbytes import Header, check_finite, little_endian
from minipeft.quant.scheme import SCHEMES, Scheme, Shape, scheme
from minipeft.quant.weight import QuantizedWeight

_FIELDS = ("kind", "options", "shape")


def description(weight: QuantizedWeight) -> dict[str, Any]:
    """The description of `weight`. Raises ValueError for a scheme that `scheme` cannot make again from its options,
    such as one of a class that is not registered in SCHEMES."""
    way = weight.scheme
    made = SCHEMES.get(way.kind)
    options = {name: getattr(way, name) for name in inspect.signature(made).parameters if hasattr(way, name)} \
        if made else {}
    if made is None or scheme(way.kind, **options) != way:
        raise ValueError(f"{way} cannot be written: scheme({way.kind!r}, ...) does not make it again from its options "
                         f"{shown(options)}")
    return {"kind": way.kind, "options": options, "shape": list(weight.shape)}


def described(key: str, said: Any, shape: Shape) -> Scheme:
    """The scheme that a description, `said`, of the weight `key` names. Raises ValueError, naming the key, for anything
    other than a description of a weight of this `shape`, [d_out, d_in]."""
    what = f"quantization_config: {shown(key)}"
    if not isinstance(said, dict) or set(said) != set(_FIELDS) or not isinstance(said["options"], dict):
        raise ValueError(f"{what} is {shown(said)}; expected {', '.join(_FIELDS)}")
    if said["shape"] != list(shape) or any(type(n) is not int for n in said["shape"]):
        raise ValueError(f"{what} has shape {shown(said['shape'])}; expected {list(shape)}")
    try:
        return scheme(said["kind"], **said["options"])
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def check_headers(key: str, way: Scheme, found: Mapping[str, Header], shape: Shape) -> None:
    """Raises ValueError, naming the tensor, unless the headers `found`, {leaf: (shape, dtype)}, are exactly those of a
    weight called `key`, of this `shape` [d_out, d_in], in the scheme `way`, made of float32 or of float64 numbers."""
    try:
        ways = [{leaf: (sizes, kind.name) for leaf, (sizes, kind) in way.leaves(shape, dtype).items()}
                for dtype in ("float32", "float64")]
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    for leaf in ways[0]:
        if leaf not in found:
            raise ValueError(f"{key}.{leaf} is missing; expected it, because {key} is {way}")
    if dict(found) not in ways:
        extra = [leaf for leaf in found if leaf not in ways[0]]
        if extra:
            raise ValueError(f"{key}.{extra[0]} is not expected, because {key} is {way}; expected {', '.join(ways[0])}")
        odd = next(leaf for leaf in found if found[leaf] != ways[0][leaf])
        sizes, kind = ways[0][odd]
        raise ValueError(f"{key}.{odd} is {found[odd][1]} {list(found[odd][0])}; expected {kind} {list(sizes)}, "
                         f"because {key} is {way}")


def weight_of(key: str, way: Scheme, raw: Mapping[str, numpy.ndarray], found: Mapping[str, Header], shape: Shape,
              dtype: Any) -> QuantizedWeight:
    """The weight called `key`, of this `shape` [d_out, d_in], in the scheme `way`, that computes in `dtype`. raw:
    {leaf: bytes as uint8}; found: their headers, after `check_headers`. Raises ValueError, naming the tensor, for
    numbers that are not finite."""
    arrays = {}
    for leaf, data in raw.items():
        sizes, kind = found[leaf]
        array = little_endian(data, kind).reshape(sizes)
        if array.dtype.kind == "f" and not numpy.isfinite(array).all():
            raise ValueError(f"{key}.{leaf} holds NaN or infinity; expected finite numbers")
        arrays[leaf] = to_device(array)
    weight = QuantizedWeight(way, shape, dtype, arrays)
    check_finite(key, weight)
    return weight


def tensors_of(key: str, weight: QuantizedWeight) -> dict[str, numpy.ndarray]:
    """{name: tensor} of a `weight` called `key`, each as it is."""
    return {f"{key}.{leaf}": to_host(array.data) for leaf, array in weight.arrays.items()}
