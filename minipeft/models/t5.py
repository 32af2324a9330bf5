"""T5 (v1.0, v1.1, FLAN): Raffel et al., 2020, arXiv:1910.10683, as in transformers, with its Hugging Face files.

    x + drop(F(rms_norm(x)))                    pre-LN with RMSNorm; no biases anywhere
    softmax(q k^T + bias) v                     no 1/sqrt(d_kv): the initialization of q absorbs it
    v1.0: wo drop(relu(wi x));   v1.1: wo drop(gelu_new(wi_0 x) * wi_1 x)
    logits = E h / sqrt(d_model) if scale_decoder_outputs (v1.0), else head h (v1.1)

heads * d_kv need not equal d_model. Each stack has one table of relative positions. Names, where i is a layer, V is
vocab, d is d_model and inner is heads * d_kv (a test checks this table against the model):

    embedding.weight                          [V, d]           shared.weight; also the head when tied
    encoder.position.weight, decoder.position.weight  [buckets, heads]
                                              encoder.block.0.layer.0.SelfAttention.relative_attention_bias
    encoder.i.attn.{q,k,v}.weight             [inner, d]       encoder.block.i.layer.0.SelfAttention.q ...
    encoder.i.attn.o.weight                   [d, inner]
    encoder.i.attn_norm.weight                [d]              encoder.block.i.layer.0.layer_norm
    encoder.i.ff.wi.weight                    [d_ff, d]        v1.0; v1.1 has wi_0 (activated) and wi_1
    encoder.i.ff.wo.weight                    [d, d_ff]        encoder.block.i.layer.1.DenseReluDense.wo
    encoder.i.ff_norm.weight                  [d]
    decoder.i.attn.*, decoder.i.attn_norm.weight      as in the encoder
    decoder.i.cross.{q,k,v,o}.weight, decoder.i.cross_norm.weight   decoder.block.i.layer.1.EncDecAttention.q ...
    decoder.i.ff.*, decoder.i.ff_norm.weight          decoder.block.i.layer.2
    encoder.norm.weight, decoder.norm.weight  [d]              encoder.final_layer_norm
    head.weight                               [V, d]           lm_head.weight; untied only
    sites: encoder.input (input); encoder.i.attn.out, encoder.i.ff.out, decoder.i.attn.out, decoder.i.cross.out,
    decoder.i.ff.out (sublayer); encoder.i.attn.keys_values, decoder.i.attn.keys_values, decoder.i.cross.keys_values
    (keys_values)
"""
from __future__ import annotations

import dataclasses
import os
from typing import Any, Mapping, Self

from minipeft.engine.tensor import Tensor
from minipeft.checks import shown
from minipeft.models.config import Config, checked_config, first_name
from minipeft.models.encoder_decoder import EncoderDecoder
from minipeft.models.folder import existing_folder, naming, write_hf_folder
from minipeft.models.names import translated
from minipeft.models.quantized import fill
from minipeft.models.t5_files import read_checkpoint
from minipeft.nn import init
from minipeft.nn.attention import Attention
from minipeft.nn.blocks import Block, Stack
from minipeft.nn.layers import Embedding, FeedForward, Linear, RMSNorm
from minipeft.nn.merge_report import MergeReport
from minipeft.nn.positions import RelativeBuckets
from minipeft.nn.site import Site
from minipeft.engine.ops import mul
from minipeft.quant.origin import give_origin


@dataclasses.dataclass(frozen=True)
class T5Config(Config):
    """The fields of a Hugging Face T5 config.json that T5 uses; the defaults are those of v1.0 small.

    Sizes: vocab_size; d_model; num_heads heads of d_kv numbers; d_ff; num_layers and num_decoder_layers blocks;
    relative_attention_num_buckets and relative_attention_max_distance (see `RelativeBuckets`). dropout_rate: p.
    layer_norm_epsilon: of RMSNorm. initializer_factor: a factor on all initial weights. feed_forward_proj: the
    activation, such as "relu" or "gated-gelu". tie_word_embeddings: whether the head is the embedding's table.
    pad_token_id, eos_token_id, decoder_start_token_id: the special ids.

    scale_decoder_outputs: whether the head's input is multiplied by d_model^-1/2; None means the value of
    tie_word_embeddings, as in all of transformers 4. It never depends on whether a head is stored (see `from_hf`).
    Raises ValueError naming a field that is wrong."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    num_heads: int = 8
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = None  # type: ignore[assignment]  # resolved at once: it is a bool for every reader
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    def __post_init__(self) -> None:
        if self.scale_decoder_outputs is None:
            object.__setattr__(self, "scale_decoder_outputs", self.tie_word_embeddings)
        super().__post_init__()

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layers have a gate, as in v1.1."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """The name of the activation. "gated-gelu" means gelu_new, as in transformers; other names mean themselves."""
        name = self.feed_forward_proj.removeprefix("gated-")
        return "gelu_new" if self.gated and name == "gelu" else name

    def check(self) -> None:
        super().check()
        self._expect_activation("feed_forward_proj", self.activation)
        buckets = self.relative_attention_num_buckets
        self._expect("relative_attention_num_buckets", buckets >= 4, "an integer >= 4")
        self._expect("relative_attention_max_distance", self.relative_attention_max_distance > buckets // 2,
                     f"more than half of the {buckets} buckets")

    def resolved(self) -> dict[str, Any]:
        return {**super().resolved(), "feed_forward_proj": "gated-" * self.gated + first_name(self.activation)}

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """The configuration in the `values` of a Hugging Face config.json, old or new; fields that T5 does not use are
        ignored.

        Up to transformers 4, tie_word_embeddings also decides the scale. From 5 on, scale_decoder_outputs does, and
        tie_word_embeddings may be true although a head is stored. Raises ValueError for another model_type or a wrong
        field."""
        if values.get("model_type", "t5") not in ("t5", "mt5"):
            raise ValueError(f"config: model_type is {shown(values['model_type'])}; expected 't5'")
        known = {f.name: values[f.name] for f in dataclasses.fields(cls) if values.get(f.name) is not None}
        known.setdefault("num_decoder_layers", known.get("num_layers", 6))
        return cls(**known)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a config.json that transformers reads."""
        return {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True,
                "dense_act_fn": self.activation, "is_gated_act": self.gated, "use_cache": True, **self.to_dict()}


class T5(EncoderDecoder):
    """The T5 model. rng: draws the initial weights; None leaves all but the norm weights 0, to be filled from a file.
    dtype: "float32" or "float64". Raises TypeError for another type of config or rng, ValueError for another dtype."""

    config: T5Config

    def __init__(self, config: T5Config, rng: init.Rng, dtype: str = "float32"):
        self.config = checked_config(config, T5Config)
        init.check_rng(rng)
        dtype = init.compute_dtype(dtype)
        d, f = config.d_model, config.initializer_factor
        self.embedding = Embedding(init.normal(f)((config.vocab_size, d), dtype, rng))
        self.encoder = self._stack(config.num_layers, False, rng, dtype)
        self.decoder = self._stack(config.num_decoder_layers, True, rng, dtype)
        self.head = Linear(self.embedding.weight if config.tie_word_embeddings
                           else init.normal(f)((config.vocab_size, d), dtype, rng))

    def logits(self, hidden: Tensor, rng: Any = None) -> Tensor:
        """head(hidden / sqrt(d_model)) if scale_decoder_outputs, else head(hidden), as in transformers.

        hidden [batch, target, d_model] -> [batch, target, vocab]. rng: dropout is on if given."""
        if self.config.scale_decoder_outputs:
            hidden = mul(hidden, self.config.d_model ** -0.5)
        return self.head(hidden, rng)

    def _stack(self, layers: int, decoder: bool, rng: init.Rng, dtype: str) -> Stack:
        c, d, inner = self.config, self.config.d_model, self.config.num_heads * self.config.d_kv
        f = c.initializer_factor

        def linear(d_in: int, d_out: int, std: float) -> Linear:
            return Linear(init.normal(f * std)((d_out, d_in), dtype, rng))

        def norm() -> RMSNorm:
            return RMSNorm(init.ones((d,), dtype) * f, c.layer_norm_epsilon)

        def attention() -> Attention:
            return Attention(linear(d, inner, (d * c.d_kv) ** -0.5), linear(d, inner, d ** -0.5),
                             linear(d, inner, d ** -0.5), linear(inner, d, inner ** -0.5), c.num_heads, 1.0,
                             c.dropout_rate)

        def block() -> Block:
            cross, cross_norm = (attention(), norm()) if decoder else (None, None)
            gate = linear(d, c.d_ff, d ** -0.5) if c.gated else None
            ff = FeedForward(linear(d, c.d_ff, d ** -0.5), linear(c.d_ff, d, c.d_ff ** -0.5), gate, c.activation,
                             c.dropout_rate)
            return Block(attention(), norm(), cross, cross_norm, ff, norm(), True, c.dropout_rate)

        table = init.normal(f * d ** -0.5)((c.relative_attention_num_buckets, c.num_heads), dtype, rng)
        position = RelativeBuckets(table, c.relative_attention_max_distance, bidirectional=not decoder)
        return Stack([block() for _ in range(layers)], norm(), position, c.dropout_rate,
                     input=None if decoder else Site("input", d, dtype), drop_last=True)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, dtype: str = "float32") -> Self:
        """A model from a Hugging Face folder (config.json; model.safetensors, single or sharded).

        Weights that were quantized by bitsandbytes in 4 bits (nf4, fp4), or by minipeft, stay quantized: the slots hold
        `QuantizedWeight`s with the codes and scales of the file.

        dtype: the dtype that the model computes in, "float32" or "float64"; float16 and bfloat16 files are widened.
        Raises ValueError naming the folder for a pickle (saying how to convert it), a damaged file, wrong fields,
        missing or unknown keys, other shapes than config.json asks for, input embeddings that differ, other methods of
        quantization (LLM.int8, GPTQ, AWQ), and weights that were saved with another configuration; FileNotFoundError
        for a missing file."""
        path, dtype = existing_folder(directory), init.compute_dtype(dtype)
        with naming(path):
            config, arrays, origin = read_checkpoint(path, T5Config.from_hf, cls.from_hf_name, dtype)
            model = cls(config, None, dtype)
            fill(model, arrays)
        give_origin(model, origin)
        return model

    def save_pretrained(self, directory: str | os.PathLike, dtype: str | None = None,
                        merged: bool | None = None) -> MergeReport:
        """Write config.json and model.safetensors as transformers reads them; the folder is made if it is missing.

        Quantized weights are stored as they are. Weights in nf4 or fp4 have bitsandbytes' keys, and transformers reads
        them if all are of one kind and linear, and none is a wo, which it keeps in float32. Other kinds are for
        minipeft alone (`models/quantized.py`).

        dtype: how weights are stored ("float16" or "bfloat16" round them once); None keeps the model's own. merged:
        True writes the model with all plugged attachments merged into the weights: each computed in float64 from the
        arrays as they are (merged attachments too, from their own arrays) and rounded once, or stored as codes where
        the attachment is merged into a quantized weight. False writes the base; None is for a model on which nothing
        is plugged or merged. The model stays as it is. Returns how much of each merged change is left after the
        rounding. Raises ValueError, before anything is written, for None on any other model, for a plugged attachment
        that no weight can absorb, for numbers that are not finite, and for overflow in `dtype`. A scale_decoder_outputs
        that differs from tie_word_embeddings is respected by transformers 5 and by minipeft; transformers 4 ignores
        it."""
        return write_hf_folder(self, directory, dtype, merged)

    @staticmethod
    def to_hf_name(name: str) -> str:
        """The key in a Hugging Face state dict of the base parameter `name`. Raises ValueError if there is none."""
        found = translated(name, _NAMES)
        if found is None:
            raise ValueError(f"{name!r} is not the name of a T5 parameter")
        return found

    @staticmethod
    def from_hf_name(name: str) -> str:
        """The inverse of `to_hf_name`: our name for theirs. Raises ValueError for an unknown name."""
        found = translated(name, ((theirs, ours) for ours, theirs in _NAMES))
        if found is None:
            raise ValueError(f"{shown(name)} is not a key of a T5 state dict")
        return found


_NAMES = (  # ours and Hugging Face's; the letters are explained in `names.py`
    ("embedding.weight", "shared.weight"),
    ("head.weight", "lm_head.weight"),
    ("S.norm.weight", "S.final_layer_norm.weight"),
    ("S.position.weight", "S.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    ("S.i.attn.Q.weight", "S.block.i.layer.0.SelfAttention.Q.weight"),
    ("S.i.attn_norm.weight", "S.block.i.layer.0.layer_norm.weight"),
    ("decoder.i.cross.Q.weight", "decoder.block.i.layer.1.EncDecAttention.Q.weight"),
    ("decoder.i.cross_norm.weight", "decoder.block.i.layer.1.layer_norm.weight"),
    ("encoder.i.ff.W.weight", "encoder.block.i.layer.1.DenseReluDense.W.weight"),
    ("encoder.i.ff_norm.weight", "encoder.block.i.layer.1.layer_norm.weight"),
    ("decoder.i.ff.W.weight", "decoder.block.i.layer.2.DenseReluDense.W.weight"),
    ("decoder.i.ff_norm.weight", "decoder.block.i.layer.2.layer_norm.weight"))
