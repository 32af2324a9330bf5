"""Prompts in a file of PEFT's: prompt tuning, and P-tuning, whose network is not in the file.

    prompt_embeddings [n P, d]        P = num_virtual_tokens, n = num_transformer_submodules

The first P rows stand in front of the encoder's input. On an encoder-decoder n is 2 by default, and PEFT never reads
the other P rows: they are kept, and written back. P-tuning computes its prompt by a small network while it is trained.
Its file holds the rows that the network gave in the end, so they are a prompt like any other.
"""
from __future__ import annotations

from typing import Any

from minipeft.attaching.method import Method
from minipeft.checks import integer, shown
from minipeft.formats.peft.codec import Codec, Config, Shapes, codec
from minipeft.formats.peft.names import check_model
from minipeft.formats.row import Row
from minipeft.methods.prompt import PromptTuning

KEY, TASK = "prompt_embeddings", "SEQ_2_SEQ_LM"
NEEDED = ("task_type", "num_virtual_tokens")


def virtual_tokens(config: Config, model: Any) -> int:
    """P of a file for `model`. Raises ValueError for a model that is none of Hugging Face's, for another task_type than
    SEQ_2_SEQ_LM, and for a P that is no integer of at least 1."""
    check_model(model)
    if config["task_type"] != TASK:
        raise ValueError(f"task_type is {shown(config['task_type'])}; expected {TASK!r}: with another one PEFT ignores "
                         f"the prompt, or fails")
    return size(config, "num_virtual_tokens", None)


def size(config: Config, field: str, usual: int | None) -> int:
    """The integer in `field`, by default the usual one. Raises ValueError for anything that is no integer >= 1."""
    return integer(field, usual if config.get(field) is None else config[field], 1)


def check_shape(shapes: Shapes, shape: tuple[int, int], meaning: str) -> None:
    """Raises ValueError for prompt_embeddings of another shape. meaning: of the expected shape, for the message."""
    found = shapes.get(KEY, shape)
    if tuple(found) != shape:
        raise ValueError(f"{KEY} has shape {list(found)}; expected {shown(list(shape))}: {meaning}")


class PromptFile(Codec):
    """The part that the files of all prompts share."""

    used = frozenset({"num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads"})
    needed = NEEDED
    defaults = {"num_transformer_submodules": 2}

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        length, n = virtual_tokens(config, model), size(config, "num_transformer_submodules", None)
        for field, expected in _sizes(model).items():
            if size(config, field, expected) != expected:
                raise ValueError(f"{field} is {shown(config[field])}; expected {expected}, as in this model")
        check_shape(shapes, (n * length, model.config.d_model), f"a row for each of num_transformer_submodules "
                    f"({shown(n)}) * num_virtual_tokens ({shown(length)})")
        return PromptTuning(length, "random")

    def rows(self, method: Any, model: Any, config: Config) -> list[Row]:
        (name,), n = method.places(model), config["num_transformer_submodules"]
        return [Row(f"{name}.P", KEY, (n * method.length, model.config.d_model),
                    at=... if n == 1 else slice(method.length))]

    def writes(self, method: Any) -> bool:
        return isinstance(method, PromptTuning)

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        check_model(model)
        if list(method.places(model)) != ["encoder.input"]:
            raise ValueError(f"this prompt is at {', '.join(method.places(model))}; PEFT has prompts at encoder.input "
                             f"alone")
        if method.next_to_text:
            raise ValueError("next_to_text is True; expected False, because PEFT puts every prompt in front of the "
                             "padding, and its outputs would be others in rows that are padded on the left")
        return {"num_virtual_tokens": method.length, "num_transformer_submodules": 1, "modules_to_save": None,
                **_sizes(model)}


def _sizes(model: Any) -> dict[str, int]:
    c = model.config
    return {"token_dim": c.d_model, "num_layers": c.num_layers, "num_attention_heads": c.num_heads}


@codec
class PromptTuningFile(PromptFile):
    """Prompt tuning: the type of every prompt that is made here."""

    peft_type = "PROMPT_TUNING"
    harmless = frozenset({"num_transformer_submodules", "prompt_tuning_init", "prompt_tuning_init_text",
                          "tokenizer_name_or_path", "tokenizer_kwargs"})

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        return {**super().config(method, model), "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None,
                "tokenizer_name_or_path": None, "tokenizer_kwargs": None}


@codec
class PTuningFile(PromptFile):
    """P-tuning: only the type of prompts that were read from such a file."""

    peft_type = "P_TUNING"
    harmless = frozenset({"num_transformer_submodules", "encoder_reparameterization_type", "encoder_hidden_size",
                          "encoder_num_layers", "encoder_dropout"})

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        return {**super().config(method, model), "encoder_reparameterization_type": "MLP", "encoder_dropout": 0.0,
                "encoder_hidden_size": model.config.d_model, "encoder_num_layers": 2}
