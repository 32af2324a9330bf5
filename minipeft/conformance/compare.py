"""A port's run held against a reference's, tensor by tensor, and the first one that is off named.

    rho(X) = max |MINE - REF| / tau          within iff rho <= 1
    tau    = u (8 noise + noise*) + eta      u the unit roundoff of what MINE computed in (plus REF's own)

noise is what `trace` measured for each row of X at the unit of that dtype (float32's for float64), noise* the largest
of the tensor (a row in which REF cancels exactly, such as the gradient of the only key that a query sees, need not do
so in another order of summation), eta what underflow costs. 8: the margin between the worst of 8 samples and a run
that is none of them. Integers must be equal.

Tensors are looked at in REF's order of evaluation, forward first, then the gradients backwards: what is off first is
nearest to the cause, everything after it inherits the error. So the verdict names it, the last one before it that
agrees, and what MINE looks like, if it looks like anything: transposed, a constant multiple, rows in another order,
one vector added to each row (`likeness.py`).
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import Any, Iterator, Mapping, Sequence

import numpy

from minipeft.conformance.arithmetic import DTYPES, UNIT, arithmetic
from minipeft.conformance.likeness import likeness
from minipeft.conformance.recording import GRAD
from minipeft.conformance.trace import FORMAT, NOISE
from minipeft.files import read_dtypes, read_tensors

_MARGIN = 8
_SHOWN = 5
_FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Held:
    """One tensor. kind: "within", "off", "shape", "not finite" or "missing". rho is infinite where there is none.
    where, got, want, tau: of the element that is worst. share: which part of the elements is off."""

    name: str
    kind: str
    rho: float
    words: str = ""
    where: tuple[int, ...] = ()
    got: float = 0.0
    want: float = 0.0
    tau: float = 0.0

    def __str__(self) -> str:
        return f"{self.name}: {self.words}" if self.words else f"{self.name}: rho {self.rho:.2g}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """held: every tensor of REF in its order. extra: names that REF does not know. partial: whether MINE may leave
    tensors out. looks_like: what the first one off looks like, in words, or ""."""

    held: tuple[Held, ...]
    extra: tuple[str, ...]
    dtype: str
    partial: bool
    looks_like: str

    @property
    def compared(self) -> list[Held]:
        return [h for h in self.held if h.kind != "missing"]

    @property
    def off(self) -> list[Held]:
        """What differs, in order of evaluation; the first is nearest to the cause."""
        return [h for h in self.compared if h.kind != "within"]

    @property
    def missing(self) -> list[str]:
        return [h.name for h in self.held if h.kind == "missing"]

    @property
    def first(self) -> Held | None:
        return self.off[0] if self.off else None

    @property
    def holds(self) -> bool:
        """Something was compared, nothing of it is off, and nothing is left out that may not be."""
        return bool(self.compared) and not self.off and (self.partial or not self.missing)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        n = len(self.compared)
        yield (f"{n} of {len(self.held)} tensors compared as {self.dtype}: {n - len(self.off)} within, "
               f"{len(self.off)} off")
        if self.missing:
            yield f"missing in MINE{'' if self.partial else ' (--partial allows it)'}: {_listed(self.missing)}"
        if self.extra:
            yield f"not in REF, not looked at: {_listed(self.extra)}"
        if self.first is None:
            worst = max(self.compared, key=lambda h: h.rho, default=None)
            if worst is None:
                yield "nothing was compared: MINE holds no tensor under a name of REF"
            else:
                yield f"{'everything' if self.holds else 'what was compared'} agrees; largest rho: {worst}"
            return
        yield f"first off: {self.first}"
        if self.looks_like:
            yield f"looks like: {self.looks_like}"
        yield self._verdict(self.first)
        if self.off[1:]:
            yield "off after it (most likely only because of it):"
            yield from (f"    {h}" for h in self.off[1:_SHOWN])
            if len(self.off) > _SHOWN:
                yield f"    and {len(self.off) - _SHOWN} more"

    def _verdict(self, first: Held) -> str:
        before = self.compared[:self.compared.index(first)]
        names = [h.name for h in self.held]
        unseen = [h.name for h in self.held[:names.index(first.name)] if h.kind == "missing"]
        hidden = (f" ({len(unseen)} before it missing in MINE, {unseen[-1]} the last of them: write them to see closer)"
                  if unseen else "")
        if not before:
            return f"nothing before it was compared{hidden}: look at the inputs, the weights and {first.name} itself"
        stretch = f"look at what stands between {before[-1].name} and {first.name}"
        if first.name.startswith(GRAD) and not any(h.name.startswith(GRAD) for h in before):
            return f"the forward agrees, all {len(before)} tensors of it, the backward does not{hidden}: {stretch}"
        return f"all {len(before)} before it agree{hidden}: {stretch}"


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''}"


def compare(mine: str | os.PathLike, ref: str | os.PathLike, *, dtype: str | None = None,
            partial: bool = False) -> Comparison:
    """Hold the safetensors file `mine`, {name: tensor} as `trace` names them, against the trace `ref`.

    dtype: what MINE computed in; None takes the coarsest of its floating-point tensors. partial: MINE may leave
    tensors out. Raises ValueError for a damaged file, a REF that is no trace or has no noise, and an unknown dtype."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    theirs, metadata = read_tensors(ref)
    order = _order(theirs, metadata, ref)
    ours, _ = read_tensors(mine)
    stored = {kind for name, kind in read_dtypes(mine).items() if name in order and kind in UNIT}
    dtype = dtype or max(stored, key=lambda kind: UNIT[kind], default="float32")
    own = UNIT[metadata["dtype"]]
    held: list[Held] = []
    first = ""
    for name in order:
        want = theirs[name]
        if name not in ours:
            if theirs[name].dtype.kind == "f":  # inputs may be left out: MINE was given them
                held.append(Held(name, "missing", float("inf")))
            continue
        tau = _tau(theirs, name, UNIT[dtype] + own, dtype) if want.dtype.kind == "f" else None
        held.append(_held(name, ours[name], want, tau))
        if held[-1].kind in ("off", "shape") and not first and tau is not None:
            first = likeness(ours[name], want, tau, _sizes(metadata))
        first = first or ("-" if held[-1].kind not in ("within", "missing") else "")
    extra = tuple(name for name in ours if name not in theirs)
    return Comparison(tuple(held), extra, dtype, partial, "" if first == "-" else first)


def _order(tensors: Mapping[str, numpy.ndarray], metadata: Mapping[str, str], path: Any) -> list[str]:
    """REF's names in order, after everything in it that is relied on was checked."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: metadata format is {metadata.get('format')!r}; expected {FORMAT!r}: the second "
                         f"file is the reference, as minipeft.trace writes it")
    try:
        order = json.loads(metadata.get("order", ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the metadata's order is not valid JSON: {error}") from None
    if not isinstance(order, list) or not all(isinstance(name, str) and name in tensors for name in order) \
            or len(set(order)) != len(order):
        raise ValueError(f"{path}: the metadata's order is not a list of the names in the file, each once")
    if metadata.get("dtype") not in _FLOATS:
        raise ValueError(f"{path}: the metadata's dtype is {metadata.get('dtype')!r}; expected one of "
                         f"{', '.join(_FLOATS)}")
    floats = [name for name in order if tensors[name].dtype.kind == "f"]
    if not any(NOISE["float32"] + name in tensors for name in floats):
        raise ValueError(f"{path} holds no noise: it was traced with samples=0, and no bound can be made of that")
    for name in floats:
        for noise in (tensors.get(prefix + name) for prefix in NOISE.values()):
            if noise is None or noise.shape != tensors[name].shape[:-1] or noise.dtype.kind != "f" \
                    or not (numpy.isfinite(noise).all() and (noise >= 0).all()):
                raise ValueError(f"{path}: the noise of {name} is not a number >= 0 for each row of it")
        if not numpy.isfinite(tensors[name]).all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite")
    return order


def _tau(ref: Mapping[str, numpy.ndarray], name: str, u: float, dtype: str) -> numpy.ndarray:
    """The bound, of the shape of ref[name]."""
    want, most = ref[name], ref[NOISE.get(dtype, NOISE["float32"]) + name].astype(numpy.float64)
    bound = u * (_MARGIN * most + most.max(initial=0.0)) + arithmetic(dtype).eta
    return numpy.broadcast_to(bound[..., None] if want.ndim else bound, want.shape)


def _held(name: str, got: numpy.ndarray, want: numpy.ndarray, tau: numpy.ndarray | None) -> Held:
    if got.shape != want.shape:
        return Held(name, "shape", float("inf"), f"has shape {list(got.shape)}; expected {list(want.shape)}")
    if not numpy.isfinite(got).all():
        at = _index(numpy.argmin(numpy.isfinite(got)), got)
        words = f"holds {got[at]} at {list(at)}, where REF has {want[at]:.6g}"
        return Held(name, "not finite", float("inf"), words, at)
    if want.size == 0:
        return Held(name, "within", 0.0)
    error = abs(got.astype(numpy.float64) - want.astype(numpy.float64))
    bound = numpy.zeros(want.shape) if tau is None else tau
    with numpy.errstate(divide="ignore", invalid="ignore"):
        ratio = numpy.where(error == 0, 0.0, error / bound)
    at = _index(ratio.argmax(), ratio)
    numbers = float(ratio[at]), at, float(got[at]), float(want[at]), float(bound[at])
    if numbers[0] <= 1:
        return Held(name, "within", numbers[0], "", *numbers[1:])
    words = (f"rho {numbers[0]:.2g}, worst at {list(at)}: got {got[at]:.6g}, want {want[at]:.6g}, allowed "
             f"{bound[at]:.2g}; {_extent(ratio > 1)}")
    return Held(name, "off", numbers[0], words, *numbers[1:])


def _index(flat: Any, array: numpy.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in numpy.unravel_index(int(flat), array.shape))


def _extent(off: numpy.ndarray) -> str:
    """How many elements are off, and the box that they lie in, where that is not the whole tensor."""
    count = f"{int(off.sum())} of {off.size} numbers off"
    if off.ndim == 0:
        return count
    box = [(int(i.min()), int(i.max()) + 1) for i in numpy.nonzero(off)]
    if all(end - start == size for (start, end), size in zip(box, off.shape)):
        return count
    return f"{count}, all in [{', '.join(str(a) if b - a == 1 else f'{a}:{b}' for a, b in box)}]"


def _sizes(metadata: Mapping[str, str]) -> dict[str, int]:
    """The sizes in the configuration that the trace carries: what a constant factor may come from."""
    try:
        config = json.loads(metadata.get("config", "null"))
    except (ValueError, RecursionError):
        return {}
    return {name: size for name, size in config.items() if type(size) is int and size > 1} \
        if isinstance(config, dict) else {}


_EPILOG = """\
REF is written by minipeft.trace(model, batch, "ref.safetensors") with a float64 model. MINE is a safetensors file that
your port writes: the tensors of its run on the same weights and the same batch, under REF's names (X for the output of
the part called X, grad/X for the gradient of the loss with respect to it; the docstring of
minipeft.conformance.trace has the table). In PyTorch, say: a forward hook on every module that stores its output, and
retain_grad() on it.

Start with few tensors and --partial: logits, loss, then the outputs of the blocks, then what lies within the first
block that is off. Run your port in float32 first, without dropout; half precision comes after.

rho is the worst error over what rounding can explain: below 1 nothing is wrong, around 1e5 it is a bug.

exit codes: 0 all within, 1 something is off or missing, 2 usage, or a file that cannot be read"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command `compare MINE REF`. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m minipeft.conformance compare", epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Hold a port's run against a reference's, tensor by tensor, and name the first one that is off.")
    parser.add_argument("mine", metavar="MINE", help="your port's tensors (.safetensors)")
    parser.add_argument("ref", metavar="REF", help="the trace it is held against")
    parser.add_argument("--dtype", choices=DTYPES, help="what MINE computed in, if it is coarser than what it is "
                        "stored in (bfloat16 values in a float32 file); default: the coarsest dtype in MINE")
    parser.add_argument("--partial", action="store_true", help="MINE may leave tensors out")
    parser.add_argument("--all", action="store_true", help="print every tensor with its rho, in order")
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        result = compare(options.mine, options.ref, dtype=options.dtype, partial=options.partial)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.all:
        print("\n".join(f"{h.kind:>10}  {h}" for h in result.held))
    print(result)
    return 0 if result.holds else 1
