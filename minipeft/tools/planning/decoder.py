"""The shapes of a decoder of the LLaMA family: weights, places, and the arrays of a step, for hollow arrays alone.

    x = x + o(attention(rope(q(n)), rope(k(n)), v(n)))      n = rms_norm(x)       Touvron et al., 2023, arXiv:2302.13971
    x = x + wo(silu(wi_0(n)) * wi_1(n))                     n = rms_norm(x)
    q [heads * head_dim, d], k and v [kv_heads * head_dim, d]                     Ainslie et al., 2023, arXiv:2305.13245

A key/value head serves several query heads, so keys and values are repeated before the scores are formed. Qwen 2 has
biases at q, k and v, and Qwen 3 has a norm of each head of q and k. The rotation of rope is written as one op that
keeps nothing; its numbers do not matter here, and are not those of rope. Names, beside those of Hugging Face:

    embedding.weight                       model.embed_tokens.weight
    decoder.i.attn.{q,k,v,o}.weight        model.layers.i.self_attn.{q,k,v,o}_proj.weight
    decoder.i.attn.{q,k}_norm.weight       model.layers.i.self_attn.{q,k}_norm.weight
    decoder.i.attn_norm.weight             model.layers.i.input_layernorm.weight
    decoder.i.ff.{wi_0,wi_1,wo}.weight     model.layers.i.mlp.{gate,up,down}_proj.weight
    decoder.i.ff_norm.weight               model.layers.i.post_attention_layernorm.weight
    decoder.norm.weight, head.weight       model.norm.weight, lm_head.weight (untied only)
"""
from __future__ import annotations

import dataclasses
from typing import Any, Mapping, Self

import numpy

from minipeft.backend import Array, xp
from minipeft.checks import boolean, integer, number, shown
from minipeft.engine.ops import attention, key_first
from minipeft.engine.ops.drop import dropout_mask
from minipeft.engine.tensor import Tensor, op
from minipeft.models.config import LARGEST
from minipeft.models.names import translated
from minipeft.nn.attention import Attention, additive, causal
from minipeft.nn.blocks import Block, Stack
from minipeft.nn.layers import Embedding, FeedForward, Linear, RMSNorm
from minipeft.nn.module import Model, Module
from minipeft.nn.routing import routed
from minipeft.nn.site import Site

KINDS = ("llama", "mistral", "qwen2", "qwen3")
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}  # transformers' defaults where the field is not there
_HEAD_DIM = {"qwen3": 128}
_NAMES = (("embedding.weight", "model.embed_tokens.weight"), ("head.weight", "lm_head.weight"),
          ("decoder.norm.weight", "model.norm.weight"),
          ("decoder.i.attn_norm.weight", "model.layers.i.input_layernorm.weight"),
          ("decoder.i.ff_norm.weight", "model.layers.i.post_attention_layernorm.weight"),
          *((f"decoder.i.attn.{part}.{leaf}", f"model.layers.i.self_attn.{part}_proj.{leaf}")
            for part in "qkvo" for leaf in ("weight", "bias")),
          *((f"decoder.i.attn.{part}_norm.weight", f"model.layers.i.self_attn.{part}_norm.weight") for part in "qk"),
          *((f"decoder.i.ff.{ours}.{leaf}", f"model.layers.i.mlp.{theirs}_proj.{leaf}")
            for ours, theirs in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")) for leaf in ("weight", "bias")))


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a decoder. kind: one of KINDS. vocab_size: tokens. d_model, d_ff: widths. num_layers: blocks.
    num_heads, num_kv_heads: of queries, and of keys and values. head_dim: numbers of a head. tied: whether the head is
    the embedding's table. qkv_bias, o_bias, ff_bias: whether these layers have biases. head_norms: whether each head of
    q and k has a norm. dropout_rate: of the attention. Raises ValueError for sizes that do not fit together."""

    kind: str
    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool
    qkv_bias: bool = False
    o_bias: bool = False
    ff_bias: bool = False
    head_norms: bool = False
    dropout_rate: float = 0.0
    pad_token_id, eos_token_id, decoder_start_token_id = 0, 1, 0

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"config: num_attention_heads is {self.num_heads}; expected a multiple of the "
                             f"{self.num_kv_heads} key/value heads (num_key_value_heads)")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """The sizes in the `values` of a Hugging Face config.json. Raises ValueError for another model_type, a missing
        or wrong size, and a mixture of experts, which it does not know."""
        kind = values.get("model_type")
        if kind not in KINDS:
            raise ValueError(f"config: model_type is {shown(kind)}; expected one of {', '.join(KINDS)}")
        if values.get("num_local_experts") or values.get("num_experts"):
            raise ValueError("config: it is a mixture of experts, which the plan does not know; expected a dense model")

        def size(name: str, otherwise: int | None = None) -> int:
            given = values.get(name)
            given = otherwise if given is None else given
            found = integer(f"config: {name}", given, 1)
            if found > LARGEST:
                raise ValueError(f"config: {name} is {shown(found)}; expected at most {LARGEST}")
            return found

        def flag(name: str, otherwise: bool = False) -> bool:
            given = values.get(name)
            return boolean(f"config: {name}", otherwise if given is None else given)

        d, heads = size("hidden_size"), size("num_attention_heads")
        if values.get("head_dim") is None and d % heads:
            raise ValueError(f"config: hidden_size is {d}; expected a multiple of num_attention_heads, {heads}, or a "
                             f"head_dim")
        o_bias = kind in ("llama", "qwen3") and flag("attention_bias")  # transformers does not ask for it elsewhere
        rate = values.get("attention_dropout")
        kv_heads, head_dim = heads, max(1, d // heads)
        if "num_key_value_heads" not in values and heads % _KV_HEADS.get(kind, heads) == 0:  # else no model can have it
            kv_heads = _KV_HEADS.get(kind, heads)
        if "head_dim" not in values:
            head_dim = _HEAD_DIM.get(kind, head_dim)
        return cls(kind, size("vocab_size"), d, size("intermediate_size"), size("num_hidden_layers"), heads,
                   size("num_key_value_heads", kv_heads), size("head_dim", head_dim),
                   flag("tie_word_embeddings"), o_bias or kind == "qwen2", o_bias, kind == "llama" and flag("mlp_bias"),
                   kind == "qwen3", number("config: attention_dropout", 0.0 if rate is None else rate, 0))


class Decoder(Model):
    """A decoder of hollow arrays. dtype: of its weights."""

    def __init__(self, config: DecoderConfig, dtype: Any):
        c, self.config = config, config

        def linear(d_in: int, d_out: int, bias: bool = False) -> Linear:
            return Linear(xp.empty((d_out, d_in), dtype), xp.empty((d_out,), dtype) if bias else None)

        def norm(width: int = c.d_model) -> RMSNorm:
            return RMSNorm(xp.empty((width,), dtype), 1e-6)

        def block() -> Block:
            wide, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
            attn = GroupedAttention(
                linear(c.d_model, wide, c.qkv_bias), linear(c.d_model, narrow, c.qkv_bias),
                linear(c.d_model, narrow, c.qkv_bias), linear(wide, c.d_model, c.o_bias), c,
                (norm(c.head_dim), norm(c.head_dim)) if c.head_norms else None)
            ff = FeedForward(linear(c.d_model, c.d_ff, c.ff_bias), linear(c.d_ff, c.d_model, c.ff_bias),
                             linear(c.d_model, c.d_ff, c.ff_bias), "silu", 0.0)
            return Block(attn, norm(), None, None, ff, norm(), True, 0.0)

        self.embedding = Embedding(xp.empty((c.vocab_size, c.d_model), dtype))
        self.decoder = Stack([block() for _ in range(c.num_layers)], norm(), Rotary(dtype),  # type: ignore[arg-type]
                             0.0, Site("input", c.d_model, dtype), drop_last=False)
        self.head = Linear(self.embedding.weight if c.tied else xp.empty((c.vocab_size, c.d_model), dtype))

    def embed(self, ids: Array) -> Tensor:
        """ids [batch, time] -> [batch, time, d_model]."""
        return self.embedding(ids)

    def __call__(self, ids: Array, rng: Any = None) -> Tensor:
        """ids [batch, time] -> logits [batch, time, vocab]."""
        with routed(self.host):
            return self.head(self.decoder(self.embed(ids), rng=rng)[0], rng)


class Rotary(Module):
    """The positions of a decoder: nothing is added to embeddings, and the scores get the causal mask, laid out once."""

    def __init__(self, dtype: Any):
        self.dtype = dtype

    def embed(self, positions: numpy.ndarray) -> None:
        """None, for positions [time]: rope turns queries and keys."""
        return None

    def bias(self, queries: int, keys: int, start: int) -> Any:
        """The causal mask of `queries` and `keys`, [1, 1, queries, keys], whatever `start` is."""
        return key_first(additive(causal(queries, keys), self.dtype))


class GroupedAttention(Attention):
    """An attention with fewer heads of keys and values than of queries. q, k, v, o: its projections. norms: of each
    head of q and of k, in Qwen 3."""

    def __init__(self, q: Linear, k: Linear, v: Linear, o: Linear, config: DecoderConfig, norms: Any):
        super().__init__(q, k, v, o, config.num_heads, config.head_dim ** -0.5, config.dropout_rate)
        self.head_dim, self.times = config.head_dim, config.num_heads // config.num_kv_heads
        if norms is not None:
            self.q_norm, self.k_norm = norms

    def __call__(self, x: Any, source: Any, bias: Any = None, rng: Any = None, cache: Any = None,
                 mask: Any = None) -> Tensor:
        """x and source [batch, time, d_model] -> the same shape; the arguments are those of `Attention`."""
        q, k, v = self.q(x, rng), self.k(source, rng), self.v(source, rng)
        if hasattr(self, "q_norm"):
            q, k = (norm(t.reshape(*t.shape[:2], -1, self.head_dim)).reshape(t.shape)
                    for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        q, k = turned(q), turned(k)
        if self.keys_values.used:
            k, v, bias = self.keys_values(k, v, bias)
        if self.times > 1:
            k, v = (repeated(t, times=self.times, width=self.head_dim) for t in (k, v))
        keep = None
        if rng is not None and self.p:
            keep = dropout_mask((q.shape[0], self.heads, q.shape[1], k.shape[1]), self.p, rng, q.dtype)
        return self.o(attention(q, k, v, bias, keep, mask, heads=self.heads, scale=self.scale), rng)


@op
def turned(x):
    """The memory of rope: two products, [batch, time, d] each, of which the second is added to the first.

    Its VJP is the rotation back, so nothing is kept."""
    def rotated(a):
        out = a * 1.0
        out += a * 1.0
        return out
    return rotated(x), (rotated,)


@op
def repeated(x, *, times, width):
    """Each head of x [batch, key, heads * width], repeated `times` times;   dx = the sum over the copies."""
    batch, keys, _ = x.shape
    heads = x.reshape(batch, keys, -1, 1, width)
    out = xp.concatenate([heads] * times, axis=3).reshape(batch, keys, -1)
    return out, (lambda g: g.reshape(batch, keys, -1, times, width).sum(axis=3).reshape(x.shape),)


def hf_name(name: str) -> str | None:
    """Hugging Face's name of the weight `name`, or None."""
    return translated(name, _NAMES)
