"""Decoder: a language model of the LLaMA family (LLaMA, Mistral, Qwen 2 and 3), as in transformers.

    x = E(ids)                                              Touvron et al., 2023, arXiv:2302.13971, sec. 2.2
    x = x + o(attention(rotate(q(n)), rotate(k(n)), v(n)))  n = rms_norm(x)       causal, scores / sqrt(head_dim)
    x = x + wo(silu(wi_0 n) * wi_1 n)                       n = rms_norm(x)       in every block
    logits = head(rms_norm(x))

Rotary positions are in `nn/rotary.py`, grouped-query attention in `nn/causal.py`. Names, where i is a layer, V is
vocab, d is d_model, inner is heads * head_dim and narrow is kv_heads * head_dim (a test checks this table against the
model):

    embedding.weight                       [V, d]          model.embed_tokens.weight; also the head when tied
    decoder.i.attn.q.weight                [inner, d]      model.layers.i.self_attn.q_proj.weight
    decoder.i.attn.{k,v}.weight            [narrow, d]
    decoder.i.attn.o.weight                [d, inner]
    decoder.i.attn.{q,k,v,o}.bias          [d_out]         with attention_bias; qwen2 has those of q, k and v
    decoder.i.attn.{q,k}_norm.weight       [head_dim]      model.layers.i.self_attn.q_norm.weight; qwen3 only
    decoder.i.attn_norm.weight             [d]             model.layers.i.input_layernorm.weight
    decoder.i.ff.{wi_0,wi_1}.weight        [d_ff, d]       model.layers.i.mlp.gate_proj.weight (activated), up_proj
    decoder.i.ff.wo.weight                 [d, d_ff]       model.layers.i.mlp.down_proj.weight
    decoder.i.ff.{wi_0,wi_1,wo}.bias       [d_out]         with mlp_bias
    decoder.i.ff_norm.weight               [d]             model.layers.i.post_attention_layernorm.weight
    decoder.norm.weight                    [d]             model.norm.weight
    head.weight                            [V, d]          lm_head.weight; untied only
    sites: decoder.input (input); decoder.i.attn.keys_values (keys_values); decoder.i.attn.out, decoder.i.ff.out
    (sublayer)

A row counts its positions from its first token, so a row that is padded on the left gives, up to rounding, what it
gives alone. transformers counts from the left edge in a forward; the distances between tokens, on which rotary
positions depend, are the same.
"""
from __future__ import annotations

import os
from typing import Any, Self

import numpy

from minipeft.backend import Array, to_device
from minipeft.engine.ops import cross_entropy
from minipeft.engine.tensor import Tensor
from minipeft.models.config import checked_config
from minipeft.models.continuing import continued
from minipeft.models.decoder_config import DecoderConfig
from minipeft.models.decoder_files import read_checkpoint
from minipeft.models.encoder_decoder import IGNORE, checked_inputs
from minipeft.models.folder import existing_folder, naming, write_hf_folder
from minipeft.models.names import translated
from minipeft.models.quantized import fill
from minipeft.nn import init
from minipeft.nn.attention import KeyValues
from minipeft.nn.causal import CausalBlock, CausalStack, GroupedAttention
from minipeft.nn.inputs import check_ids, host_ids
from minipeft.nn.layers import Embedding, FeedForward, Linear, RMSNorm
from minipeft.nn.merge_report import MergeReport
from minipeft.nn.module import Model
from minipeft.nn.rotary import Rotary
from minipeft.nn.routing import routed
from minipeft.nn.site import Site
from minipeft.quant.origin import give_origin

STD = 0.02  # of initial weights, as in transformers


class Decoder(Model):
    """A language model. rng: draws the initial weights from N(0, 0.02^2), biases 0; None leaves all but the norm
    weights 0, to be filled from a file. dtype: "float32" or "float64". Raises TypeError for another type of config or
    rng, ValueError for another dtype."""

    config: DecoderConfig

    def __init__(self, config: DecoderConfig, rng: init.Rng, dtype: str = "float32"):
        c = self.config = checked_config(config, DecoderConfig)
        init.check_rng(rng)
        dtype = init.compute_dtype(dtype)
        d, inner, narrow = c.d_model, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

        def linear(d_in: int, d_out: int, bias: bool) -> Linear:
            return Linear(init.normal(STD)((d_out, d_in), dtype, rng), init.zeros((d_out,), dtype) if bias else None)

        def norm(width: int = d) -> RMSNorm:
            return RMSNorm(init.ones((width,), dtype), c.rms_norm_eps)

        def block() -> CausalBlock:
            attn = GroupedAttention(linear(d, inner, c.qkv_bias), linear(d, narrow, c.qkv_bias),
                                    linear(d, narrow, c.qkv_bias), linear(inner, d, c.attention_bias),
                                    c.num_attention_heads, c.num_key_value_heads,
                                    (norm(c.head_dim), norm(c.head_dim)) if c.head_norms else None,
                                    c.attention_dropout)
            ff = FeedForward(linear(d, c.intermediate_size, c.mlp_bias), linear(c.intermediate_size, d, c.mlp_bias),
                             linear(d, c.intermediate_size, c.mlp_bias), c.hidden_act, 0.0)
            return CausalBlock(attn, norm(), ff, norm())

        self.embedding = Embedding(init.normal(STD)((c.vocab_size, d), dtype, rng))
        self.decoder = CausalStack([block() for _ in range(c.num_layers)], norm(),
                                   Rotary(c.head_dim, c.frequencies, dtype), Site("input", d, dtype))
        self.head = Linear(self.embedding.weight if c.tie_word_embeddings
                           else init.normal(STD)((c.vocab_size, d), dtype, rng))

    def embed(self, ids: Array) -> Tensor:
        """The embeddings of ids: [batch, time] -> [batch, time, d_model]."""
        return self.embedding(ids)

    def logits(self, hidden: Tensor, rng: Any = None) -> Tensor:
        """The head's output: hidden [batch, time, d_model] -> [batch, time, vocab]. rng: dropout is on if given."""
        return self.head(hidden, rng)

    def __call__(self, input_ids: Any, attention_mask: Any = None, adapter: Any = None, rng: Any = None) -> Tensor:
        """Logits [batch, time, vocab]; those at position t are of token t + 1.

        input_ids [batch, time]: integers. attention_mask [batch, time]: 1 at tokens and 0 at padding; None means that
        every position is a token. A soft prompt stands in front of the row; there are no logits at its positions (PEFT
        gives those too). adapter: None uses the plugged attachments; a name, a tuple of names, or a dict {name: factor}
        uses these attachments alone on all rows, bottom first (an empty tuple: the base alone); a list has an entry for
        each row: one of these, or None for the base alone. rng: if given, dropout is on. Before anything is computed,
        raises ValueError for ids out of range, wrong shapes, unknown adapters, and factors that are not finite or that
        a prompt cannot take; and TypeError for arguments of another type and for a model on another backend than the
        one in use."""
        ids, mask = self._checked(input_ids, attention_mask)
        init.check_rng(rng)
        with routed(self.host, adapter, len(ids)):
            return self.logits(self._hidden(ids, mask, rng)[:, -ids.shape[1]:], rng)

    def loss(self, input_ids: Any, labels: Any, attention_mask: Any = None, adapter: Any = None,
             rng: Any = None) -> Tensor:
        """The mean cross-entropy over the label tokens, a scalar. labels [batch, time]: ids, mostly input_ids
        themselves, or -100 for positions that do not count. Other arguments and exceptions as in a call.

        The labels are shifted here: the logits at position t are compared with labels[:, t + 1], so labels[:, 0] never
        counts. Raises ValueError for labels of another shape than input_ids or out of range, and if none counts."""
        ids, mask = self._checked(input_ids, attention_mask)
        labels = host_ids(labels, "labels")
        if labels.shape != ids.shape:
            raise ValueError(f"labels has shape {list(labels.shape)}; expected {list(ids.shape)}, as input_ids")
        check_ids(numpy.where(labels == IGNORE, labels.dtype.type(0), labels), self.config.vocab_size, "labels")
        shifted = labels[:, 1:]
        if (shifted == IGNORE).all():
            raise ValueError("every label behind the first position is -100: there is no token to take the mean over")
        init.check_rng(rng)
        with routed(self.host, adapter, len(ids)):
            hidden = self._hidden(ids, mask, rng)[:, -ids.shape[1]:-1]
            return cross_entropy(self.logits(hidden, rng), to_device(shifted))

    def generate(self, input_ids: Any, attention_mask: Any = None, max_new_tokens: int = 20, adapter: Any = None,
                 use_cache: bool = True, num_beams: int = 1, length_penalty: float = 1.0,
                 early_stopping: bool | str = False, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float = 1.0, rng: Any = None, stop: Any = None) -> numpy.ndarray:
        """Ids [batch, time + new tokens] on the host: input_ids as they are, then the new tokens, by greedy search, by
        beam search with num_beams > 1, or drawn at random with `rng`, a numpy.random.Generator (`models.decoding`).

        input_ids [batch, time], padded on the left or on the right. It stops after `max_new_tokens`, or when every row
        has produced a token of `stop`, a list of ids, by default the configuration's eos_token_ids; finished rows are
        filled with pad. Without a mask, pad tokens of input_ids are taken as padding, unless pad also stops a row. New
        tokens continue a row's positions behind its last token, also where padding stands between. use_cache: each step
        runs the model on the newest token alone, because the keys and values of earlier ones are kept. The ids are the
        same without it. adapter: as in a call. num_beams, length_penalty, early_stopping, temperature, top_k, top_p: as
        in `EncoderDecoder.generate`.

        Before anything is computed, raises ValueError unless max_new_tokens is an integer >= 0, for other options out
        of range, and for options of another kind of search; otherwise ValueError and TypeError as a call does."""
        return continued(self, input_ids, attention_mask, max_new_tokens, adapter, use_cache, num_beams, length_penalty,
                         early_stopping, temperature, top_k, top_p, rng, stop)[0]

    def new_cache(self, capacity: int) -> list[KeyValues]:
        """Empty keys and values of every block, for up to `capacity` positions."""
        return [KeyValues(capacity) for _ in self.decoder.blocks]

    def _hidden(self, ids: Array, mask: Array | None, rng: Any) -> Tensor:
        """[batch, prompt + time, d_model]: the hidden states, those of soft prompts in front."""
        x, mask = self.decoder.input(self.embed(ids), mask)
        return self.decoder(x, mask, rng)

    def _checked(self, ids: Any, mask: Any) -> tuple[Array, Array | None]:
        return checked_inputs(self, ids, mask)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, dtype: str = "float32") -> Self:
        """A model from a Hugging Face folder (config.json; model.safetensors, single or sharded) of a llama, mistral,
        qwen2 or qwen3. Weights that were quantized by bitsandbytes in 4 bits, or by minipeft, stay quantized.

        dtype: the dtype that the model computes in, "float32" or "float64"; float16 and bfloat16 files are widened.
        Raises ValueError naming the folder for a pickle, a damaged file, another model_type, fields that are wrong or
        not known (`decoder_config.py`), missing or unknown keys, other shapes than config.json asks for, a stored head
        that differs although config.json says that it is tied, and other methods of quantization; FileNotFoundError for
        a missing file."""
        path, dtype = existing_folder(directory), init.compute_dtype(dtype)
        with naming(path):
            config, arrays, origin = read_checkpoint(path, DecoderConfig.from_hf, cls.from_hf_name, dtype)
            model = cls(config, None, dtype)
            fill(model, arrays)
        give_origin(model, origin)
        return model

    def save_pretrained(self, directory: str | os.PathLike, dtype: str | None = None,
                        merged: bool | None = None) -> MergeReport:
        """Write config.json and model.safetensors as transformers reads them; the folder is made if it is missing.

        dtype, merged, the result and the exceptions are those of `T5.save_pretrained`; quantized weights are stored as
        there."""
        return write_hf_folder(self, directory, dtype, merged)

    @staticmethod
    def to_hf_name(name: str) -> str:
        """The key in a Hugging Face state dict of the base parameter `name`. Raises ValueError if there is none."""
        found = translated(name, _NAMES)
        if found is None:
            raise ValueError(f"{name!r} is not the name of a Decoder parameter")
        return found

    @staticmethod
    def from_hf_name(key: str) -> str:
        """The base parameter that is called `key` in a Hugging Face state dict. Raises ValueError if there is none."""
        found = translated(key, [(theirs, ours) for ours, theirs in _NAMES])
        if found is None:
            raise ValueError(f"{key!r} is not a key of a LLaMA, Mistral or Qwen checkpoint")
        return found


_NAMES = (  # ours and Hugging Face's; the letters are explained in `names.py`
    ("embedding.weight", "model.embed_tokens.weight"), ("head.weight", "lm_head.weight"),
    ("decoder.norm.weight", "model.norm.weight"),
    ("decoder.i.attn_norm.weight", "model.layers.i.input_layernorm.weight"),
    ("decoder.i.ff_norm.weight", "model.layers.i.post_attention_layernorm.weight"),
    *((f"decoder.i.attn.{part}.*", f"model.layers.i.self_attn.{part}_proj.*") for part in "qkvo"),
    *((f"decoder.i.attn.{part}_norm.weight", f"model.layers.i.self_attn.{part}_norm.weight") for part in "qk"),
    *((f"decoder.i.ff.{ours}.*", f"model.layers.i.mlp.{theirs}_proj.*")
      for ours, theirs in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))))
