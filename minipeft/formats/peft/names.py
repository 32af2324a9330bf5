"""The names of a model's modules as PEFT sees them, and of the keys in a file.

    path      "encoder.block.0.layer.0.SelfAttention.q"              a module of the Hugging Face model
    key       "base_model.model." + path + ".lora_A.weight"          an array in adapter_model.safetensors
    slot      "encoder.0.attn.q.weight"                              the same weight here
"""
from __future__ import annotations

import re
from typing import Any, Iterable, Mapping

from minipeft.checks import shown

PREFIX = "base_model.model."
LEFT_BEHIND = ("_orig_mod", "module", "default")  # by torch.compile, by data-parallel training, by PEFT in memory
_UNSAID = frozenset({*LEFT_BEHIND, "base_model", "model", "weight"})


def modules(model: Any) -> dict[str, str]:
    """{path: name of the slot of its weight}, of every module of `model` that has one, in the order of the model.
    Raises ValueError for a model without names in Hugging Face's libraries."""
    check_model(model)
    return {model.to_hf_name(name).removesuffix(".weight"): name for name, slot in model.slots.items()
            if name.endswith(".weight")}


def check_model(model: Any) -> None:
    """Raises ValueError for a model without names in Hugging Face's libraries."""
    if not hasattr(model, "to_hf_name"):
        raise ValueError(f"{type(model).__name__} is no model of Hugging Face's; PEFT's files are for T5")


def linear_modules(model: Any) -> list[str]:
    """The paths of all linear layers except the head: those of target_modules="all-linear"."""
    slots = model.slots
    head = path_of(model, "head.weight") if "head.weight" in slots else None
    return [path for path, name in modules(model).items() if slots[name].kind == "linear" and path != head]


def uses(model: Any) -> dict[str, str]:
    """{path: path of the module whose weight it uses}, of the modules without a weight of their own: T5's encoder and
    decoder use the table "shared". A tied head uses the table, too."""
    table = path_of(model, "embedding.weight")
    stacks = ("encoder", "decoder") if hasattr(model, "encoder") else ()
    tied = {"lm_head": table} if "head.weight" not in model.slots else {}
    return {**{f"{stack}.embed_tokens": table for stack in stacks}, **tied}


def modules_and_uses(model: Any) -> dict[str, str]:
    """{path: name of the slot of its weight}, of every module that has or uses one."""
    own = modules(model)
    return {**own, **{path: own[table] for path, table in uses(model).items()}}


def check_uses(what: str, paths: Iterable[str], model: Any) -> None:
    """Raises ValueError where some uses of a weight are among the `paths`, and others are not: here they are one
    weight. what: the field that chose the paths. T5's "shared" is no use of the table, and a decoder's embedding is."""
    chosen, found = set(paths), uses(model)
    all_uses = [*found, *([] if hasattr(model, "encoder") else set(found.values()))]
    some = [path for path in all_uses if path in chosen]
    others = [path for path in all_uses if path not in chosen]
    if some and others:
        use = some[0] if some[0] in found else others[0]
        raise ValueError(f"{what} chooses {some[0]}, but not {others[0]}: {_one_weight(use, model)}")


def check_keys(keys: Iterable[str], model: Any) -> None:
    """Raises ValueError if one of these `keys`, which are not expected, is of a module without a weight of its own, or
    of a bias, which no layer of the model has."""
    found = uses(model)  # once: a file may have very many keys
    for key in keys:
        path = key.removeprefix("base_model.").removeprefix("model.")
        for use in found:
            if path.startswith(f"{use}."):
                raise ValueError(f"{shown(key)} is for {use} alone: {_one_weight(use, model)}")
        if path.endswith(".bias") and ".lora_" not in path:
            raise ValueError(f"{shown(key)} is a bias, and " + (
                "T5 has none" if hasattr(model, "encoder") else "biases of adapters on a Decoder are not read"))


def _one_weight(use: str, model: Any) -> str:
    scaled = "scale_decoder_outputs=True, " if hasattr(model, "encoder") else ""
    advice = ("" if use != "lm_head" else f"; load it on a model with a head of its own: tie_word_embeddings=False, "
              f"{scaled}and a copy of embedding.weight as head.weight")
    return (f"on this model {use} has the weight of {uses(model)[use]}, and one weight cannot be changed for one of "
            f"its uses{advice}")


def path_of(model: Any, slot: str) -> str:
    """The path of the module whose weight is the slot called `slot`. Raises ValueError as `modules` does."""
    check_model(model)
    return model.to_hf_name(slot).removesuffix(".weight")


def words(key: str) -> tuple[str, ...]:
    """The words of a key or a path without those that some tools add and others leave out."""
    return tuple(word for word in key.split(".") if word not in _UNSAID)


def stripped(key: str) -> str:
    """A key without what tools leave behind, and with exactly one prefix if it had any."""
    key = ".".join(word for word in key.split(".") if word not in LEFT_BEHIND)
    return re.sub(rf"^(?:{re.escape(PREFIX)})+", PREFIX, key)


def mapped(keys: Iterable[str], expected: Iterable[str], model: Any = None,
           library: str = "PEFT", hint: str = "") -> tuple[dict[str, str], list[str]]:
    """({key in the file: key as the `library` writes it}, what was changed, in words). hint: how the error ends.

    Keys that tools have changed are compared by their `words`. Beyond that, either the file may have words in every key
    that no expected key has, such as "language_model", or the other way round; not both, because then a decoder's keys
    would be those of an encoder. Numbers are never left out. Every key needs a partner of its own among `expected`.
    Raises ValueError, with three keys of each side, for keys that have none, and for expected keys that the file lacks;
    with the reason, where it is known, for keys of PEFT's that have no place on this `model`."""
    wanted = set(expected)
    keys = list(keys)
    theirs, ours = {key: words(key) for key in keys}, {key: words(key) for key in wanted}
    more, less = _only(theirs, ours), _only(ours, theirs)
    left_out = set() if more and less else more | less
    free = {_without(said, left_out): key for key, said in ours.items()}
    found = {key: key for key in keys if key in wanted}
    taken = set(found)
    for key in keys:
        partner = free.get(_without(theirs[key], left_out))
        if key not in found and partner is not None and partner not in taken:
            found[key] = partner
            taken.add(partner)
    extra, missing = [key for key in keys if key not in found], sorted(wanted - taken)
    if model is not None:
        check_keys(extra, model)
    if extra or missing:
        raise ValueError(f"the tensors of the file are not those of its configuration on this model. "
                         f"{_some('Not expected', extra)}. {_some('Missing', missing)}{hint and f'. {hint}'}")
    changed = [key for key in keys if found[key] != key]
    return found, [f"keys were read under the names that {library} gives them ({len(changed)} in all): "
                   f"{shown(changed[0])} as {shown(found[changed[0]])}"] if changed else []


def _only(some: Mapping[str, tuple[str, ...]], others: Mapping[str, tuple[str, ...]]) -> set[str]:
    """The words, other than numbers, that every one of `some` has and none of the `others`."""
    common = set.intersection(*map(set, some.values())) if some else set()
    return {word for word in common.difference(*others.values()) if not word.isdigit()}


def _without(said: tuple[str, ...], left_out: set[str]) -> tuple[str, ...]:
    return tuple(word for word in said if word not in left_out)


def _some(what: str, keys: list[str]) -> str:
    return f"{what}: {', '.join(shown(key) for key in keys[:3])} ({len(keys)} in all)" if keys else f"{what}: none"


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless every tensor has the shape that is expected of it, and none is empty. found, expected:
    {key: shape}."""
    for key, shape in expected.items():
        if 0 in found[key]:
            raise ValueError(f"{key} has shape {list(found[key])}, no number at all; expected {list(shape)}")
        if tuple(found[key]) != tuple(shape):
            raise ValueError(f"{key} has shape {list(found[key])}; expected {list(shape)}"
                             f"{_truncated(found[key], shape)}")


def _truncated(found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """How much of a tensor is there, where one axis alone is too short: a part of it was saved."""
    short = [axis for axis, (n, whole) in enumerate(zip(found, expected)) if n != whole]
    if len(found) != len(expected) or len(short) != 1 or found[short[0]] > expected[short[0]]:
        return ""
    axis = short[0]
    return f": truncated, with {found[axis]} of {expected[axis]} {('rows', 'columns')[axis] if axis < 2 else 'slices'}"
