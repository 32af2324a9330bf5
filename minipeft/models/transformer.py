"""The Transformer of Vaswani et al., 2017, "Attention is all you need", arXiv:1706.03762, with its usual variants.

    LayerNorm(x + Dropout(Sublayer(x)))                            post-LN, sec. 3.1, 5.4 (pre_norm=True: pre-LN)
    softmax(Q K^T / sqrt(d_k)) V per head, concatenated            sec. 3.2
    max(0, x W1 + b1) W2 + b2                                      sec. 3.3 (wi, wo here)
    one table for both embeddings and the head, embeddings * sqrt(d_model)      sec. 3.4
    sinusoidal positions added to the embeddings, then dropout     sec. 3.5, 5.4

Departures from the paper, all optional: pre_norm, final_norm (a norm after each stack, usual with pre_norm), gelu,
learned positions, an untied head. Dropout on attention probabilities and after the activation is as in the authors'
code and torch; the paper's text names only sublayer outputs and the sums of embeddings and positions.

Names, where i is a layer (a test checks this table against the model):

    embedding.weight                                   [vocab, d_model]      also the head when tied
    encoder.position.weight, decoder.position.weight   [max_length, d_model] learned positions only
    encoder.i.attn.{q,k,v,o}.{weight,bias}             [d_model, d_model], [d_model]
    encoder.i.attn_norm.{weight,bias}                  [d_model]
    encoder.i.ff.wi.{weight,bias}                      [d_ff, d_model], [d_ff]
    encoder.i.ff.wo.{weight,bias}                      [d_model, d_ff], [d_model]
    encoder.i.ff_norm.{weight,bias}                    [d_model]
    decoder.i.attn.*, decoder.i.attn_norm.*            as in the encoder
    decoder.i.cross.{q,k,v,o}.*, decoder.i.cross_norm.*  the same shapes; attention to the encoder's output
    decoder.i.ff.*, decoder.i.ff_norm.*                as in the encoder
    encoder.norm.{weight,bias}, decoder.norm.{weight,bias}   [d_model]       final_norm only
    head.weight                                        [vocab, d_model]      untied only
    sites: encoder.input (input); encoder.i.attn.out, encoder.i.ff.out, decoder.i.attn.out, decoder.i.cross.out,
    decoder.i.ff.out (sublayer); encoder.i.attn.keys_values, decoder.i.attn.keys_values, decoder.i.cross.keys_values
    (keys_values)
"""
from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, Self

from minipeft.engine.tensor import Tensor
from minipeft.backend import Array
from minipeft.files import read_json, read_tensors
from minipeft.models.config import Config, checked_config, first_name
from minipeft.models.encoder_decoder import EncoderDecoder
from minipeft.models.folder import (CONFIG, LIMIT, WEIGHTS, check_saved_with, existing_folder, exported, naming,
                                    write_folder)
from minipeft.models.quantized import FIELD, Stored, fill, headers
from minipeft.models.shapes import check_layers, check_shapes, transformer_shapes
from minipeft.nn import init
from minipeft.nn.attention import Attention
from minipeft.nn.blocks import Block, Stack
from minipeft.nn.layers import Embedding, FeedForward, LayerNorm, Linear
from minipeft.nn.merge_report import MergeReport
from minipeft.nn.positions import Learned, Sinusoidal
from minipeft.nn.site import Site
from minipeft.engine.ops import mul
from minipeft.quant.origin import give_origin, origin_in_metadata, read_origin


@dataclasses.dataclass(frozen=True)
class TransformerConfig(Config):
    """Sizes and variants. The defaults are the paper's base model (Table 3), without its label smoothing of 0.1;
    vocab_size has no default.

    Sizes: vocab_size; d_model; num_heads heads; d_ff; num_layers and num_decoder_layers blocks. dropout_rate,
    label_smoothing: of training. activation: of the feed-forward. pre_norm: pre-LN instead of post-LN. final_norm: one
    more norm at the end of each stack. positions: "sinusoidal" or "learned"; max_length: rows of a learned table.
    tie_embeddings: one table for both inputs and the head. layer_norm_eps: of LayerNorm. pad_token_id, eos_token_id,
    decoder_start_token_id: the special ids. Raises ValueError naming a field that is wrong."""

    vocab_size: int
    d_model: int = 512
    num_heads: int = 8
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = 6
    dropout_rate: float = 0.1
    label_smoothing: float = 0.0
    activation: str = "relu"
    pre_norm: bool = False
    final_norm: bool = False
    positions: str = "sinusoidal"
    max_length: int = 512
    tie_embeddings: bool = True
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    def check(self) -> None:
        super().check()
        self._expect("num_heads", self.d_model % self.num_heads == 0, f"a divisor of d_model {self.d_model}")
        self._expect("positions", self.positions in ("sinusoidal", "learned"), "'sinusoidal' or 'learned'")
        self._expect_activation("activation", self.activation)

    def resolved(self) -> dict[str, Any]:
        return {**super().resolved(), "activation": first_name(self.activation)}


class Transformer(EncoderDecoder):
    """The Transformer. Linear weights start Xavier-uniform, biases 0, and the table N(0, 1/d_model), so that embeddings
    times sqrt(d_model) have unit variance. rng: draws them; None leaves all weights but the norm weights 0, to be
    filled from a file. dtype: "float32" or "float64". Raises TypeError for another type of config or rng, ValueError
    for another dtype."""

    def __init__(self, config: TransformerConfig, rng: init.Rng, dtype: str = "float32"):
        self.config = checked_config(config, TransformerConfig)
        init.check_rng(rng)
        dtype = init.compute_dtype(dtype)
        d = config.d_model
        self.embedding = Embedding(init.normal(d ** -0.5)((config.vocab_size, d), dtype, rng))
        self.encoder = self._stack(config.num_layers, False, rng, dtype)
        self.decoder = self._stack(config.num_decoder_layers, True, rng, dtype)
        self.head = Linear(self.embedding.weight if config.tie_embeddings
                           else init.normal(d ** -0.5)((config.vocab_size, d), dtype, rng))
        self.label_smoothing = config.label_smoothing

    @classmethod
    def base(cls, rng: init.Rng = None, vocab_size: int = 37000) -> Self:
        """The paper's base model: 6 + 6 layers, d_model 512, d_ff 2048, 8 heads; 63 M parameters with a vocab_size of
        37,000 (the paper's Table 3 says 65 M). Without rng its weights are 0, which is enough to count and to load."""
        return cls(TransformerConfig(vocab_size, label_smoothing=0.1), rng)

    def embed(self, ids: Array) -> Tensor:
        """E(ids) * sqrt(d_model), sec. 3.4: [batch, time] -> [batch, time, d_model]."""
        return mul(self.embedding(ids), math.sqrt(self.config.d_model))

    def _stack(self, layers: int, decoder: bool, rng: init.Rng, dtype: str) -> Stack:
        c, d = self.config, self.config.d_model

        def linear(d_in: int, d_out: int) -> Linear:
            return Linear(init.xavier((d_out, d_in), dtype, rng), init.zeros((d_out,), dtype))

        def norm() -> LayerNorm:
            return LayerNorm(init.ones((d,), dtype), init.zeros((d,), dtype), c.layer_norm_eps)

        def attention() -> Attention:
            q, k, v, o = (linear(d, d) for _ in range(4))
            return Attention(q, k, v, o, c.num_heads, (d // c.num_heads) ** -0.5, c.dropout_rate)

        def block() -> Block:
            cross, cross_norm = (attention(), norm()) if decoder else (None, None)
            ff = FeedForward(linear(d, c.d_ff), linear(c.d_ff, d), None, c.activation, c.dropout_rate)
            return Block(attention(), norm(), cross, cross_norm, ff, norm(), c.pre_norm, c.dropout_rate)

        position = (Sinusoidal(d, dtype) if c.positions == "sinusoidal"
                    else Learned(init.normal(d ** -0.5)((c.max_length, d), dtype, rng)))
        return Stack([block() for _ in range(layers)], norm() if c.final_norm else None, position, c.dropout_rate,
                     input=None if decoder else Site("input", d, dtype), drop_last=False)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, dtype: str = "float32") -> Self:
        """A model from a folder that `save_pretrained` wrote (config.json, model.safetensors).

        dtype: the dtype that the model computes in, "float32" or "float64". Raises ValueError naming the folder for a
        damaged file, wrong or missing fields, missing or unexpected tensors, other shapes than config.json asks for,
        and weights that were saved with another configuration; FileNotFoundError for a missing file."""
        path, dtype = existing_folder(directory), init.compute_dtype(dtype)
        with naming(path):
            values = read_json(path / CONFIG, LIMIT)
            if values.pop("model_type", None) != "minipeft-transformer":
                raise ValueError(f"{path / CONFIG}: model_type is not 'minipeft-transformer'; for T5 use "
                                 f"T5.from_pretrained")
            stored = Stored(values, headers(path / WEIGHTS))
            values.pop(FIELD, None)
            config = TransformerConfig.from_dict(values)
            check_layers(config, len(stored.keys))
            wanted = transformer_shapes(config)
            check_shapes(shapes := stored.shapes(wanted.get), wanted)
            tensors, metadata = read_tensors(path / WEIGHTS, raw=stored.raw)
            check_saved_with(config, metadata, stored.config)
            arrays = stored.weights(tensors, shapes, dtype)
            model = cls(config, None, dtype)
            fill(model, arrays)
            give_origin(model, read_origin(metadata))
        return model

    def save_pretrained(self, directory: str | os.PathLike, dtype: str | None = None,
                        merged: bool | None = None) -> MergeReport:
        """Write config.json and model.safetensors into `directory`, which is made if it is missing.

        dtype: how weights are stored ("float16" or "bfloat16" round them once); None keeps the model's own. merged:
        True writes the model with all plugged attachments merged into the weights: each computed in float64 from the
        arrays as they are (merged attachments too, from their own arrays) and rounded once. False writes the base; None
        is for a model on which nothing is plugged or merged. The model stays as it is. Returns how much of each merged
        change is left after the rounding. Raises ValueError, before anything is written, for None on any other model,
        for a plugged attachment that no weight can absorb, for numbers that are not finite, and for overflow in
        `dtype`."""
        values = {"model_type": "minipeft-transformer", **self.config.to_dict()}
        tensors, report = exported(self, merged, dtype)
        said = {"format": "minipeft", **origin_in_metadata(self, bool(report.dtypes), dtype)}
        write_folder(directory, self.config, values, tensors, said, dtype)
        return report
