"""Prefix tuning in a file of PEFT's.

    prompt_embeddings [P, 2 L d], d = heads * d_kv: 2 L slices [P, d] side by side

    layer i of the decoder      K = slice 4 i mod 2 L      V = slice (4 i + 1) mod 2 L      in its self-attention alone

L is num_layers, by default that of the encoder. If L is odd, or if the decoder has at most L / 2 layers, each of its
layers has slices of its own. Otherwise layers i and i + L / 2 share theirs. Such a file is loaded with as_peft=True
alone, as PrefixTuning(slices="peft"). Slices that no layer uses are kept, and written back.

A prefix of the decoder with a K and a V for each layer is written with an odd L. PEFT reads that, too.

Outputs are those of PEFT's forward. Its generation (0.21.2, transformers 4.57) counts the positions of the tokens as if
there were no prefix, and gives other logits than its forward.
"""
from __future__ import annotations

from typing import Any

from minipeft.attaching.method import Method
from minipeft.checks import shown
from minipeft.formats.peft.codec import Codec, Config, Shapes, codec
from minipeft.formats.peft.names import check_model
from minipeft.formats.peft.prompts import KEY, NEEDED, check_shape, size, virtual_tokens
from minipeft.formats.row import Row
from minipeft.methods.prefix import PrefixTuning, key_slice


@codec
class PrefixFile(Codec):
    """Prefix tuning, in the decoder alone."""

    peft_type = "PREFIX_TUNING"
    used = frozenset({"num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads"})
    harmless = frozenset({"encoder_hidden_size", "init_weights", "prefix_projection"})
    neutral = {"num_transformer_submodules": (2, None)}
    needed = NEEDED

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        length, c = virtual_tokens(config, model), model.config
        layers = size(config, "num_layers", c.num_layers)
        heads, d = size(config, "num_attention_heads", c.num_heads), size(config, "token_dim", c.d_model)
        if (heads, d) != (c.num_heads, c.num_heads * c.d_kv):
            raise ValueError(f"PEFT cannot run this prefix on this model: token_dim is {shown(d)} and "
                             f"num_attention_heads {shown(heads)}; expected {c.num_heads * c.d_kv} (heads * d_kv) and "
                             f"{c.num_heads}")
        if layers < c.num_decoder_layers:
            raise ValueError(f"PEFT cannot run this prefix on this model: num_layers is {layers}, by default that of "
                             f"the encoder; expected at least {c.num_decoder_layers}, the layers of the decoder")
        check_shape(shapes, (length, 2 * layers * d), f"a row for each of num_virtual_tokens ({shown(length)}), and "
                    f"2 * num_layers ({shown(layers)}) slices of token_dim ({d}) numbers in it")
        slices = "own" if layers == _own_layers(model) else "peft" if layers == c.num_layers else layers
        return PrefixTuning(length, ("decoder",), "earlier", slices=slices)

    def departure(self, method: Any, model: Any) -> str | None:
        layers, depth = _layers(method, model), model.config.num_decoder_layers
        if not _tied(layers, depth):
            return None
        used = {key_slice(i, layers) for i in range(depth)}
        return (f"PEFT's prefix tuning is not that of the paper here: with num_layers {layers}, layers i and "
                f"i + {layers // 2} of the decoder read the same slices of {KEY} as their keys and values, and "
                f"{2 * (layers - len(used))} of the {2 * layers} slices are never used")

    def rows(self, method: Any, model: Any, config: Config) -> list[Row]:
        layers = _layers(method, model)
        found = {}
        for i, (name, site) in enumerate(method.places(model).items()):
            for leaf, s in zip("KV", (key_slice(i, layers), key_slice(i, layers) + 1)):
                ours = method.arrays(name, site, model)[leaf].key(name, leaf)  # one for all layers that share it
                found[ours] = Row(ours, KEY, (method.length, 2 * layers * site.width),
                                  at=(slice(None), slice(s * site.width, (s + 1) * site.width)))
        return list(found.values())

    def writes(self, method: Any) -> bool:
        return isinstance(method, PrefixTuning)

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        check_model(model)
        if not hasattr(model, "encoder"):
            raise ValueError(f"a prefix on a {type(model).__name__} is not written in PEFT's format; expected a model "
                             f"with an encoder, such as T5. attachment.save writes it in minipeft's own")
        c, places = model.config, list(method.places(model))
        theirs = [f"decoder.{i}.attn.keys_values" for i in range(c.num_decoder_layers)]
        if places != theirs:
            other = next((name for name in places if name not in theirs), None)
            raise ValueError(f"this prefix {'leaves out some layers' if other is None else f'is at {other}'}; expected "
                             f"sites='decoder': PEFT has a prefix in the self-attention of every layer of the decoder, "
                             f"and nowhere else")
        if method.bias != "earlier":
            raise ValueError(f"bias is {shown(method.bias)}; expected 'earlier': PEFT's prefix stands in front of the "
                             f"tokens of the decoder, at earlier positions")
        if method.mlp is not None:
            raise ValueError(f"mlp is {method.mlp}; expected None: PEFT's file holds K and V alone, not the network "
                             f"that makes them; save what minipeft.methods.prefix.without_mlp gives")
        d = c.num_heads * c.d_kv
        return {"num_virtual_tokens": method.length, "num_layers": _layers(method, model), "token_dim": d,
                "num_attention_heads": c.num_heads, "num_transformer_submodules": 2, "modules_to_save": None,
                "prefix_projection": False, "encoder_hidden_size": d, "init_weights": None}


def _layers(method: Any, model: Any) -> int:
    """L of the file for `method` on `model`."""
    return method.slice_layers(model) or _own_layers(model)


def _own_layers(model: Any) -> int:
    """L of a file in which each layer of the decoder has slices of its own: that of the encoder, as PEFT has it, where
    this is so, else the smallest odd number that is large enough."""
    encoder, depth = model.config.num_layers, model.config.num_decoder_layers
    return encoder if encoder >= depth and not _tied(encoder, depth) else depth + 1 - depth % 2


def _tied(layers: int, depth: int) -> bool:
    """Whether any of the first `depth` layers share their slices."""
    return layers % 2 == 0 and depth > layers // 2
