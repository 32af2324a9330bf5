"""`select` chooses parameters by their dotted names; a tensor carries no flag.

    select(model, r"\\.bias$")                  {"encoder.0.attn.q.bias": Parameter, ...}
    value_and_grad(step, select(model, ".*"))  full fine-tuning
"""
from __future__ import annotations

from minipeft.nn.module import Model, whole
from minipeft.nn.weight import Parameter
from minipeft.nn.where import Where, matching


def select(model: Model, where: Where) -> dict[str, Parameter]:
    """{name: Parameter} among base parameters and those of plugged attachments (`place@name.leaf`), in model order.

    where: a regular expression searched in the name, a callable on the name, or a list of these.
    Raises ValueError for a pattern that matches nothing, and for a merged attachment and the weights that it is merged
    into, which are constants now; TypeError for a part of a model."""
    params: dict[str, Parameter] = dict(model.base_parameters)
    frozen = {name: slot.merged[-1].name for name, slot in model.slots.items() if slot.merged}
    for attachment in whole(model).attachments.values():
        if attachment.state != "off":
            params.update(attachment.parameters)
        if attachment.state == "merged":
            frozen.update(dict.fromkeys(attachment.parameters, attachment.name))
    chosen = matching(params, where)
    for name in chosen:
        if name in frozen:
            raise ValueError(f"{name} cannot be trained while {frozen[name]!r} is merged: unmerge first "
                             f"(model.attachments[{frozen[name]!r}].unmerge())")
    return {name: params[name] for name in chosen}
