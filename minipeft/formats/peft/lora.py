"""LoRA and DoRA in a file of PEFT's. The tensors are in `lora_rows.py`.

    LoRA     W + s B A                                use_dora: false
    DoRA     (m / |V|) V,  V = W + s B A              use_dora: true
    PiSSA    W - s B0 A0 + s B A                      init_lora_weights: "pissa" (`lora_start.py`)
    QA-LoRA  W + (L / g) s B A, over groups           use_qalora: true (`qalora.py`)

r and alpha may differ from path to path (rank_pattern and alpha_pattern, each looked up by itself).
s = alpha / r, or alpha / sqrt(r) with use_rslora.

bias="all" and "lora_only" store biases of the base that were trained. T5 has none, so nothing is stored. A tied head is
one weight with the table, so ensure_weight_tying says nothing here.
"""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.attaching.method import Method
from minipeft.checks import is_number, shown
from minipeft.formats.peft import qalora
from minipeft.formats.peft.codec import Codec, Config, Shapes, codec
from minipeft.formats.peft.lora_rows import doubled, factors, magnitude, pooled
from minipeft.formats.peft.lora_start import principal, starts_from_base
from minipeft.formats.peft.names import modules, path_of, words
from minipeft.formats.peft.places import (PLACES, alpha, by_place, flag, of_any_rank, patterns, rank, target_modules,
                                          targets, unused_patterns, usual, where)
from minipeft.formats.peft.targets import ends_with
from minipeft.formats.row import Row
from minipeft.methods.dora import DoRA
from minipeft.methods.lora import LoRA
from minipeft.methods.qalora import QALoRA

USUAL = ("q", "v")  # target_modules of LoRA on T5, where PEFT finds none


@codec
class LoRAFile(Codec):
    """peft_type "LORA": LoRA, and DoRA and QA-LoRA, which are LoRAs with use_dora and use_qalora in PEFT."""

    peft_type = "LORA"
    used = PLACES | {"r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_dropout",
                     "fan_in_fan_out", "use_qalora", "qalora_group_size"}
    needed = ("r", "lora_alpha")
    harmless = frozenset({"init_lora_weights", "megatron_core", "runtime_config", "eva_config", "corda_config",
                          "lora_ga_config", "loftq_config", "ensure_weight_tying"})
    neutral = {"bias": ("none", "all", "lora_only"), "lora_bias": (False, None), "use_bdlora": (None,),
               "layer_replication": (None, []), "megatron_config": (None,), "arrow_config": (None,),
               "kasa_config": (None,), "monteclora_config": (None,), "velora_config": (None,),
               "target_parameters": (None, []), "alora_invocation_tokens": (None,)}
    defaults = {"init_lora_weights": True, "bias": "none", "lora_bias": False, "ensure_weight_tying": False,
                "loftq_config": {}, "megatron_core": "megatron.core",
                **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "corda_config", "eva_config",
                                 "kasa_config", "layer_replication", "lora_ga_config", "megatron_config",
                                 "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora",
                                 "velora_config"))}

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        paths, r, pissa = targets(config, model, shapes=shapes), rank(config), starts_from_base(config)
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
        if group := qalora.group(config, shapes, {path: slots[names[path]] for path in paths}):
            return qalora.of_any_rank(QALoRA(r, a, group, pooling=qalora.POOLING, **common), model)
        if pissa and tables:
            raise ValueError("init_lora_weights is 'pissa' on an embedding table, where PEFT starts in another way; "
                             "expected linear layers alone")
        if not flag(config, "use_dora"):
            found = LoRA(r, a, init="pissa" if pissa else "gaussian", **common)
            return found if pissa else of_any_rank(found, model)
        if not any("lora_magnitude_vector" in words(key) for key in shapes):
            raise ValueError("use_dora is true, and the file has no lora_magnitude_vector: as plain LoRA its factors "
                             "mean something else")
        if pissa or tables and "linear" in kinds.values():
            raise ValueError(f"use_dora is true {'and init_lora_weights pissa' if pissa else 'on a table as well'}; "
                             f"expected DoRA on the base as it is, on linear layers alone or on a table alone")
        return of_any_rank(DoRA(r, a, norm="input" if tables else "output", **common), model)

    def rows(self, method: Any, model: Any, config: Config) -> list[Row]:
        found = []
        for name, slot in method.places(model).items():
            place = name, slot, path_of(model, name)
            r = method.rank_at(name, slot)
            if isinstance(method, QALoRA):
                found += pooled(*place, r, method.groups_at(name, slot))
                continue
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
        return notes + qalora.notes(method, config)

    def writes(self, method: Any) -> bool:
        return isinstance(method, (LoRA, DoRA, QALoRA))

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        return self.config_again(method, model, {})

    def config_again(self, method: Any, model: Any, read: Config) -> dict[str, Any]:
        places, times = method.places(model), 2 if _is_pissa(method) and not starts_from_base(read) else 1
        if getattr(method, "enable", None) is not None:
            raise ValueError(f"enable is {shown(method.enable)}: PEFT has no LoRA on some of the projections that a "
                             f"matrix holds side by side")
        for name, slot in places.items():
            norm = "input" if slot.kind == "embedding" else "output"
            if isinstance(method, DoRA) and method.norm != norm:
                raise ValueError(f"norm is {method.norm!r}, and {name} is {slot.kind}; PEFT has norm={norm!r} there")
        pools, r, a = isinstance(method, QALoRA), *usual(method, times)
        return {"r": r, "lora_alpha": a, "lora_dropout": method.dropout,
                "use_rslora": method.scaling == "alpha/sqrt(r)", "use_dora": isinstance(method, DoRA),
                "use_qalora": pools,
                "qalora_group_size": qalora.written_group(method, places) if pools else qalora.size(read),
                "fan_in_fan_out": False,
                "target_modules": target_modules(places, model), "exclude_modules": None,
                "layers_to_transform": None, "layers_pattern": None,
                **patterns(method, places, model, times)}


def _is_pissa(method: Any) -> bool:
    return isinstance(method, LoRA) and method.init == "pissa"


def _dropout(config: Config) -> float:
    """lora_dropout, which acts in training alone. Raises ValueError unless it is a number in [0, 1) or null."""
    value = 0.0 if config.get("lora_dropout") is None else config["lora_dropout"]
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"lora_dropout is {shown(value)}; expected a number in [0, 1)")
    return value
