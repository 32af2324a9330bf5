"""How a LoRA of PEFT's started, `init_lora_weights`, and which of these starts change the base.

    true, false, "gaussian", "orthogonal", "eva", "mica"     only A and B are drawn: a trained file says the rest
    "pissa"                                                  W - s B0 A0 + s B A, with A0 and B0 from W itself
    "pissa_niter_16", "olora", "corda", "lora_ga", "loftq"   the base is changed too, in another way

PEFT overwrites the base by W - s B0 A0 whenever it loads a file of PiSSA, also one that is trained, and the file has A
and B alone. s B0 A0 is the best approximation of W of rank r, so it can be computed here from the same W. It is unique
where the singular values r and r + 1 differ. PEFT 0.21.2 decomposes in float32: on 512 x 512 matrices, r = 16, its
product differs from the exact one by 1e-6 to 6e-6 of its norm, and logits of a small T5 by 1e-6 to 2e-6 of the largest,
not much more than with any LoRA in float32.

The others cannot be computed from the file and the base: "corda" and "lora_ga" depend on data, "loftq" on a quantizer,
and "pissa_niter_16" on random numbers that PEFT draws anew, so that PEFT itself does not load what it saved. "olora"
could be, by a QR decomposition, but is not supported.
"""
from __future__ import annotations

from fractions import Fraction

import numpy

from minipeft.backend import to_host
from minipeft.checks import shown
from minipeft.formats.peft.codec import Config
from minipeft.methods.pissa import factors_of
from minipeft.nn.slot import Slot

HARMLESS = ("gaussian", "orthogonal", "eva", "mica")
CHANGES_BASE = ("pissa_niter_", "olora", "corda", "lora_ga", "loftq")
_CLOSE = 1e-6  # of the largest singular value: below this difference, float32 does not tell two of them apart


def starts_from_base(config: Config) -> bool:
    """Whether the factors of the file are relative to W - s B0 A0 (PiSSA). Raises ValueError for a start that changes
    the base in another way, and for one that is not known."""
    value = config.get("init_lora_weights")
    if value is None or type(value) is bool:
        return False
    start = value.lower() if isinstance(value, str) else ""
    if start.startswith(CHANGES_BASE):
        raise ValueError(f"init_lora_weights is {shown(value)}: PEFT changes the base when it loads this file, in a "
                         f"way that the file does not hold, so its A and B mean nothing on the base as it is. Convert "
                         f"the adapter in PEFT, by save_pretrained(..., path_initial_model_for_weight_conversion=...)")
    if start != "pissa" and start not in HARMLESS:
        raise ValueError(f"init_lora_weights is {shown(value)}; expected true, false, 'pissa', "
                         f"{', '.join(map(repr, HARMLESS))}")
    return start == "pissa"


def principal(name: str, slot: Slot, r: int, s: Fraction) -> dict[str, numpy.ndarray]:
    """{"name.A0": [r, d_in], "name.B0": [d_out, r]} of the base of the slot called `name`, whatever is plugged there,
    for the factor `s`. Raises ValueError for a base whose rank is lower, and where singular values r and r + 1 are the
    same in float32, so that the file does not say which part of the base PEFT takes away."""
    weight = to_host(slot.base.dense().data).astype("float64")
    A0, B0 = factors_of(name, weight, slot.dtype, r, s)
    rest = numpy.linalg.norm(weight - float(s) * B0 @ A0, 2)
    sizes = abs(float(s)) * (A0 ** 2).sum(axis=1)  # the first r singular values
    if sizes[-1] - rest < _CLOSE * sizes[0]:
        raise ValueError(f"init_lora_weights is 'pissa' with r = {r}, and the singular values {r} and {r + 1} of "
                         f"{name} are both {rest:.6g}; expected different ones: the base does not determine the start")
    return {f"{name}.A0": A0, f"{name}.B0": B0}
