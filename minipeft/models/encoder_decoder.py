"""The common part of the Transformer and T5: from ids to logits, loss and generated ids.

    encoder: E(input_ids) -> stack -> encoded;   decoder: E(decoder_input_ids), encoded -> stack -> head -> logits

A model is used only through these methods. They compute with the plugged attachments, or with those that `adapter`
names. With `rng=None` a call evaluates; with a numpy.random.Generator it uses dropout, as in training.
"""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.engine.tensor import Tensor
from minipeft.backend import Array, namespace, to_device
from minipeft.models.decoding import decode
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
    """A model with an encoder and a decoder. Subclasses build `embedding`, `encoder`, `decoder` and `head`, and define
    `embed` and `logits` where they differ from those below."""

    config: Any
    embedding: Embedding
    encoder: Stack
    decoder: Stack
    head: Linear
    label_smoothing = 0.0

    def embed(self, ids: Array) -> Tensor:
        """The embeddings of ids: [batch, time] -> [batch, time, d_model]."""
        return self.embedding(ids)

    def logits(self, hidden: Tensor, rng: Any = None) -> Tensor:
        """The head's output: hidden [batch, target, d_model] -> [batch, target, vocab]. rng: dropout is on if given."""
        return self.head(hidden, rng)

    def __call__(self, input_ids: Any, decoder_input_ids: Any, attention_mask: Any = None,
                 decoder_attention_mask: Any = None, adapter: Any = None, rng: Any = None) -> Tensor:
        """Logits [batch, target, vocab].

        input_ids [batch, source], decoder_input_ids [batch, target]: integers. attention_mask, decoder_attention_mask:
        of these shapes, 1 at tokens and 0 at padding; None means that every position is a token. adapter: None uses the
        plugged attachments; a name, a tuple of names, or a dict {name: factor} uses these attachments alone on all
        rows, bottom first (an empty tuple: the base alone); a list has an entry for each row: one of these, or None for
        the base alone. A factor multiplies the change that the attachment makes (`nn/scaled.py`). rng: if given,
        dropout is on. Before anything is computed, raises ValueError for ids out of range, wrong shapes, unknown
        adapters, and factors that are not finite or that a prompt cannot take; and TypeError for arguments of another
        type and for a model on another backend than the one in use."""
        ids, mask = self._checked(input_ids, attention_mask)
        targets, target_mask = self._checked(decoder_input_ids, decoder_attention_mask, "decoder_")
        if len(ids) != len(targets):
            raise ValueError(f"input_ids has {len(ids)} rows and decoder_input_ids {len(targets)}")
        check_rng(rng)
        with routed(self.host, adapter, len(ids)):
            encoded, mask = self.encoder(self.embed(ids), mask, rng=rng)
            hidden, _ = self.decoder(self.embed(targets), target_mask, encoded, mask, rng=rng)
            return self.logits(hidden, rng)

    def encode(self, input_ids: Any, attention_mask: Any = None, adapter: Any = None, rng: Any = None) -> Tensor:
        """The encoder's output [batch, source, d_model]; arguments and exceptions as in a call. Soft prompts make it
        longer: their positions come first, and a row with a shorter prompt than others is padded on the left."""
        ids, mask = self._checked(input_ids, attention_mask)
        check_rng(rng)
        with routed(self.host, adapter, len(ids)):
            return self.encoder(self.embed(ids), mask, rng=rng)[0]

    def loss(self, input_ids: Any, labels: Any, attention_mask: Any = None, decoder_attention_mask: Any = None,
             adapter: Any = None, rng: Any = None) -> Tensor:
        """The mean cross-entropy over the label tokens, a scalar. labels [batch, target]: ids, or -100 for positions
        that do not count. Other arguments and exceptions as in a call.

        The decoder reads the labels shifted right behind the start token (-100 read as pad).
        Raises ValueError for labels out of range, and when every label is -100."""
        labels = host_ids(labels, "labels")
        check_ids(numpy.where(labels == IGNORE, labels.dtype.type(0), labels), self.config.vocab_size, "labels")
        if (labels == IGNORE).all():
            raise ValueError("every label is -100: there is no token to take the mean over")
        logits = self(input_ids, self.shift_right(labels), attention_mask, decoder_attention_mask, adapter, rng)
        return cross_entropy(logits, to_device(labels), smoothing=self.label_smoothing)

    def shift_right(self, labels: Any) -> numpy.ndarray:
        """The decoder's input, [start, labels[:, :-1]] with -100 read as pad; [batch, target] -> [batch, target]."""
        labels = host_ids(labels, "labels").astype(numpy.int64)
        start = numpy.full((labels.shape[0], 1), self.config.decoder_start_token_id, dtype=labels.dtype)
        shifted = numpy.concatenate([start, labels[:, :-1]], axis=1)
        return numpy.where(shifted == IGNORE, self.config.pad_token_id, shifted)

    def generate(self, input_ids: Any, attention_mask: Any = None, max_new_tokens: int = 20, adapter: Any = None,
                 use_cache: bool = True, num_beams: int = 1, length_penalty: float = 1.0,
                 early_stopping: bool | str = False, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float = 1.0, rng: Any = None) -> numpy.ndarray:
        """Ids [batch, 1 + new tokens] on the host, with the start token in column 0: by greedy search, by beam search
        with num_beams > 1, or drawn at random with `rng`, a numpy.random.Generator (`models.decoding`).

        input_ids [batch, source]. It stops after `max_new_tokens`, or when every row has produced eos; finished rows
        are filled with pad. Without a mask, pad tokens of input_ids are taken as padding, unless pad is also eos, as in
        transformers. (A call and `loss` do not infer a mask.) adapter: as in a call. use_cache: each step runs the
        decoder on the newest token alone, because the keys and values of earlier tokens are kept, and those of the
        encoder's output are projected once; use_cache=False runs it on the whole prefix. The ids are the same, and the
        logits agree up to rounding.

        num_beams, length_penalty, early_stopping (True, False or "never"): of beam search, as in transformers 4.57
        (`decoding.beam_search`); `decoding.decode` also gives the scores. temperature > 0, top_k (a number of tokens,
        or None for all), top_p in (0, 1]: of sampling (`decoding.distribution`); here all tokens are kept unless you
        say otherwise, while transformers keeps 50. The same rng state gives the same ids.

        Before anything is computed, raises ValueError unless max_new_tokens is an integer >= 0, for the other options
        out of range, and for options of another kind of search than the one asked for; otherwise ValueError and
        TypeError as a call does."""
        return decode(self, input_ids, attention_mask, max_new_tokens, adapter, use_cache, num_beams, length_penalty,
                      early_stopping, temperature, top_k, top_p, rng)[0]

    def new_cache(self, capacity: int, source: int) -> list[tuple[KeyValues, KeyValues]]:
        """Empty keys and values of every decoder block, for up to `capacity` tokens and an encoder's output of `source`
        positions."""
        return [(KeyValues(capacity), KeyValues(source, fixed=True)) for _ in self.decoder.blocks]

    def _checked(self, ids: Any, mask: Any, whose: str = "") -> tuple[Array, Array | None]:
        return checked_inputs(self, ids, mask, whose)


def checked_inputs(model: Any, ids: Any, mask: Any, whose: str = "") -> tuple[Array, Array | None]:
    """ids [batch, time] and their mask, of a call of `model`, on the backend in use. whose: "decoder_" for the inputs
    of a decoder, in errors. Raises TypeError for a model on another backend, ValueError as `check_ids` and `check_mask`
    do."""
    data = getattr(model.embedding.weight.base, "data", None)
    if data is not None and not isinstance(data, namespace().ndarray):
        raise TypeError(f"the model's arrays are {type(data).__module__.split('.')[0]} arrays, the backend in use "
                        f"is {getattr(namespace(), '__name__', 'another')}: model.to(backend) moves them, and "
                        f"`with minipeft.use(backend)` puts a backend in use")
    ids = check_ids(ids, model.config.vocab_size, f"{whose}input_ids")
    return ids, check_mask(mask, ids.shape, f"{whose}attention_mask")
