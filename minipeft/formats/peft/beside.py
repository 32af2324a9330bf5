"""Weights that a file of PEFT's holds beside its method. Here the method and these are the parts of one `Union`.

    modules_to_save             saved_modules.py        beside every method that wraps modules, and beside prompts
    trainable_token_indices     token_rows.py           beside LoRA
"""
from __future__ import annotations

import dataclasses
from typing import Any, Iterable

from minipeft.attaching.method import Method
from minipeft.checks import shown
from minipeft.formats.peft import saved_modules, token_rows
from minipeft.formats.peft.codec import Codec, Config
from minipeft.formats.peft.names import PREFIX, modules_and_uses, uses
from minipeft.formats.row import Row
from minipeft.methods.selective import Selective
from minipeft.methods.union import Union
from minipeft.nn.where import exactly

PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")


def fields(codec: Codec) -> set[str]:
    """The fields of a configuration that are read here."""
    return {*([saved_modules.FIELD] if codec.peft_type != "TRAINABLE_TOKENS" else []),
            *([token_rows.FIELD] if codec.peft_type == "LORA" else [])}


def joined(main: Method, codec: Codec, config: Config, model: Any) -> Method:
    """`main`, or the union of it and of what stands beside it in a file with these fields. Raises ValueError for
    malformed fields, and where two of them choose the same weight."""
    saved, tokens = _read(codec, config, model)
    owner: dict[str, str] = {}
    for what, names in (("the method itself", main.places(model)), (saved_modules.FIELD, dict.fromkeys(saved.values())),
                        (token_rows.FIELD, dict.fromkeys(modules_and_uses(model)[path] for path in tokens))):
        for name in names:
            if owner.setdefault(name, what) != what:
                raise ValueError(f"{name} is chosen by {owner[name]} and by {what}; expected one of them")
    parts = [*([saved_modules.part(saved.values())] if saved else []), *token_rows.parts(tokens, model)]
    return Union(main, *parts) if parts else main


def _read(codec: Codec, config: Config, model: Any) -> tuple[dict[str, str], dict[str, list[int]]]:
    """The choices of the two fields: {path: slot}, {path: ids}."""
    known = fields(codec)
    return (saved_modules.saved(config, model) if saved_modules.FIELD in known else {},
            token_rows.trained(config, model) if token_rows.FIELD in known else {})


def main_of(method: Method, model: Any) -> Method:
    """The method without what stands beside it in a file: of a union the part that is no Selective, or the first.
    Raises ValueError for a union with two parts that are no Selective."""
    return _split(method, model)[0]


def _split(method: Method, model: Any) -> tuple[Method, list[Selective]]:
    """The main part, and the others, each on its own places."""
    if not isinstance(method, Union):
        return method, []
    places, parts = set(method.places(model)), []
    for part in method.parts:
        own = part.places(model)
        kept = [name for name in own if name in places]
        narrowed: Any = part
        parts.append(part if len(kept) == len(own) else dataclasses.replace(narrowed, where=exactly(kept)))
    main = next((part for part in parts if not isinstance(part, Selective)), parts[0])
    beside = []
    for part in parts:
        if isinstance(part, Selective) and part is not main:
            beside.append(part)
        elif part is not main:
            raise ValueError(f"PEFT holds one method in a file, and beside it whole modules and rows of tables; this "
                             f"is {shown(main)} beside {shown(part)}")
    return main, beside


def rows(method: Method, codec: Codec, model: Any, config: Config) -> list[Row]:
    """Every array of the method, or of the union, under both names."""
    saved, tokens = _read(codec, config, model)
    return [*codec.rows(main_of(method, model), model, config),
            *saved_modules.rows(saved, model, "base_model." if codec.peft_type in PROMPTS else PREFIX),
            *token_rows.rows(tokens, model)]


def computed(method: Method, codec: Codec, model: Any, config: Config) -> dict[str, Any]:
    """{our key: array} of fixed arrays that the file leaves out."""
    return {**codec.computed(main_of(method, model), model, config),
            **token_rows.computed(_read(codec, config, model)[1], model)}


def notes(keys: Iterable[str], codec: Codec, config: Config, model: Any) -> list[str]:
    """Sentences for the reader of a file with these keys and fields: about names that choose no module, and about
    tensors for "shared", which PEFT sees at no use of the table, except for the rows of a tied one."""
    idle = saved_modules.idle(config, model) if saved_modules.FIELD in fields(codec) else []
    found = [f"{saved_modules.FIELD} names {', '.join(map(shown, idle[:3]))}{', ...' if idle[3:] else ''}, which is no "
             f"module of this model"] if idle else []
    paths = [key.removeprefix("base_model.").removeprefix("model.") for key in keys]
    ignored = [path for path in paths if path.startswith("shared.")
               and not (path.endswith("trainable_tokens_delta") and "lm_head" in uses(model))]
    if ignored and not any(path.startswith("encoder.embed_tokens.") for path in paths):
        found.append("PEFT's own forward ignores what is stored for 'shared', because T5's encoder and decoder keep "
                     "the table that they had; here it acts at every use of the table")
    return found


def written(method: Method, codec: Codec, model: Any, said: Config) -> dict[str, Any]:
    """The fields for a file of the method, or of the union. said: those of the file that it came from, or none. Raises
    ValueError for a part that PEFT cannot hold beside its method."""
    main, beside = _split(method, model)
    whole: list[str] = []
    tokens: dict[str, list[int]] = {}
    for part in beside:
        for name, slot in part.places(model).items():
            if part.rows is None and part.mask is None:
                whole.append(name)
            else:
                tokens[name] = token_rows.ids_of(part, name, slot)
    if tokens and token_rows.FIELD not in fields(codec) or whole and saved_modules.FIELD not in fields(codec):
        raise ValueError(f"PEFT has whole modules beside most methods, and rows of a table beside LoRA alone; it "
                         f"cannot hold those of {', '.join([*tokens, *whole][:3])} beside {shown(main)}")
    given = {saved_modules.FIELD: saved_modules.written(whole, model, said),
             token_rows.FIELD: token_rows.written(tokens, model, said) if tokens else None}
    return {field: value for field, value in given.items() if field in fields(codec)}
