"""Blocks of neighboring numbers, each divided by its largest: from numbers to 4-bit codes and scales.

    absmax_b = max |w| over block b           float32
    y = w (1 / absmax_b)                      a float32 reciprocal, then a float32 product
    code = level number of y                  `codebooks.py`

Blocks lie in the flat, row-major array. They run across the ends of rows, and the last one may be shorter. Dettmers et
al., 2023, arXiv:2305.14314, sec. 2. The rounding is that of bitsandbytes on a CPU, whose bytes these are:

* The last block, if it is shorter, is divided by its absmax, without a reciprocal.
* A block of zeros has absmax 0 and the codes of 0, which are 7 in NF4 and 0 in FP4. CUDA's kernel computes 0 * (1/0)
  there, which is NaN, and writes code 0. Both mean zeros. The absmax of a shorter last block is at least 1e-38, also
  where its numbers are zero or smaller than that.
* If the number of codes is odd, the last low nibble is the code of 0.
* FP4 has two zeros. A positive number that is nearest to zero gets code 8, and a negative one code 0. CUDA's kernel
  exchanges the two, because it handles the sign separately and compares |y|. Its threshold 0.583333 is 3.6e-7 below the
  midpoint.

CUDA's kernel is compiled with an approximate reciprocal, so its codes of numbers next to a threshold may differ from
these. The numbers that given codes stand for are the same everywhere.

One departure: in a full block whose absmax is not 0 and below 1e-38, bitsandbytes divides by 1e-38, and most numbers
become zeros. Here they are divided by their absmax, so that no error is larger than the levels allow.
"""
from __future__ import annotations

import numpy

from minipeft.backend import Array, xp
from minipeft.quant.codebooks import Levels, packed_codes

TINY = numpy.float32(1e-38)  # the least divisor
CHUNK = 2 ** 15              # numbers at a time, so that sixteen passes over them stay in the cache


def encoded(flat: numpy.ndarray, blocksize: int, levels: Levels) -> tuple[numpy.ndarray, numpy.ndarray]:
    """flat [n], floating-point numbers -> codes [ceil(n / 2)], uint8, and absmax [ceil(n / blocksize)], float32.

    blocksize: numbers in a block. Raises ValueError for numbers that are not finite in float32."""
    n = len(flat)
    packed = numpy.empty(-(-n // 2), dtype="uint8")
    absmax = numpy.empty(-(-n // blocksize), dtype="float32")
    step = 2 * blocksize * max(1, CHUNK // (2 * blocksize))  # whole blocks and whole bytes
    for start in range(0, n, step):
        with numpy.errstate(over="ignore"):  # what does not fit into float32 is found below
            part = flat[start:start + step].astype("float32", copy=False)
        y, scales = _divided(part, blocksize, flat, start)
        absmax[start // blocksize:start // blocksize + len(scales)] = scales
        packed[start // 2:start // 2 + -(-len(part) // 2)] = packed_codes(y, levels)
    return packed, absmax


def _divided(x: numpy.ndarray, blocksize: int, flat: numpy.ndarray, start: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """y and absmax of x [n]; y ends with a 0 more if n is odd."""
    whole, n = len(x) // blocksize * blocksize, len(x)
    y, absmax = numpy.zeros(n + n % 2, dtype="float32"), numpy.empty(-(-n // blocksize), dtype="float32")
    blocks, rest = x[:whole].reshape(-1, blocksize), x[whole:]
    full = absmax[:len(blocks)]
    # Floats without a sign are ordered like their bits, NaN last, and the maximum of integers takes half the time.
    full[:] = (blocks.view("int32") & 0x7FFFFFFF).max(axis=1).view("float32")
    if len(rest):
        absmax[-1] = numpy.maximum(abs(rest).max(), TINY)
    if not numpy.isfinite(absmax).all():
        at = start + int(numpy.flatnonzero(~numpy.isfinite(x))[0])
        raise ValueError(f"the number at position {at} is {flat[at]}; expected finite numbers, of which float32 can "
                         f"hold those below {numpy.finfo('float32').max:.2g}")
    scaled = y[:whole].reshape(-1, blocksize)
    numpy.multiply(blocks, (1 / numpy.maximum(full, TINY))[:, None], out=scaled)
    small = (full > 0) & (full < TINY)
    if small.any():
        scaled[small] = blocks[small] / full[small, None]
    if len(rest):
        numpy.divide(rest, absmax[-1], out=y[whole:n])
    return y, absmax


def times_absmax(values: Array, absmax: Array, skipped: int, blocksize: int, out: Array) -> None:
    """Write values * absmax of their blocks to `out`. values, out: [n], neighbors. absmax: [blocks]. skipped: how many
    numbers of the first block lie before them. blocksize: numbers in a block."""
    head = min(-skipped % blocksize, len(values))          # the rest of a block that began earlier
    whole = (len(values) - head) // blocksize
    tail = head + whole * blocksize                        # where a block begins that ends later
    if head:
        xp.multiply(values[:head], absmax[:1], out=out[:head])
        absmax = absmax[1:]
    if whole:
        xp.multiply(values[head:tail].reshape(whole, blocksize), absmax[:whole, None],
                    out=out[head:tail].reshape(whole, blocksize))
    if tail < len(values):
        xp.multiply(values[tail:], absmax[whole:], out=out[tail:])
