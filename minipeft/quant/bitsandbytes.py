"""The keys of a matrix in 4 bits, as bitsandbytes saves it (read from bitsandbytes 0.50.2, `QuantState.as_dict`).

    <key>                                  packed codes: uint8 [n / 2, 1], or the same bytes in another dtype
    <key>.absmax                           float32 [blocks]; with double quantization uint8 [blocks]
    <key>.quant_map                        float32 [16], the numbers that the codes stand for
    <key>.nested_absmax                    float32 [blocks / 256]     with double quantization
    <key>.nested_quant_map                 float32 [256]              with double quantization
    <key>.quant_state.bitsandbytes__nf4    or __fp4: JSON as uint8: quant_type, blocksize, dtype, shape, and with double
                                           quantization nested_blocksize, nested_dtype, nested_offset

Files are untrusted. Every size follows from the shape that the model wants, and is compared with the header before a
tensor is read. The maps are read and not made again, so a map that differs from ours is honored.
"""
from __future__ import annotations

import json
import math
import re
from typing import Any, Iterable, Mapping

import numpy

from minipeft.backend import to_device, to_host, xp
from minipeft.checks import is_number, shown
from minipeft.files import json_object
from minipeft.quant.scheme import Shape, scheme
from minipeft.quant.weight import QuantizedWeight

KINDS = ("nf4", "fp4")
Header = tuple[tuple[int, ...], str]  # (shape, dtype as the file calls it)
_DTYPES = ("float32", "float16", "bfloat16")  # of the numbers before they were quantized
_STATE = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_STATE = ("nested_blocksize", "nested_dtype", "nested_offset")
_LONGEST = 4096  # bytes of JSON; bitsandbytes writes 170
_NESTED = 256    # absmax in a nested block: the only size that bitsandbytes multiplies with
_QUANT_STATE = "quant_state.bitsandbytes__"
_COMPANION = re.compile(rf"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|{re.escape(_QUANT_STATE)}[^.]*)",
                        re.DOTALL)


def companions(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """{key of a weight: {leaf: name of the tensor}} of all weights of which some of the `names` are companions. The
    codes have the leaf "", if they are there."""
    names = list(names)
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if match := _COMPANION.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = name
    for key in found.keys() & set(names):
        found[key][""] = key
    return found


def check_headers(key: str, found: Mapping[str, Header], shape: Shape) -> None:
    """Raises ValueError, naming the tensor, unless the headers `found`, {leaf: (shape, dtype)}, can be those of a
    matrix called `key` of this `shape`, [d_out, d_in]."""
    states = [leaf for leaf in found if leaf.startswith(_QUANT_STATE)]
    if len(states) != 1 or states[0].removeprefix(_QUANT_STATE) not in KINDS:
        raise ValueError(f"{key} has {', '.join(f'{key}.{leaf}' for leaf in states) or 'no quant_state'}; expected one "
                         f"{key}.{_QUANT_STATE}nf4 or ...fp4 beside codes in 4 bits")
    nested = "nested_absmax" in found or "nested_quant_map" in found
    wanted = ["", "absmax", "quant_map", states[0], *(("nested_absmax", "nested_quant_map") if nested else ())]
    for leaf in wanted:
        if leaf not in found:
            raise ValueError(f"{_full(key, leaf)} is missing; expected it beside {key}.{states[0]}")
    n = math.prod(shape)
    for leaf, dtype, least, most in (
            ("absmax", "uint8" if nested else "float32", 1, n), ("quant_map", "float32", 16, 16),
            ("nested_absmax", "float32", 1, n), ("nested_quant_map", "float32", _NESTED, _NESTED),
            (states[0], "uint8", 1, _LONGEST)):
        sizes, stored = found.get(leaf, ((least,), dtype))
        if stored != dtype or len(sizes) != 1 or not least <= sizes[0] <= most:
            raise ValueError(f"{_full(key, leaf)} is {stored} {list(sizes)}; expected {dtype} "
                             f"[{least if least == most else f'{least} to {most}'}]")
    sizes, dtype = found[""]
    count, size = -(-n // 2), 2 if dtype == "bfloat16" else numpy.dtype(dtype).itemsize
    if sizes not in ((count // size,), (count // size, 1), (1, count // size)) or count % size:
        raise ValueError(f"{key} is {dtype} {list(sizes)}; expected the {count} bytes of {list(shape)} numbers in 4 "
                         f"bits, as uint8 [{count}, 1] or as another dtype with as many bytes")


def weight_of(key: str, raw: Mapping[str, numpy.ndarray], shape: Shape, dtype: Any) -> QuantizedWeight:
    """The weight called `key`, of this `shape` [d_out, d_in], that computes in `dtype`. raw: {leaf: bytes as uint8},
    after `check_headers`. Raises ValueError, naming the tensor, for a state or numbers that cannot be those of such a
    weight."""
    state_leaf = next(leaf for leaf in raw if leaf.startswith(_QUANT_STATE))
    nested = "nested_absmax" in raw
    what = _full(key, state_leaf)
    state = _state(what, raw[state_leaf].tobytes(), state_leaf.removeprefix(_QUANT_STATE), shape, nested)
    maps = {"levels": _map(f"{key}.quant_map", raw["quant_map"], rising=state["quant_type"] == "nf4")}
    if nested:
        maps["absmax_levels"] = _map(f"{key}.nested_quant_map", raw["nested_quant_map"], rising=True)
    try:
        way = scheme(state["quant_type"], blocksize=state["blocksize"], double=nested, **maps)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    offset = numpy.array([state.get("nested_offset", 0)], "<f4")
    arrays = {}
    for leaf, (sizes, kind) in way.leaves(shape, dtype).items():
        theirs = {"packed": "", "qabsmax": "absmax"}.get(leaf, leaf)
        found = offset.view("uint8") if leaf == "offset" else raw[theirs]
        if found.size != math.prod(sizes) * kind.itemsize:
            raise ValueError(f"{_full(key, theirs)} has {found.size // kind.itemsize} numbers; expected "
                             f"{math.prod(sizes)} for {list(shape)} in blocks of {state['blocksize']}")
        array = little_endian(found, kind).reshape(sizes)
        if kind.kind == "f" and not (numpy.isfinite(array) & ((array >= 0) | (leaf == "offset"))).all():
            raise ValueError(f"{_full(key, theirs)} holds numbers that are negative or not finite; expected the "
                             f"largest absolute value of each block")
        arrays[leaf] = to_device(array)
    weight = QuantizedWeight(way, shape, dtype, arrays)
    weight.source = state["dtype"]
    check_finite(key, weight)
    return weight


def tensors_of(key: str, weight: QuantizedWeight, dtype: str | None = None) -> dict[str, numpy.ndarray]:
    """{name: tensor} of a `weight` called `key`, of a kind in KINDS. dtype: how the file stores the other weights,
    which the state names as that of the original; None means the one that the weight was read with, or else its own.
    It is "float32" where that is "float64", which bitsandbytes does not know."""
    arrays, nested = {leaf: to_host(p.data) for leaf, p in weight.arrays.items()}, "qabsmax" in weight.arrays
    said = dtype or weight.source or weight.dtype.name
    way: Any = weight.scheme
    state: dict[str, Any] = {"quant_type": way.kind, "blocksize": way.blocksize,
                             "dtype": "float32" if said == "float64" else said, "shape": list(weight.shape)}
    found = {"": arrays["packed"].reshape(-1, 1), "absmax": arrays["qabsmax" if nested else "absmax"],
             "quant_map": numpy.array(way.levels, "float32")}
    if nested:
        found["nested_absmax"] = arrays["nested_absmax"]
        found["nested_quant_map"] = numpy.array(way.absmax_levels, "float32")
        state |= {"nested_blocksize": _NESTED, "nested_dtype": "float32",
                  "nested_offset": float(arrays["offset"].reshape(()))}
    found[_QUANT_STATE + way.kind] = numpy.frombuffer(json.dumps(state).encode(), "uint8")
    return {_full(key, leaf): array.reshape(-1) if leaf else array for leaf, array in found.items()}


def configuration(weights: Iterable[QuantizedWeight], skipped: list[str] | None) -> dict[str, Any] | None:
    """The quantization_config with which transformers reads these `weights`. None if no configuration fits them all:
    they must be of one kind, all with double quantization or none. skipped: the other linear modules; None means those
    that it skips by itself."""
    kinds = {(weight.scheme.kind, "qabsmax" in weight.arrays) for weight in weights}
    if len(kinds) != 1 or not {kind for kind, _ in kinds} <= set(KINDS):
        return None
    (kind, double), = kinds
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": skipped}


def _full(key: str, leaf: str) -> str:
    return f"{key}.{leaf}" if leaf else key


def _state(what: str, text: bytes, kind: str, shape: Shape, nested: bool) -> dict[str, Any]:
    """The JSON of a quant_state, checked. kind: in the name of its tensor."""
    state, wanted = json_object(what, text, finite=True), (*_STATE, *(_NESTED_STATE if nested else ()))
    missing, extra = [name for name in wanted if name not in state], [name for name in state if name not in wanted]
    if missing or extra:
        raise ValueError(f"{what} {f'lacks {missing[0]}' if missing else f'has a field {shown(extra[0])}'}; expected "
                         f"exactly {', '.join(wanted)}")
    offset = state.get("nested_offset", 0.0)
    for name, holds, expected in (
            ("quant_type", state["quant_type"] == kind, f"{kind!r}, as the name of the tensor says"),
            ("blocksize", type(state["blocksize"]) is int, "an integer"),
            ("dtype", state["dtype"] in _DTYPES, f"one of {', '.join(_DTYPES)}"),
            ("shape", state["shape"] == list(shape) and all(type(n) is int for n in state["shape"]),
             f"{list(shape)}, the shape of the weight"),
            ("nested_blocksize", not nested or state["nested_blocksize"] == _NESTED, f"{_NESTED}"),
            ("nested_dtype", not nested or state["nested_dtype"] == "float32", "'float32'"),
            ("nested_offset", is_number(offset) and abs(offset) <= float(numpy.finfo("float32").max),
             "a finite number of float32")):
        if not holds:
            raise ValueError(f"{what}: {name} is {shown(state[name])}; expected {expected}")
    return state


def little_endian(raw: numpy.ndarray, dtype: Any) -> numpy.ndarray:
    """The numbers of this `dtype` [n] in the bytes of a file, `raw` [bytes], uint8."""
    return raw.view(numpy.dtype(dtype).newbyteorder("<")).astype(dtype, copy=False)


def check_finite(key: str, weight: QuantizedWeight) -> None:
    """Raises ValueError if a number that `weight`, called `key`, stands for is not finite."""
    with numpy.errstate(over="ignore", invalid="ignore"):
        numbers = weight.dense().data
    if not to_host(xp.isfinite(numbers).all()):
        raise ValueError(f"{key}: its codes and scales give numbers that are not finite in {weight.dtype}")


def _map(what: str, raw: numpy.ndarray, rising: bool) -> tuple[float, ...]:
    """A map, checked. rising: whether its numbers have to rise."""
    numbers = little_endian(raw, "float32")
    if not numpy.isfinite(numbers).all() or rising and not (numpy.diff(numbers) > 0).all():
        raise ValueError(f"{what} begins {shown(numbers[:4].tolist())}; expected {len(numbers)} finite numbers"
                         f"{', each larger than the one before' * rising}")
    return tuple(numbers.tolist())
