"""trainable_token_indices in a file of PEFT's: rows of a table that were trained beside LoRA.

    {"shared": [9, 5]}     path.token_adapter.trainable_tokens_delta [n, d]: the new rows 9 and 5, in spite of its name

Here they are W0 + d at these rows, a Selective: rows=(9, 5) of the table, or a mask for a matrix such as a head. A list
alone is about the table. A name chooses every module whose path ends with it.

PEFT gives a tied table's rows to all of its uses, and stores them once, for "shared". An untied table's rows for
"shared" have no effect in PEFT, whose encoder and decoder keep the table that they had. Those for "embed_tokens" have
one. They are stored twice, for the encoder and for the decoder, and here the two must be equal.
"""
from __future__ import annotations

from typing import Any, Mapping, Sequence

import numpy

from minipeft.backend import to_host
from minipeft.checks import is_integer, shown
from minipeft.formats.peft.names import PREFIX, check_uses, modules_and_uses, uses
from minipeft.formats.row import Row
from minipeft.methods.mask import indices_of_mask
from minipeft.methods.selective import Selective
from minipeft.nn.where import exactly

FIELD, KEY = "trainable_token_indices", "token_adapter.trainable_tokens_delta"


def trained(config: Mapping[str, Any], model: Any) -> dict[str, list[int]]:
    """{path: ids} of the modules whose rows a file with this config stores, in its order. Raises ValueError for a
    malformed field, a name that chooses no module, ids that its weight lacks, and different ids for the uses of one
    weight."""
    given = config.get(FIELD)
    if given is None:
        return {}
    if not isinstance(given, dict):
        given = {"shared": given}
    modules = modules_and_uses(model)
    found: dict[str, list[int]] = {}
    for name, ids in given.items():
        paths = [path for path in modules if name and path.endswith(name)]
        if not paths:
            raise ValueError(f"{FIELD} names {shown(name)}, which is no module of this model; expected one such as "
                             f"'shared'")
        _check(name, ids)
        for path in paths:
            shape = model.slots[modules[path]].shape
            if len(shape) != 2 or max(ids) >= shape[0]:
                raise ValueError(f"{FIELD} has {shown(ids)} for {path}, whose weight is {list(shape)}; expected ids of "
                                 f"its rows")
            if found.setdefault(path, ids) != ids:
                raise ValueError(f"{FIELD} has two lists for {path}, {shown(found[path])} and {shown(ids)}")
    first: dict[str, str] = {}
    for path, ids in found.items():
        other = first.setdefault(modules[path], path)
        if found[other] != ids:
            raise ValueError(f"{FIELD} has {shown(found[other])} for {other} and {shown(ids)} for {path}, which are "
                             f"one weight on this model; expected the same ids")
    if "lm_head" in uses(model) and "shared" in found:  # tied: PEFT stores the rows once
        return {path: ids for path, ids in found.items() if path not in uses(model)}
    check_uses(FIELD, found, model)
    return found


def _check(name: str, ids: Any) -> None:
    if not isinstance(ids, list) or not ids or not all(map(is_integer, ids)) or len(set(ids)) < len(ids):
        raise ValueError(f"{FIELD} has {shown(ids)} for {name}; expected distinct integers >= 0, at least one")


def parts(ids: Mapping[str, list[int]], model: Any) -> list[Selective]:
    """A part of a Union for each weight in {path: ids}."""
    modules = modules_and_uses(model)
    return [_part(slot, model.slots[slot], some) for slot, some in {modules[p]: ids[p] for p in ids}.items()]


def _part(name: str, slot: Any, ids: list[int]) -> Selective:
    if slot.kind == "embedding":
        return Selective(rows=tuple(ids), where=exactly([name]))
    return Selective(mask={name: _flat(slot, ids)}, where=exactly([name]))


def _flat(slot: Any, ids: Sequence[int]) -> numpy.ndarray:
    """The flat indices of the rows `ids`."""
    return (numpy.array(ids)[:, None] * slot.shape[1] + numpy.arange(slot.shape[1])).reshape(-1)


def rows(ids: Mapping[str, list[int]], model: Any) -> list[Row]:
    """A row for each of {path: ids}."""
    modules = modules_and_uses(model)
    return [_row(modules[path], f"{PREFIX}{path}.{KEY}", model.slots[modules[path]], some)
            for path, some in ids.items()]


def _row(name: str, key: str, slot: Any, ids: list[int]) -> Row:
    """Their rows are in the order of `ids`; in our d the ids ascend, and the d of a mask is flat."""
    order = numpy.argsort(ids)
    shape, place = (len(ids), slot.shape[1]), numpy.argsort(order)
    ours = shape if slot.kind == "embedding" else (-1,)
    return Row(f"{name}.d", key, shape, lambda d: d.reshape(shape)[place], lambda d: d[order].reshape(ours),
               base=to_host(slot.base.dense().data)[ids])


def computed(ids: Mapping[str, list[int]], model: Any) -> dict[str, numpy.ndarray]:
    """{our key: array}: the indices of the masks for {path: ids}."""
    modules = modules_and_uses(model)
    slots = {modules[path]: (model.slots[modules[path]], some) for path, some in ids.items()}
    return {f"{name}.indices": indices_of_mask(name, slot.shape, _flat(slot, some))
            for name, (slot, some) in slots.items() if slot.kind != "embedding"}


def ids_of(part: Selective, name: str, slot: Any) -> list[int]:
    """The ids of the rows that the part trains at the slot called `name`. Raises ValueError for a mask that is not made
    of whole rows."""
    if part.rows is not None:
        return list(part.rows)
    flat = indices_of_mask(name, slot.shape, part.mask[name])  # type: ignore[index]
    ids = numpy.unique(flat // slot.shape[-1])
    if len(slot.shape) != 2 or flat.size != ids.size * slot.shape[1]:
        raise ValueError(f"the mask of {name} is not made of whole rows, and {FIELD} holds whole rows alone")
    return ids.tolist()


def written(ids: Mapping[str, list[int]], model: Any, said: Mapping[str, Any]) -> Any:
    """The field, for a file with {name of a slot: ids}: as in the config `said` if it means the same, else by paths.
    The rows of an untied table are stored for its uses."""
    modules = modules_and_uses(model)
    if {modules[path]: set(some) for path, some in trained(said, model).items()} == {
            name: set(some) for name, some in ids.items()}:
        return said.get(FIELD)
    table_of = uses(model)
    return {path: some for name, some in ids.items() for path, slot in modules.items() if slot == name
            and (path not in table_of if "lm_head" in table_of else path not in table_of.values())}
