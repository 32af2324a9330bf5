"""How many numbers are trained, by which method, in which part of the model.

    trainable / all / percent     parameters of the model
    by component                  attention, feed-forward, embedding, norm, position, head, bias (other than a norm's)
    bytes                         of the weights, and of training with AdamW: a gradient and two moments per number
"""
from __future__ import annotations

import dataclasses
import math
from typing import Any, Mapping

from minipeft.nn import parts
from minipeft.nn.absent import ABSENT
from minipeft.nn.module import Model, whole
from minipeft.nn.place import Place
from minipeft.nn.weight import Parameter

COMPONENTS = (*parts.COMPONENTS, "bias")
_EXAMPLE_RANK = 8


@dataclasses.dataclass(frozen=True)
class Report:
    """Counts of numbers. `print` it for the table.

    trainable, all: how many are trained, and how many there are. A quantized weight counts by its shape.
    components: {component: count} of the base. methods: {attachment: {component: how many it trains there}}, or
    {"selected": ...}. weight_bytes: of all arrays, and of dequantized numbers that are kept. training_bytes: of
    gradients and moments. projection: (d_out, d_in, rows per head) of a query projection, or None if there is none.
    ranks: of the plugged LoRAs, for the example at the end."""

    trainable: int
    all: int
    components: dict[str, int]
    methods: dict[str, dict[str, int]]
    weight_bytes: int
    training_bytes: int
    projection: tuple[int, int, int] | None
    ranks: tuple[int, ...] = (_EXAMPLE_RANK,)

    @property
    def percent(self) -> float:
        """100 trainable / all."""
        return 100 * self.trainable / self.all if self.all else 0.0

    def __str__(self) -> str:
        lines = [f"trainable model parameters: {self.trainable}", f"all model parameters: {self.all}",
                 f"percentage of trainable model parameters: {self.percent:.2f}%", "",
                 f"  {'':<14}{'base':>14}{'':>9}" + "".join(f"{name:>14}" for name in self.methods)]
        base = sum(self.components.values())
        for part in dict.fromkeys([*self.components, *(part for found in self.methods.values() for part in found)]):
            count, trained = self.components.get(part, 0), [found.get(part, 0) for found in self.methods.values()]
            if count or any(trained):
                lines.append(f"  {part:<14}{count:>14,}{100 * count / base:>7.1f} %"
                             + "".join(f"{n:>14,}" for n in trained))
        lines += ["", f"weights               {self.weight_bytes / 2 ** 20:>13.2f} MiB",
                  f"gradients and moments {self.training_bytes / 2 ** 20:>13.2f} MiB with AdamW"]
        for rank in self.ranks if self.projection else ():
            d_out, d_in, d_head = self.projection  # type: ignore[misc]
            lines += ["", f"LoRA of rank {rank} in place of the dense update of",
                      _example(rank, "one head's query", d_head, d_in),
                      _example(rank, "the whole query projection", d_out, d_in)]
        return "\n".join(lines)


def _example(rank: int, what: str, d_out: int, d_in: int) -> str:
    low, dense = rank * (d_in + d_out), d_in * d_out
    saving = f"{100 * (1 - low / dense):.2f} % fewer" if low < dense else "no fewer: r (d_in + d_out) >= d_in d_out"
    return f"  {what} {d_in} x {d_out}: {low:,} for {dense:,}, {saving}"


def report(model: Model, params: Any = None) -> Report:
    """Counts for training `params`: {name: Parameter} as `select` gives it, or an Attachment. None means the parameters
    of all plugged attachments, or, if nothing is plugged or merged, the whole model (full fine-tuning). Merged
    constants, attachments that are off and the indices of masks are not trained; they count in `weight_bytes` alone.

    Raises ValueError for a parameter that is not the model's, TypeError for a part of a model and for params of another
    kind."""
    attachments = whole(model).attachments
    plugged = {name: a.parameters for name, a in attachments.items() if a.state == "plugged"}
    own = {name: p for found in plugged.values() for name, p in found.items()}
    base, places = model.base_arrays, dict(model.named_places())
    constants = [a for place in places.values() for entry in place.merged for a in entry.merged.arrays.values()]
    trained: Mapping[str, Parameter] = own if own or constants else model.base_parameters
    groups = plugged if own else {"selected": trained}
    if params is not None:
        trained = _checked(model, getattr(params, "parameters", params))
        groups = {"selected": trained}
    of_base, sizes = set(map(id, base.values())), _base_sizes(model)
    everything = {id(p): p for p in [*base.values(), *own.values(), *trained.values()]}
    held = {id(p): p for a in attachments.values() for p in a.arrays.values()}
    arrays = [*{**everything, **held}.values(), *constants]
    methods = [attachments[name].method for name in plugged]
    parts = [part for method in methods for part in getattr(method, "parts", [method])]
    ranks = dict.fromkeys(part.rank for part in parts if type(part).__name__ == "LoRA")
    return Report(
        trainable=sum(p.data.size for p in trained.values()),
        all=sum(sizes.values()) + sum(p.data.size for key, p in everything.items() if key not in of_base),
        components=_counts(sizes, places),
        methods={name: {part: n for part, n in _counts(_sizes(found), places).items() if n}
                 for name, found in groups.items()},
        weight_bytes=sum(p.data.nbytes for p in arrays) + sum(
            getattr(piece, "kept_bytes", 0) for place in places.values() for piece in place.pieces()),
        training_bytes=sum(3 * p.data.nbytes for p in trained.values()), projection=_projection(model),
        ranks=tuple(ranks) or (_EXAMPLE_RANK,))


def _checked(model: Model, params: Any) -> Mapping[str, Parameter]:
    """{name: Parameter} of this model, under its own names."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params is {type(params).__name__}; expected an Attachment, or {{name: Parameter}} as "
                        f"select(model, where) gives it")
    there = {**model.base_parameters, **{n: p for a in model.attachments.values() for n, p in a.parameters.items()}}
    for name, p in params.items():
        if there.get(name) is not p:
            raise ValueError(f"params[{name!r}] is not a parameter of this model under its name; "
                             f"select(model, where) lists those that are")
    return params


def _sizes(params: Mapping[str, Any]) -> dict[str, int]:
    return {name: p.data.size for name, p in params.items()}


def _base_sizes(model: Model) -> dict[str, int]:
    """{name: numbers} of the base. A base of codes and scales counts as the matrix that they stand for."""
    found: dict[str, int] = {}
    for name, slot in model.slots.items():
        if any(isinstance(p, Parameter) for p in slot.base.arrays.values()):
            found |= {f"{name}.{leaf}" if leaf else name: p.data.size for leaf, p in slot.base.arrays.items()}
        else:
            found[name] = math.prod(slot.shape)
    return found


def _counts(sizes: Mapping[str, int], places: Mapping[str, Place]) -> dict[str, int]:
    counts = dict.fromkeys(COMPONENTS, 0)
    for name, size in sizes.items():
        where = name.partition("@")[0]
        # its place; that of a base of several arrays, "place.leaf"; or the matrix of the layer that shares it
        there = next((n for n in (where, where.rpartition(".")[0], f"{where}.weight") if n in places), None)
        part = "shared" if there is None else component(there, places[there])  # shared by several layers
        counts[part] = counts.get(part, 0) + size
    return counts


def component(name: str, place: Place) -> str:
    """Which of COMPONENTS the place called `name` counts for. A linear layer's bias is "bias", a norm's is "norm"."""
    found = parts.component(name)
    return "bias" if place.kind in ("bias", ABSENT) and found != "norm" else found


def _projection(model: Any) -> tuple[int, int, int] | None:
    blocks = getattr(getattr(model, "encoder", None), "blocks", None)
    if not blocks:
        return None
    d_out, d_in = blocks[0].attn.q.weight.shape
    return d_out, d_in, d_out // blocks[0].attn.heads
