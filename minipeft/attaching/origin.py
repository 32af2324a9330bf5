"""The base from which a base was quantized, so that an adapter can tell relatives from strangers.

    original W  --quantize-->  base W~        origin(W~) = (fingerprint of W, "26 matrices in int4, groups of 32")

    an adapter of W on W~, one of W~ on W, one of W~ on another quantization of W      a warning
    an adapter of anything else                                                       an error

A change that was learned on W~ makes up for the error of W~ as well (Dettmers et al., 2023, arXiv:2305.14314, sec. 4).
On W that error is absent, and another quantization has another error. So the outputs of such an adapter there are close
to those in training, but not the same. Only an evaluation can say whether they are good enough.

A fingerprint says which base an origin belongs to (`trained_on.origin_of`). So a base that is trained or replaced after
it was quantized has none.
"""
from __future__ import annotations

import dataclasses
from typing import Any

from minipeft.checks import shown


@dataclasses.dataclass(frozen=True)
class Origin:
    """base: the fingerprint of the base before it was quantized. quantization: in words, such
    as "26 matrices in int4, groups of 32"."""

    base: str
    quantization: str


def are_related(there: Any, here: Any) -> bool:
    """Whether two records `there` and `here`, with attributes base and origin, are of one base before quantization."""
    return there.base is not None and _root(there) == _root(here)


def across(there: Any, here: Any) -> str:
    """A warning in words, for an adapter that was trained on the base `there` and is loaded on its relative `here`.
    there, here: as in `are_related`."""
    now = _said(here)
    if there.origin is None:
        gap = f"trained on the original of this base, which is quantized here ({now})"
    elif here.origin is None:
        gap = f"trained on this base quantized ({_said(there)}), and here it is not quantized"
    elif _said(there) != now:
        gap = f"trained on another quantization of the same original ({_said(there)}; here: {now})"
    else:
        gap = f"trained on the same original quantized to other codes or scales, as in another dtype ({now})"
    return f"{gap}. The weights differ by the error of quantization, so it computes something else than in training: " \
           f"evaluate it here, or train it a little more"


def _root(record: Any) -> str:
    return record.base if record.origin is None else record.origin.base


def _said(record: Any) -> str:
    return "" if record.origin is None else shown(record.origin.quantization)
