"""Small integers side by side in bytes.

    packed(codes, bits)         [n, d] -> [n, ceil(d bits / 8)] bytes, the first code in the lowest bits
    unpacked(data, bits, d)     and back; in any dtype, with a number taken off each code

The bits of a row follow each other without a gap, so 8 codes take `bits` bytes. Unpacking looks up several codes at a
time: a word of a few codes is an index into a table of all such words. For 4 bits a byte is a word of two codes, and
the table has 256 rows of two numbers. These can be floating-point numbers, so a decoder needs no conversion.
"""
from __future__ import annotations

import functools
from typing import Any

import numpy

from minipeft.backend import Array, to_device, xp

WORDS = {2: 4, 3: 4, 4: 2, 5: 2}  # {bits: codes in a word}; a word then lies within two neighboring bytes


def packed(codes: numpy.ndarray, bits: int) -> numpy.ndarray:
    """codes [n, d], uint8 below 2^bits -> bytes [n, ceil(d bits / 8)], uint8; the rest of the last byte is 0. bits: 2,
    3, 4, 5 or 8."""
    n, d = codes.shape
    if bits == 8:
        return codes.copy()
    whole = -(-d // 8) * 8
    if whole != d:
        codes = numpy.pad(codes, ((0, 0), (0, whole - d)))
    eights = codes.reshape(n, whole // 8, 8)
    long = eights[..., 0].astype("<u8")  # little-endian: the lowest bits in the first byte
    for i in range(1, 8):
        long |= eights[..., i].astype("<u8") << numpy.uint64(bits * i)
    spread = long.view("uint8").reshape(n, whole // 8, 8)[..., :bits]
    return numpy.ascontiguousarray(spread.reshape(n, whole // 8 * bits)[:, :row_bytes(d, bits)])


def unpacked(data: Array, bits: int, d: int, dtype: Any = "uint8", minus: int = 0) -> Array:
    """data: bytes [n, ceil(d bits / 8)] -> the codes less `minus` [n, d] in `dtype`, in a new array. bits: 2, 3, 4, 5
    or 8."""
    if bits == 8:
        codes = data.astype(dtype)
        if minus:
            codes -= minus
        return codes
    table = to_device(_table(bits, numpy.dtype(dtype), minus))
    each = xp.take(table, _words(data, bits * WORDS[bits]), axis=0)  # [n, words, codes in a word]
    codes = each.reshape(len(data), each.shape[1] * WORDS[bits])
    return codes if codes.shape[1] == d else xp.ascontiguousarray(codes[:, :d])


def row_bytes(d: int, bits: int) -> int:
    """The bytes of d codes of `bits` bits."""
    return -(-d * bits // 8)


@functools.lru_cache(maxsize=None)
def _table(bits: int, dtype: numpy.dtype, minus: int) -> numpy.ndarray:
    """[2^(bits of a word), codes in a word]: the codes of each word, less `minus`."""
    words = numpy.arange(2 ** (bits * WORDS[bits]))[:, None]
    table = ((words >> numpy.arange(WORDS[bits]) * bits) % 2 ** bits - minus).astype(dtype)
    table.flags.writeable = False
    return table


def _words(data: Array, width: int) -> Array:
    """bytes [n, m] -> their words of `width` bits [n, words]; bits after the last byte count as 0."""
    if width == 8:
        return data
    n, size = data.shape
    per, words = (3, 2) if width == 12 else (5, 4)  # so many bytes hold so many words of 12 or of 10 bits
    if size % per:
        data = xp.concatenate([data, xp.zeros((n, per - size % per), "uint8")], axis=1)
    wide = data.reshape(n, -(-size // per), per).astype("uint16")
    out = xp.empty((n, wide.shape[1], words), dtype="uint16")
    for word in range(words):
        first, skip = divmod(word * width, 8)
        out[..., word] = ((wide[..., first] >> skip) | (wide[..., first + 1] << (8 - skip))) & (2 ** width - 1)
    return out.reshape(n, wide.shape[1] * words)
