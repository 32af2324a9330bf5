"""An update of many arrays that is made whole, whatever interrupts it.

Python may raise KeyboardInterrupt at any line, so an update in place can stop between two arrays. `Update` therefore
records how far it has come. It updates one block of numbers at a time, in two phases with one assignment between them:

    keep    copy parameter and moments; if stopped here, nothing has changed, and they are copied again
    move    update them in place; if stopped here, they are restored from the copies, and updated again

So `run` may be called again at any time, and continues to the end. `to_its_end` does that, and raises the exception
afterwards. A block is small enough for all its passes to stay in the processor's cache, which is faster than making
each pass over a whole array. The values do not depend on the blocks, because every operation is elementwise.
"""
from __future__ import annotations

from typing import Any, Callable, NamedTuple

import numpy

from minipeft.backend import Array, namespace, xp

BLOCK = 1 << 16  # numbers in a block: a quarter of a megabyte in float32


class Rates(NamedTuple):
    """The numbers of one parameter's AdamW step. scale: the factor on the gradient; root: sqrt(1 - b2^t); rate:
    lr / (1 - b1^t); shrink: 1 - lr weight_decay, or None without weight decay."""

    b1: float
    b2: float
    scale: float
    root: float
    eps: float
    rate: float
    shrink: float | None


class Piece(NamedTuple):
    """One parameter's part of an update: parameter p, moments m and v and gradient g, of one shape. block: how many
    rows are updated at a time (0: the whole arrays). work: the dtype of everything computed from the gradient."""

    p: Array
    m: Array
    v: Array
    g: Array
    rates: Rates
    block: int
    work: Any


def piece(p: Array, m: Array, v: Array, g: Array, rates: Rates) -> Piece:
    """The Piece of a parameter p, its moments m and v, and its gradient g, all of the same shape. On NumPy a large
    array is updated in blocks: of the flat array if all four arrays are contiguous, otherwise of rows. Elsewhere it is
    one block."""
    work = g.dtype if g.dtype.kind == "f" else (g * 0.5).dtype
    if type(p) is not numpy.ndarray or p.size <= BLOCK:
        return Piece(p, m, v, g, rates, 0, work)
    if all(array.flags.c_contiguous for array in (p, m, v, g)):
        p, m, v, g = (array.reshape(-1) for array in (p, m, v, g))
    return Piece(p, m, v, g, rates, max(1, BLOCK * len(p) // p.size), work)


class Update:
    """AdamW's step over `pieces`. after: called when all of them are updated; it must allow a second call."""

    def __init__(self, pieces: list[Piece], after: Callable[[], None]):
        self._pieces, self._after = pieces, after
        self._scratch: dict[Any, list[Array]] = {}
        sizes: dict[Any, int] = {}
        for one in pieces:  # everything is allocated before anything changes
            size = one.block * (one.p.size // len(one.p)) if one.block else one.p.size
            sizes[one.p.dtype, one.work] = max(size, sizes.get((one.p.dtype, one.work), 0))
        for (dtype, work), size in sizes.items():
            self._scratch[dtype, work] = [xp.empty(size, dtype=d) for d in (dtype, dtype, dtype, work, work)]
        self._at = (0, 0, False)  # piece, row, whether the block there is copied

    def run(self) -> None:
        """Continue to the end. NumPy's warnings are off, because a program that turns them into exceptions would be
        stopped in the middle of a step."""
        np = namespace()  # looked up once
        with numpy.errstate(all="ignore"):
            while self._at[0] < len(self._pieces):
                number, start, kept = self._at
                one = self._pieces[number]
                p, m, v, g, rates, block, dtype = one
                if block:
                    p, m, v, g = (array[start:start + block] for array in one[:4])
                old_p, old_m, old_v, work, scaled = [
                    array[:p.size] if p.ndim == 1 else array[:p.size].reshape(p.shape)
                    for array in self._scratch[p.dtype, dtype]]
                if kept:  # an interrupt came while they were updated
                    p[...], m[...], v[...] = old_p, old_m, old_v
                else:
                    old_p[...], old_m[...], old_v[...] = p, m, v
                    self._at = (number, start, True)
                _move(np, p, m, v, g, rates, work, scaled)
                start += block
                self._at = (number, start, False) if block and start < len(one.p) else (number + 1, 0, False)
        self._after()


def _move(np: Any, p: Array, m: Array, v: Array, g: Array, r: Rates, work: Array, scaled: Array) -> None:
    """The equations of `optim.py`, in place."""
    if r.scale != 1:
        g = np.multiply(g, r.scale, out=scaled)
    np.multiply(g, 1 - r.b1, out=work)
    m *= r.b1
    m += work
    np.multiply(g, g, out=work)
    work *= 1 - r.b2
    v *= r.b2
    v += work
    np.sqrt(v, out=work)
    work /= r.root
    work += r.eps
    np.divide(m, work, out=work)
    work *= r.rate
    if r.shrink is not None:
        p *= r.shrink
    p -= work


def to_its_end(run: Callable[[], Any]) -> None:
    """Call run(), which continues where it stopped when it is called again. After an exception it is called again, and
    only then does the exception propagate. (The call survives a second interrupt, too, but not a third.)"""
    try:
        run()
    except BaseException:
        try:
            run()
        except BaseException:
            run()
        raise
