"""Bottleneck adapters: the parts of the method, put together."""
from __future__ import annotations

from minipeft.conformance.case import Case
from minipeft.conformance.method import Method
from minipeft.conformance.methods.bottleneck_adapter.cases import draw, refusals, vectors
from minipeft.conformance.methods.bottleneck_adapter.activations import POLYNOMIAL
from minipeft.conformance.methods.bottleneck_adapter.equations import CONVENTIONS, LEAVES, exact_values, values
from minipeft.conformance.methods.bottleneck_adapter.laws import LAWS, y_of
from minipeft.conformance.methods.bottleneck_adapter.laws_of_state import LAWS as LAWS_OF_STATE
from minipeft.conformance.methods.bottleneck_adapter.mutants import PLANTED
from minipeft.conformance.methods.bottleneck_adapter.mutants_of_training import PLANTED as PLANTED_IN_TRAINING
from minipeft.conformance.methods.bottleneck_adapter.notes import NOTES
from minipeft.conformance.methods.bottleneck_adapter.plain import BottleneckAdapter
from minipeft.conformance.numbers import float_of


def arguments(case: Case) -> tuple:
    """The factory's positional arguments (D, b_D, U, b_U, dtype), and its keywords activation, placement and scale."""
    return (*(case[name] for name in LEAVES), case.dtype), {
        "activation": case.params["activation"], "placement": case.params["placement"],
        "scale": float_of(case.params["scale"])}


def _gradient(name: str) -> tuple:
    return ("vjp",), lambda make, c: make(c).arrays("vjp", {name: c[name].shape}, *(c[k] for k in "xnFg"))[name]


METHOD = Method(
    name="bottleneck_adapter", title="bottleneck adapter",
    equation=("y = x + F + s A(h), A(h) = U f(D h + b_D) + b_U; D [m, d], b_D [m], U [d, m], b_U [d]",
              "houlsby h = F; pfeiffer h = x + F; parallel h = x, or h = n by convention",
              "a = f(D h + b_D), dz = (s g U) f'(D h + b_D), dh = dz D: dU = s g^T a, db_U = s sum g, dD = dz^T h, "
              "db_D = sum dz; x, n and F get g where they are added and dh where they are read"),
    source={"paper": "Houlsby et al., 2019, arXiv:1902.00751", "where": "sec. 2.1; placements: Pfeiffer et al., 2020, "
            "arXiv:2005.00247, and He et al., 2021, arXiv:2110.04366"},
    conventions=CONVENTIONS,
    axes={"D": ("m", "d"), "b_D": ("m",), "U": ("d", "m"), "b_U": ("d",), "x": ("N", "d"), "n": ("N", "d"),
          "F": ("N", "d"), "g": ("N", "d")},
    sizes={"N": (1, 6), "d": (1, 16), "m": (1, 6)},
    draw=draw, arguments=arguments, reference=values, exact=exact_values,
    outputs={"y": (("forward",), y_of), **{f"d{name}": _gradient(name) for name in (*LEAVES, "x", "F")}},
    properties=(*LAWS.all, *LAWS_OF_STATE.all), plain=BottleneckAdapter,
    mutants=(*PLANTED.all, *PLANTED_IN_TRAINING.all),
    refusals=refusals, vectors=vectors, notes=NOTES, exact_when=lambda case: case.params["activation"] in POLYNOMIAL)
