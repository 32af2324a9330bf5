"""The change that an attachment makes at one slot: as low-rank factors where its equation is a sum, else as a matrix.

    LoRA                d = s B A
    LoRA, pissa         d = s (B A - B0 A0) = s [B, -B0] [A; A0]
    LoRA, enable        d = s [B_1 A_1; 0; B_3 A_3] = s [[B_1, 0]; 0; [0, B_3]] [A_1; A_3]
    QA-LoRA             d[o, i] = k s (B A)[o, i // g] = k s B A', each column of A repeated g times in A'
    other methods       d = f(W0) - W0, dense, over the base W0
"""
from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import numpy

from minipeft.attaching.attachment import Attachment
from minipeft.backend import to_host
from minipeft.methods.lora import LowRank
from minipeft.methods.merged import MergedLowRank
from minipeft.methods.pissa import PrincipalLowRank
from minipeft.methods.qalora import GroupedLowRank
from minipeft.nn.slot import Slot
from minipeft.nn.wide import wide_base, wide_piece


@dataclasses.dataclass(frozen=True)
class Factors:
    """A change d = s B A of a weight.   A [r, d_in], B [d_out, r], on the host, in the weight's dtype; s: exact."""

    A: numpy.ndarray
    B: numpy.ndarray
    s: Fraction

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[0]

    def dense(self) -> numpy.ndarray:
        """s B A [d_out, d_in] in float64."""
        return float(self.s) * (self.B.astype("float64") @ self.A.astype("float64"))

    def stored(self, where: str, dtype: Any) -> "Factors":
        """The same, with A and B rounded to `dtype`. Raises ValueError, naming the place `where`, for NaN and
        overflow."""
        with numpy.errstate(over="ignore"):
            A, B = self.A.astype(dtype), self.B.astype(dtype)
        if not (numpy.isfinite(A).all() and numpy.isfinite(B).all()):
            raise ValueError(f"the factors of the change at {where} are not finite in {dtype}; expected attachments "
                             f"without NaN, and a change that does not overflow")
        return Factors(A, B, self.s)


def factors(attachment: Attachment, slot: Slot) -> Factors | None:
    """The factors of an attachment's change at a slot; None for a method whose change depends on the weight below it,
    or has no factors."""
    piece: Any = attachment.at[slot]
    if type(piece) not in (LowRank, PrincipalLowRank, MergedLowRank, GroupedLowRank):
        return None
    A, B, s = to_host(piece.A.data), to_host(piece.B.data), Fraction(piece.scale)
    if isinstance(piece, PrincipalLowRank):
        A, B = numpy.concatenate([A, to_host(piece.A0.data)]), numpy.concatenate([B, -to_host(piece.B0.data)], axis=1)
    elif isinstance(piece, MergedLowRank):
        B = _in_blocks(B, piece.enable)
    elif isinstance(piece, GroupedLowRank):
        A = numpy.repeat(A, slot.shape[1] // A.shape[1], axis=1)
    return Factors(A, B, s)


def _in_blocks(B: numpy.ndarray, enable: tuple[bool, ...]) -> numpy.ndarray:
    """[B_1; B_3] [k m, r] as [[B_1, 0]; 0; [0, B_3]] [n m, k r], for n parts of which k are enabled."""
    k, r = sum(enable), B.shape[1]
    m = B.shape[0] // k
    laid = numpy.zeros((len(enable) * m, k * r), dtype=B.dtype)
    for i, at in enumerate(part for part, on in enumerate(enable) if on):
        laid[at * m:(at + 1) * m, i * r:(i + 1) * r] = B[i * m:(i + 1) * m]
    return laid


def difference(attachment: Attachment, slot: Slot) -> numpy.ndarray:
    """f(W0) - W0 in float64, [d_out, d_in], of an attachment's piece at a slot, over its base alone."""
    base = wide_base(slot)
    return to_host(wide_piece(attachment.at[slot]).over(base).dense().data - base.data)


def svd_of_product(B: numpy.ndarray, A: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """U [d_out, k], S [k], V^T [k, d_in] of B A, without forming the product.   B [d_out, n], A [n, d_in]; k is the
    smallest of n, d_out and d_in.

    B = Q_B R_B and A^T = Q_A R_A, so that B A = Q_B (R_B R_A^T) Q_A^T, and only the small matrix is decomposed."""
    (q_b, r_b), (q_a, r_a) = numpy.linalg.qr(B), numpy.linalg.qr(A.T)
    u, s, vt = numpy.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vt @ q_a.T
