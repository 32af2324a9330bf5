"""The configuration of a decoder of the LLaMA family, and the fields of Hugging Face's config.json that it may have.

A field that changes the mathematics must not be overlooked, so every field is one of these: read; known to change
nothing; or refused by name, unless it is off (null or false).
"""
from __future__ import annotations

import dataclasses
from typing import Any, Mapping, Self

from minipeft.checks import integer, is_number, shown
from minipeft.models.config import Config, first_name, listed
from minipeft.nn.rotary import TYPES, Frequencies

KINDS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
         "qwen3": "Qwen3ForCausalLM"}
_HAVING = {"attention_bias": ("llama", "qwen3"), "mlp_bias": ("llama",)}  # for the others transformers ignores them
_IGNORED = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range",
            "pretraining_tp", "_name_or_path", "max_window_layers", "transformers.js_config", "is_llama_config",
            "quantization_config", "id2label", "label2id", "rope_parameters", "rope_theta", "rope_scaling",
            "eos_token_id", "use_sliding_window", "sliding_window", "layer_types", "_attn_implementation",
            "return_dict", "chunk_size_feed_forward", "problem_type", "num_key_value_heads", "head_dim"}
_ROPE = {"rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
         "original_max_position_embeddings"}


@dataclasses.dataclass(frozen=True)
class DecoderConfig(Config):
    """The fields of a Hugging Face config.json that a Decoder uses; the defaults are those of a LLaMA of 7 B.

    model_type: one of KINDS; qwen2 has biases at q, k and v, qwen3 a norm of each head of q and k. Sizes: vocab_size;
    hidden_size, the width d_model; intermediate_size, that of the feed-forward; num_hidden_layers; num_attention_heads
    heads of queries and num_key_value_heads of keys and values, of head_dim numbers each. hidden_act: the activation.
    rms_norm_eps: of the norms. attention_bias, mlp_bias: whether q, k, v and o, and the feed-forward, have biases.
    attention_dropout: the rate on attention probabilities, in training. tie_word_embeddings: whether the head is the
    embedding's table. rope_theta, rope_type (one of `rotary.TYPES`), rope_factor, rope_low_freq_factor,
    rope_high_freq_factor, rope_original_length: of the positions (`rotary.Frequencies`). max_position_embeddings: how
    far it was trained; it bounds nothing here. pad_token_id, bos_token_id, eos_token_ids: the special ids; any of the
    last ends a text. Raises ValueError naming a field that is wrong."""

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_type: str = "default"
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
    max_position_embeddings: int = 2048
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_ids: tuple[int, ...] = (2,)

    @property
    def d_model(self) -> int:
        """hidden_size, under the name that methods know."""
        return self.hidden_size

    @property
    def num_layers(self) -> int:
        """num_hidden_layers, under the name that methods know."""
        return self.num_hidden_layers

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def head_norms(self) -> bool:
        """Whether each head of q and k has a norm."""
        return self.model_type == "qwen3"

    @property
    def frequencies(self) -> Frequencies:
        """How fast the pairs of a head turn."""
        return Frequencies(self.rope_theta, self.rope_type, self.rope_factor, self.rope_low_freq_factor,
                           self.rope_high_freq_factor, self.rope_original_length)

    def check(self) -> None:
        super().check()
        self._expect("model_type", self.model_type in KINDS, f"one of {', '.join(KINDS)}")
        self._expect("num_attention_heads", self.num_attention_heads % self.num_key_value_heads == 0,
                     f"a multiple of num_key_value_heads, {self.num_key_value_heads}")
        self._expect("head_dim", self.head_dim % 2 == 0, "an even number: rotary positions turn pairs of numbers")
        self._expect_activation("hidden_act", self.hidden_act)
        for name, kinds in _HAVING.items():
            self._expect(name, not getattr(self, name) or self.model_type in kinds,
                         f"false: {self.model_type} has no such biases")
        self._expect("rope_type", self.rope_type in TYPES, f"one of {', '.join(TYPES)}")
        for name in ("rope_theta", "rope_factor", "rope_low_freq_factor"):
            self._expect(name, getattr(self, name) > 0, "a number > 0")
        self._expect("rope_high_freq_factor", self.rope_high_freq_factor > self.rope_low_freq_factor,
                     f"more than rope_low_freq_factor, {self.rope_low_freq_factor}")
        for name in ("bos_token_id", "eos_token_ids"):
            value = getattr(self, name)
            self._expect(name, all(i < self.vocab_size for i in (value if isinstance(value, tuple) else (value,))),
                         f"ids below vocab_size {self.vocab_size}")

    def resolved(self) -> dict[str, Any]:
        return {**super().resolved(), "hidden_act": first_name(self.hidden_act)}

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """The configuration in the `values` of a Hugging Face config.json, of transformers 4 or 5.

        Raises ValueError, by name, for another model_type, a missing size, a sliding window in use, another kind of
        rotary positions, and every other field that is on and not known."""
        kind = values.get("model_type")
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"config: model_type is {shown(kind)}; expected one of {', '.join(KINDS)}")
        fields = {f.name for f in dataclasses.fields(cls)} - {"eos_token_ids"}
        fields -= {f for f in fields if f.startswith("rope_")}
        odd = [name for name, value in values.items()
               if name not in fields | _IGNORED and value is not None and value is not False]
        if odd:
            raise ValueError(f"config: {listed(odd)}: not known, and it might change what {kind} computes; expected "
                             f"only fields that minipeft knows")
        known = {name: values[name] for name in fields if values.get(name) is not None}
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if name not in known:
                raise ValueError(f"config: {name} is missing")
        _check_windows(kind, values)
        known.update(_heads(kind, values), **_rope(values), **_special(kind, values))
        return cls(**known)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a config.json that transformers 4 and 5 read (5 reads the fields of 4)."""
        values = self.to_dict()
        rope = {name: values.pop(f"rope_{name}") for name in ("type", "factor", "low_freq_factor", "high_freq_factor",
                                                              "original_length")}
        scaling: dict[str, Any] | None = {"rope_type": rope["type"], "factor": rope["factor"]}
        if self.rope_type == "llama3":
            scaling = {**rope, "rope_type": rope["type"], "original_max_position_embeddings": rope["original_length"]}
            del scaling["type"], scaling["original_length"]
        ids = list(values.pop("eos_token_ids"))
        for name, kinds in _HAVING.items():
            if self.model_type not in kinds:
                del values[name]
        if self.model_type != "llama":
            values["sliding_window"] = None
        if self.model_type.startswith("qwen"):
            values["use_sliding_window"] = False
        return {"architectures": [KINDS[self.model_type]], **values,
                "rope_scaling": None if self.rope_type == "default" else scaling,
                "eos_token_id": ids[0] if len(ids) == 1 else ids or None, "use_cache": True}


def _check_windows(kind: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError where keys far away are hidden."""
    if kind == "mistral" and "sliding_window" not in values:
        raise ValueError("config: sliding_window is missing, which means 4096 for mistral; expected null: sliding "
                         "windows are not computed here")
    window = values.get("sliding_window")
    in_use = window is not None and kind == "mistral" or bool(values.get("use_sliding_window"))
    if in_use:
        raise ValueError(f"config: sliding_window is {shown(window)} and in use; expected null: sliding windows are "
                         f"not computed here")
    types = values.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(t != "full_attention" for t in types)):
        raise ValueError(f"config: layer_types is {shown(types)}; expected full_attention alone")


def _heads(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """num_key_value_heads and head_dim, with the defaults of transformers where they are missing or null."""
    d, heads = values["hidden_size"], integer("config: num_attention_heads", values["num_attention_heads"], 1)
    if kind != "llama" and "num_key_value_heads" not in values:
        raise ValueError(f"config: num_key_value_heads is missing for {kind}; expected it, as every {kind} has it")
    found = values.get("num_key_value_heads")
    head_dim = values.get("head_dim")
    if head_dim is None:
        head_dim = 128 if kind == "qwen3" and "head_dim" not in values else integer(
            "config: hidden_size", d, 1) // heads
        if head_dim < 1 or kind != "qwen3" and head_dim * heads != d:
            raise ValueError(f"config: hidden_size is {shown(d)}; expected a multiple of num_attention_heads, {heads}, "
                             f"or a head_dim")
    return {"num_key_value_heads": heads if found is None else found, "head_dim": head_dim}


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of rotary positions: rope_parameters of transformers 5, or rope_theta and rope_scaling of 4."""
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    for name, given in (("rope_parameters", new), ("rope_scaling", old)):
        if given is not None and not isinstance(given, dict):
            raise ValueError(f"config: {name} is {shown(given)}; expected null or fields such as rope_type")
    if new is not None and old is not None and new != old:
        raise ValueError("config: rope_parameters and rope_scaling are both given and differ; expected one of them")
    given = new or old or {}
    odd = [name for name, value in given.items() if name not in _ROPE and value is not None]
    if odd:
        raise ValueError(f"config: {listed(odd)} of the rotary positions: not known; expected some of "
                         f"{', '.join(sorted(_ROPE))}")
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in TYPES:
        raise ValueError(f"config: rope_type is {shown(kind)}; expected one of {', '.join(TYPES)}")
    thetas = [v for v in (given.get("rope_theta"), values.get("rope_theta")) if v is not None]
    if any(v != thetas[0] for v in thetas):
        raise ValueError(f"config: rope_theta is {shown(thetas[1])}, and {shown(thetas[0])} among rope's parameters")
    found = {"rope_type": kind, **({"rope_theta": thetas[0]} if thetas else {})}
    needed = {"default": (), "linear": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}[kind]
    for name in needed:
        if not is_number(given.get(name)):
            raise ValueError(f"config: {name} of the rotary positions is {shown(given.get(name))}; expected a number")
        found["rope_original_length" if name.startswith("original") else f"rope_{name}"] = given[name]
    return found


def _special(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """pad_token_id, bos_token_id and eos_token_ids. Where there is no pad, it is the first eos, as in generation with
    transformers."""
    eos = values.get("eos_token_id", None if kind.startswith("qwen") else 2)
    ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    pad, bos = values.get("pad_token_id"), values.get("bos_token_id")
    if pad is None or pad == -1:  # -1: of the first LLaMA
        pad = ids[0] if ids else 0
    return {"pad_token_id": pad, "eos_token_ids": ids, "bos_token_id": (ids[0] if ids else 0) if bos is None else bos}
