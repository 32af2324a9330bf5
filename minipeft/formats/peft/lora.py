"""LoRA and DoRA in a file of PEFT's. The tensors are in `lora_rows.py`.

    LoRA     W + s B A                                use_dora: false
    DoRA     (m / |V|) V,  V = W + s B A              use_dora: true
    PiSSA    W - s B0 A0 + s B A                      init_lora_weights: "pissa" (`lora_start.py`)

r and alpha may differ from path to path (rank_pattern, alpha_pattern, looked up one by one); s = alpha / r, or alpha /
sqrt(r) with use_rslora.
"""
from __future__ import annotations

import math
import re
from typing import Any, Mapping

import numpy

from minipeft.attaching.method import Method
from minipeft.checks import is_integer, is_number, shown
from minipeft.formats.peft.codec import Codec, Config, Shapes, codec
from minipeft.formats.peft.lora_rows import doubled, factors, magnitude
from minipeft.formats.peft.lora_start import principal, starts_from_base
from minipeft.formats.peft.names import linear_modules, modules, path_of, words
from minipeft.formats.peft.row import Row
from minipeft.formats.peft.targets import chosen, ends_with, first_match, pattern
from minipeft.methods.dora import DoRA
from minipeft.methods.lora import LoRA
from minipeft.methods.per_place import PerPlace

PLACES = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"})
USUAL = ("q", "v")  # target_modules of LoRA on T5, where PEFT finds none


def where(paths: list[str], model: Any) -> tuple[str, ...]:
    """The pattern list that chooses exactly the slots of the modules at `paths`."""
    slots = modules(model)
    return tuple(f"^{re.escape(slots[path])}$" for path in paths)


def targets(config: Config, model: Any, shapes: Shapes = {}, prefix: str = "lora_") -> list[str]:
    """The paths that the config chooses on the model. Where it does not say which, they are those that stand in the
    keys of `shapes` before a word that begins with `prefix`. Raises ValueError where there are none."""
    if config.get("target_modules") is not None or not shapes:
        return chosen(config, list(modules(model)), linear_modules(model))
    paths = {words(path): path for path in modules(model)}
    longest = max(map(len, paths))
    found = {paths.get(said[:at]) for said in map(words, shapes) for at, word in enumerate(said)
             if word.startswith(prefix) and at <= longest}
    if not found - {None}:
        raise ValueError(f"target_modules is not given, and no tensor belongs to a module of this model: "
                         f"{', '.join(shown(key) for key in list(shapes)[:3])}")
    return [path for path in modules(model) if path in found]


def rank(config: Config, field: str = "r") -> int:
    """The rank in `field`. Raises ValueError unless it is an integer of at least 1."""
    if not is_integer(config.get(field), 1):
        raise ValueError(f"{field} is {shown(config.get(field))}; expected an integer >= 1")
    return config[field]


def alpha(value: Any, field: str) -> float:
    """The alpha `value` of the field called `field`. Raises ValueError for 0, text, null and what is not finite."""
    if not is_number(value) or value == 0:
        raise ValueError(f"{field} is {shown(value)}; expected a finite number other than 0, which would switch the "
                         f"adapter off")
    return value


def flag(config: Config, field: str) -> bool:
    """Whether `field` is on. Raises ValueError unless it is true, false, null or missing."""
    if config.get(field) is not None and type(config[field]) is not bool:
        raise ValueError(f"{field} is {shown(config[field])}; expected true or false")
    return bool(config.get(field))


def by_place(config: Config, field: str, paths: list[str], model: Any, usual: Any) -> tuple[tuple[str, Any], ...]:
    """Our pattern, ((regular expression, value), ...), of PEFT's rank_pattern or alpha_pattern in `field`: an entry for
    each of `paths` whose value differs from the usual one. Raises ValueError for a value that is no rank or alpha."""
    given, slots = pattern(config, field), modules(model)
    for key, value in given.items():
        what = f"{field}[{shown(key)}]"
        if field == "rank_pattern":
            rank({what: value}, what)
        else:
            alpha(value, what)
    found = {path: first_match(given, path) for path in paths}
    return tuple((f"^{re.escape(slots[path])}$", value) for path, value in found.items()
                 if value is not None and value != usual)


def unused_patterns(config: Config, paths: list[str]) -> list[str]:
    """A sentence for each of rank_pattern and alpha_pattern that has a key which matches none of `paths`."""
    unused = {field: pattern(config, field).unused(paths) for field in ("rank_pattern", "alpha_pattern")}
    return [f"{field} has {', '.join(map(shown, keys[:3]))} ({len(keys)} in all), which no adapted module matches"
            for field, keys in unused.items() if keys]


def usual(method: PerPlace, times: int = 1) -> tuple[int, float]:
    """The r and alpha of a file of `method`, whose scale is alpha / r, or alpha / sqrt(r). times: how much larger a
    rank is written than it is here."""
    return times * method.rank, _alpha(method, method.alpha, method.rank, times)


def patterns(method: PerPlace, names: Mapping[str, Any], model: Any, times: int = 1) -> dict[str, dict[str, Any]]:
    """PEFT's rank_pattern and alpha_pattern of a method on the places `names`: an entry for each place whose rank or
    alpha is not the `usual` one, under its path. times: as in `usual`."""
    r, a = usual(method, times)
    ranks = {path_of(model, name): times * method.rank_at(name, slot) for name, slot in names.items()}
    alphas = {path_of(model, name): _alpha(method, method.alpha_at(name), method.rank_at(name, slot), times)
              for name, slot in names.items()}
    return {"rank_pattern": {path: found for path, found in ranks.items() if found != r},
            "alpha_pattern": {path: found for path, found in alphas.items() if found != a}}


def _alpha(method: PerPlace, value: float, r: int, times: int) -> float:
    """The alpha that gives, beside a rank of times * r, the s that an alpha of `value` gives here beside r."""
    if method.scaling == "alpha":
        return value * r * times
    return value if times == 1 else value * (times if method.scaling == "alpha/r" else math.sqrt(times))


def target_modules(names: Mapping[str, Any], model: Any) -> list[str]:
    """target_modules for the places `names`: the last words of their paths where these choose exactly them, else whole
    paths."""
    paths = [path_of(model, name) for name in names]
    last = sorted({path.rpartition(".")[2] for path in paths})
    short = {"target_modules": last}
    return last if sorted(chosen(short, list(modules(model)), [])) == sorted(paths) else sorted(paths)


@codec
class LoRAFile(Codec):
    """peft_type "LORA": LoRA and DoRA, which is a LoRA with use_dora in PEFT."""

    peft_type = "LORA"
    used = PLACES | {"r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_dropout",
                     "fan_in_fan_out"}
    needed = ("r", "lora_alpha")
    harmless = frozenset({"init_lora_weights", "megatron_core", "qalora_group_size", "runtime_config", "eva_config",
                          "corda_config", "lora_ga_config", "loftq_config"})
    neutral = {"bias": ("none",), "lora_bias": (False, None), "use_qalora": (False, None), "use_bdlora": (None,),
               "layer_replication": (None, []), "megatron_config": (None,), "arrow_config": (None,),
               "kasa_config": (None,), "monteclora_config": (None,), "velora_config": (None,),
               "target_parameters": (None, []), "trainable_token_indices": (None,),
               "ensure_weight_tying": (False, None), "alora_invocation_tokens": (None,)}
    defaults = {"init_lora_weights": True, "bias": "none", "lora_bias": False, "use_qalora": False,
                "qalora_group_size": 16, "ensure_weight_tying": False, "loftq_config": {},
                "megatron_core": "megatron.core",
                **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "corda_config", "eva_config",
                                 "kasa_config", "layer_replication", "lora_ga_config", "megatron_config",
                                 "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora",
                                 "velora_config"))}

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        paths, r, pissa = targets(config, model, shapes), rank(config), starts_from_base(config)
        slots, names = model.slots, modules(model)
        kinds = {path: slots[names[path]].kind for path in paths}
        for path, kind in kinds.items():
            if kind not in LoRA.kinds:
                raise ValueError(f"the adapter acts on {path}, a weight of the kind {kind!r}; expected linear layers "
                                 f"and embedding tables")
        a, tables = alpha(config["lora_alpha"], "lora_alpha"), "embedding" in kinds.values()
        common: dict[str, Any] = {
            "where": where(paths, model), "dropout": _dropout(config),
            "scaling": "alpha/sqrt(r)" if flag(config, "use_rslora") else "alpha/r",
            "rank_pattern": by_place(config, "rank_pattern", paths, model, r),
            "alpha_pattern": by_place(config, "alpha_pattern", paths, model, a)}
        flag(config, "fan_in_fan_out")
        if pissa and tables:
            raise ValueError("init_lora_weights is 'pissa' on an embedding table, where PEFT starts in another way; "
                             "expected linear layers alone")
        if not flag(config, "use_dora"):
            return LoRA(r, a, init="pissa" if pissa else "gaussian", **common)
        if not any("lora_magnitude_vector" in words(key) for key in shapes):
            raise ValueError("use_dora is true, and the file has no lora_magnitude_vector: as plain LoRA its factors "
                             "mean something else")
        if pissa or tables and "linear" in kinds.values():
            raise ValueError(f"use_dora is true {'and init_lora_weights pissa' if pissa else 'on a table as well'}; "
                             f"expected DoRA on the base as it is, on linear layers alone or on a table alone")
        return DoRA(r, a, norm="input" if tables else "output", **common)

    def rows(self, method: Any, model: Any, config: Config) -> list[Row]:
        found = []
        for name, slot in method.places(model).items():
            place = name, slot, path_of(model, name)
            r = method.rank_at(name, slot)
            found += doubled(*place, r) if _is_pissa(method) and not starts_from_base(config) else factors(*place, r)
            found += [magnitude(*place)] if isinstance(method, DoRA) else []
        return found

    def computed(self, method: Any, model: Any, config: Config) -> dict[str, numpy.ndarray]:
        if not _is_pissa(method):
            return {}
        return {key: array for name, slot in method.places(model).items() for key, array in
                principal(name, slot, method.rank_at(name, slot), method.scale_at(name, slot)).items()}

    def notes(self, method: Any, model: Any, config: Config) -> list[str]:
        paths = [path_of(model, name) for name in method.places(model)]
        notes = unused_patterns(config, paths)
        if config.get("target_modules") is None and set(paths) != {
                path for path in modules(model) if ends_with(path, USUAL)}:
            notes.append(f"target_modules is not given; it was taken from the tensors. PEFT would take "
                         f"{' and '.join(USUAL)} and ignore the others")
        if flag(config, "fan_in_fan_out"):
            notes.append("fan_in_fan_out is true, for weights that are stored [d_in, d_out]; those of this model are "
                         "[d_out, d_in], so it was ignored, as in PEFT")
        if "shared" in paths:
            notes.append("it adapts the shared table: PEFT's forward ignores that, and PEFT's merge does not; here it "
                         "acts wherever the table is used, merged or not")
        return notes

    def writes(self, method: Any) -> bool:
        return isinstance(method, (LoRA, DoRA))

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        return self.config_again(method, model, {})

    def config_again(self, method: Any, model: Any, read: Config) -> dict[str, Any]:
        places, times = method.places(model), 2 if _is_pissa(method) and not starts_from_base(read) else 1
        if getattr(method, "enable", None) is not None:
            raise ValueError(f"enable is {shown(method.enable)}: PEFT has no LoRA on some of the projections that a "
                             f"matrix holds side by side")
        for name, slot in places.items():
            norm = "input" if slot.kind == "embedding" else "output"
            r, most = method.rank_at(name, slot), min(slot.shape)
            if isinstance(method, DoRA) and method.norm != norm:
                raise ValueError(f"norm is {method.norm!r}, and {name} is {slot.kind}; PEFT has norm={norm!r} there")
            if times * r > most:
                raise ValueError(f"init is 'pissa' with r = {r}, which PEFT has on the base as it is as a LoRA of rank "
                                 f"{times * r} alone; expected at most {most // times} for {name} {list(slot.shape)}")
        r, a = usual(method, times)
        return {"r": r, "lora_alpha": a, "lora_dropout": method.dropout,
                "use_rslora": method.scaling == "alpha/sqrt(r)", "use_dora": isinstance(method, DoRA),
                "fan_in_fan_out": False, "target_modules": target_modules(places, model), "exclude_modules": None,
                "layers_to_transform": None, "layers_pattern": None, "modules_to_save": None,
                **patterns(method, places, model, times)}


def _is_pissa(method: Any) -> bool:
    return isinstance(method, LoRA) and method.init == "pissa"


def _dropout(config: Config) -> float:
    """lora_dropout, which acts in training alone. Raises ValueError unless it is a number in [0, 1) or null."""
    value = 0.0 if config.get("lora_dropout") is None else config["lora_dropout"]
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"lora_dropout is {shown(value)}; expected a number in [0, 1)")
    return value
