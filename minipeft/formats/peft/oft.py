"""OFT in a file of PEFT's.

    a linear layer     W R^T      path.oft_R.weight [blocks, b (b - 1) / 2]         with block_share [1, b (b - 1) / 2]
    a table            W R        path.oft_embedding_R.weight, the same

R is made of Q as in `methods/oft.py`: by the series, "neumann", with use_cayley_neumann, and otherwise as "transposed".
All three forms turn the other way where Q has the other sign, so the paper's form and tables are written with -Q.

The file gives either b (oft_block_size) or the number of blocks (r), and the other is 0. Where it does not divide the
width, PEFT takes the nearest number that does, the smaller of two.
"""
from __future__ import annotations

import functools
import re
from typing import Any, Iterable, Mapping

import numpy

from minipeft.attaching.method import Method
from minipeft.checks import is_integer, shown
from minipeft.formats.peft.codec import Codec, Config, Shapes, codec
from minipeft.formats.peft.names import PREFIX, modules, path_of
from minipeft.formats.peft.places import TARGETS, flag, only, target_modules, targets, where
from minipeft.formats.row import Row, same
from minipeft.methods.oft import MOST_TERMS, OFT


@codec
class OFTFile(Codec):
    """OFT, with a block size for each width. COFT is refused."""

    peft_type = "OFT"
    used = TARGETS | {"r", "oft_block_size", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"}
    harmless = frozenset({"init_weights", "module_dropout", "eps"})
    neutral = {"coft": (False,), "bias": ("none",), "fan_in_fan_out": (False,)}
    needed = ("oft_block_size", "use_cayley_neumann")
    defaults = {"target_modules": ["q", "v"], "exclude_modules": None, "layers_to_transform": None,
                "layers_pattern": None, "r": 0, "num_cayley_neumann_terms": 5, "block_share": False, "coft": False,
                "eps": 6e-5, "module_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "init_weights": True,
                "modules_to_save": None}

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        paths, slots = targets(config, model, "linear", "embedding"), modules(model)
        sizes = {slots[path]: block_size(config, model.slots[slots[path]].shape[1]) for path in paths}
        usual = next(iter(sizes.values()))
        series, terms = flag(config, "use_cayley_neumann", True), config["num_cayley_neumann_terms"]
        if series and not (is_integer(terms, 3) and terms <= MOST_TERMS):
            raise ValueError(f"num_cayley_neumann_terms is {shown(terms)}; expected an integer from 3 to {MOST_TERMS}")
        if series and _older(config.get("peft_version"), (0, 18)):
            raise ValueError(f"peft_version is {shown(config['peft_version'])}; before 0.18, use_cayley_neumann meant "
                             f"another series, which is not supported")
        return OFT(usual, where(paths, model), flag(config, "block_share", False),
                   "neumann" if series else "transposed", max(terms, 4) if series else OFT.terms,  # 3 means 4
                   tuple((f"^{re.escape(name)}$", size) for name, size in sizes.items() if size != usual))

    def rows(self, method: Any, model: Any, config: Config) -> list[Row]:
        found = []
        for name, slot in method.places(model).items():
            size, table = method.size_at(name), slot.kind == "embedding"
            shape = (1 if method.share else slot.shape[1] // size, size * (size - 1) // 2)
            turn = same if (method.cayley == "paper") == table else numpy.negative
            key = f"{PREFIX}{path_of(model, name)}.oft_{'embedding_' if table else ''}R.weight"
            found.append(Row(f"{name}.q", key, shape, turn, turn))
        return found

    def writes(self, method: Any) -> bool:
        return isinstance(method, OFT)

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        places = method.places(model)
        only("OFT", places, "linear", "embedding")
        return {**written_size({(slot.shape[1], method.size_at(name)) for name, slot in places.items()}),
                "target_modules": target_modules(places, model), "block_share": method.share,
                "use_cayley_neumann": method.cayley == "neumann", "num_cayley_neumann_terms": method.terms}

    def notes(self, method: Any, model: Any, config: Config) -> list[str]:
        if method.cayley != "neumann" or config.get("peft_version") is not None:
            return []
        return ["peft_version is missing; before 0.18, use_cayley_neumann meant another series, which is not the one "
                "that is computed now"]


def block_size(config: Mapping[str, Any], width: int) -> int:
    """b of a weight of the given width, by the fields of `config`. Raises ValueError unless one of oft_block_size and r
    is an integer of at least 1 and the other is 0, and where b would be 1."""
    size, blocks = config["oft_block_size"], config["r"]
    if not is_integer(size, 0) or not is_integer(blocks, 0) or (size == 0) == (blocks == 0):
        raise ValueError(f"oft_block_size is {shown(size)} and r is {shown(blocks)}; expected two integers, one of "
                         f"them 0 and the other at least 1")
    found = _divisor(width, size) if size else width // _divisor(width, blocks)
    if found < 2:
        raise ValueError(f"oft_block_size is {shown(size)} and r is {shown(blocks)}: blocks of one number, which "
                         f"nothing can turn, at a width of {width}")
    return found


def _divisor(width: int, wanted: int) -> int:
    """The divisor of `width` nearest to `wanted`, the smaller of two."""
    return min(_divisors(width), key=lambda n: (abs(n - wanted), n))


@functools.cache
def _divisors(width: int) -> tuple[int, ...]:
    return tuple(n for n in range(1, width + 1) if width % n == 0)


def written_size(sizes: Iterable[tuple[int, int]]) -> dict[str, int]:
    """The fields oft_block_size and r that give each width its b. sizes: pairs (width, b). Raises ValueError where
    there are none."""
    sizes = sorted(sizes)
    every = range(1, max(width for width, _ in sizes) + 1)
    found, counts = {b for _, b in sizes}, {width // b for width, b in sizes}
    exact = [(b, 0) for b in found if len(found) == 1] + [(0, n) for n in counts if len(counts) == 1]
    for size, blocks in (*exact, *((b, 0) for b in found), *((n, 0) for n in every), *((0, n) for n in every)):
        fields = {"oft_block_size": size, "r": blocks}
        if all(_gives(fields, width, b) for width, b in sizes):
            return fields
    said = ", ".join(f"{b} for a width of {width}" for width, b in sizes)
    raise ValueError(f"block sizes are {said}; OFT of PEFT has one oft_block_size or one r for all weights")


def _gives(fields: Mapping[str, int], width: int, b: int) -> bool:
    try:
        return block_size(fields, width) == b
    except ValueError:
        return False


def _older(version: Any, than: tuple[int, int]) -> bool:
    """Whether a version such as "0.17.1" is given and older."""
    found = re.match(r"(\d{1,9})\.(\d{1,9})", version) if isinstance(version, str) else None
    return found is not None and (int(found[1]), int(found[2])) < than
