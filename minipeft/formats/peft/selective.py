"""Selective tuning in files of PEFT's: whole weights, rows of the table, and single elements.

    LN_TUNING           path.ln_tuning_layers.weight        the new weight, in place of the old one: norms and others
    TRAINABLE_TOKENS    path.trainable_tokens_delta [n, d]  the new rows at token_indices, in place of the old ones
    SHIRA               path.shira_weight [n]               what is added at
                        path.shira_indices [2, n]           these rows and columns, n = r (d_in + d_out), int32

Ours is the difference d from the base in all of them. On a T5 whose head is tied to the table, TRAINABLE_TOKENS holds
the rows four times: at shared, encoder.embed_tokens, decoder.embed_tokens and lm_head. Where it is not tied, PEFT's
forward does not see the rows of shared; they count once it has merged them.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Mapping

import numpy

from minipeft.attaching.method import Method
from minipeft.backend import to_host
from minipeft.checks import is_integer, shown
from minipeft.formats.peft.codec import Codec, Config, Shapes, codec
from minipeft.formats.peft.names import PREFIX, modules, path_of
from minipeft.formats.peft.places import only, rank, target_modules, targets, where
from minipeft.formats.row import Row
from minipeft.methods.mask import indices_of_mask
from minipeft.methods.selective import Selective

TABLE = "embedding.weight"


@codec
class LNTuningFile(Codec):
    """Selective tuning of whole weights, in place of the old ones."""

    peft_type = "LN_TUNING"
    used = frozenset({"target_modules", "exclude_modules"})
    defaults = {"target_modules": ["layer_norm", "final_layer_norm"], "exclude_modules": None, "modules_to_save": None}

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        return Selective(where=where(targets(config, model, "norm", "linear", "position"), model))

    def rows(self, method: Any, model: Any, config: Config) -> list[Row]:
        return [Row(f"{name}.d", f"{PREFIX}{path_of(model, name)}.ln_tuning_layers.weight", slot.shape, base=base(slot))
                for name, slot in method.places(model).items()]

    def writes(self, method: Any) -> bool:
        return isinstance(method, Selective) and method.rows is None and method.mask is None

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        places = method.places(model)
        only("LN_TUNING", places, "norm", "linear", "position")
        return {"target_modules": target_modules(places, model)}


@codec
class TrainableTokensFile(Codec):
    """Selective tuning of rows of the table, in place of the old ones."""

    peft_type = "TRAINABLE_TOKENS"
    used = frozenset({"target_modules", "token_indices"})
    harmless = frozenset({"init_weights"})
    needed = ("token_indices",)
    defaults = {"target_modules": "shared", "init_weights": True}

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        chosen, ids = targets(config, model), config["token_indices"]
        vocabulary = model.slots[TABLE].shape[0]
        if not isinstance(ids, list) or not ids or not all(is_integer(i, 0) and i < vocabulary for i in ids) \
                or len(set(ids)) < len(ids):
            raise ValueError(f"token_indices is {shown(ids)}; expected distinct ids from 0 to {vocabulary - 1}, at "
                             f"least one")
        if chosen != [path_of(model, TABLE)]:
            raise ValueError(f"target_modules is {shown(config['target_modules'])}, which chooses "
                             f"{', '.join(chosen[:3])}; expected the table of the vocabulary alone, 'shared'")
        return Selective(where=where(chosen, model), rows=tuple(ids))

    def rows(self, method: Any, model: Any, config: Config) -> list[Row]:
        ids, slot = list(method.rows), model.slots[TABLE]
        to_file, to_ours = orders(numpy.array(ids))
        return [Row(f"{TABLE}.d", f"{PREFIX}{path}.trainable_tokens_delta", (len(ids), slot.shape[1]),
                    lambda d: d[to_file], lambda d: d[to_ours], base(slot)[ids]) for path in tables(model)]

    def writes(self, method: Any) -> bool:
        return isinstance(method, Selective) and method.rows is not None

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        places = method.places(model)
        only("TRAINABLE_TOKENS", places, "embedding")
        return {"target_modules": target_modules(places, model), "token_indices": list(method.rows)}


@codec
class ShiraFile(Codec):
    """Selective tuning of single elements, with a mask."""

    peft_type = "SHIRA"
    used = frozenset({"target_modules", "r"})
    harmless = frozenset({"init_weights", "mask_type", "random_seed"})
    neutral = {"fan_in_fan_out": (False,)}
    needed = ("r",)
    defaults = {"target_modules": ["q", "v"], "mask_type": "random", "random_seed": None, "init_weights": True,
                "fan_in_fan_out": False, "modules_to_save": None}

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        paths, r, slots = targets(config, model, "linear"), rank(config), modules(model)
        mask = {}
        for path in paths:
            d_out, d_in = model.slots[slots[path]].shape
            if r * (d_in + d_out) > d_in * d_out:
                raise ValueError(f"r is {shown(r)}, which means r ({d_in} + {d_out}) elements; expected at most the "
                                 f"{d_in * d_out} that {path} has")
            mask[slots[path]] = range(r * (d_in + d_out))  # as many as there will be; `completed` says which
        return Selective(where=where(paths, model), mask=mask)

    def rows(self, method: Any, model: Any, config: Config) -> list[Row]:
        return [row for name, slot in method.places(model).items()
                for row in elements(name, slot, path_of(model, name), method.mask[name])]

    def completed(self, method: Any, theirs: Mapping[str, Any], model: Any) -> Method:
        mask = {}
        for name, slot in method.places(model).items():
            key = f"{PREFIX}{path_of(model, name)}.shira_indices"
            at = theirs[key]
            with numpy.errstate(invalid="ignore"):  # on Windows they are stored as float32
                rows, columns = found = at.astype("int64")
            if (found != at).any() or (found < 0).any() or (found >= numpy.array(slot.shape)[:, None]).any():
                raise ValueError(f"{key} points outside of {name}; expected rows from 0 to {slot.shape[0] - 1} and "
                                 f"columns from 0 to {slot.shape[1] - 1}")
            flat = rows * slot.shape[1] + columns
            if len(numpy.unique(flat)) < len(flat):
                raise ValueError(f"{key} holds an element twice; expected distinct ones")
            mask[name] = flat
        return dataclasses.replace(method, mask=mask)

    def writes(self, method: Any) -> bool:
        return isinstance(method, Selective) and method.mask is not None

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        places = method.places(model)
        only("SHIRA", places, "linear")
        ranks = {name: divmod(size_of(method.mask[name]), sum(slot.shape)) for name, slot in places.items()}
        r = next(iter(ranks.values()))[0]
        for name, slot in places.items():
            if ranks[name] != (r, 0) or not r:
                raise ValueError(f"the mask of {name} has {size_of(method.mask[name])} elements; SHIRA of PEFT has "
                                 f"r ({slot.shape[1]} + {slot.shape[0]}), with one r for all weights")
        return {"target_modules": target_modules(places, model), "r": r}


def base(slot: Any) -> numpy.ndarray:
    """The base weight of a slot, on the host: [d_out, d_in] or [d]."""
    return to_host(slot.base.dense().data)


def tied(model: Any) -> bool:
    """Whether the head is the table of the vocabulary."""
    return "head.weight" not in model.slots


def tables(model: Any) -> tuple[str, ...]:
    """The modules of PEFT's at which the rows of the table are."""
    return ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head") if tied(model) else ("shared",)


def orders(numbers: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(permutation from ascending to the order of `numbers` [n], permutation back), for arrays whose first axis they
    count."""
    to_ours = numpy.argsort(numbers, kind="stable")
    return numpy.argsort(to_ours, kind="stable"), to_ours


def size_of(mask: Any) -> int:
    """How many elements a mask chooses: booleans, or flat indices."""
    return int(numpy.count_nonzero(mask)) if to_host(mask).dtype == bool else len(mask)


def elements(name: str, slot: Any, path: str, mask: Any) -> list[Row]:
    """The rows of d and of the indices of the slot called `name`, the weight of the module at `path`. mask: booleans,
    or flat indices in the order of the file."""
    columns, n = slot.shape[1], len(mask) if isinstance(mask, range) else size_of(mask)

    def to_file() -> numpy.ndarray:
        return orders(in_file(mask, name, slot))[0]

    def to_ours() -> numpy.ndarray:
        return orders(in_file(mask, name, slot))[1]

    return [Row(f"{name}.d", f"{PREFIX}{path}.shira_weight", (n,), lambda d: d[to_file()], lambda d: d[to_ours()]),
            Row(f"{name}.indices", f"{PREFIX}{path}.shira_indices", (2, n),
                lambda flat: numpy.stack(numpy.divmod(flat[to_file()], columns)).astype("int32"),
                lambda at: (at[0].astype("int64") * columns + at[1].astype("int64"))[to_ours()])]


def in_file(mask: Any, name: str, slot: Any) -> numpy.ndarray:
    """The flat indices [n] of a mask of the slot called `name`, in the order of a file; of booleans, ascending."""
    array = to_host(mask)
    return indices_of_mask(name, slot.shape, array) if array.dtype == bool else array
