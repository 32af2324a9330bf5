"""The names of a model's modules as PEFT sees them, and of the keys in a file.

    path      "encoder.block.0.layer.0.SelfAttention.q"              a module of the Hugging Face model
    key       "base_model.model." + path + ".lora_A.weight"          an array in adapter_model.safetensors
    slot      "encoder.0.attn.q.weight"                              the same weight here
"""
from __future__ import annotations

from typing import Any, Iterable, Mapping

from minipeft.checks import shown
from minipeft.nn.slot import Slot

PREFIX = "base_model.model."
LEFT_BEHIND = ("_orig_mod.", "module.")  # by torch.compile, and by data-parallel training


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
    head = None if "head.weight" not in model.slots else model.to_hf_name("head.weight").removesuffix(".weight")
    return [path for path, name in modules(model).items() if model.slots[name].kind == "linear" and path != head]


def path_of(model: Any, slot: str) -> str:
    """The path of the module whose weight is the slot called `slot`."""
    return model.to_hf_name(slot).removesuffix(".weight")


def slot_of(model: Any, path: str) -> Slot:
    """The slot of the weight of the module at `path`."""
    return model.slots[modules(model)[path]]


def mapped(keys: Iterable[str], expected: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """({key in the file: key as PEFT writes it}, what was changed, in words).

    A prefix that a tool left behind is stripped, and a doubled or missing "base_model.model." is mended, where this
    gives every key a partner of its own among `expected`. Raises ValueError, with three keys of each side, for keys
    that have none, and for expected keys that the file lacks."""
    keys, wanted = list(keys), set(expected)
    for change, words in _CHANGES:
        renamed = {key: change(key) for key in keys}
        if len(set(renamed.values())) == len(keys) and set(renamed.values()) == wanted:
            return renamed, [words] if words else []
    best = min((({key: change(key) for key in keys}) for change, _ in _CHANGES),
               key=lambda renamed: len(set(renamed.values()) ^ wanted))
    extra = [key for key, found in best.items() if found not in wanted]
    missing = [key for key in wanted if key not in set(best.values())]
    raise ValueError(f"the tensors of the file are not those of its configuration on this model. "
                     f"{_some('Not expected', extra)}. {_some('Missing', sorted(missing))}")


def stripped(key: str) -> str:
    """A key without what tools leave behind, and with exactly one prefix if it had any."""
    for left in LEFT_BEHIND:
        key = key.replace(left, "") if key.startswith(left) or f".{left}" in key else key
    while key.startswith(PREFIX * 2):
        key = key.removeprefix(PREFIX)
    return key


def _prefixed(key: str) -> str:
    key = stripped(key)
    return key if key.startswith("base_model.") else PREFIX + key


_CHANGES = (  # tried in this order: (key -> key, in words)
    (lambda key: key, ""),
    (lambda key: key.replace(".default.", ".") if ".default." in key else key.removesuffix(".default"),
     "the adapter's name, 'default', was taken out of the keys"),
    (stripped, f"prefixes that a tool left behind ({', '.join(LEFT_BEHIND)}, a second {PREFIX}) were stripped"),
    (_prefixed, f"the missing prefix {PREFIX} was put in front of the keys"))


def _some(what: str, keys: list[str]) -> str:
    return f"{what}: {', '.join(shown(key) for key in keys[:3])} ({len(keys)} in all)" if keys else f"{what}: none"


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless every tensor has the shape that is expected of it, and none is empty."""
    for key, shape in expected.items():
        if 0 in found[key]:
            raise ValueError(f"{key} has shape {list(found[key])}, no number at all; expected {list(shape)}")
        if tuple(found[key]) != tuple(shape):
            raise ValueError(f"{key} has shape {list(found[key])}; expected {list(shape)}")
