"""Small integers side by side in bytes.

    packed(codes, bits)         [n, d] -> [n, ceil(d bits / 8)] bytes, the first code in the lowest bits
    unpacked(data, bits, d)     and back
"""
from __future__ import annotations

import numpy

from minipeft.backend import Array, xp


def packed(codes: numpy.ndarray, bits: int) -> numpy.ndarray:
    """codes [n, d], uint8 below 2^bits -> bytes [n, ceil(d bits / 8)], uint8; the rest of the last byte is 0."""
    single = (codes[..., None] >> numpy.arange(bits, dtype="uint8")) & 1                       # [n, d, bits]
    return numpy.packbits(single.reshape(len(codes), -1), axis=1, bitorder="little")


def unpacked(data: Array, bits: int, d: int) -> Array:
    """data: bytes [n, ceil(d bits / 8)] -> codes [n, d], uint8."""
    if bits == 8:
        return data
    if bits in (2, 4):  # whole codes in a byte
        each = xp.stack([(data >> shift) & (2 ** bits - 1) for shift in range(0, 8, bits)], axis=-1)
        return each.reshape(len(data), -1)[:, :d]
    single = xp.unpackbits(data.reshape(-1), bitorder="little").reshape(len(data), -1)[:, :d * bits]
    weights = xp.asarray([2 ** i for i in range(bits)], dtype="uint8")
    return (single.reshape(len(data), d, bits) * weights).sum(axis=-1, dtype="uint8")
