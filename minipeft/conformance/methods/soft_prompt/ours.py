"""minipeft itself as a plug-in: one attention layer of its engine, and the prompt that `attach(PromptTuning(...))` puts
at its input site.

PromptTuning refuses a prompt of length 0, so nothing is attached for one.
"""
from __future__ import annotations

from typing import Any, Mapping

import numpy

from minipeft.engine.tensor import Tensor, array_of, value_and_grad
from minipeft.conformance.saved import bytes_of, loaded
from minipeft.nn.attention import Attention, additive
from minipeft.nn.inputs import check_ids, check_mask
from minipeft.nn.layers import Embedding, Linear
from minipeft.nn.module import Model, Module
from minipeft.nn.positions import Learned, positions_of
from minipeft.nn.site import Site
from minipeft.engine.ops import add, index, mul
from minipeft.engine.ops import sum as total
from minipeft.attaching.attach import attach
from minipeft.attaching.attachment import Attachment
from minipeft.methods.prompt import PromptTuning

Array = numpy.ndarray
SITE = "encoder.input"
CONVENTIONS = {"numbering": "tokens"}
capabilities = {"name": "minipeft", "dtypes": ["float64", "float32"], "conventions": {"soft_prompt": CONVENTIONS}}


class Clipped(Module):
    """Relative positions, as the cases have them: relative[clip(j - i, -R, R) + R] is added to the scores."""

    def __init__(self, table: Array):
        self.table = table

    def embed(self, positions: Array) -> None:
        return None

    def bias(self, n: int) -> Array:
        """[1, 1, n, n]."""
        far = len(self.table) // 2
        return self.table[numpy.clip(numpy.arange(n) - numpy.arange(n)[:, None], -far, far) + far][None, None]


class Encoder(Module):
    """embeddings [b, t, d], mask [b, t] -> [b, p + t, d]: the input site, positions, and one attention."""

    def __init__(self, position: Learned | Clipped, attention: Attention):
        width, dtype = attention.o.weight.shape[0], attention.o.weight.dtype
        self.input, self.position, self.attention = Site("input", width, dtype), position, attention

    def __call__(self, x: Any, mask: Array) -> Tensor:
        x, seen = self.input(x, mask)
        n, dtype = array_of(x).shape[1], array_of(x).dtype
        added = self.position.embed(positions_of(seen, 0, n))
        x = x if added is None else add(x, added)
        bias = additive(seen[:, None, None, :], dtype)
        if isinstance(self.position, Clipped):
            bias = bias + self.position.bias(n)
        return self.attention(x, x, bias)


class OneAttention(Model):
    """A whole model: ids [b, t], mask [b, t] -> [b, t, d] at the tokens."""

    def __init__(self, base: Mapping[str, Array], dtype: str):
        w = {name: array.astype(dtype) for name, array in base.items()}
        self.embedding = Embedding(w["E"])
        q, k, v, o = (Linear(w[name]) for name in "qkvo")
        position = Learned(w["position"]) if "position" in w else Clipped(w["relative"])
        self.encoder = Encoder(position, Attention(q, k, v, o, heads=1, scale=len(w["q"]) ** -0.5, p=0.0))

    def inputs(self, ids: Array, mask: Array) -> tuple[Tensor, Any]:
        """Embeddings [b, t, d] and the mask, checked as every model of minipeft does."""
        checked = check_ids(ids, self.embedding.weight.base.shape[0], "ids")
        return self.embedding(checked), check_mask(mask, ids.shape, "mask")

    def __call__(self, ids: Array, mask: Array) -> Tensor:
        y = self.encoder(*self.inputs(ids, mask))
        return index(y, key=(slice(None), slice(y.shape[1] - ids.shape[1], None)))


class Prompted:
    """The handle. Every call of it is a call of minipeft; `--list --method soft_prompt` describes them."""

    next_to_text = True  # the kit's default convention; PromptTuning's is "outside the padding"

    def __init__(self, P: Array, base: Mapping[str, Array], dtype: str):
        self.dtype, self.model = dtype, OneAttention(base, dtype)
        self.attachment: Attachment | None = None
        if P.shape[1:] != base["E"].shape[1:]:
            raise ValueError(f"P {P.shape} does not fit E {base['E'].shape}")
        if len(P):
            method = PromptTuning(length=len(P), init="random", next_to_text=self.next_to_text, where=f"^{SITE}$")
            self.attachment = attach(self.model, method, numpy.random.default_rng(0), "prompt")
            self.attachment.parameters[f"{SITE}@prompt.P"].data = P.astype(dtype)

    def forward(self, ids: Array, mask: Array) -> Array:
        return array_of(self.model(ids, mask)).astype(numpy.float64)

    def embed(self, ids: Array, mask: Array) -> tuple[Array, Array, Array]:
        x, seen = self.model.encoder.input(*self.model.inputs(ids, mask))
        positions = numpy.broadcast_to(positions_of(array_of(seen), 0, x.shape[1]), x.shape[:2])
        return array_of(x).astype(numpy.float64), array_of(seen), positions.copy()

    def base_forward(self, ids: Array, mask: Array) -> Array:
        """y [b, t, d] with the prompt unplugged."""
        if self.attachment is None:
            return self.forward(ids, mask)
        self.attachment.unplug()
        try:
            return self.forward(ids, mask)
        finally:
            self.attachment.plug()

    def disabled(self, ids: Array, mask: Array) -> Array:
        return self.base_forward(ids, mask)

    def vjp(self, ids: Array, mask: Array, g: Array) -> dict[str, Array]:
        """{"P": gradient of sum(y g)}."""
        params = self._attached().parameters
        _, grads = value_and_grad(lambda: total(mul(self.model(ids, mask), g.astype(self.dtype))), params)
        return {name.rsplit(".", 1)[-1]: found.astype(numpy.float64) for name, found in grads.items()}

    def trainable(self) -> set[str]:
        return {name.rsplit(".", 1)[-1] for name in self._attached().parameters}

    def save(self) -> bytes:
        return bytes_of(self._attached())

    def load(self, blob: bytes) -> None:
        """Replaces the prompt by that of the file. If the file does not fit, the prompt stays."""
        found = loaded(self.model, blob)
        self._attached().remove()
        self.attachment = found

    def state_keys(self) -> set[str]:
        return {name.rsplit(".", 1)[-1] for name in self._attached().tensors}

    def _attached(self) -> Attachment:
        if self.attachment is None:
            raise ValueError("a prompt of length 0 has nothing to train or to save")
        return self.attachment


def soft_prompt(P: Array, base: Mapping[str, Array], dtype: str) -> Prompted:
    """The factory: an attention layer of the arrays `base`, with the prompt P [p, d]. Raises ValueError if P does not
    fit."""
    return Prompted(P, base, dtype)
