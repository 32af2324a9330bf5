"""The bytes of llama.cpp's blocks, as they stand in a GGUF file.

    q4_0   d       q[0..15] low, q[16..31] high nibble        2 + 16 bytes
    q4_1   d  m    the same                                   4 + 16
    q5_0   d       bit 4 of q[0..31], then the low nibbles    2 + 4 + 16
    q5_1   d  m    the same                                   4 + 4 + 16
    q8_0   d       q[0..31] as int8                           2 + 32

d and m are little-endian float16. A row of the matrix is its blocks one after another. Source: `gguf.quants` of the
`gguf` package.
"""
from __future__ import annotations

import numpy

from minipeft.backend import to_host
from minipeft.quant.ggml import BLOCK, Blocks
from minipeft.quant.groups import group_count
from minipeft.quant.packing import packed, unpacked
from minipeft.quant.scheme import Leaves, Shape

_HALF = BLOCK // 2


def block_bytes(scheme: Blocks) -> int:
    """The bytes of one block of `scheme`."""
    return BLOCK * scheme.bits // 8 + (4 if scheme.has_offset else 2)


def to_blocks(scheme: Blocks, arrays: Leaves, shape: Shape) -> numpy.ndarray:
    """The bytes of a matrix of `shape` [d_out, d_in], of which `scheme` made these arrays: uint8 [d_out, bytes of a
    row], on the host. Raises ValueError for a shape that is not made of whole blocks."""
    blocks = (shape[0], group_count(scheme, shape, BLOCK))
    halves = [to_host(arrays[leaf]).astype("<f2").view("uint8").reshape(*blocks, 2)
              for leaf in ("d", "m") if leaf in arrays]
    if scheme.bits == 8:
        rest = [to_host(arrays["codes"]).view("uint8").reshape(*blocks, BLOCK)]
    else:
        q = to_host(unpacked(arrays["codes"], scheme.bits, shape[1])).reshape(*blocks, BLOCK)
        low = q & 15
        rest = [numpy.packbits(q >> 4, axis=2, bitorder="little")] if scheme.bits == 5 else []
        rest.append(low[..., :_HALF] | (low[..., _HALF:] << 4))
    return numpy.concatenate([*halves, *rest], axis=2).reshape(shape[0], -1)


def from_blocks(scheme: Blocks, data: numpy.ndarray, shape: Shape) -> dict[str, numpy.ndarray]:
    """{leaf: array} of `scheme`, on the host, from the bytes of a matrix of `shape` [d_out, d_in]: data, uint8 [d_out,
    bytes of a row]. Raises ValueError for another shape or dtype, and for a d or an m that is NaN or infinite."""
    blocks = (shape[0], group_count(scheme, shape, BLOCK))
    size = block_bytes(scheme)
    if data.dtype != "uint8" or data.shape != (shape[0], blocks[1] * size):
        raise ValueError(f"{scheme}: the blocks of a matrix {list(shape)} are {data.dtype} {list(data.shape)}; "
                         f"expected uint8 {[shape[0], blocks[1] * size]}")
    parts = data.reshape(*blocks, size)
    out = {leaf: numpy.ascontiguousarray(parts[..., at:at + 2]).view("<f2")[..., 0].astype("float16")
           for leaf, at in (("d", 0), ("m", 2)) if leaf in scheme.leaves(shape, "float32")}
    for leaf, found in out.items():
        if not numpy.isfinite(found).all():
            row, block = numpy.argwhere(~numpy.isfinite(found))[0]
            raise ValueError(f"{scheme}: {leaf} of block {block} in row {row} is {found[row, block]}; expected a "
                             "finite number")
    if scheme.bits == 8:
        return {"codes": parts[..., 2:].copy().view("int8").reshape(shape), **out}
    nibbles = parts[..., -_HALF:]
    q = numpy.concatenate([nibbles & 15, nibbles >> 4], axis=2)
    if scheme.bits == 5:
        q |= numpy.unpackbits(parts[..., -_HALF - 4:-_HALF], axis=2, bitorder="little") << 4
    return {"codes": packed(q.reshape(shape), scheme.bits), **out}
