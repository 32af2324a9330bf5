"""LoRA, DoRA and (IA)^3 in AdapterHub's files, on T5: three methods of one configuration.

    LoRA       W + (alpha / r) B A              path.loras.NAME.lora_A [r, d_in]     path.loras.NAME.lora_B [d_out, r]
    DoRA       (m / |V|) V,  V = W + B A        the same, and path.loras.NAME.m.weight [d_out, 1]
    (IA)^3     l W                              path.loras.NAME.lora_B [d_out, 1]

selfattn_lora: attn_matrices, some of q, k and v, in self-attention and cross-attention alike. intermediate_lora: wi, in
a gated feed-forward wi_1, the matrix without the activation. output_lora: wo. composition_mode is "add", or "scale" for
(IA)^3, whose l lies before the activation.

AdapterHub's DoRA divides by |W + B A|, and adds (alpha / r) B A x to W x. With alpha = r both are the same V. Otherwise
it is not DoRA, and is refused.
"""
from __future__ import annotations

from typing import Any, Iterable

import numpy

from minipeft.attaching.method import Method
from minipeft.checks import is_number, shown
from minipeft.formats.adapterhub.names import HERE, choice, left_out, path_of, places, switch
from minipeft.formats.peft.codec import Codec, Config, Shapes
from minipeft.formats.peft.places import alpha, rank
from minipeft.formats.row import Row
from minipeft.methods.dora import DoRA
from minipeft.methods.ia3 import IA3, ScaledInput
from minipeft.methods.lora import LoRA
from minipeft.methods.per_place import PerPlace
from minipeft.nn.where import exactly

_LAYERS = {"intermediate_lora": r"\.ff\.(wi|wi_1)\.weight$", "output_lora": r"\.ff\.wo\.weight$"}
SWITCHES = {**{letter: rf"\.(attn|cross)\.{letter}\.weight$" for letter in "qkv"}, **_LAYERS}


class _File(Codec):
    """The part that the three have in common: the places, and the fields without an effect."""

    used = frozenset({"architecture", "composition_mode", "selfattn_lora", "intermediate_lora", "output_lora",
                      "attn_matrices", "leave_out", "r", "alpha", "dropout", "use_dora"})
    needed = ("r", "alpha")
    harmless = frozenset({"init_weights", "init_weights_seed", "dtype"})
    neutral = {"use_gating": (False,), "vera_d": (None,), "vera_b": (None,)}

    def _where(self, config: Config, model: Any) -> tuple[str, ...]:
        letters = config.get("attn_matrices", ["q", "v"])
        if not isinstance(letters, list) or not all(isinstance(letter, str) for letter in letters):
            raise ValueError(f"attn_matrices is {shown(letters)}; expected a list of some of q, k and v")
        on = [name for name in _LAYERS if switch(config, name)]
        on += [name for name in "qkv" if name in letters] if switch(config, "selfattn_lora", True) else []
        return exactly(places(model, SWITCHES, on, left_out(config)))

    def _config(self, names: Iterable[str], model: Any) -> dict[str, Any]:
        on, left = choice(model, SWITCHES, names)
        letters = [letter for letter in "qkv" if letter in on]
        return {"architecture": "lora", "selfattn_lora": bool(letters), "attn_matrices": letters or ["q", "v"],
                **{name: name in on for name in _LAYERS}, "leave_out": left, "composition_mode": "add",
                "init_weights": "lora", "init_weights_seed": None, "use_gating": False, "use_dora": False,
                "vera_d": None, "vera_b": None, "dtype": None}


class LoRAFile(_File):
    """AdapterHub's LoRAConfig with composition_mode "add"."""

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        return LoRA(rank(config), alpha(config["alpha"], "alpha"), _dropout(config), self._where(config, model))

    def rows(self, method: Any, model: Any, config: Config) -> list[Row]:
        return [Row(f"{name}.{leaf}", f"{path_of(model, name)}.loras.{HERE}.{key}", declared.shape)
                for name, slot in method.places(model).items()
                for (leaf, declared), key in zip(method.arrays(name, slot, model).items(),
                                                 ("lora_A", "lora_B", "m.weight"))]

    def writes(self, method: Any) -> bool:
        return isinstance(method, LoRA)

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        if method.enable is not None or method.init == "pissa":
            raise ValueError(f"{'enable' if method.enable else 'init'} is {shown(method.enable or method.init)}, which "
                             f"AdapterHub does not have; expected a LoRA without it")
        return {**self._config(method.places(model), model), **_strength(method, model), "dropout": method.dropout}


class DoRAFile(LoRAFile):
    """AdapterHub's LoRAConfig with use_dora. Its gradient passes through |V|."""

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        a, r = alpha(config["alpha"], "alpha"), rank(config)
        if a != r:
            raise ValueError(f"alpha is {shown(a)} and r is {r}: AdapterHub's DoRA then divides by the length of "
                             f"another vector than the one that it scales; expected use_dora with alpha = r")
        return DoRA(r, a, _dropout(config), self._where(config, model), detach=False)

    def writes(self, method: Any) -> bool:
        return isinstance(method, DoRA)

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        strength = _strength(method, model)
        if strength["alpha"] != strength["r"] or method.norm != "output":
            raise ValueError(f"alpha is {strength['alpha']}, r {strength['r']} and norm {method.norm!r}; AdapterHub "
                             f"has DoRA with alpha = r and norm 'output' alone")
        return {**self._config(method.places(model), model), **strength, "dropout": method.dropout, "use_dora": True}


class IA3File(_File):
    """AdapterHub's LoRAConfig with composition_mode "scale"."""

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        for field, usual in (("r", 1), ("alpha", 1), ("dropout", 0), ("use_dora", False), ("output_lora", False)):
            if config.get(field, usual) != usual:
                raise ValueError(f"{field} is {shown(config[field])}; expected {usual} where composition_mode is "
                                 f"'scale'")
        return IA3("before", self._where(config, model))

    def rows(self, method: Any, model: Any, config: Config) -> list[Row]:
        return [Row(declared.key(name, "l"), f"{path_of(model, name)}.loras.{HERE}.lora_B", (*declared.shape, 1),
                    _column, numpy.ravel)
                for name, slot in method.places(model).items()
                for declared in method.arrays(name, slot, model).values()]

    def writes(self, method: Any) -> bool:
        return isinstance(method, IA3)

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        found = method.places(model)
        for name, slot in found.items():
            if isinstance(method.make(name, slot, {"l": None}), ScaledInput):
                raise ValueError(f"its factors scale what {name} reads, and AdapterHub's scale what a matrix computes; "
                                 f"expected an IA3('before')")
        return {**self._config(found, model), "composition_mode": "scale", "r": 1, "alpha": 1, "dropout": 0.0,
                "init_weights": "ia3"}


def _column(array: numpy.ndarray) -> numpy.ndarray:
    """[n] -> [n, 1]."""
    return array.reshape(-1, 1)


def _dropout(config: Config) -> float:
    value = config.get("dropout", 0.0)
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"dropout is {shown(value)}; expected a number in [0, 1)")
    return value


def _strength(method: PerPlace, model: Any) -> dict[str, Any]:
    """r, and the alpha that gives s as alpha / r, rounded once. ValueError where places differ."""
    places: Any = method.places(model)  # slots all
    found = {(method.rank_at(name, slot), method.scale_at(name, slot)) for name, slot in places.items()}
    if len(found) > 1:
        raise ValueError(f"its places have {len(found)} pairs of rank and scale; AdapterHub has one r and one alpha "
                         f"for all places")
    r, s = found.pop()
    a = s * r
    return {"r": r, "alpha": int(a) if a.denominator == 1 else float(a)}
