"""A soft prompt before one attention layer in plain NumPy, written as anybody would write a plug-in; the mutants are
planted in it."""
from __future__ import annotations

from typing import Any, Mapping

import numpy
import safetensors.numpy

from minipeft.conformance.emulated import Emulated

Array = numpy.ndarray


class SoftPrompt:
    """A prompt P [p, d] in front of an attention layer. base: {name: array} of the layer, named as in `equations.py`.

    `--list --method soft_prompt` describes the calls of the kit. Every part that a mutant changes is a method of its
    own. Raises ValueError for a prompt of another width."""

    def __init__(self, P: Array, base: Mapping[str, Array], dtype: str):
        self.e, self.base = Emulated(dtype), dict(base)
        self.table = base["E"]
        self.P = self.checked(P)
        self.kept: dict[str, Any] = {}                 # results of the last forward, for the gradients

    def checked(self, P: Array) -> Array:
        """A copy of P. Raises ValueError for another width than that of the embeddings."""
        if P.ndim != 2 or P.shape[1] != self.table.shape[1]:
            raise ValueError(f"a prompt {P.shape} for embeddings {self.table.shape}")
        return P.copy()

    # what the prompt does to the input

    def places(self, mask: Array, p: int) -> Array:
        """[b, p + t]: the columns of the p prompt vectors, then those of the tokens, in each row."""
        first, columns = mask.argmax(axis=1)[:, None], numpy.arange(mask.shape[1])
        tokens = columns + p * (columns >= first)
        return numpy.concatenate([first + numpy.arange(p), tokens], axis=1)

    def mask_of(self, mask: Array, p: int) -> Array:
        """[b, p + t]: the mask of prompt and tokens."""
        return numpy.concatenate([numpy.ones((len(mask), p), bool), mask], axis=1)

    def positions_of(self, places: Array, p: int) -> Array:
        """[b, p + t]: the positions of prompt and tokens. places: their columns."""
        return places

    def prompts(self, P: Array, b: int) -> Array:
        """[b, p, d]: the prompt for each of b rows."""
        return numpy.stack([P] * b)

    def laid_out(self, ids: Array, mask: Array, P: Array) -> tuple[Array, Array, Array, Array]:
        """X [b, p + t, d], mask' and positions [b, p + t] by column; the columns [b, p + t] of prompt and tokens."""
        if ids.shape != mask.shape:
            raise ValueError(f"a mask {mask.shape} for ids {ids.shape}")
        if ids.min() < 0 or ids.max() >= len(self.table):
            raise ValueError(f"ids from {ids.min()} to {ids.max()}; there are {len(self.table)} embeddings")
        p, rows = len(P), numpy.arange(len(ids))[:, None]
        at = self.places(mask, p)
        x = numpy.empty((*at.shape, P.shape[1]))
        seen, positions = numpy.empty(at.shape, bool), numpy.empty(at.shape, numpy.int64)
        x[rows, at] = numpy.concatenate([self.prompts(P, len(ids)), self.table[ids]], axis=1)
        seen[rows, at], positions[rows, at] = self.mask_of(mask, p), self.positions_of(at, p)
        return x, seen, positions, at

    def embed(self, ids: Array, mask: Array) -> tuple[Array, Array, Array]:
        """X [b, p + t, d], mask' and positions [b, p + t]: the inputs of the layer."""
        return self.laid_out(ids, mask, self.P)[:3]

    # the layer

    def scale(self, d: int) -> float:
        """The factor of the scores, 1 / sqrt(d)."""
        return d ** -0.5

    def bias(self, seen: Array, positions: Array) -> Array:
        """[b, query, key]: the term that is added to the scores."""
        hidden = numpy.where(self.visible(seen), 0, self.hidden())
        if "relative" not in self.base:
            return hidden
        far = len(self.base["relative"]) // 2
        return hidden + self.base["relative"][numpy.clip(self.distance(positions), -far, far) + far]

    def distance(self, positions: Array) -> Array:
        """[1, query, key] or [b, query, key]: the distance from query to key, in columns."""
        columns = numpy.arange(positions.shape[1])
        return columns[None, None, :] - columns[None, :, None]

    def visible(self, seen: Array) -> Array:
        """[b, 1, key]: True where queries see the key."""
        return seen[:, None, :]

    def hidden(self) -> float:
        """The term that is added to the scores of hidden keys."""
        return -numpy.inf

    def attention(self, x: Array, seen: Array, positions: Array) -> Array:
        """[b, n, d] -> [b, n, d]; seen, positions: [b, n]."""
        r, mm, base = self.e.r, self.e.mm, self.base
        if "position" in base:
            if positions.max() >= len(base["position"]):
                raise ValueError(f"position {positions.max()}; the table has {len(base['position'])}")
            x = r(x + base["position"][positions])
        q, k, v = (mm(x, base[name].T) for name in "qkv")
        scores = r(r(mm(q, k.swapaxes(1, 2)) * self.scale(x.shape[-1])) + self.bias(seen, positions))
        weights = self.weights_of(scores)
        self.kept = {"q": q, "k": k, "v": v, "weights": weights}
        return mm(mm(weights, v), base["o"].T)

    def weights_of(self, scores: Array) -> Array:
        """[b, query, key]: the softmax over the keys."""
        weights = numpy.exp(self.e.r(scores - scores.max(axis=-1, keepdims=True)))
        return self.e.r(weights / weights.sum(axis=-1, keepdims=True))

    def run(self, ids: Array, mask: Array, P: Array) -> Array:
        """y [b, t, d] with the prompt P."""
        x, seen, positions, at = self.laid_out(ids, mask, P)
        return self.stripped(self.attention(x, seen, positions), at[:, len(P):])

    def stripped(self, y: Array, at: Array) -> Array:
        """y [b, n, d] at the columns [b, t] of the tokens."""
        return y[numpy.arange(len(y))[:, None], at]

    def forward(self, ids: Array, mask: Array) -> Array:
        """ids, mask [b, t] -> y [b, t, d]. Raises ValueError for inputs that do not fit."""
        return self.run(ids, mask, self.P)

    def base_forward(self, ids: Array, mask: Array) -> Array:
        """y [b, t, d] without a prompt."""
        return self.run(ids, mask, self.P[:0])

    def disabled(self, ids: Array, mask: Array) -> Array:
        """y [b, t, d] with the prompt switched off for this call."""
        return self.base_forward(ids, mask)

    # gradients

    def into_x(self, g: Array) -> Array:
        """[b, n, d] gradient of the attention's output -> that of its input."""
        mm, r, w = self.e.mm, self.e.r, self.base
        q, k, v, weights = (self.kept[name] for name in ("q", "k", "v", "weights"))
        out = mm(g, w["o"])
        moved = mm(out, v.swapaxes(1, 2))
        scores = r(weights * r(moved - self.e.sum(r(moved * weights), axis=-1, keepdims=True)))
        scores = r(scores * self.scale(q.shape[-1]))
        return r(r(mm(mm(scores, k), w["q"]) + mm(mm(scores.swapaxes(1, 2), q), w["k"]))
                 + mm(mm(weights.swapaxes(1, 2), out), w["v"]))

    def rows_of(self, ids: Array, mask: Array, g: Array) -> Array:
        """[b, p, d]: each row's gradient at the prompt's columns."""
        x, seen, positions, at = self.laid_out(ids, mask, self.P)
        self.attention(x, seen, positions)
        rows, whole = numpy.arange(len(ids))[:, None], numpy.zeros(x.shape)
        whole[rows, at[:, len(self.P):]] = g
        return self.into_x(whole)[rows, at[:, :len(self.P)]]

    def vjp(self, ids: Array, mask: Array, g: Array) -> dict:
        """{"P": gradient of sum(g * y), "E": None}, for g [b, t, d]."""
        return {"P": self.e.sum(self.rows_of(ids, mask, g), axis=0), "E": None}

    # state

    def trainable(self) -> set[str]:
        """The names of the trained arrays."""
        return {"P"}

    def save(self) -> bytes:
        """The prompt as the bytes of a file."""
        return safetensors.numpy.save({"P": self.P})

    def load(self, blob: bytes) -> None:
        """Replaces the prompt by that of a file. Raises ValueError for another width."""
        self.P = self.checked(safetensors.numpy.load(blob)["P"])

    def state_keys(self) -> set[str]:
        """The names of the arrays in a file."""
        return {"P"}
