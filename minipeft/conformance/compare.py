"""Compares a port's run (MINE) with a reference run (REF), tensor by tensor, and names the first one that differs.

    rho(X) = max |MINE - REF| / tau          X agrees iff rho <= 1
    tau    = u (8 noise + noise*) + eta      u: unit roundoff of the dtype that MINE computed in, plus that of REF's

noise: measured by `trace` for each row of X, at the unit roundoff of that dtype (of float32 for float64). noise*: the
largest noise of the tensor; a row in which REF cancels exactly, such as the gradient of the only key that a query sees,
need not cancel in another order of summation. eta: the error by underflow. 8: a margin, since noise is the worst of 8
samples, and MINE is none of them. Integers must be equal. Axes of length 1 do not matter: [] and [1] are one shape.

Tensors are compared in REF's order of evaluation: the forward pass, then the gradients of the backward pass. The first
difference is nearest to the cause; everything after it inherits the error. So the verdict names the first tensor that
differs, the last one before it that agrees, and a known pattern if MINE has one: transposed, a constant multiple, rows
in another order, one vector added to each row (`likeness.py`). If the first difference is a wrong shape or a number
that is not finite, the pattern is also given for the first tensor whose numbers are wrong.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import Any, Mapping, Sequence

import numpy

from minipeft.conformance.arithmetic import DTYPES, UNIT, arithmetic
from minipeft.conformance.comparison import Comparison, Held
from minipeft.conformance.likeness import likeness
from minipeft.conformance.trace import FORMAT, NOISE
from minipeft.files import read_dtypes, read_tensors

_MARGIN = 8


def compare(mine: str | os.PathLike, ref: str | os.PathLike, *, dtype: str | None = None,
            partial: bool = False) -> Comparison:
    """Compare the safetensors file `mine`, which holds {name: tensor} under the names of `trace`, with the trace `ref`.

    dtype: in which MINE was computed; None takes the coarsest dtype of its floating-point tensors. partial: whether
    MINE may leave tensors out. Raises ValueError for a damaged file, a REF that is not a trace or has no noise, and an
    unknown dtype."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    theirs, metadata = read_tensors(ref)
    order = _order(theirs, metadata, ref)
    ours, _ = read_tensors(mine)
    stored = {kind for name, kind in read_dtypes(mine).items() if name in theirs and kind in UNIT}
    dtype = dtype or max(stored, key=lambda kind: UNIT[kind], default="float32")
    u = UNIT[dtype] + UNIT[metadata["dtype"]]
    floats = {name for name in order if theirs[name].dtype.kind == "f"}
    held = []
    for name in order:
        if name in ours:
            tau = _tau(theirs, name, u, dtype) if name in floats else None
            held.append(_held(name, _fitted(ours[name], theirs[name]), theirs[name], tau))
        elif name in floats:  # integer inputs may be left out: MINE was given them
            held.append(Held(name, "missing", float("inf")))
    off = [h for h in held if h.kind not in ("within", "missing")]
    in_numbers = [h for h in off if h.kind == "off" and h.name in floats]
    for h in {*off[:1], *in_numbers[:1]}:
        if h.name in floats:
            words = likeness(_fitted(ours[h.name], theirs[h.name]), theirs[h.name], _tau(theirs, h.name, u, dtype),
                             _sizes(metadata))
            held[held.index(h)] = dataclasses.replace(h, looks_like=words)
    return Comparison(tuple(held), tuple(name for name in ours if name not in theirs), dtype, partial)


def _fitted(got: numpy.ndarray, want: numpy.ndarray) -> numpy.ndarray:
    """`got` in the shape of `want`, if their shapes differ only in axes of length 1."""
    mine, theirs = ([n for n in x.shape if n != 1] for x in (got, want))
    return got.reshape(want.shape) if mine == theirs else got


def _order(tensors: Mapping[str, numpy.ndarray], metadata: Mapping[str, str], path: Any) -> list[str]:
    """REF's names in order, after a check of everything in the file that the comparison relies on."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: metadata format is {metadata.get('format')!r}; expected {FORMAT!r}: the second "
                         f"file is the reference, as minipeft.trace writes it")
    try:
        order = json.loads(metadata.get("order", ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the metadata's order is not valid JSON: {error}") from None
    if not isinstance(order, list) or not all(isinstance(name, str) and name in tensors for name in order) \
            or len(set(order)) != len(order) or not all(name.isprintable() for name in order):
        raise ValueError(f"{path}: the metadata's order is not a list of names in the file, each once and printable")
    if metadata.get("dtype") not in DTYPES:
        raise ValueError(f"{path}: the metadata's dtype is {metadata.get('dtype')!r}; expected one of "
                         f"{', '.join(DTYPES)}")
    floats = [name for name in order if tensors[name].dtype.kind == "f"]
    if not any(NOISE["float32"] + name in tensors for name in floats):
        raise ValueError(f"{path} holds no noise: it was traced with samples=0, so no bound can be derived from it")
    for name in floats:
        for noise in (tensors.get(prefix + name) for prefix in NOISE.values()):
            if noise is None or noise.shape != tensors[name].shape[:-1] or noise.dtype.kind != "f" \
                    or not (numpy.isfinite(noise).all() and (noise >= 0).all()):
                raise ValueError(f"{path}: the noise of {name} is not a number >= 0 for each row of it")
        if not numpy.isfinite(tensors[name]).all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite")
    return order


def _tau(ref: Mapping[str, numpy.ndarray], name: str, u: float, dtype: str) -> numpy.ndarray:
    """The bound, in the shape of ref[name]."""
    want, most = ref[name], ref[NOISE.get(dtype, NOISE["float32"]) + name].astype(numpy.float64)
    bound = u * (_MARGIN * most + most.max(initial=0.0)) + arithmetic(dtype).eta
    return numpy.broadcast_to(bound[..., None] if want.ndim else bound, want.shape)


def _held(name: str, got: numpy.ndarray, want: numpy.ndarray, tau: numpy.ndarray | None) -> Held:
    if got.shape != want.shape:
        return Held(name, "shape", float("inf"), f"has shape {list(got.shape)}; expected {list(want.shape)}")
    if not numpy.isfinite(got).all():
        at = _index(numpy.argmin(numpy.isfinite(got)), got)
        words = f"holds {got[at]} at {list(at)}, where REF has {_number(want[at])}"
        return Held(name, "not finite", float("inf"), words, at)
    if want.size == 0:
        return Held(name, "within", 0.0)
    bound = numpy.zeros(want.shape) if tau is None else tau
    with numpy.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if tau is None:  # no difference of floats, which do not hold every integer
            ratio = numpy.where(got == want, 0.0, numpy.inf)
        else:
            error = abs(got.astype(numpy.float64) - want)
            ratio = numpy.where(error == 0, 0.0, error / bound)
    at = _index(ratio.argmax(), ratio)
    numbers = float(ratio[at]), at, float(got[at]), float(want[at]), float(bound[at])
    if numbers[0] <= 1:
        return Held(name, "within", numbers[0], "", *numbers[1:])
    words = (f"rho {numbers[0]:.2g}, worst at {list(at)}: got {_number(got[at])}, want "
             f"{_number(want[at])}, allowed {bound[at]:.2g}; {_extent(ratio > 1)}")
    return Held(name, "off", numbers[0], words, *numbers[1:])


def _number(x: Any) -> str:
    return f"{x:.6g}" if x.dtype.kind == "f" else str(x)


def _index(flat: Any, array: numpy.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in numpy.unravel_index(int(flat), array.shape))


def _extent(off: numpy.ndarray) -> str:
    """How many elements are wrong, and the smallest box that holds them if that is not the whole tensor."""
    count = f"{int(off.sum())} of {off.size} numbers wrong"
    if off.ndim == 0:
        return count
    box = [(int(i.min()), int(i.max()) + 1) for i in numpy.nonzero(off)]
    if all(end - start == size for (start, end), size in zip(box, off.shape)):
        return count
    return f"{count}, all in [{', '.join(str(a) if b - a == 1 else f'{a}:{b}' for a, b in box)}]"


def _sizes(metadata: Mapping[str, str]) -> dict[str, int]:
    """The sizes in the trace's model configuration: a constant factor may come from one of them."""
    try:
        config = json.loads(metadata.get("config", "null"))
    except (ValueError, RecursionError):
        return {}
    return {name: size for name, size in config.items() if type(size) is int and 1 < size < 2 ** 53} \
        if isinstance(config, dict) else {}


_EPILOG = """\
REF is written by minipeft.trace(model, batch, "ref.safetensors") with a float64 model. MINE is a safetensors file that
your port writes: the tensors of its run on the same weights and the same batch, under REF's names. X is the output of
the part of the model called X, and grad/X is the gradient of the loss with respect to it; the docstring of
minipeft.conformance.trace has the table of names. In PyTorch, for example, put a forward hook on every module that
stores its output, and call retain_grad() on the output.

Start with few tensors and --partial: first logits and loss, then the outputs of the blocks, then the tensors inside the
first block that differs. Run your port in float32 first, without dropout; try half precision later.

rho is the worst error divided by the largest error that rounding can explain: up to 1 nothing is wrong, around 1e5 it
is a bug.

exit codes: 0 everything agrees, 1 something differs or is missing, 2 wrong usage or a file that cannot be read"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command `compare MINE REF` with the arguments `argv`; None takes those of the process. Returns the exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m minipeft.conformance compare", epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compare a port's run with a reference run, tensor by tensor, and name the first tensor that "
                    "differs.")
    parser.add_argument("mine", metavar="MINE", help="your port's tensors (.safetensors)")
    parser.add_argument("ref", metavar="REF", help="the reference: a file written by minipeft.trace")
    parser.add_argument("--dtype", choices=DTYPES, help="the dtype in which MINE was computed, if it is coarser than "
                        "the one it is stored in (bfloat16 values in a float32 file); default: the coarsest in MINE")
    parser.add_argument("--partial", action="store_true", help="MINE may leave tensors out")
    parser.add_argument("--all", action="store_true", help="print every tensor with its rho, in order")
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        result = compare(options.mine, options.ref, dtype=options.dtype, partial=options.partial)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.all:
        print("\n".join(f"{h.kind:>10}  {h}" for h in result.held))
    print(result)
    return 0 if result.holds else 1
