"""Bottleneck adapters in AdapterHub's files, on T5.

    path.adapters.NAME.adapter_down.0.weight [m, d]      D            path.adapters.NAME.adapter_down.0.bias [m]     b_D
    path.adapters.NAME.adapter_up.weight [d, m]          U            path.adapters.NAME.adapter_up.bias [d]         b_U

Where they stand: mh_adapter after self-attention, cross_adapter after cross-attention, output_adapter after the
feed-forward. m = d // reduction_factor, at least 1. With x the residual stream, F the output of the sublayer and
a(h) = scaling * (U f(D h + b_D) + b_U), a T5 of AdapterHub's computes, because it is pre-LN:

    is_parallel                                          x + F + a(x)               par_bn
    original_ln_before                                   x + F + a(x + F)           seq_bn
    not original_ln_before                               x + F + a(F)               double_seq_bn

That is, if original_ln_after adds the x; without it, x is lost, or is there already where residual_before_ln is off.
"""
from __future__ import annotations

from typing import Any, Mapping

import numpy

from minipeft.attaching.method import Method
from minipeft.checks import is_number, shown
from minipeft.formats.adapterhub.names import HERE, choice, layer_of, left_out, path_of, places, switch
from minipeft.formats.peft.codec import Codec, Config, Shapes
from minipeft.formats.row import Row
from minipeft.methods.bottleneck import PLACEMENTS, Bottleneck
from minipeft.nn.where import exactly

SWITCHES = {"mh_adapter": r"\.attn\.out$", "cross_adapter": r"\.cross\.out$", "output_adapter": r"\.ff\.out$"}
FLAGS = ("original_ln_before", "original_ln_after", "residual_before_ln", "is_parallel")
# {non_linearity: our activation}
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_new",
               "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "swish": "swish"}
_INITS = {"bert": "bert", "mam_adapter": "zeros", "houlsby": "houlsby"}
_LEAVES = {"D": "adapter_down.0.weight", "b_D": "adapter_down.0.bias", "U": "adapter_up.weight",
           "b_U": "adapter_up.bias"}
# of parametrized hypercomplex layers; phm_layer says whether there are any
_PHM = ("phm_dim", "factorized_phm_W", "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_c_init",
        "phm_init_range", "learn_phm", "hypercomplex_nonlinearity", "phm_rank", "phm_bias")
_MOST = 2 ** 31  # numbers in a bottleneck


class BottleneckFile(Codec):
    """AdapterHub's BnConfig."""

    used = frozenset({*SWITCHES, *FLAGS, "leave_out", "reduction_factor", "non_linearity", "scaling", "init_weights"})
    needed = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "scaling", *FLAGS)
    harmless = frozenset({"dropout", "init_weights_seed", "adapter_residual_before_ln", "inv_adapter_reduction_factor",
                          *_PHM})
    neutral = {"ln_before": (False,), "ln_after": (False,), "use_gating": (False,), "phm_layer": (False,),
               "inv_adapter": (None,), "stochastic_depth": (0.0, 0, None)}

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        on = [name for name in SWITCHES if switch(config, name)]
        names = places(model, SWITCHES, on, left_out(config))
        init = config.get("init_weights")
        return Bottleneck(_placement(config), size=_size(config, names, model), activation=_activation(config),
                          scale=_scale(config), where=exactly(names),
                          init=_INITS.get(init, "bert") if isinstance(init, str) else "bert")

    def rows(self, method: Any, model: Any, config: Config) -> list[Row]:
        return [Row(f"{name}.{leaf}", f"{path_of(model, name)}.adapters.{HERE}.{_LEAVES[leaf]}", declared.shape)
                for name, site in method.places(model).items()
                for leaf, declared in method.arrays(name, site, model).items()]

    def writes(self, method: Any) -> bool:
        return isinstance(method, Bottleneck)

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        if method.input != "stream":
            raise ValueError(f"input is {method.input!r}; AdapterHub's parallel adapter reads x, that is 'stream'")
        found = method.places(model)
        on, left = choice(model, SWITCHES, found)
        placement, (name, site) = PLACEMENTS[method.placement], next(iter(found.items()))
        theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
        kind = next(kind for kind in ("par_bn", "seq_bn", "double_seq_bn") if PLACEMENTS[kind].reads is placement.reads)
        return {**{name: name in on for name in SWITCHES}, "leave_out": left,
                "reduction_factor": _factor(site.width, method.arrays(name, site, model)["D"].shape[0]),
                "non_linearity": theirs[method.activation],
                "scaling": float(placement.scale if method.scale is None else method.scale),
                "is_parallel": kind == "par_bn", "original_ln_before": kind == "seq_bn", "original_ln_after": True,
                "residual_before_ln": True, "init_weights": {ours: name for name, ours in _INITS.items()}[method.init],
                "adapter_residual_before_ln": False, "dropout": 0.0, "ln_before": False, "ln_after": False,
                "use_gating": False, "phm_layer": False, "inv_adapter": None, "stochastic_depth": 0.0}


def _placement(config: Config) -> str:
    """The placement, by the equation. ValueError for one that a T5 of AdapterHub's alone would compute."""
    flags = {field: config[field] for field in FLAGS}
    before, after, residual, parallel = flags.values()
    if all(type(flag) is bool for flag in flags.values()):
        if parallel and after:
            return "par_bn"
        if not parallel and not before and after:
            return "double_seq_bn"
        if not parallel and before and residual == after:
            return "seq_bn"
    said = ", ".join(f"{field} {shown(value)}" for field, value in flags.items())
    raise ValueError(f"{said}: these do not give x + F + a(x), x + F + a(x + F) or x + F + a(F); expected those of "
                     f"par_bn, seq_bn or double_seq_bn")


def _size(config: Config, names: list[str], model: Any) -> int:
    """m. ValueError for a reduction factor that is no number > 0, and for layers of different m."""
    factor, d = config["reduction_factor"], model.config.d_model
    sizes = {}
    for name in names:
        layer = str(layer_of(model, name))
        value = factor.get(layer, factor.get("default")) if isinstance(factor, Mapping) else factor
        if not is_number(value) or value <= 0 or d / value > _MOST:
            raise ValueError(f"reduction_factor is {shown(factor)}; expected a number > 0 that leaves less than {_MOST}"
                             f" of {d} numbers")
        sizes[max(1, int(d // value))] = layer
    if len(sizes) > 1:
        raise ValueError(f"reduction_factor is {shown(factor)}, which gives layers {' and '.join(sizes.values())} "
                         f"different sizes; expected the same size in all layers")
    return next(iter(sizes))


def _factor(d: int, m: int) -> float:
    """The reduction factor that makes m of d numbers, by AdapterHub's rounding."""
    if d % m == 0:
        return d // m
    return next(factor for factor in (d / m, float(numpy.nextafter(d / m, 0))) if int(d // factor) == m)


def _activation(config: Config) -> str:
    name = config["non_linearity"]
    if not isinstance(name, str) or name.lower() not in ACTIVATIONS:
        raise ValueError(f"non_linearity is {shown(name)}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name.lower()]


def _scale(config: Config) -> float:
    value = config["scaling"]
    if not is_number(value) or value == 0:
        raise ValueError(f"scaling is {shown(value)}; expected a finite number other than 0, which would switch the "
                         f"adapter off (a scaling that is learned is not supported)")
    return float(value)
