"""The methods of a plan: every registered one, with the settings that it has by default.

A name is that of the class in lower case, or short: "prompt", "prefix". Selective tuning has the names "norms" and
"biases", and "full" is full fine-tuning. A pattern of places is searched in the names of this library and, where
nothing is found there, in those of Hugging Face.
"""
from __future__ import annotations

import dataclasses
import re
from typing import Any, Callable

from minipeft.attaching.method import METHODS, Method
from minipeft.checks import integer, shown
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.prompt import PromptTuning
from minipeft.methods.selective import Selective
from minipeft.nn.where import Where, matching
from minipeft.tools.planning.configs import Config, elsewhere
from minipeft.tools.planning.decoder import DecoderConfig

FULL, ALL_LINEAR = "full", "all-linear"
_SHORT = {"prompttuning": "prompt", "prefixtuning": "prefix"}
_NOT_ALONE = ("Union",)  # made of other methods
_OWN_RANK = ("VeRA",)    # its r counts frozen directions, and is usually larger


def known() -> dict[str, Callable[[], Method | None]]:
    """{name: a function that makes the method with its defaults}; None is full fine-tuning. A registered method that
    has no defaults is left out."""
    found: dict[str, Callable[[], Method | None]] = {FULL: lambda: None}
    for name, cls in METHODS.items():
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        complete = all(f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
                       for f in fields)
        if name == "Selective":
            found["norms"] = lambda: Selective(component="norm")
            found["biases"] = lambda: Selective(type="bias")
        elif name not in _NOT_ALONE and complete:
            found[_SHORT.get(name.lower(), name.lower())] = cls
    return found


def made(name: str, config: Config, rank: int | None = None, where: Where | None = None, asked: bool = True
         ) -> Method | None:
    """The method of this `name`; None for full fine-tuning. rank, where: in place of its defaults. asked: whether it is
    the method that the plan is about; the others take a rank or a pattern only if it means the same to them. Raises
    ValueError for an unknown name, and for a rank or a pattern that the method does not have."""
    makers = known()
    if name not in makers:
        hint = "; QLoRA is lora with quantize='nf4' (--quantize nf4)" if name == "qlora" else ""
        raise ValueError(f"method is {shown(name)}; expected one of {', '.join(makers)}{hint}")
    method: Any = makers[name]()
    if method is None:
        if asked and (rank is not None or where is not None):
            raise ValueError(f"{FULL} trains all weights and has no {'where' if rank is None else 'rank'}; leave it "
                             "out")
        return None
    changes: dict[str, Any] = {}
    has_rank = any(f.name == "rank" for f in dataclasses.fields(method))
    if rank is not None and (asked or has_rank and type(method).__name__ not in _OWN_RANK):
        if not has_rank:
            raise ValueError(f"{name} has no rank; leave it out")
        changes["rank"] = integer("rank", rank, 1)
    if where is not None and (asked or type(method).kinds == Method.kinds and not isinstance(method, Selective)):
        changes["where"] = where
    if isinstance(method, PromptTuning):
        changes["init"] = "random"
        if isinstance(config, DecoderConfig):
            changes.setdefault("where", r"^decoder\.input$")
    if isinstance(method, PrefixTuning) and isinstance(config, DecoderConfig):
        changes["sites"] = "decoder"
    return dataclasses.replace(method, **changes)


def chosen(where: Where | None, config: Config, model: Any) -> Where | None:
    """The places that `where` means: a pattern on our names or, if it finds nothing there, on Hugging Face's;
    "all-linear" for every matrix but the embedding and the head. Raises ValueError where it finds nothing."""
    if where is None or not isinstance(where, str):
        return where
    if where == ALL_LINEAR:
        return r"\.(attn|cross|ff)\.\w+\.weight$"
    names = [name for name, _ in model.named_places()]
    try:
        matching(names, where, "place")
    except ValueError:
        theirs = {name for name in names if re.search(where, elsewhere(config, name))} if _compiles(where) else set()
        if not theirs:
            raise
        return lambda name: name in theirs
    return where


def _compiles(where: str) -> bool:
    try:
        return bool(re.compile(where))
    except re.error:
        return False


def label(name: str, method: Method | None) -> str:
    """The row of a method in a table: its name, and its rank or size."""
    if method is None:
        return name
    for field, letter in (("rank", "r"), ("block_size", "b"), ("length", "p"), ("reduction", "d/m")):
        if (value := getattr(method, field, None)) is not None:
            return f"{name} {letter}={value:g}"
    return name
