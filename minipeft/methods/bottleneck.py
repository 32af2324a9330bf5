"""Bottleneck adapters: two small trained layers inside a frozen block.

    adapter(h) = U f(D h + b_D) + b_U                   Houlsby et al., 2019, arXiv:1902.00751

    h [.., d] -- D [m, d], b_D [m] -- f -- U [d, m], b_U [d] -- [.., d]     m much smaller than d; U and b_U start at 0

x is the residual stream, F the sublayer's output, and n the sublayer's input. The block's x + F becomes

    houlsby     x + F + s adapter(F)        after attention and after feed-forward, s = 1 (the same paper)
    pfeiffer    x + F + s adapter(x + F)    after feed-forward, s = 1 (Pfeiffer et al., 2020, arXiv:2005.00247)
    parallel    x + F + s adapter(x)        beside feed-forward, s = 4 (He et al., 2021, arXiv:2110.04366);
                                            adapter(n) with input="norm", as they apply it to pre-LN

AdapterHub's double_seq_bn, seq_bn and par_bn are these three in its own configurations: double_seq_bn with f = swish,
par_bn with m = d / 2. In a post-LN block the sum is taken before the norm.

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
from typing import Any, Callable, NamedTuple

from minipeft.attaching.fields import expect, finite_in, integer, number, one_of
from minipeft.attaching.method import Declared, Method, register, setting, trained
from minipeft.engine.ops import linear
from minipeft.engine.tensor import Tensor
from minipeft.nn.init import normal, truncated_normal, uniform, zeros
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
    strength = "scale"

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


class Placement(NamedTuple):
    """after: the sublayers that get an adapter. reads: h. scale, reduction, activation: s, d / m and f by default."""

    after: tuple[str, ...]
    reads: Callable
    scale: int = 1
    reduction: float = 16
    activation: str = "relu"


PLACEMENTS = {
    "houlsby": Placement(("attn", "ff"), of_sublayer), "pfeiffer": Placement(("ff",), of_residual),
    "parallel": Placement(("ff",), of_stream, 4),
    # by AdapterHub's names, with AdapterHub's defaults
    "double_seq_bn": Placement(("attn", "ff"), of_sublayer, activation="swish"),
    "seq_bn": Placement(("ff",), of_residual), "par_bn": Placement(("ff",), of_stream, 4, reduction=2)}

INITS = ("zeros", "bert", "houlsby")


@register
@dataclasses.dataclass(frozen=True)
class Bottleneck(Method):
    """Bottleneck adapters. placement: one of PLACEMENTS. The width m is `size`, or else d / reduction, rounded down (at
    least 1). activation: f, one of ACTIVATIONS. scale: s. None for reduction, activation or scale means that of the
    placement. input: h of a parallel adapter, "stream" (x) or "norm" (n). cross: also after cross-attention (Houlsby's
    model has none, and AdapterHub adds none unless it is told to). stacks: encoder, decoder, or both. where: the sites;
    it replaces the choice by placement, cross and stacks; h and s stay those of the placement.

    init: "zeros", U = 0 and D from U(-1/sqrt(d), 1/sqrt(d)): attaching changes nothing. "bert", AdapterHub's default:
    D and U from N(0, 0.02^2), so attaching changes the outputs (`transparent` is False). "houlsby", the near-identity
    of the paper: D and U from N(0, 0.01^2), truncated at two standard deviations. The biases start at 0.

    Departures: Houlsby et al. also train the block's norms (for that, attach Selective(component="norm") beside it).
    AdapterHub's seq_bn reads norm(x + F) in a post-LN block. Raises ValueError for fields out of range."""

    kinds = ("sublayer",)
    placement: str = setting("houlsby", lambda v: one_of(v, PLACEMENTS), f"one of {', '.join(PLACEMENTS)}")
    reduction: float = setting(None, lambda v: v is None or number(v) and v >= 1, "a number >= 1, or None")
    size: int | None = setting(None, lambda v: v is None or integer(v), "an integer >= 1, or None")
    activation: str = setting(None, lambda v: v is None or one_of(v, ACTIVATIONS),
                              f"one of {', '.join(ACTIVATIONS)}, or None")
    scale: float | None = setting(None, lambda v: v is None or number(v) and v != 0,
                                  "a finite number other than 0, or None")
    input: str = "stream"
    cross: bool = setting(False, lambda v: type(v) is bool, "True or False")
    stacks: tuple[str, ...] = ("encoder", "decoder")
    where: Where | None = None
    init: str = setting("zeros", lambda v: one_of(v, INITS), f"one of {', '.join(INITS)}", optional=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reduction", "activation"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(PLACEMENTS[self.placement], name))
        object.__setattr__(self, "stacks", (self.stacks,) if isinstance(self.stacks, str) else self.stacks)
        expect(self, "input", self.input in ["stream"] or self.input in ["norm"] and self.placement == "parallel",
               "'stream', or 'norm' with placement 'parallel'")
        expect(self, "stacks", isinstance(self.stacks, tuple) and self.stacks
               and all(one_of(s, ("encoder", "decoder")) for s in self.stacks), "'encoder', 'decoder', or both")

    @property
    def transparent(self) -> bool:  # type: ignore[override]
        """Whether attaching leaves all outputs as they were: only where U starts at 0."""
        return self.init == "zeros"

    def places(self, model: Any) -> dict[str, Place]:
        if self.where is not None:
            return super().places(model)
        after = (*PLACEMENTS[self.placement].after, *(["cross"] if self.cross else []))
        where = rf"^({'|'.join(self.stacks)})\.\d+\.({'|'.join(after)})\.out$"
        return dataclasses.replace(self, where=where).places(model)

    def arrays(self, name: str, site: Site, model: Any) -> dict[str, Declared]:
        expect(self, "scale", finite_in(self._scale, site.dtype), f"a finite number in {site.dtype}")
        d = site.width
        m = self.size or max(1, int(d / self.reduction))
        down, up = {"zeros": (uniform(d ** -0.5), zeros), "bert": (normal(0.02),) * 2,
                    "houlsby": (truncated_normal(0.01),) * 2}[self.init]
        return {"D": trained((m, d), down), "b_D": trained((m,)), "U": trained((d, m), up), "b_U": trained((d,))}

    def make(self, name: str, site: Site, arrays: Any) -> Adapter:
        reads = of_norm if self.input == "norm" else PLACEMENTS[self.placement].reads
        return Adapter(**arrays, reads=reads, f=ACTIVATIONS[self.activation], scale=self._scale)

    @property
    def _scale(self) -> Fraction:
        return Fraction(PLACEMENTS[self.placement].scale if self.scale is None else self.scale)


# Mistakes that people make, from the catalogue of `minipeft.conformance` (--list --method bottleneck_adapter)
#
# * The skip is counted twice: F + adapter(F) is added to a stream that holds F already.
# * pfeiffer and houlsby are mixed up: pfeiffer reads x + F, houlsby reads F.
# * The scale 4 of the parallel adapter is left out, or applied to all placements.
# * AdapterHub's default init, "bert", is not the identity: attaching changes the outputs before any training.
# * On encoder-decoder models, AdapterHub's double_seq_bn has no adapter after cross-attention unless it is asked for.
#
# Next: `nn/site.py`, on the places in the stream; `nn/blocks.py`, on the block that calls them; `methods/prompt.py`, on
# a method at the input.
