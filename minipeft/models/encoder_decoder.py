"""What the Transformer and T5 share: ids in, logits and loss out, greedy decoding, files.

    encoder: E(input_ids) -> stack -> encoded;   decoder: E(decoder_input_ids), encoded -> stack -> head -> logits

A model is used through these methods alone; what is plugged into its places, and `adapter=`, decide what it computes.
`rng=None` is evaluation; a numpy.random.Generator makes a call one of training (dropout).
"""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.engine.tensor import Tensor
from minipeft.backend import Array, namespace, to_device
from minipeft.models.decode import greedy
from minipeft.nn.attention import KeyValues
from minipeft.nn.blocks import Stack
from minipeft.nn.init import check_rng
from minipeft.nn.inputs import check_ids, check_mask, host_ids
from minipeft.nn.layers import Embedding, Linear
from minipeft.nn.module import Model
from minipeft.nn.routing import routed
from minipeft.engine.ops import cross_entropy

IGNORE = -100


class EncoderDecoder(Model):
    """Subclasses build `embedding`, `encoder`, `decoder`, `head`, and say how ids become vectors and vectors logits."""

    config: Any
    embedding: Embedding
    encoder: Stack
    decoder: Stack
    head: Linear
    label_smoothing = 0.0

    def embed(self, ids: Array) -> Tensor:
        """ids [batch, time] -> [batch, time, d_model]."""
        return self.embedding(ids)

    def logits(self, hidden: Tensor, rng: Any = None) -> Tensor:
        """[batch, target, d_model] -> [batch, target, vocab]. rng: dropout is on if given."""
        return self.head(hidden, rng)

    def __call__(self, input_ids: Any, decoder_input_ids: Any, attention_mask: Any = None,
                 decoder_attention_mask: Any = None, adapter: Any = None, rng: Any = None) -> Tensor:
        """Logits [batch, target, vocab].

        input_ids [batch, source], decoder_input_ids [batch, target]: integers; masks of these shapes, 1 at tokens and
        0 at padding, None meaning that every position is a token. adapter: None uses what is plugged; a name uses that
        attachment on all rows, and a tuple of names all of these on all rows; a list goes row by row, its entries
        names, tuples, or None for the base alone (as is an empty tuple for all rows). rng: dropout is on if given.
        Raises ValueError for ids out of range, wrong shapes and unknown adapters, before anything is computed."""
        ids, mask = self._checked(input_ids, attention_mask, "input_ids", "attention_mask")
        targets, target_mask = self._checked(decoder_input_ids, decoder_attention_mask, "decoder_input_ids",
                                             "decoder_attention_mask")
        if len(ids) != len(targets):
            raise ValueError(f"input_ids has {len(ids)} rows and decoder_input_ids {len(targets)}")
        check_rng(rng)
        with routed(self.host, adapter, len(ids)):
            encoded, mask = self.encoder(self.embed(ids), mask, rng=rng)
            hidden, _ = self.decoder(self.embed(targets), target_mask, encoded, mask, rng=rng)
            return self.logits(hidden, rng)

    def encode(self, input_ids: Any, attention_mask: Any = None, adapter: Any = None, rng: Any = None) -> Tensor:
        """The encoder's output [batch, source, d_model]; arguments as in a call. With soft prompts it is longer: theirs
        come first, and rows with shorter ones than others in the batch are filled up on the left."""
        ids, mask = self._checked(input_ids, attention_mask, "input_ids", "attention_mask")
        check_rng(rng)
        with routed(self.host, adapter, len(ids)):
            return self.encoder(self.embed(ids), mask, rng=rng)[0]

    def loss(self, input_ids: Any, labels: Any, attention_mask: Any = None, decoder_attention_mask: Any = None,
             adapter: Any = None, rng: Any = None) -> Tensor:
        """Mean cross-entropy over the label tokens, a scalar. labels [batch, target], -100 where nothing is asked.

        The decoder reads the labels shifted right behind the start token (-100 read as pad).
        Raises ValueError for labels out of range, and when every label is -100."""
        labels = host_ids(labels, "labels")
        check_ids(numpy.where(labels == IGNORE, labels.dtype.type(0), labels), self.config.vocab_size, "labels")
        if (labels == IGNORE).all():
            raise ValueError("every label is -100: there is no token to take the mean over")
        logits = self(input_ids, self.shift_right(labels), attention_mask, decoder_attention_mask, adapter, rng)
        return cross_entropy(logits, to_device(labels), smoothing=self.label_smoothing)

    def shift_right(self, labels: Any) -> numpy.ndarray:
        """[start, labels[:-1]] with -100 read as pad; [batch, target] -> [batch, target]."""
        labels = host_ids(labels, "labels").astype(numpy.int64)
        start = numpy.full((labels.shape[0], 1), self.config.decoder_start_token_id, dtype=labels.dtype)
        shifted = numpy.concatenate([start, labels[:, :-1]], axis=1)
        return numpy.where(shifted == IGNORE, self.config.pad_token_id, shifted)

    def generate(self, input_ids: Any, attention_mask: Any = None, max_new_tokens: int = 20, adapter: Any = None,
                 use_cache: bool = True) -> numpy.ndarray:
        """Greedy decoding -> integers on the host [batch, 1 + new tokens], the start token in column 0.

        It stops when every row has produced eos; finished rows are padded with pad. Without a mask, pad tokens of
        input_ids are taken as padding, unless pad is also eos; the same rule as in transformers. (A call and `loss`
        do not infer a mask.)"""
        input_ids = host_ids(input_ids, "input_ids")
        pads = input_ids == self.config.pad_token_id
        if attention_mask is None and self.config.pad_token_id != self.config.eos_token_id and pads.any():
            attention_mask = ~pads
        ids, mask = self._checked(input_ids, attention_mask, "input_ids", "attention_mask")
        with routed(self.host, adapter, len(ids)):
            return greedy(self, ids, mask, max_new_tokens, use_cache)

    def new_cache(self, capacity: int, source: int) -> list[tuple[KeyValues, KeyValues]]:
        """Empty keys and values for decoding up to `capacity` tokens over an encoder's output of `source` positions."""
        return [(KeyValues(capacity), KeyValues(source, fixed=True)) for _ in self.decoder.blocks]

    def _checked(self, ids: Any, mask: Any, name: str, mask_name: str) -> tuple[Array, Array | None]:
        table = self.embedding.weight.base
        data = getattr(table, "data", None)
        if data is not None and not isinstance(data, namespace().ndarray):
            raise TypeError(f"the model's arrays are {type(data).__module__.split('.')[0]} arrays, the backend in use "
                            f"is {getattr(namespace(), '__name__', 'another')}: model.to(backend), then run inside "
                            f"`with minipeft.use(backend)`")
        ids = check_ids(ids, self.config.vocab_size, name)
        return ids, check_mask(mask, ids.shape, mask_name)
