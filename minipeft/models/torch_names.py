"""The weights of a torch.nn.Transformer under our names, to compare the two models.

torch has only the two stacks, each with a norm after it (final_norm=True), and no embeddings, positions or head. Its
norm_first is our pre_norm; its src_key_padding_mask, True at padding, is the opposite of our attention_mask.
"""
from __future__ import annotations

from typing import Any, Mapping

from minipeft.backend import Array, to_host
from minipeft.models.names import translated

TABLE = {  # the letters are explained in `names.py`
    "S.layers.i.self_attn.in_proj_*": "S.i.attn.{q,k,v}.*",  # three blocks of d_model rows
    "S.layers.i.self_attn.out_proj.*": "S.i.attn.o.*",
    "decoder.layers.i.multihead_attn.in_proj_*": "decoder.i.cross.{q,k,v}.*",
    "decoder.layers.i.multihead_attn.out_proj.*": "decoder.i.cross.o.*",
    "S.layers.i.linear1.*": "S.i.ff.wi.*",
    "S.layers.i.linear2.*": "S.i.ff.wo.*",
    "S.layers.i.norm1.*": "S.i.attn_norm.*",
    "encoder.layers.i.norm2.*": "encoder.i.ff_norm.*",
    "decoder.layers.i.norm2.*": "decoder.i.cross_norm.*",
    "decoder.layers.i.norm3.*": "decoder.i.ff_norm.*",
    "S.norm.*": "S.norm.*",
}


def from_torch(state: Mapping[str, Any]) -> dict[str, Array]:
    """state {key of torch.nn.Transformer: array or CPU tensor} -> {our name: array on the host}; also for gradients.

    Raises ValueError for a key that such a model does not have, and for a packed projection that is not three blocks
    of rows."""
    found: dict[str, Array] = {}
    for key, value in state.items():
        name, array = translated(key, TABLE.items()), to_host(value)
        if name is None:
            raise ValueError(f"{key!r} is not a key of torch.nn.Transformer")
        parts = [name.replace("{q,k,v}", part) for part in "qkv"] if "{" in name else [name]
        if array.ndim == 0 or len(array) % len(parts):
            raise ValueError(f"{key} has shape {list(array.shape)}; expected {len(parts)} blocks of d_model rows")
        rows = len(array) // len(parts)
        found.update({part: array[n * rows:(n + 1) * rows] for n, part in enumerate(parts)})
    return found
