"""Bottleneck adapters: two small trained layers inside a frozen block.

    adapter(h) = U f(D h + b_D) + b_U                   Houlsby et al., 2019, arXiv:1902.00751, sec. 2.1

    h [.., d] -- D [m, d], b_D [m] -- f -- U [d, m], b_U [d] -- [.., d]     m much smaller than d; U and b_U start at 0

x is the residual stream, F the sublayer's output, and n the sublayer's input. The block's x + F becomes

    houlsby     x + F + s adapter(F)        after attention and after feed-forward, s = 1 (the same paper, fig. 2)
    pfeiffer    x + F + s adapter(x + F)    after feed-forward, s = 1 (Pfeiffer et al., 2020, arXiv:2005.00247)
    parallel    x + F + s adapter(x)        beside feed-forward, s = 4 (He et al., 2021, arXiv:2110.04366);
                                            adapter(n) with input="norm", as they apply it to pre-LN

In a post-LN block this sum is taken before the norm.

A frozen block computes features that most tasks share, and a small layer after it can correct them for one task. The
sum x + F is the skip: with U = 0 the block starts unchanged.

    adapter = attach(model, Bottleneck("pfeiffer", reduction=16), numpy.random.default_rng(0))
    fit(model, adapter, batches, steps=300, optimizer=AdamW(1e-3))
    adapter.save("task.safetensors")

On T5-small, houlsby with m = 32: 799,488 parameters of 60,506,624.

It acts on hidden states through a nonlinearity, so no weight can absorb it. An adapter therefore cannot be merged, and
at inference it costs 4 m d operations per token.
"""
from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any, Callable

from minipeft.attaching.fields import expect, finite_in, integer, number, one_of
from minipeft.attaching.method import Declared, Method, register, setting, trained
from minipeft.engine.ops import linear
from minipeft.engine.tensor import Tensor
from minipeft.nn.init import uniform
from minipeft.nn.layers import ACTIVATIONS
from minipeft.nn.place import Place
from minipeft.nn.site import Site
from minipeft.nn.weight import Parameter, Piece
from minipeft.nn.where import Where


class Adapter(Piece):
    """F + s adapter(h), with h = reads(x, n, F) by placement.   D [m, d], b_D [m], U [d, m], b_U [d]."""

    D: Parameter
    b_D: Parameter
    U: Parameter
    b_U: Parameter
    reads: Callable
    f: Callable
    scale: Fraction

    def __call__(self, x: Any, n: Any, F: Any) -> Tensor:
        """x, n, F [batch, time, d] -> F' [batch, time, d]."""
        narrow = self.f(linear(self.reads(x, n, F), self.D) + self.b_D)           # [batch, time, m]
        return F + (linear(narrow, self.U) + self.b_U) * self.scale


def of_sublayer(x: Any, n: Any, F: Any) -> Any:
    """h = F, the sublayer's output, of x, n, F [batch, time, d]."""
    return F


def of_residual(x: Any, n: Any, F: Any) -> Tensor:
    """h = x + F, of x, n, F [batch, time, d]."""
    return x + F


def of_stream(x: Any, n: Any, F: Any) -> Any:
    """h = x, the residual stream, of x, n, F [batch, time, d]."""
    return x


def of_norm(x: Any, n: Any, F: Any) -> Any:
    """h = n, the sublayer's input, of x, n, F [batch, time, d]."""
    return n


# name: (after which sublayers, h, s)
PLACEMENTS: dict[str, tuple[tuple[str, ...], Callable, int]] = {
    "houlsby": (("attn", "ff"), of_sublayer, 1), "pfeiffer": (("ff",), of_residual, 1),
    "parallel": (("ff",), of_stream, 4)}


@register
@dataclasses.dataclass(frozen=True)
class Bottleneck(Method):
    """Bottleneck adapters. placement: one of PLACEMENTS. The width m is `size`, or else d / reduction, rounded down (at
    least 1). activation: f, one of ACTIVATIONS. scale: s, by default that of the placement. input: h of a parallel
    adapter, "stream" (x) or "norm" (n). cross: also after cross-attention (Houlsby's model has none). stacks: encoder,
    decoder, or both. where: the sites; it replaces the choice by placement, cross and stacks, but not their h and s.

    U and b_U start at 0, so attaching changes nothing; D is drawn from U(-1/sqrt(d), 1/sqrt(d)), b_D starts at 0.
    Departures: Houlsby et al. start near the identity (a truncated Gaussian) and also train the block's norms (for
    that, attach Selective(component="norm") beside it). AdapterHub's houlsby has activation "swish", its parallel a
    reduction of 2; its pfeiffer reads norm(x + F) in a post-LN block. Raises ValueError for fields out of range."""

    kinds = ("sublayer",)
    placement: str = setting("houlsby", lambda v: one_of(v, PLACEMENTS), f"one of {', '.join(PLACEMENTS)}")
    reduction: float = setting(16, lambda v: number(v) and v >= 1, "a number >= 1")
    size: int | None = setting(None, lambda v: v is None or integer(v), "an integer >= 1, or None")
    activation: str = setting("relu", lambda v: one_of(v, ACTIVATIONS), f"one of {', '.join(ACTIVATIONS)}")
    scale: float | None = setting(None, lambda v: v is None or number(v) and v != 0,
                                  "a finite number other than 0, or None")
    input: str = "stream"
    cross: bool = setting(False, lambda v: type(v) is bool, "True or False")
    stacks: tuple[str, ...] = ("encoder", "decoder")
    where: Where | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "stacks", (self.stacks,) if isinstance(self.stacks, str) else self.stacks)
        expect(self, "input", self.input in ["stream"] or self.input in ["norm"] and self.placement == "parallel",
               "'stream', or 'norm' with placement 'parallel'")
        expect(self, "stacks", isinstance(self.stacks, tuple) and self.stacks
               and all(one_of(s, ("encoder", "decoder")) for s in self.stacks), "'encoder', 'decoder', or both")

    def places(self, model: Any) -> dict[str, Place]:
        if self.where is not None:
            return super().places(model)
        after = (*PLACEMENTS[self.placement][0], *(["cross"] if self.cross else []))
        where = rf"^({'|'.join(self.stacks)})\.\d+\.({'|'.join(after)})\.out$"
        return dataclasses.replace(self, where=where).places(model)

    def arrays(self, name: str, site: Site, model: Any) -> dict[str, Declared]:
        expect(self, "scale", finite_in(self._scale, site.dtype), f"a finite number in {site.dtype}")
        d = site.width
        m = self.size or max(1, int(d / self.reduction))
        return {"D": trained((m, d), uniform(d ** -0.5)), "b_D": trained((m,)), "U": trained((d, m)),
                "b_U": trained((d,))}

    def make(self, name: str, site: Site, arrays: Any) -> Adapter:
        reads = of_norm if self.input == "norm" else PLACEMENTS[self.placement][1]
        return Adapter(**arrays, reads=reads, f=ACTIVATIONS[self.activation], scale=self._scale)

    @property
    def _scale(self) -> Fraction:
        return Fraction(PLACEMENTS[self.placement][2] if self.scale is None else self.scale)


# Mistakes that people make, from the catalogue of `minipeft.conformance` (--list --method bottleneck_adapter)
#
# * The skip is counted twice: F + adapter(F) is added to a stream that holds F already.
# * pfeiffer and houlsby are mixed up: pfeiffer reads x + F, houlsby reads F.
# * The scale 4 of the parallel adapter is left out, or applied to all placements.
# * On encoder-decoder models, AdapterHub's houlsby has no adapter after cross-attention unless it is asked for.
#
# Next: `nn/site.py`, on the places in the stream; `nn/blocks.py`, on the block that calls them; `methods/prompt.py`, on
# a method at the input.
