"""QA-LoRA in a file of PEFT's: a LoRA with use_qalora, whose A [r, L] has a column for each group of inputs.

    L * mean over each group of x -> A -> B * s          so k = L / g, `QALoRA(pooling="mean * groups")`

L = d_in / qalora_group_size. The pooled input is that of PEFT's QALoraLinearVariant, which only GPTQ layers have. On
every other layer PEFT takes no notice of use_qalora, and makes an ordinary LoRA with A [r, d_in]. The fields of both
files are the same, and only the shapes of A tell them apart. For groups of 1 these are the same as well, and the
changes differ by a factor d_in, so such a file is refused.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Mapping

from minipeft.checks import is_integer, shown
from minipeft.formats.peft.codec import Config, Shapes
from minipeft.formats.peft.lora_start import starts_from_base
from minipeft.formats.peft.names import words
from minipeft.formats.peft.places import flag, only
from minipeft.methods.qalora import QALoRA
from minipeft.nn.slot import Slot

POOLING = "mean * groups"


def group(config: Config, shapes: Shapes, slots: Mapping[str, Slot]) -> int | None:
    """g of a file of QA-LoRA; None for a LoRA, also for one that PEFT made with use_qalora on layers that are not GPTQ.
    shapes: {key: shape} of the file. slots: {path: slot} of the modules that the file is for.

    Raises ValueError for a group that is no integer of at least 2 or does not divide a d_in, where some A have a column
    for each input and others do not, and for DoRA or PiSSA with pooled inputs."""
    if not flag(config, "use_qalora"):
        return None
    said, g, columns = "use_qalora is true", size(config), _columns(shapes)
    if not is_integer(g, 2):
        raise ValueError(f"{said} and qalora_group_size is {shown(g)}; expected an integer >= 2"
                         + (": with 1, A has the same shape on GPTQ layers, where PEFT pools, and on others" if g == 1
                            else ""))
    plain = [path for path, slot in slots.items()
             if slot.kind == "embedding" or columns.get(words(path)) == slot.shape[1]]
    if len(plain) == len(slots):
        return None
    if plain:
        other = next(path for path in slots if path not in plain)
        raise ValueError(f"{said}: A of {plain[0]} has a column for each input, as on a layer that is not GPTQ, and "
                         f"A of {other} has not; expected one kind of layers")
    if flag(config, "use_dora") or starts_from_base(config):
        raise ValueError(f"{said} beside {'use_dora' if flag(config, 'use_dora') else 'PiSSA'}, which PEFT does not "
                         f"have on the GPTQ layers that this file is for; expected one of them")
    for path, slot in slots.items():
        if slot.shape[1] % g:
            raise ValueError(f"{said}, and {path} has {slot.shape[1]} inputs; expected a qalora_group_size that "
                             f"divides them, not {g}")
    return g


def size(config: Config) -> Any:
    """qalora_group_size; 16, as in PEFT, where the file has nothing or null."""
    found = config.get("qalora_group_size")
    return 16 if found is None else found


def _columns(shapes: Shapes) -> dict[tuple[str, ...], int]:
    """{words of a path: the columns of its A}."""
    found = {}
    for key, shape in shapes.items():
        said = words(key)
        if "lora_A" in said and len(shape) == 2:
            found[said[:said.index("lora_A")]] = shape[1]
    return found


def of_any_rank(method: QALoRA, model: Any) -> QALoRA:
    """`method`, which may have ranks beyond min(d_out, d_in) if it has one on this `model`: PEFT allows them."""
    places: Mapping[str, Any] = method.places(model)
    large = any(method.own_rank(name) > min(slot.shape) for name, slot in places.items())
    return dataclasses.replace(method, any_rank=True) if large else method


def written_group(method: QALoRA, places: Mapping[str, Slot]) -> int:
    """qalora_group_size of a file of `method`, on `places` {name: slot}. Raises ValueError for another pooling, for
    groups of 1, and for tables."""
    only("use_qalora", places, "linear")
    if method.pooling != POOLING:
        raise ValueError(f"pooling is {shown(method.pooling)}, and PEFT multiplies the mean of a group by the number "
                         f"of groups; expected pooling={POOLING!r}: under another one, the same A and B make another "
                         f"change")
    if method.group < 2:
        raise ValueError("group is 1, where PEFT's files of LoRA and of QA-LoRA look the same; expected at least 2")
    return method.group


def notes(method: Any, config: Config) -> list[str]:
    """Sentences for somebody who loads a file with use_qalora."""
    if not flag(config, "use_qalora"):
        return []
    if not isinstance(method, QALoRA):
        return ["use_qalora is true, and A has a column for each input: PEFT pools on GPTQ layers alone, so this is an "
                "ordinary LoRA"]
    drops = f". lora_dropout is {method.dropout:g}: in training, PEFT drops inputs before they are pooled, and here " \
            f"the dropout acts on the pooled inputs" if method.dropout else ""
    return [f"use_qalora is for GPTQ layers in PEFT. The adapter was trained on the numbers of such a base; on another "
            f"one, outputs differ by as much as the bases do{drops}"]
