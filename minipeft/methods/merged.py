"""LoRA on some of several projections that one matrix holds side by side.

    W = W0 + s [B_1 A_1; 0; B_3 A_3]        enable = (True, False, True);  loralib's MergedLinear(enable_lora=...)

    W0 [d_out, d_in] holds n = len(enable) projections, such as q, k and v, each [d_out / n, d_in]
    A [k r, d_in] and B [k d_out / n, r] hold the A_i [r, d_in] and B_i [d_out / n, r] of the k enabled ones, in order

One product B A over the whole matrix would tie the projections together: they would share A, and the rank.
"""
from __future__ import annotations

from fractions import Fraction
from typing import Any

from minipeft.backend import xp
from minipeft.checks import shown
from minipeft.engine.ops import concat, dropout, linear
from minipeft.engine.tensor import Tensor
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Parameter, Reparam


class MergedLowRank(Reparam):
    """W0 + s [B_1 A_1; ..; B_n A_n], without the terms that are not enabled."""

    A: Parameter
    B: Parameter
    scale: Fraction
    p: float
    enable: tuple[bool, ...]
    strength = "scale"

    def dense(self) -> Tensor:
        (d_out, d_in), n = self.shape, len(self.enable)
        changes = [B @ A for A, B in zip(_split(self.A, self.B.shape[1]), self._Bs())]        # [d_out / n, d_in] each
        return self.base.dense() + self.scale * self._laid(changes, (d_out // n, d_in), axis=0)

    def project(self, x: Any, rng: Any = None) -> Tensor:
        """x W^T, never forming a B_i A_i.   drop(x) A^T [.., k r] holds the drop(x) A_i^T, each then times B_i^T."""
        y, r = self.base.project(x, rng), self.B.shape[1]
        narrow = linear(dropout(x, self.p, rng), self.A)
        changes = [linear(narrow[..., i * r:(i + 1) * r], B) for i, B in enumerate(self._Bs())]  # [.., d_out / n] each
        return y + self.scale * self._laid(changes, (*y.shape[:-1], y.shape[-1] // len(self.enable)), axis=-1)

    @property
    def drops(self) -> bool:
        return self.p > 0 or self.base.drops

    def _Bs(self) -> list[Tensor]:
        return _split(self.B, self.B.shape[0] // sum(self.enable))

    def _laid(self, changes: list[Tensor], shape: tuple, axis: int) -> Tensor:
        """The changes of the enabled projections, in order, with zeros of this shape for the others between them."""
        waiting, zero = iter(changes), xp.zeros(shape, dtype=self.dtype)
        return concat(*(next(waiting) if on else zero for on in self.enable), axis=axis)


def _split(array: Tensor, rows: int) -> list[Tensor]:
    return [array[at:at + rows] for at in range(0, array.shape[0], rows)]


def chooses(enable: Any) -> bool:
    """Whether `enable` is None, or a tuple of booleans, one of them true."""
    return enable is None or isinstance(enable, tuple) and any(enable) and all(type(on) is bool for on in enable)


def parts(enable: tuple[bool, ...] | None, name: str, slot: Slot) -> tuple[int, int]:
    """(k, n): k of the n equal parts of d_out have factors of their own, at the place `slot` called `name`, for
    `enable` as in `chooses`. (1, 1) for None. Raises ValueError for an embedding table, and where n does not divide
    d_out."""
    if enable is None:
        return 1, 1
    if slot.kind == "embedding":
        raise ValueError(f"LoRA: enable is {shown(enable)}, and {name} is an embedding table; expected a matrix that "
                         f"holds projections side by side")
    if slot.shape[0] % len(enable):
        raise ValueError(f"LoRA: enable is {shown(enable)}, and {name} has d_out = {slot.shape[0]}; expected a number "
                         f"of parts that divides it")
    return sum(enable), len(enable)
