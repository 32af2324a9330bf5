"""Double quantization: the absmax of each block becomes a byte.

    offset = mean(absmax)                                        one float32 number
    qabsmax, nested_absmax = 8-bit codes of absmax - offset      blocks of 256, levels of the dynamic map
    absmax~ = map[qabsmax] * nested_absmax + offset              two roundings, in float32

Dettmers et al., 2023, arXiv:2305.14314, sec. 3, "Double Quantization". The paper speaks of 8-bit floats; the authors'
code uses the dynamic map (`dynamic_map.py`). A weight then takes 4 + 8/64 + 32/(64 * 256) = 4.127 bits instead of 4.5.

The bytes are those of bitsandbytes on a CPU. Two of its rules are unusual:

* The code is not that of the nearest level. y = z / max |z| is rounded to one of 65,536 equally spaced numbers, and the
  code is the one of that number. CUDA's kernel compares y itself. The two differ in about 0.2 % of the codes, by one.
* The mean is added up in the order of PyTorch on a CPU that adds eight float32 numbers at a time (`_sum`). Beyond
  32,768 blocks PyTorch shares the sum among threads. Its order, and the last bit of its offset, then depend on their
  number.

Where the sum overflows, bitsandbytes has an infinite offset and NaN for weights; here the mean is computed in float64.
"""
from __future__ import annotations

import functools

import numpy

from minipeft.backend import Array, to_device
from minipeft.quant.codebooks import Levels, ascending, thresholds

BLOCK = 256
_LANES = 8
_BINS = 65536


def encoded(absmax: numpy.ndarray, levels: Levels) -> dict[str, numpy.ndarray]:
    """{"qabsmax": [blocks] uint8, "nested_absmax": [ceil(blocks / 256)] float32, "offset": [] float32} of absmax
    [blocks], float32."""
    offset = mean(absmax)
    z = absmax - offset
    starts = numpy.arange(0, len(z), BLOCK)
    nested = numpy.maximum.reduceat(abs(z), starts)
    scale = nested[numpy.arange(len(z)) // BLOCK]
    with numpy.errstate(divide="ignore", over="ignore", invalid="ignore"):
        reciprocal = numpy.float32(1) / scale
        y = numpy.where(numpy.isfinite(reciprocal), z * reciprocal, z / scale)
    codes = numpy.where(scale > 0, _binned(levels)[_bin(numpy.where(scale > 0, y, 0))], 0).astype("uint8")
    return {"qabsmax": codes, "nested_absmax": nested, "offset": numpy.asarray(offset)}


def decoded(qabsmax: Array, nested_absmax: Array, offset: Array, levels: Levels, at: Array) -> Array:
    """absmax~ of the blocks `at`, any shape of integers, float32. qabsmax [blocks], nested_absmax [ceil(blocks / 256)],
    offset []."""
    scaled = to_device(_float32(levels))[qabsmax[at]] * nested_absmax[at // BLOCK]
    return scaled + offset


def mean(x: numpy.ndarray) -> numpy.float32:
    """The mean of x [n], float32, as PyTorch computes it on a CPU in one thread."""
    with numpy.errstate(over="ignore"):
        found = numpy.float32(_sum(x) / numpy.float32(len(x)))
    return found if numpy.isfinite(found) else numpy.float32(x.mean(dtype="float64"))


def _sum(x: numpy.ndarray) -> numpy.float32:
    """The sum of x [n] in PyTorch's order: each of eight lanes adds every eighth number, then the numbers that are left
    over are added, then the lanes."""
    whole = len(x) // _LANES * _LANES
    if not whole:
        return _column_sums(x[:, None])[0]
    total = numpy.float32(0)
    for value in [*x[whole:], *_column_sums(x[:whole].reshape(-1, _LANES))]:
        total = total + value
    return total


def _column_sums(x: numpy.ndarray) -> numpy.ndarray:
    """The sums of the columns of x [n, lanes]: four interleaved sums, which are added in the end.

    Each is a cascade of four levels. Level 0 adds a run of numbers. When a run is full, its sum goes to level 1; when
    level 1 has taken as many runs, its sum goes to level 2, and so on. So the error grows with log n."""
    n = len(x) // 4
    rows = x[:4 * n].reshape(n, 4, x.shape[1])
    power = max(4, (n - 1).bit_length() // 4) if n else 4
    run = 2 ** power
    sums = numpy.zeros((4, 4, x.shape[1]), "float32")                                 # [level, interleaved, lanes]
    for start in range(0, n // run * run, run):
        for row in rows[start:start + run]:
            sums[0] += row
        for level in range(1, 4):
            sums[level] += sums[level - 1]
            sums[level - 1] = 0
            if (start + run) & (run - 1) << level * power:
                break
    for row in rows[n // run * run:]:
        sums[0] += row
    for level in range(1, 4):
        sums[0] += sums[level]
    total = sums[0]
    for row in x[4 * n:]:
        total[0] += row
    for other in total[1:]:
        total[0] += other
    return total[0]


def _bin(y: numpy.ndarray) -> numpy.ndarray:
    """Which of 65,536 equally spaced numbers from -1 to 1 is nearest to y [n]: [n], uint16. In float32."""
    half, one = numpy.float32(0.5), numpy.float32(1)
    return ((numpy.clip(y, -one, one) + one) * half * numpy.float32(_BINS - 1) + half).astype("uint16")


@functools.lru_cache
def _binned(levels: Levels) -> numpy.ndarray:
    """The code of each of the 65,536 numbers: [65536], uint8."""
    grid = numpy.float32(-1) + numpy.float32(2) * numpy.arange(_BINS, dtype="float32") / numpy.float32(_BINS - 1)
    return ascending(levels)[numpy.searchsorted(thresholds(levels), grid, side="left")]


@functools.lru_cache
def _float32(levels: Levels) -> numpy.ndarray:
    return numpy.array(levels, dtype="float32")
