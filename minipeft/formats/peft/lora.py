"""LoRA in a file of PEFT's.

    linear layer       W + s B A             path.lora_A.weight [r, d_in]       path.lora_B.weight [d_out, r]
    embedding table    W + s (B A)^T         path.lora_embedding_A [r, V]       path.lora_embedding_B [d, r]

On a table [V, d] PEFT's factors are those of the transposed weight: our B [V, r] is its A transposed, and our A [r, d]
its B. r and alpha may differ from path to path (rank_pattern, alpha_pattern); s = alpha / r, or alpha / sqrt(r) with
use_rslora.
"""
from __future__ import annotations

import re
from typing import Any, Mapping

from minipeft.attaching.method import Method
from minipeft.checks import is_integer, is_number, shown
from minipeft.formats.peft.codec import Codec, Config, Shapes, codec
from minipeft.formats.peft.names import PREFIX, linear_modules, modules, path_of
from minipeft.formats.peft.targets import chosen, first_match, pattern
from minipeft.formats.row import Row, transposed
from minipeft.methods.lora import LoRA
from minipeft.methods.per_place import PerPlace

PLACES = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"})


def where(paths: list[str], model: Any) -> tuple[str, ...]:
    """The pattern list that chooses exactly the slots of the modules at `paths`."""
    slots = modules(model)
    return tuple(f"^{re.escape(slots[path])}$" for path in paths)


def targets(config: Config, model: Any) -> list[str]:
    """The paths that the config chooses on the model."""
    return chosen(config, list(modules(model)), linear_modules(model))


def rank(config: Config, field: str = "r") -> int:
    """The rank in `field`. Raises ValueError unless it is an integer of at least 1."""
    if not is_integer(config.get(field), 1):
        raise ValueError(f"{field} is {shown(config.get(field))}; expected an integer >= 1")
    return config[field]


def alpha(value: Any, field: str) -> float:
    """The alpha in `field`. Raises ValueError for 0, text, null and what is not finite."""
    if not is_number(value) or value == 0:
        raise ValueError(f"{field} is {shown(value)}; expected a finite number other than 0, which would switch the "
                         f"adapter off")
    return value


def by_place(config: Config, field: str, paths: list[str], model: Any, usual: Any) -> tuple[tuple[str, Any], ...]:
    """Our pattern, ((regular expression, value), ...), of PEFT's rank_pattern or alpha_pattern in `field`: an entry for
    each of `paths` whose value differs from the usual one."""
    given, slots = pattern(config, field), modules(model)
    found = {path: first_match(given, path) for path in paths}
    return tuple((f"^{re.escape(slots[path])}$", value) for path, value in found.items()
                 if value is not None and value != usual)


def patterns(method: PerPlace, names: Mapping[str, Any], model: Any) -> dict[str, dict[str, Any]]:
    """PEFT's rank_pattern and alpha_pattern of a method on the places `names`: an entry for each place whose rank or
    alpha is not the usual one, under its path."""
    ranks = {path_of(model, name): method.rank_at(name, slot) for name, slot in names.items()}
    alphas = {path_of(model, name): method.alpha_at(name) for name in names}
    return {"rank_pattern": {path: r for path, r in ranks.items() if r != method.rank},
            "alpha_pattern": {path: a for path, a in alphas.items() if a != method.alpha}}


def target_modules(names: Mapping[str, Any], model: Any) -> list[str]:
    """target_modules for the places `names`: the last words of their paths where these choose exactly them, else whole
    paths."""
    paths = [path_of(model, name) for name in names]
    words = sorted({path.rpartition(".")[2] for path in paths})
    short = {"target_modules": words}
    return words if sorted(chosen(short, list(modules(model)), [])) == sorted(paths) else sorted(paths)


@codec
class LoRAFile(Codec):
    peft_type = "LORA"
    used = PLACES | {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
                     "lora_dropout"}
    needed = ("r", "lora_alpha")
    harmless = frozenset({"megatron_core", "qalora_group_size", "eva_config"})
    neutral = {"bias": ("none",), "use_dora": (False,), "lora_bias": (False,), "fan_in_fan_out": (False,),
               "use_qalora": (False,), "use_bdlora": (None,), "layer_replication": (None,), "loftq_config": ({}, None),
               "megatron_config": (None,), "corda_config": (None,), "arrow_config": (None,), "kasa_config": (None,),
               "lora_ga_config": (None,), "monteclora_config": (None,), "velora_config": (None,),
               "target_parameters": (None, []), "trainable_token_indices": (None,), "ensure_weight_tying": (False,),
               "alora_invocation_tokens": (None,)}

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        paths, r = targets(config, model), rank(config)
        a = alpha(config["lora_alpha"], "lora_alpha")
        return LoRA(r, a, where=where(paths, model), scaling="alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r",
                    rank_pattern=by_place(config, "rank_pattern", paths, model, r),
                    alpha_pattern=by_place(config, "alpha_pattern", paths, model, a))

    def rows(self, method: Any, model: Any, config: Config) -> list[Row]:
        return [row for name, slot in method.places(model).items()
                for row in factors(name, slot, path_of(model, name), method.rank_at(name, slot))]

    def writes(self, method: Any) -> bool:
        return isinstance(method, LoRA)

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        places = method.places(model)
        return {"r": method.rank, "lora_alpha": method.alpha, "lora_dropout": method.dropout, "bias": "none",
                "use_rslora": method.scaling == "alpha/sqrt(r)", "use_dora": False, "lora_bias": False,
                "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
                "target_modules": target_modules(places, model), **patterns(method, places, model)}


def factors(name: str, slot: Any, path: str, r: int) -> list[Row]:
    """The rows of A [r, d_in] and B [d_out, r] of the slot called `name`, the weight of the module at `path`."""
    d_out, d_in = slot.shape
    if slot.kind == "embedding":
        return [Row(f"{name}.B", f"{PREFIX}{path}.lora_embedding_A", (r, d_out), transposed, transposed),
                Row(f"{name}.A", f"{PREFIX}{path}.lora_embedding_B", (d_in, r), transposed, transposed)]
    return [Row(f"{name}.A", f"{PREFIX}{path}.lora_A.weight", (r, d_in)),
            Row(f"{name}.B", f"{PREFIX}{path}.lora_B.weight", (d_out, r))]
