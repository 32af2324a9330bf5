"""Copies of base weights in a file of PEFT's (save_embedding_layers).

    path.base_layer.weight     beside an adapter on an embedding layer or a head
    path.weight                of an embedding layer or a head without one, when the vocabulary was resized

They are no part of the adapter, so they must be equal to the weights of this model. They are kept, and written back.
"""
from __future__ import annotations

from typing import Any, Collection, Iterable, Mapping

import numpy

from minipeft.backend import to_host
from minipeft.formats.peft.names import PREFIX, modules_and_uses, path_of, stripped


def copies(stored: Iterable[str], expected: Collection[str], model: Any) -> dict[str, numpy.ndarray]:
    """{key: the weight of this model}, of the copies among the keys `stored` in the file. expected: the keys of the
    adapter itself."""
    if all(key in expected for key in stored):
        return {}
    own = modules_and_uses(model)
    weights = {**{f"{PREFIX}{path}.base_layer.weight": slot for path, slot in own.items()},
               **{f"{PREFIX}{path}.weight": own[path] for path in (path_of(model, "embedding.weight"), "lm_head")}}
    keys = [key for said in stored for key in (stripped(said), PREFIX + stripped(said))
            if key in weights and key not in expected]
    return {key: to_host(model.slots[weights[key]].base.dense().data) for key in keys}


def check_copies(theirs: Mapping[str, numpy.ndarray], bases: Mapping[str, numpy.ndarray]) -> None:
    """Raises ValueError for one of the arrays in a file, `theirs`, that should be one of `bases`, the weights of this
    model, and has other numbers, whichever of the two dtypes is the wider one."""
    for key, base in bases.items():
        found = theirs[key]
        if not any(map(numpy.array_equal, (found.astype(base.dtype), found), (base, base.astype(found.dtype)))):
            trained = "" if key.endswith("base_layer.weight") else (
                "; or, if the module was trained as a whole, name it in modules_to_save")
            raise ValueError(f"{key} should be a copy of the base, and this model has other numbers there: load the "
                             f"adapter on the base that it was trained on{trained}")
