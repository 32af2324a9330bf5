"""LoHa, LoKr and HiRA in files of PEFT's.

    LOHA    W + s (w1_a w1_b) * (w2_a w2_b)    path.hada_w1_a, hada_w2_a [d_out, r]; hada_w1_b, hada_w2_b [r, d_in]
    LOKR    W + s kron(w1, w2)                 path.lokr_w1, or lokr_w1_a and lokr_w1_b; lokr_w2, or its two factors
    HIRA    W * (1 + B A)                      path.hira_A [r, d_in], path.hira_B [d_out, r]

s = alpha / r, in LOKR also where neither w1 nor w2 is a product and r means nothing. A table [V, d] has
path.hira_embedding_A [r, V] and path.hira_embedding_B [d, r], the factors of the transposed weight. PEFT 0.21 ignores
the rank_pattern of HIRA. So where all tensors have the rank r, it is ignored here, too.
"""
from __future__ import annotations

import re
from typing import Any, ClassVar

from minipeft.attaching.method import Method
from minipeft.checks import is_integer, shown
from minipeft.formats.peft.codec import Codec, Config, Shapes, codec
from minipeft.formats.peft.names import PREFIX, path_of
from minipeft.formats.peft.places import (TARGETS, alpha, by_place, flag, of_any_rank, only, patterns, rank,
                                          target_modules, targets, where)
from minipeft.formats.row import Row, transposed
from minipeft.methods.hira import HiRA
from minipeft.methods.loha import LoHa
from minipeft.methods.lokr import LoKr
from minipeft.methods.per_place import PerPlace


class Products(Codec):
    """What the three share. kinds: of slots that PEFT has the method for."""

    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    used = TARGETS | {"r", "rank_pattern", "alpha", "alpha_pattern"}
    harmless = frozenset({"init_weights", "rank_dropout", "module_dropout", "use_effective_conv2d"})
    needed: ClassVar[tuple[str, ...]] = ("r", "alpha")
    defaults = {"target_modules": ["q", "v"], "exclude_modules": None, "layers_to_transform": None,
                "layers_pattern": None, "init_weights": True, "modules_to_save": None}

    def ranks(self, config: Config, model: Any) -> dict[str, Any]:
        """The fields rank, where and rank_pattern of our method."""
        paths, r = targets(config, model, *self.kinds), rank(config)
        return {"rank": r, "where": where(paths, model),
                "rank_pattern": by_place(config, "rank_pattern", paths, model, r)}

    def alphas(self, config: Config, model: Any) -> dict[str, Any]:
        """The fields alpha and alpha_pattern of our method."""
        paths, a = targets(config, model, *self.kinds), alpha(config["alpha"], "alpha")
        return {"alpha": a, "alpha_pattern": by_place(config, "alpha_pattern", paths, model, a)}

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        places = method.places(model)
        only(self.peft_type, places, *self.kinds)
        if getattr(method, "scaling", "alpha/r") != "alpha/r":
            raise ValueError(f"scaling is {shown(method.scaling)}; {self.peft_type} of PEFT has 'alpha/r' alone")
        alphas = {"alpha": method.alpha} if isinstance(method, PerPlace) else {}
        return {"r": method.rank, **alphas, "target_modules": target_modules(places, model),
                **patterns(method, places, model)}


DROPOUTS = {"rank_dropout": 0.0, "module_dropout": 0.0, "use_effective_conv2d": False}


@codec
class LoHaFile(Products):
    """LoHa, with ranks and alphas by path."""

    peft_type = "LOHA"
    defaults = {**Products.defaults, **DROPOUTS}

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        return of_any_rank(LoHa(**self.ranks(config, model), **self.alphas(config, model)), model)

    def rows(self, method: Any, model: Any, config: Config) -> list[Row]:
        found = []
        for name, slot in method.places(model).items():
            (d_out, d_in), r, at = slot.shape, method.own_rank(name), f"{PREFIX}{path_of(model, name)}.hada_w"
            for i in "12":
                found += [Row(f"{name}.B{i}", f"{at}{i}_a", (d_out, r)), Row(f"{name}.A{i}", f"{at}{i}_b", (r, d_in))]
        return found

    def writes(self, method: Any) -> bool:
        return isinstance(method, LoHa)


@codec
class LoKrFile(Products):
    """LoKr, with ranks and alphas by path. Two full factors have a scale."""

    peft_type = "LOKR"
    used = Products.used | {"decompose_both", "decompose_factor"}
    harmless = Products.harmless | {"rank_dropout_scale"}
    defaults = {**Products.defaults, **DROPOUTS, "rank_dropout_scale": False, "decompose_both": False,
                "decompose_factor": -1}

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        factor = config["decompose_factor"]
        if not is_integer(factor, -1) or not factor:
            raise ValueError(f"decompose_factor is {shown(factor)}; expected -1 or an integer >= 1")
        return LoKr(**self.ranks(config, model), **self.alphas(config, model), factor=None if factor == -1 else factor,
                    decompose_both=flag(config, "decompose_both", False), full="alpha / r")

    def rows(self, method: Any, model: Any, config: Config) -> list[Row]:
        return [Row(f"{name}.{leaf}", f"{PREFIX}{path_of(model, name)}.lokr_{leaf}", declared.shape)
                for name, slot in method.places(model).items()
                for leaf, declared in method.arrays(name, slot, model).items()]

    def writes(self, method: Any) -> bool:
        return isinstance(method, LoKr)

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        found = super().config(method, model)
        if method.full == "1":  # alpha = r says this, at each place where neither factor is a product
            alphas = {path_of(model, name): method.own_rank(name) for name, slot in method.places(model).items()
                      if {"w1", "w2"} == set(method.arrays(name, slot, model))}
            found["alpha_pattern"] = {**found["alpha_pattern"], **alphas}
        return {**found, "decompose_both": method.decompose_both,
                "decompose_factor": -1 if method.factor is None else method.factor}


@codec
class HiRAFile(Products):
    """HiRA, also of the table."""

    peft_type = "HIRA"
    kinds = ("linear", "embedding")
    used = TARGETS | {"r", "rank_pattern"}
    harmless = frozenset({"init_weights", "hira_dropout"})
    neutral = {"fan_in_fan_out": (False,)}
    needed = ("r",)
    defaults = {**Products.defaults, "hira_dropout": 0.0, "fan_in_fan_out": False}

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        fields = self.ranks(config, model)
        found = {shape[0] for key, shape in shapes.items() if re.search(r"\.hira_(embedding_)?A(\.|$)", key) and shape}
        return of_any_rank(HiRA(**{**fields, "rank_pattern": ()} if found == {fields["rank"]} else fields), model)

    def rows(self, method: Any, model: Any, config: Config) -> list[Row]:
        found = []
        for name, slot in method.places(model).items():
            (d_out, d_in), r, at = slot.shape, method.own_rank(name), f"{PREFIX}{path_of(model, name)}.hira_"
            if slot.kind == "embedding":
                found += [Row(f"{name}.B", f"{at}embedding_A", (r, d_out), transposed, transposed),
                          Row(f"{name}.A", f"{at}embedding_B", (d_in, r), transposed, transposed)]
            else:
                found += [Row(f"{name}.A", f"{at}A", (r, d_in)), Row(f"{name}.B", f"{at}B", (d_out, r))]
        return found

    def writes(self, method: Any) -> bool:
        return isinstance(method, HiRA)

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        found = super().config(method, model)
        if found["rank_pattern"]:
            raise ValueError(f"rank_pattern is {shown(method.rank_pattern)}; HIRA of PEFT 0.21 ignores it and gives "
                             f"all weights the rank r, so that it could not load the file")
        return found
