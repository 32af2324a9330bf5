"""Added biases: a trained bias for each linear layer that has none.

    y = x W^T + b          b [d_out], trained; it starts at 0          after Ben Zaken et al., 2021, arXiv:2106.10199

    x [.., d_in] -- W [d_out, d_in], frozen -- + b [d_out] -- y [.., d_out]

BitFit (the same paper) trains the biases of a model and nothing else, and a bias is enough to turn a feature on or off.
T5 and LLaMA have no biases, so a model of that kind first needs some.

    adapter = attach(model, AddedBias(), numpy.random.default_rng(0))
    fit(model, adapter, batches, steps=300, optimizer=AdamW(1e-3))
    with adapter.off(): ...

On T5-small, q, v and o of all attentions, and all feed-forward layers: 58,368 parameters of 60,506,624.

Departure from the paper, which trains biases that are there: for those, attach `Selective(type="bias")`. With g the
gradient at y, db is the sum of g over all positions, and x is not kept for it. A bias of k is left out by default. It
adds q b to all scores of one query alike, and softmax ignores that.

Where it is not attached, the layer computes what it did before, and no zeros are added. Merged, b is a constant of the
layer. The files of such a model have no name for it, so `save_pretrained(merged=True)` refuses.
"""
from __future__ import annotations

import dataclasses
from typing import Any

from minipeft.attaching.method import Declared, Method, register, trained
from minipeft.engine.tensor import Tensor
from minipeft.nn.absent import ABSENT
from minipeft.nn.place import Place
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Parameter, Reparam
from minipeft.nn.where import Where


class Bias(Reparam):
    """0 + b.   b [d_out], above the zeros of a bias that is absent, or above another bias that was added."""

    b: Parameter

    def dense(self) -> Tensor:
        return self.base.dense() + self.b


@register
@dataclasses.dataclass(frozen=True)
class AddedBias(Method):
    """Biases for linear layers without one. where: the names that these biases would have, "<layer>.bias"; by default
    those of q, v and o of every attention and of the feed-forward layers. The head and k can be chosen, too.

    b starts at 0, so attaching changes nothing. Raises ValueError on a model where `where` finds no such layer, for
    example because all of them have biases."""

    kinds = (ABSENT,)
    where: Where = r"\.(attn|cross)\.(q|v|o)\.bias$|\.ff\.\w+\.bias$"

    def places(self, model: Any) -> dict[str, Place]:
        try:
            return super().places(model)
        except ValueError as error:
            raise ValueError(f"AddedBias: {error}; it is for layers without a bias (to train the biases that a model "
                             f"has, attach Selective(type='bias'))") from error

    def arrays(self, name: str, slot: Slot, model: Any) -> dict[str, Declared]:
        return {"b": trained(slot.shape)}

    def make(self, name: str, slot: Slot, arrays: Any) -> Bias:
        return Bias(**arrays)


# Mistakes that people make
#
# * A model is said to be tuned by BitFit although it has no biases, so that nothing is trained (on T5, 0 parameters).
# * Switched off, the model keeps its trained biases: they were trained in place (huggingface/peft, LoraConfig with
#   bias="all"). Here the base is never written to.
# * A merged model is saved in a format without biases: the file loads, and the biases are gone.
# * The bias is added once for each adapter that is merged, or before the product with W.
#
# Next: `nn/absent.py`, on the place of a bias that is not there; `methods/selective.py`, on biases that are there.
