"""(IA)^3: keys, values and hidden features of the feed-forward, each times a trained factor.

    softmax(Q (l_k * K)^T / sqrt(d_k)) (l_v * V)        Liu et al., 2022, arXiv:2205.05638, sec. 3.3
    (l_ff * f(x W1)) W2                                 *: elementwise; f: the activation; each l starts at 1

    x [.., d] -- W_k [d_k, d] (+ b_k) -- * l_k [d_k] -- K        values likewise, with l_v
    x [.., d] -- W1 [d_ff, d] -- f -- * l_ff [d_ff] -- W2 [d, d_ff] -- [.., d]

A frozen model already computes more features than a task needs. A factor for each can silence it, strengthen it or flip
its sign, and that takes one number per feature.

    adapter = attach(model, IA3(), numpy.random.default_rng(0))
    fit(model, adapter, batches, steps=300, optimizer=AdamW(3e-3))
    adapter.merge()

On T5-small, k and v of all 18 attentions and 12 feed-forward layers: 43,008 parameters of 60,506,624.

With L encoder and L decoder layers there are L (d_k + d_v + d_ff) + L (2 d_k + 2 d_v + d_ff) factors, where d_k and d_v
are those of all heads together. A factor of a feature scales a row of the matrix that computes it, or a column of the
matrix that reads it:

    l * (x W^T + b) = x (l W)^T + l * b        rows of W_k and W_v [d_out, d_in]; their bias is scaled as well
    (l * h) W^T = h (W l)^T                    columns of W2 [d_out, d_in]

So merging leaves no extra operation. It computes l W from W and keeps W; unmerging divides nothing.

placement="before" is AdapterHub's: l_ff multiplies the output of W1, before f, and in a gated layer the linear branch.
In a gated layer both placements compute the same, and so they do for relu with l > 0. For relu with an l < 0, and for
gelu without a gate, they compute different functions.
"""
from __future__ import annotations

import dataclasses
import re
from typing import Any

from minipeft.attaching.fields import one_of
from minipeft.attaching.method import Declared, Method, register, setting, trained
from minipeft.engine.tensor import Tensor
from minipeft.methods.per_place import is_expression
from minipeft.nn.init import ones
from minipeft.nn.place import Place
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Parameter, Reparam
from minipeft.nn.where import Where


class ScaledOutput(Reparam):
    """l W, of a matrix [d_out, d_in] or a bias [d_out].   l [d_out]."""

    l: Parameter  # noqa: E741

    def dense(self) -> Tensor:
        return (self.l.reshape(-1, 1) if len(self.shape) == 2 else self.l) * self.base.dense()

    def project(self, x: Any, rng: Any = None) -> Tensor:
        """x (l W)^T = l * (x W^T).   x [..., d_in] -> [..., d_out]."""
        return self.base.project(x, rng) * self.l


class ScaledInput(Reparam):
    """W l, of a matrix [d_out, d_in].   l [d_in]."""

    l: Parameter  # noqa: E741

    def dense(self) -> Tensor:
        return self.base.dense() * self.l

    def project(self, x: Any, rng: Any = None) -> Tensor:
        """x (W l)^T = (x * l) W^T.   x [..., d_in] -> [..., d_out]."""
        return self.base.project(x * self.l, rng)


# {placement: the matrices}
PLACEMENTS = {"after": r"\.(attn|cross)\.(k|v)\.weight$|\.ff\.wo\.weight$",
              "before": r"\.(attn|cross)\.(k|v)\.weight$|\.ff\.(wi|wi_1)\.weight$"}


@register
@dataclasses.dataclass(frozen=True)
class IA3(Method):
    """(IA)^3. placement: where l_ff multiplies, "after" the activation, as in the paper and in PEFT, or "before" it, as
    in AdapterHub. where: the matrices; it replaces the choice by placement. inputs: a regular expression; of a matrix
    in whose name it is found, by default of one called "wo", the columns are scaled. Of any other the rows are scaled,
    and its bias with the same l; one that AddedBias adds is not.

    Each l starts at 1, so attaching changes nothing. Raises ValueError for fields out of range, and on a model where
    `where` finds no matrix."""

    kinds = ("linear", "bias")
    placement: str = setting("after", lambda v: one_of(v, PLACEMENTS), "'after' or 'before'")
    where: Where | None = None
    inputs: str = setting(r"\.wo\.weight$", is_expression, "a regular expression", optional=True)

    def places(self, model: Any) -> dict[str, Place]:
        if self.where is None:
            return dataclasses.replace(self, where=PLACEMENTS[self.placement]).places(model)
        chosen = super().places(model)
        layers = {_layer(name) for name, place in chosen.items() if place.kind == "linear"}
        for name in chosen:
            if _layer(name) not in layers:
                raise ValueError(f"IA3: where chooses {name}, and no matrix beside it; expected {_layer(name)}.weight, "
                                 f"whose l scales its bias as well")
        return {name: place for name, place in model.named_places() if _layer(name) in layers
                and (place.kind == "linear" or place.kind == "bias" and not self.scales_input(name))}

    def arrays(self, name: str, slot: Slot, model: Any) -> dict[str, Declared]:
        return {"l": trained(slot.shape[1:] if self.scales_input(name) else slot.shape[:1], ones, shared=_layer(name))}

    def make(self, name: str, slot: Slot, arrays: Any) -> Reparam:
        return ScaledInput(**arrays) if self.scales_input(name) else ScaledOutput(**arrays)

    def scales_input(self, name: str) -> bool:
        """Whether l scales the input of the layer of the place called `name`, and not its output."""
        return re.search(self.inputs, f"{_layer(name)}.weight") is not None


def _layer(name: str) -> str:
    """encoder.0.attn.k, of encoder.0.attn.k.weight and encoder.0.attn.k.bias."""
    return name.rpartition(".")[0]


# Mistakes that people make, from comparing other libraries
#
# * The feed-forward is scaled before the activation: another function for relu with an l < 0, and for gelu without a
#   gate.
# * Unmerging divides by l + 1e-8: each cycle moves the weight a little, and an l of 0 loses its row. Here W is kept.
# * Rows and columns are mixed up: on a square matrix no shape tells.
# * The bias of k and v is not scaled, so merged and unmerged differ.
#
# Next: `nn/weight.py`, on weights that lie on other weights; `methods/dora.py`, on factors beside LoRA;
# `nn/layers.py`, on the feed-forward layer.
