"""modules_to_save in a file of PEFT's: modules that were trained as a whole, beside the method.

    modules_to_save=["lm_head"]      path.weight, of the shape of W: the trained weight itself; here W0 + d, a Selective

A name chooses every module whose path ends with it, even within a word ("o" chooses SelfAttention.o and
DenseReluDense.wo), and with a module all modules inside of it. PEFT copies each module for itself. So a weight with
several uses, T5's table, has a copy for each use that was chosen, and here these must be equal. The copy for "shared"
has no effect in PEFT, whose encoder and decoder keep the table that they had. (After
merge_and_unload with a copy of a tied head, PEFT's logits are sqrt(d_model) times too large.)

The keys begin with "base_model.model.", and beside a prompt or a prefix with "base_model.".
"""
from __future__ import annotations

from typing import Any, Iterable, Iterator, Mapping

from minipeft.backend import to_host
from minipeft.formats.peft.names import check_uses, modules_and_uses, uses
from minipeft.formats.row import Row
from minipeft.formats.peft.targets import names_in
from minipeft.methods.selective import Selective
from minipeft.nn.where import exactly

FIELD = "modules_to_save"


def saved(config: Mapping[str, Any], model: Any) -> dict[str, str]:
    """{path: name of the slot of its weight}, of all modules that a config saves. Raises ValueError for a malformed
    field, and where some uses of a weight are saved and others are not."""
    found = _chosen(names_in(config, FIELD), model)
    check_uses(FIELD, found, model)
    return found


def idle(config: Mapping[str, Any], model: Any) -> list[str]:
    """The names in the field of a config that choose no module of this model."""
    names = names_in(config, FIELD)
    there = {end for path in (modules_and_uses(model) if names else {}) for end in _ends(path)}
    return [name for name in names if name not in there]


def _chosen(names: list[str], model: Any) -> dict[str, str]:
    """{path: slot} of the modules that the names choose."""
    wanted = set(names)
    return {path: slot for path, slot in (modules_and_uses(model) if names else {}).items()
            if not wanted.isdisjoint(_ends(path))}


def _ends(path: str) -> Iterator[str]:
    """Every name that chooses the module at `path`: the ends of its path, and of those of the modules around it."""
    for stop in [i for i, letter in enumerate(path) if letter == "."] + [len(path)]:
        yield from (path[start:stop] for start in range(stop))


def part(slots: Iterable[str]) -> Selective:
    """The part of a Union that trains these slots as a whole."""
    return Selective(where=exactly(dict.fromkeys(slots)))


def rows(paths: Mapping[str, str], model: Any, prefix: str) -> list[Row]:
    """A row for each of `paths`, {path: slot}. prefix: of the keys."""
    return [Row(f"{name}.d", f"{prefix}{path}.weight", model.slots[name].shape,
                base=to_host(model.slots[name].base.dense().data)) for path, name in paths.items()]


def written(slots: Iterable[str], model: Any, said: Mapping[str, Any]) -> list[str] | None:
    """The field, for a file in which these slots are saved: as in the config `said` if it chooses them, else last words
    of paths if these choose exactly them, else whole paths. A table is saved for each of its uses."""
    wanted, names = set(slots), names_in(said, FIELD)
    if set(_chosen(names, model).values()) == wanted:
        return names or None
    paths = {path for path, slot in modules_and_uses(model).items() if slot in wanted} - set(uses(model).values())
    words = sorted({path.rpartition(".")[2] for path in paths})
    return words if set(_chosen(words, model)) == paths else sorted(paths)
