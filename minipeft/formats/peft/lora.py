"""LoRA in a file of PEFT's.

    linear layer       W + s B A             path.lora_A.weight [r, d_in]       path.lora_B.weight [d_out, r]
    embedding table    W + s (B A)^T         path.lora_embedding_A [r, V]       path.lora_embedding_B [d, r]

On a table [V, d] PEFT's factors are those of the transposed weight: our B [V, r] is its A transposed, and our A [r, d]
its B. r and alpha may differ from path to path (rank_pattern, alpha_pattern); s = alpha / r, or alpha / sqrt(r) with
use_rslora.
"""
from __future__ import annotations

from typing import Any

from minipeft.attaching.method import Method
from minipeft.formats.peft.codec import Codec, Config, Shapes, codec
from minipeft.formats.peft.names import PREFIX, path_of
from minipeft.formats.peft.places import PLACES, alpha, by_place, patterns, rank, target_modules, targets, where
from minipeft.formats.peft.row import Row, transposed
from minipeft.methods.lora import LoRA


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
