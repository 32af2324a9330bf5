"""Prefix tuning: trained keys and values in front of those of every attention.

    Attention(Q, [K; k], [V; v])          Li & Liang, 2021, arXiv:2101.00190, eq. (3), sec. 4.2

    K, V [p, heads * d_k] --------------------+
    n [batch, key, d] -- W_k, W_v -- k, v [batch, key, heads * d_k] -- [batch, p + key, heads * d_k] -- attention

An encoder-decoder gets three kinds of prefixes: one in the self-attention of the encoder, one in that of the decoder,
and one in cross-attention. Every layer of each kind has a K and a V of its own. Every query sees the whole prefix. With
`mlp` a small network makes K and V (sec. 4.3), and all of it is trained:

    K = h W_K^T + b_K,   V = h W_V^T + b_V,   h = tanh(P W^T + b)         P [p, d], W [m, d]: one for each kind

A prompt can tell a model what to do only through its first layer. A prefix acts on what every layer attends to, so it
can steer all of them directly.

    adapter = attach(model, PrefixTuning(20), numpy.random.default_rng(0))
    fit(model, adapter, batches, steps=300, optimizer=AdamW(1e-2))
    adapter.save("task.safetensors")

On T5-small, p = 20: 368,640 parameters of 60,506,624.

A prefix takes no positions, so the tokens keep their distances and their positions. T5 adds a bias to each score, by
the distance of key and query, and the paper does not say which one the keys of a prefix get. With bias="none" it is 0.
With bias="earlier" the prefix counts as p tokens directly in front of the row's first token, as in PEFT's decoder. In
cross-attention, and in models that have no such bias, both are 0. With bias="adapterhub" the distances between tokens
change, too: each key is p positions later than it was, and the queries stay where they are. It is there for adapters of
AdapterHub, whose numbers depend on it. A prefix is not a weight, so it cannot be merged. It lengthens every attention
by p keys.

Where positions are rotary, the keys of the prefix are not rotated, and the row's first token is at position p, as in
PEFT's LLaMA.

PEFT cuts one array [p, 2 L d] into 2 L slices, where L is the number of layers of the encoder. Layer i of the decoder
has its K in slice 4 i mod 2 L and its V in the slice after it. If L is even, layers i and i + L / 2 have the same two,
and at least half of the slices are never used. With slices="peft" the layers share K and V in this way, and train them
together. It is there for the files of PEFT, whose numbers depend on it.
"""
from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from minipeft.attaching.attach import check_name
from minipeft.attaching.attachment import Attachment
from minipeft.attaching.build import wanted
from minipeft.attaching.fields import expect, finite_in, integer, number, one_of
from minipeft.attaching.method import Declared, Method, register, setting, trained
from minipeft.backend import Array, to_device, xp
from minipeft.checks import shown
from minipeft.engine.ops import add, concat, embedding, linear, tanh
from minipeft.engine.tensor import Tensor, array_of
from minipeft.nn.init import normal, uniform
from minipeft.nn.place import Place
from minipeft.nn.positions import positions_of
from minipeft.nn.rotary import Rotary
from minipeft.nn.site import Site
from minipeft.nn.weight import Parameter, Piece
from minipeft.nn.where import Where


class Prefix(Piece):
    """[K; k] and [V; v].   K, V [p, heads * d_k]. position: None for bias="none"; else that of the site. shifts: for
    bias="adapterhub". rotary: the rotary positions of the site, if it has them."""

    K: Parameter
    V: Parameter
    position: Any
    shifts: bool
    rotary: Rotary | None

    @property
    def prefix(self) -> tuple[Any, Any]:
        """K and V, [p, heads * d_k] each."""
        return self.K, self.V

    def __call__(self, k: Any, v: Any, bias: Any) -> tuple[Tensor, Tensor, Any]:
        """k, v [batch, key, heads * d_k] -> [batch, p + key, heads * d_k] each. bias [1 or batch, 1 or heads, 1 or
        query, key] -> the same with p + key; None says that every key is seen and has no bias, and stays None."""
        K, V = self.prefix
        each_row = xp.zeros((k.shape[0], 1, 1), dtype=k.dtype)
        if bias is not None and self.shifts:
            bias = shifted_bias(self.position, K.shape[0], bias)
        elif bias is not None:
            bias = _beside(earlier_bias(self.position, K.shape[0], bias), bias)
        keys = K + each_row
        if self.rotary is not None:
            keys = self.rotary.as_at_zero(keys)
        return concat(keys, k, axis=1), concat(V + each_row, v, axis=1), bias


class ComputedPrefix(Prefix):
    """K = h W_K^T + b_K, V = h W_V^T + b_V, h = tanh(P W^T + b).

    P [p, d], W [m, d], b [m] of one kind; W_K, W_V [heads * d_k, m], b_K, b_V [heads * d_k] of one attention."""

    P: Parameter
    W: Parameter
    b: Parameter
    W_K: Parameter
    b_K: Parameter
    W_V: Parameter
    b_V: Parameter

    @property
    def prefix(self) -> tuple[Tensor, Tensor]:
        h = tanh(linear(self.P, self.W) + self.b)                                         # [p, m]
        return linear(h, self.W_K) + self.b_K, linear(h, self.W_V) + self.b_V


def earlier_bias(position: Any, p: int, bias: Any) -> Any:
    """The bias of p tokens directly in front of a row's first token: [1 or batch, heads, query, p], or zeros where
    `position` (of `nn.positions`, or None) has no bias.

    bias [1 or batch, 1 or heads, query, key]: that of the row's keys, which is -inf in padding on the left. The last
    query is at the last key. Prefix key j is at position j, and a row's token i at p + i."""
    queries, keys = bias.shape[-2:]
    table = None if position is None else position.bias(keys, p + keys, p)                # [1 or batch, heads, key, ..]
    if table is None:
        return xp.zeros((*bias.shape[:-1], p), dtype=bias.dtype)
    seen = array_of(bias)[:, 0, -1] != -math.inf
    at = to_device(positions_of(seen, keys - queries, queries))                           # [query], [batch, query]
    n, heads = table.shape[:2]
    rows = table[..., :p].transpose(0, 2, 1, 3).reshape(n * keys, heads * p)              # by row and position
    found = embedding(rows, at + keys * xp.arange(n)[:, None])                            # [1 or batch, query, ..]
    return found.reshape(*found.shape[:2], heads, p).transpose(0, 2, 1, 3)


def shifted_bias(position: Any, p: int, bias: Any) -> Any:
    """The bias of p keys and of the row's own, as AdapterHub's T5 has it: [1 or batch, 1 or heads, query, p + key].

    position, bias: as in `earlier_bias`. The p + key keys are at the positions 0, 1, ..., and the query of key i is at
    i. Padding on the left takes positions. A key that `bias` hides stays hidden."""
    queries, keys = bias.shape[-2:]
    given = array_of(bias)[:, :1]
    hidden = xp.concatenate([xp.zeros((*given.shape[:-1], p), dtype=bias.dtype),
                             xp.where(given == -math.inf, given, xp.zeros((), dtype=bias.dtype))], axis=-1)
    table = None if position is None else position.bias(queries, p + keys, keys - queries)
    return hidden if table is None else add(table, hidden)


def _beside(a: Any, b: Any) -> Tensor:
    """[a; b] along the keys, of biases whose other axes broadcast."""
    lead = tuple(map(max, a.shape[:-1], b.shape[:-1]))
    return concat(*(x if x.shape[:-1] == lead else add(x, xp.zeros((*lead, 1), dtype=x.dtype)) for x in (a, b)),
                  axis=-1)


SITES = {"encoder": r"^encoder\.\d+\.attn\.keys_values$", "decoder": r"^decoder\.\d+\.attn\.keys_values$",
         "cross": r"^decoder\.\d+\.cross\.keys_values$"}  # {kind: where}


def key_slice(layer: int, layers: int) -> int:
    """Which of the 2 * layers slices of PEFT's are the keys of this layer of the decoder. The next one has its
    values."""
    return 4 * layer % (2 * layers)


@register
@dataclasses.dataclass(frozen=True)
class PrefixTuning(Method):
    """Prefix tuning. length: p. sites: which kinds of attention, some of SITES; by default all that the model has.
    bias: of the prefix in T5's scores, "none", "earlier" or "adapterhub". Of two prefixes on one attention, the one
    that is plugged later stands in front; in rows padded on the left its distance counts the padding. mlp: the width m
    of the network that makes K and V; None trains K and V directly. std: K and V start from N(0, std^2), by default
    0.02; not with mlp. where: keys and values sites, instead of the choice by sites. slices: "own", or "peft" for a
    decoder whose layers share K and V as in PEFT. An integer is the L of a PEFT file that does not have that of the
    model.

    The paper trains through a network because training K and V directly was less stable (sec. 4.3); where data are
    scarce it starts from what the model computes for real words. Departure: K and V start at random and small, so that
    at first the prefix adds little; PEFT and AdapterHub draw them from N(0, 1). With mlp, P starts from N(0, 1) and a
    matrix with n inputs from U(-1/sqrt(n), 1/sqrt(n)), as in both, and b, b_K, b_V at 0. As in AdapterHub each kind has
    its own P, W and b. `without_mlp` drops the network after training. Raises ValueError for fields out of range and,
    on a model, for slices at a place where PEFT has none."""

    kinds = ("keys_values",)
    transparent = False
    length: int = setting(20, integer, "an integer >= 1")
    sites: tuple[str, ...] = tuple(SITES)
    bias: str = setting("none", lambda v: one_of(v, ("none", "earlier", "adapterhub")),
                        "'none', 'earlier' or 'adapterhub'")
    mlp: int | None = setting(None, lambda v: v is None or integer(v), "an integer >= 1, or None")
    std: float | None = None
    where: Where | None = None
    slices: str | int = setting("own", lambda v: one_of(v, ("own", "peft")) or integer(v),
                                "'own', 'peft' or an integer >= 1", optional=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sites", (self.sites,) if isinstance(self.sites, str) else self.sites)
        expect(self, "sites", isinstance(self.sites, tuple) and self.sites
               and all(one_of(s, SITES) for s in self.sites), f"some of {', '.join(SITES)}")
        expect(self, "std", self.std is None or number(self.std) and self.std >= 0 and self.mlp is None,
               "a finite number >= 0 without mlp, or None")

    def places(self, model: Any) -> dict[str, Place]:
        if self.where is not None:
            return super().places(model)
        kinds = self.sites if hasattr(model, "encoder") or self.sites != tuple(SITES) else ("decoder",)
        return dataclasses.replace(self, where=tuple(SITES[kind] for kind in kinds)).places(model)

    def arrays(self, name: str, site: Site, model: Any) -> dict[str, Declared]:
        width, m, pair = site.width, self.mlp, self._pair(name, model)
        if m is None:
            std = 0.02 if self.std is None else self.std
            expect(self, "std", finite_in(std, site.dtype), f"a finite number in {site.dtype}")
            init = normal(std)
            return {leaf: trained((self.length, width), init, pair) for leaf in "KV"}
        kind, d = _kind(name), model.config.d_model
        return {"P": trained((self.length, d), normal(1.0), shared=kind),
                "W": trained((m, d), uniform(d ** -0.5), shared=kind), "b": trained((m,), shared=kind),
                "W_K": trained((width, m), uniform(m ** -0.5), pair), "b_K": trained((width,), shared=pair),
                "W_V": trained((width, m), uniform(m ** -0.5), pair), "b_V": trained((width,), shared=pair)}

    def make(self, name: str, site: Site, arrays: Any) -> Prefix:
        piece = Prefix if self.mlp is None else ComputedPrefix
        return piece(**arrays, position=None if self.bias == "none" else site.position,
                     shifts=self.bias == "adapterhub",
                     rotary=site.position if isinstance(site.position, Rotary) else None)

    def slice_layers(self, model: Any) -> int | None:
        """L of the 2 L slices that the layers of `model` share; None if each has its own."""
        if isinstance(self.slices, int):
            return self.slices
        return model.config.num_layers if self.slices == "peft" else None

    def _pair(self, name: str, model: Any) -> str | None:
        """A name for the two slices of the site called `name`, under which layers share them; None for its own."""
        layers = self.slice_layers(model)
        if layers is None:
            return None
        expect(self, "slices", _kind(name) == "decoder" and int(name.split(".")[1]) < layers,
               f"'own' for {name}: PEFT has slices for the self-attention of L = {layers} layers of a decoder alone")
        at = key_slice(int(name.split(".")[1]), layers)
        return f"decoder.slices_{at}_{at + 1}"


def _kind(name: str) -> str:
    """The kind of the site called `name`, one of SITES; "prefix" for a site of no such name."""
    return next((kind for kind, where in SITES.items() if re.search(where, name)), "prefix")


def without_mlp(attachment: Attachment, name: str | None = None) -> Attachment:
    """The same prefix without the network: a new attachment on the same model, of a PrefixTuning with mlp=None, whose K
    and V are those that the network of `attachment` makes now. It is off, so no output changes. Plugged in place of
    `attachment` it gives the same outputs with less work, and its file holds K and V alone. It was trained on what
    `attachment` was trained on.

    name: of the new attachment, by default "<name>-plain". Raises ValueError for an attachment of another method or
    without a network, for a removed one, and for a name that is taken."""
    model, method = attachment.model, attachment.method
    if not isinstance(method, PrefixTuning) or method.mlp is None or not attachment.places:
        raise ValueError(f"{attachment!r}, of {shown(method)}, has no network to drop; expected a prefix with mlp on a "
                         f"model")
    name = f"{attachment.name}-plain" if name is None else name
    check_name(model, name)
    plain = dataclasses.replace(method, mlp=None)
    plan = wanted(model, plain)
    made: dict[str, Array] = {plan.declared[where][leaf].key(where, leaf): array_of(x)
                              for where, place in attachment.places.items()
                              for leaf, x in zip("KV", attachment.at[place].prefix)}
    pieces, arrays = plan.built(lambda key, declared, dtype: made[key])
    trained_on = attachment.trained_on and attachment.trained_on.settled(model)
    new = Attachment(model, name, plain, plan.places, pieces, arrays, trained_on)
    model.host.now = model.host.now.replace(attached={**model.attachments, name: new})
    return new


# Mistakes that people make
#
# * An encoder-decoder gets a prefix in the self-attention of its decoder alone (huggingface/peft #410 and #1188).
# * Layers share their K and V by mistake, and half of the parameters never get a gradient. See slices.
# * K and V are d_model wide, and as many as the encoder has layers. That fails where heads * d_k is another number, and
#   where the decoder has more layers. Where it has fewer, some are never used (huggingface/peft #385).
# * The keys of the tokens move by p and the queries stay where they are, so T5's distances are wrong.
# * The network is not saved with its prefix, so training cannot be resumed.
#
# Next: `nn/attention.py`, on the scores; `methods/prompt.py`, on a prefix for the first layer alone.
