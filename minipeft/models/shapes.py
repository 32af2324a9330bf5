"""The shapes {name: shape} of all parameters of a configuration, without building the model.

A file is compared with these before a model is built, so that a configuration of a few bytes cannot ask for more memory
than the weights beside it take. A test compares them with the models.
"""
from __future__ import annotations

from typing import Any, Mapping

from minipeft.models.config import listed

Shapes = dict[str, tuple[int, ...]]
_FEWEST = 4  # tensors per layer; a layer has at least 8, and if up to half are missing, the error names them


def t5_shapes(config: Any) -> Shapes:
    """The shapes of a T5; the names are in `t5.py`."""
    c, d, inner = config, config.d_model, config.num_heads * config.d_kv
    attention = {"q.weight": (inner, d), "k.weight": (inner, d), "v.weight": (inner, d), "o.weight": (d, inner)}
    wide = ("wi_0", "wi_1") if c.gated else ("wi",)
    ff = {**{f"{name}.weight": (c.d_ff, d) for name in wide}, "wo.weight": (d, c.d_ff)}
    once = {"position.weight": (c.relative_attention_num_buckets, c.num_heads), "norm.weight": (d,)}
    return _shapes(c, attention, ff, {"weight": (d,)}, once, c.tie_word_embeddings)


def transformer_shapes(config: Any) -> Shapes:
    """The shapes of a Transformer; the names are in `transformer.py`."""
    c, d = config, config.d_model
    attention = {f"{name}.{leaf}": shape for name in "qkvo" for leaf, shape in (("weight", (d, d)), ("bias", (d,)))}
    ff = {"wi.weight": (c.d_ff, d), "wi.bias": (c.d_ff,), "wo.weight": (d, c.d_ff), "wo.bias": (d,)}
    norm = {"weight": (d,), "bias": (d,)}
    once: Shapes = {"position.weight": (c.max_length, d)} if c.positions == "learned" else {}
    if c.final_norm:
        once.update({f"norm.{leaf}": shape for leaf, shape in norm.items()})
    return _shapes(c, attention, ff, norm, once, c.tie_embeddings)


def decoder_shapes(config: Any) -> Shapes:
    """The shapes of a Decoder; the names are in `decoder.py`."""
    c, d = config, config.hidden_size
    inner, narrow = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    linears = {"attn.q": (inner, d, c.qkv_bias), "attn.k": (narrow, d, c.qkv_bias), "attn.v": (narrow, d, c.qkv_bias),
               "attn.o": (d, inner, c.attention_bias), "ff.wi_0": (c.intermediate_size, d, c.mlp_bias),
               "ff.wi_1": (c.intermediate_size, d, c.mlp_bias), "ff.wo": (d, c.intermediate_size, c.mlp_bias)}
    block: Shapes = {"attn_norm.weight": (d,), "ff_norm.weight": (d,)}
    for name, (d_out, d_in, bias) in linears.items():
        block |= {f"{name}.weight": (d_out, d_in), **({f"{name}.bias": (d_out,)} if bias else {})}
    if c.head_norms:
        block |= {"attn.q_norm.weight": (c.head_dim,), "attn.k_norm.weight": (c.head_dim,)}
    found: Shapes = {"embedding.weight": (c.vocab_size, d), "decoder.norm.weight": (d,)}
    found |= {f"decoder.{i}.{leaf}": shape for i in range(c.num_hidden_layers) for leaf, shape in block.items()}
    return found if c.tie_word_embeddings else {**found, "head.weight": (c.vocab_size, d)}


def _shapes(c: Any, attention: Mapping, ff: Mapping, norm: Mapping, once: Mapping, tied: bool) -> Shapes:
    """The shapes of a model. attention, ff, norm: those of a part of a block; once: those that each stack has once."""
    encoder = {"attn": attention, "attn_norm": norm, "ff": ff, "ff_norm": norm}
    decoder = {**encoder, "cross": attention, "cross_norm": norm}
    found: Shapes = {"embedding.weight": (c.vocab_size, c.d_model)}
    for stack, layers, parts in (("encoder", c.num_layers, encoder), ("decoder", c.num_decoder_layers, decoder)):
        found |= {f"{stack}.{i}.{part}.{leaf}": shape
                  for i in range(layers) for part, leaves in parts.items() for leaf, shape in leaves.items()}
        found |= {f"{stack}.{leaf}": shape for leaf, shape in once.items()}
    return found if tied else {**found, "head.weight": (c.vocab_size, c.d_model)}


def check_layers(config: Any, tensors: int) -> None:
    """Raises ValueError if `config` has too many layers for that many tensors, before any name is made."""
    fields = [name for name in ("num_layers", "num_decoder_layers", "num_hidden_layers") if name in vars(config)]
    if sum(getattr(config, name) for name in fields) * _FEWEST > tensors:
        said = " and ".join(f"{name} {'is ' * (not i)}{getattr(config, name)}" for i, name in enumerate(fields))
        raise ValueError(f"config: {said}; there are {tensors} tensors, too few for so many layers")


def check_shapes(found: Mapping[str, tuple], wanted: Shapes) -> None:
    """Compares shapes that were found with those that are wanted, {name: shape}. Raises ValueError, naming them, for
    missing tensors, unexpected tensors and shapes that differ."""
    missing, extra = [n for n in wanted if n not in found], [n for n in found if n not in wanted]
    if missing or extra:
        raise ValueError("; ".join(f"{len(names)} {what}: {listed(names)}"
                                   for what, names in (("missing", missing), ("unexpected", extra)) if names))
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(f"{name} has shape {list(found[name])}; expected {list(shape)}")
