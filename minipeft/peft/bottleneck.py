"""Bottleneck adapters: two small layers with a skip, inside a frozen block.

    A(h) = s (U f(D h + b_D) + b_U)               Houlsby et al., 2019, arXiv:1902.00751, sec. 2.1

D [m, d], b_D [m], U [d, m], b_U [d]: 2 m d + d + m numbers each, m much smaller than d. With x the residual stream, F
the sublayer's output and n what the sublayer read, the block's x + F becomes

    houlsby     x + F + A(F)            after attention and after feed-forward (the same paper, fig. 2)
    pfeiffer    x + F + A(x + F)        after feed-forward (Pfeiffer et al., 2020, arXiv:2005.00247)
    parallel    x + F + s A(x)          beside feed-forward, s = 4 (He et al., 2021, arXiv:2110.04366); A(n) with
                                        input="norm", their reading on pre-LN

before the norm in a post-LN block. It acts on hidden states through a nonlinearity, so no weight can absorb it: an
adapter is not merged, it costs its 4 m d operations per token at inference.
"""
from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any, Callable

import numpy

from minipeft.autograd.tensor import Tensor
from minipeft.backend import Array, scalar
from minipeft.nn import init
from minipeft.nn.layers import ACTIVATIONS
from minipeft.nn.site import Site
from minipeft.nn.weight import Parameter
from minipeft.nn.where import Where, matching
from minipeft.ops import add, linear, mul
from minipeft.peft.fields import expect, integer, number, plain

# name: (after which sublayers, what A reads, s)
PLACEMENTS: dict[str, tuple[tuple[str, ...], Callable, int]] = {
    "houlsby": (("attn", "ff"), lambda x, n, F: F, 1),
    "pfeiffer": (("ff",), lambda x, n, F: add(x, F), 1),
    "parallel": (("ff",), lambda x, n, F: x, 4)}


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """placement: one of PLACEMENTS. The width m is `size`, or d_model / reduction. scale: s, by default 1, parallel 4.
    input: what a parallel adapter reads, "stream" (x) or "norm" (n). cross: also after cross-attention (Houlsby's
    model has none). stacks: encoder, decoder, or both. where: the sites, instead of what these three say.

    U and b_U start at 0, so attaching changes nothing, D is U(-1/sqrt(d), 1/sqrt(d)). Departures: Houlsby et al. start
    near the identity (a truncated Gaussian) and train the norms of the block too (attach Selective(component="norm")
    beside); AdapterHub's pfeiffer reads norm(x + F) in a post-LN block. Raises ValueError for fields out of range."""

    placement: str = "houlsby"
    reduction: float = 16
    size: int | None = None
    activation: str = "relu"
    scale: float | None = None
    input: str = "stream"
    cross: bool = False
    stacks: tuple[str, ...] = ("encoder", "decoder")
    where: Where | None = None

    def __post_init__(self) -> None:
        plain(self)
        object.__setattr__(self, "stacks", (self.stacks,) if isinstance(self.stacks, str) else self.stacks)
        expect(self, "placement", self.placement in PLACEMENTS, f"one of {', '.join(PLACEMENTS)}")
        expect(self, "reduction", number(self.reduction) and self.reduction >= 1, "a number >= 1")
        expect(self, "size", self.size is None or integer(self.size), "an integer >= 1, or None")
        expect(self, "activation", self.activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
        expect(self, "scale", self.scale is None or number(self.scale) and self.scale != 0,
               "a finite number other than 0, or None")
        expect(self, "input", self.input == "stream" or self.input == "norm" and self.placement == "parallel",
               "'stream', or 'norm' with placement 'parallel'")
        expect(self, "cross", type(self.cross) is bool, "True or False")
        expect(self, "stacks", isinstance(self.stacks, tuple) and self.stacks
               and all(s in ("encoder", "decoder") for s in self.stacks), "'encoder', 'decoder', or both")

    def places(self, model: Any) -> dict[str, Site]:
        """The sublayer sites that are chosen."""
        sites = {name: site for name, site in model.sites.items() if site.kind == "sublayer"}
        after = (*PLACEMENTS[self.placement][0], *(["cross"] if self.cross else []))
        where = rf"^({'|'.join(self.stacks)})\.\d+\.({'|'.join(after)})\.out$" if self.where is None else self.where
        return {name: sites[name] for name in matching(sites, where, "sublayer site")}

    def build(self, model: Any, places: dict[str, Site], rng: numpy.random.Generator) -> dict[str, "Adapter"]:
        """{site: its adapter}; draws D."""
        table = model.embedding.weight.base
        d = table.shape[1]
        m = self.size or max(1, int(d / self.reduction))
        return {name: Adapter(self, init.uniform((m, d), d ** -0.5, rng, table.dtype),
                              init.zeros((d, m), table.dtype)) for name in places}


class Adapter:
    """(x, n, F) -> F + A(h), all [batch, time, d]; h by placement."""

    def __init__(self, method: Bottleneck, down: Array, up: Array):
        m, d = down.shape
        self.D, self.b_D = Parameter(down), Parameter(init.zeros((m,), down.dtype))
        self.U, self.b_U = Parameter(up), Parameter(init.zeros((d,), up.dtype))
        _, self.reads, scale = PLACEMENTS[method.placement]
        if method.input == "norm":
            self.reads = lambda x, n, F: n
        self.f, self.scale = ACTIVATIONS[method.activation], Fraction(scale if method.scale is None else method.scale)

    def __call__(self, x: Any, n: Any, F: Any) -> Tensor:
        h = self.f(add(linear(self.reads(x, n, F), self.D), self.b_D))              # [batch, time, m]
        return add(F, mul(add(linear(h, self.U), self.b_U), scalar(self.scale, self.U)))
