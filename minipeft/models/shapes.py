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
    if (config.num_layers + config.num_decoder_layers) * _FEWEST > tensors:
        raise ValueError(f"config: num_layers is {config.num_layers} and num_decoder_layers "
                         f"{config.num_decoder_layers}; there are {tensors} tensors, too few for so many layers")


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
