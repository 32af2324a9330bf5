"""Bottleneck adapters: two small layers with a skip, inside a frozen block.

    A(h) = U f(D h + b_D) + b_U                   Houlsby et al., 2019, arXiv:1902.00751, sec. 2.1

D [m, d], b_D [m], U [d, m], b_U [d]: 2 m d + d + m numbers each, m much smaller than d. With x the residual stream, F
the sublayer's output and n what the sublayer read, the block's x + F becomes

    houlsby     x + F + s A(F)          after attention and after feed-forward, s = 1 (the same paper, fig. 2)
    pfeiffer    x + F + s A(x + F)      after feed-forward, s = 1 (Pfeiffer et al., 2020, arXiv:2005.00247)
    parallel    x + F + s A(x)          beside feed-forward, s = 4 (He et al., 2021, arXiv:2110.04366); A(n) with
                                        input="norm", their reading on pre-LN

before the norm in a post-LN block. It acts on hidden states through a nonlinearity, so no weight can absorb it: an
adapter is not merged, it costs its 4 m d operations per token at inference.
"""
from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any, Callable

from minipeft.engine.tensor import Tensor
from minipeft.backend import Array, scalar
from minipeft.nn import init
from minipeft.nn.layers import ACTIVATIONS
from minipeft.nn.site import Site
from minipeft.nn.weight import Parameter
from minipeft.nn.where import Where, matching
from minipeft.engine.ops import add, linear, mul
from minipeft.attaching.fields import expect, finite_in, integer, number, one_of, plain


def _sublayer(x: Any, n: Any, F: Any) -> Any:
    return F


def _residual(x: Any, n: Any, F: Any) -> Tensor:
    return add(x, F)


def _stream(x: Any, n: Any, F: Any) -> Any:
    return x


def _norm(x: Any, n: Any, F: Any) -> Any:
    return n


# name: (after which sublayers, what A reads, s)
PLACEMENTS: dict[str, tuple[tuple[str, ...], Callable, int]] = {
    "houlsby": (("attn", "ff"), _sublayer, 1), "pfeiffer": (("ff",), _residual, 1), "parallel": (("ff",), _stream, 4)}


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """placement: one of PLACEMENTS. The width m is `size`, or d_model / reduction. scale: s, by default 1, parallel 4.
    input: what a parallel adapter reads, "stream" (x) or "norm" (n). cross: also after cross-attention (Houlsby's
    model has none). stacks: encoder, decoder, or both. where: the sites, instead of those of placement, cross and
    stacks (what A reads, and s, stay).

    U and b_U start at 0, so attaching changes nothing, D is U(-1/sqrt(d), 1/sqrt(d)). Departures: Houlsby et al. start
    near the identity (a truncated Gaussian) and train the norms of the block too (attach Selective(component="norm")
    beside); AdapterHub's houlsby has activation "swish", its parallel a reduction of 2, and its pfeiffer reads
    norm(x + F) in a post-LN block. Raises ValueError for fields out of range."""

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
        expect(self, "placement", one_of(self.placement, PLACEMENTS), f"one of {', '.join(PLACEMENTS)}")
        expect(self, "reduction", number(self.reduction) and self.reduction >= 1, "a number >= 1")
        expect(self, "size", self.size is None or integer(self.size), "an integer >= 1, or None")
        expect(self, "activation", one_of(self.activation, ACTIVATIONS), f"one of {', '.join(ACTIVATIONS)}")
        expect(self, "scale", self.scale is None or number(self.scale) and self.scale != 0,
               "a finite number other than 0, or None")
        expect(self, "input", self.input in ["stream"] or self.input in ["norm"] and self.placement == "parallel",
               "'stream', or 'norm' with placement 'parallel'")
        expect(self, "cross", type(self.cross) is bool, "True or False")
        expect(self, "stacks", isinstance(self.stacks, tuple) and self.stacks
               and all(one_of(s, ("encoder", "decoder")) for s in self.stacks), "'encoder', 'decoder', or both")

    def places(self, model: Any) -> dict[str, Site]:
        """The sublayer sites that are chosen."""
        sites = {name: site for name, site in model.sites.items() if site.kind == "sublayer"}
        after = (*PLACEMENTS[self.placement][0], *(["cross"] if self.cross else []))
        where = rf"^({'|'.join(self.stacks)})\.\d+\.({'|'.join(after)})\.out$" if self.where is None else self.where
        dtype = model.embedding.weight.base.dtype
        expect(self, "scale", finite_in(self._scale, dtype), f"a finite number in {dtype}")
        return {name: sites[name] for name in matching(sites, where, "sublayer site")}

    def shapes(self, name: str, site: Site, model: Any) -> dict[str, tuple]:
        """Of D, b_D, U and b_U at one site."""
        d = model.embedding.weight.base.shape[1]
        m = self.size or max(1, int(d / self.reduction))
        return {"D": (m, d), "b_D": (m,), "U": (d, m), "b_U": (d,)}

    def build(self, model: Any, places: dict[str, Site], rng: init.Rng) -> dict[str, "Adapter"]:
        """{site: its adapter}; draws D."""
        dtype, pieces = model.embedding.weight.base.dtype, {}
        for name, site in places.items():
            shape = self.shapes(name, site, model)
            down = init.uniform(shape["D"], shape["D"][1] ** -0.5, rng, dtype)
            pieces[name] = Adapter(self, down, init.zeros(shape["U"], dtype))
        return pieces

    @property
    def _scale(self) -> Fraction:
        return Fraction(PLACEMENTS[self.placement][2] if self.scale is None else self.scale)


class Adapter:
    """(x, n, F) -> F + s A(h), all [batch, time, d]; h by placement."""

    def __init__(self, method: Bottleneck, down: Array, up: Array):
        m, d = down.shape
        self.D, self.b_D = Parameter(down), Parameter(init.zeros((m,), down.dtype))
        self.U, self.b_U = Parameter(up), Parameter(init.zeros((d,), up.dtype))
        self.reads = _norm if method.input == "norm" else PLACEMENTS[method.placement][1]
        self.f, self.scale = ACTIVATIONS[method.activation], method._scale

    def __call__(self, x: Any, n: Any, F: Any) -> Tensor:
        h = self.f(add(linear(self.reads(x, n, F), self.D), self.b_D))              # [batch, time, m]
        return add(F, mul(add(linear(h, self.U), self.b_U), scalar(self.scale, self.U)))
