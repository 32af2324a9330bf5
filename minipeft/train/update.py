"""An update of many arrays that is made whole, whatever interrupts it.

Python may raise KeyboardInterrupt at any line, so an update in place can stop between two arrays. `Update` is a machine
that knows where it is. It moves a block of numbers in two phases, and one assignment lies between them:

    keep    copies of parameter and moments; stopped here, nothing has changed, and they are copied again
    move    parameter and moments in place; stopped here, they are put back from the copies, and moved again

So `run` may be called again at any time, and goes on to the end: `to_its_end` does that, and the exception goes on
afterwards. Blocks are small enough for all their passes to stay in the processor's cache, which is faster than one pass
over a whole array after the other. The values do not depend on the blocks: every operation is elementwise.
"""
from __future__ import annotations

from typing import Any, Callable, NamedTuple

import numpy

from minipeft.backend import Array, namespace, xp

BLOCK = 1 << 16  # numbers: a quarter of a megabyte in float32


class Rates(NamedTuple):
    """The numbers of one parameter's AdamW step. scale: on the gradient; root: sqrt(1 - b2^t); rate: lr / (1 - b1^t);
    shrink: 1 - lr decay, or None without decay."""

    b1: float
    b2: float
    scale: float
    root: float
    eps: float
    rate: float
    shrink: float | None


class Piece(NamedTuple):
    """One parameter's part of an update: four arrays of one shape, of which `block` rows are moved at a time (0: the
    arrays as they are). work: the dtype of what is computed from the gradient."""

    p: Array
    m: Array
    v: Array
    g: Array
    rates: Rates
    block: int
    work: Any


def piece(p: Array, m: Array, v: Array, g: Array, rates: Rates) -> Piece:
    """Blocks on NumPy: of the flat array where all four are contiguous, of rows otherwise. Elsewhere one block."""
    work = g.dtype if g.dtype.kind == "f" else (g * 0.5).dtype
    if type(p) is not numpy.ndarray or p.size <= BLOCK:
        return Piece(p, m, v, g, rates, 0, work)
    if p.flags.c_contiguous and m.flags.c_contiguous and v.flags.c_contiguous and g.flags.c_contiguous:
        return Piece(p.reshape(-1), m.reshape(-1), v.reshape(-1), g.reshape(-1), rates, BLOCK, work)
    return Piece(p, m, v, g, rates, max(1, BLOCK * len(p) // p.size), work)


class Update:
    """AdamW's step over `pieces`; `after` is called when all of them are moved, and must bear to be called again."""

    def __init__(self, pieces: list[Piece], after: Callable[[], None]):
        self._pieces, self._after = pieces, after
        self._scratch: dict[Any, list[Array]] = {}
        sizes: dict[Any, int] = {}
        for one in pieces:  # everything is allocated before anything changes
            size = one.block * (one.p.size // len(one.p)) if one.block else one.p.size
            sizes[one.p.dtype, one.work] = max(size, sizes.get((one.p.dtype, one.work), 0))
        for (dtype, work), size in sizes.items():
            self._scratch[dtype, work] = [xp.empty(size, dtype=d) for d in (dtype, dtype, dtype, work, work)]
        self._at = (0, 0, False)  # piece, row, whether its numbers are kept

    def run(self) -> None:
        """Go on to the end. Overflow is no warning here: it would be an exception for some, in the middle of a step."""
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
                if kept:  # an interrupt came while they were moved
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
    """run(), which goes on where it was when it is called again; at an interrupt it is called again before that goes
    on. (Two more interrupts are borne, a third is not.)"""
    try:
        run()
    except BaseException:
        try:
            run()
        except BaseException:
            run()
        raise
