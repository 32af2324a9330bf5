"""The outcome of comparing two runs: every tensor, the first that differs, and the verdict in words."""
from __future__ import annotations

import dataclasses
from typing import Iterator, Sequence

from minipeft.conformance.recording import GRAD

_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Held:
    """The comparison of one tensor.

    kind: "within" (it agrees), "off" (its numbers are wrong), "shape", "not finite" or "missing". rho: worst error over
    bound; infinite where no error can be computed. words: the difference, or "". where, got, want, tau: index, both
    values and bound of the worst element. looks_like: how MINE differs from REF if that is a known pattern, or ""."""

    name: str
    kind: str
    rho: float
    words: str = ""
    where: tuple[int, ...] = ()
    got: float = 0.0
    want: float = 0.0
    tau: float = 0.0
    looks_like: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.words}" if self.words else f"{self.name}: rho {self.rho:.2g}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The comparison of two runs.

    held: every tensor of REF in its order; `looks_like` is filled in for the first that differs and for the first whose
    numbers are wrong. extra: names in MINE that REF lacks. dtype: in which MINE was computed. partial: whether MINE may
    leave tensors out."""

    held: tuple[Held, ...]
    extra: tuple[str, ...]
    dtype: str
    partial: bool

    @property
    def compared(self) -> list[Held]:
        """The tensors that both files hold."""
        return [h for h in self.held if h.kind != "missing"]

    @property
    def off(self) -> list[Held]:
        """The tensors that differ, in order of evaluation; the first is nearest to the cause."""
        return [h for h in self.compared if h.kind != "within"]

    @property
    def missing(self) -> list[str]:
        """The names of REF's floating-point tensors that MINE lacks."""
        return [h.name for h in self.held if h.kind == "missing"]

    @property
    def first(self) -> Held | None:
        """The first tensor that differs."""
        return self.off[0] if self.off else None

    @property
    def looks_like(self) -> str:
        """The pattern of the first tensor that differs, in words, or ""."""
        return self.first.looks_like if self.first else ""

    @property
    def holds(self) -> bool:
        """Whether something was compared, all of it agrees, and no tensor is missing that must be there."""
        return bool(self.compared) and not self.off and (self.partial or not self.missing)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        n = len(self.compared)
        yield (f"{n} of {len(self.held)} tensors compared as {self.dtype}: {n - len(self.off)} agree, "
               f"{len(self.off)} differ")
        if self.missing:
            yield f"missing in MINE{'' if self.partial else ' (--partial allows it)'}: {_listed(self.missing)}"
        if self.extra:
            yield f"not in REF, ignored: {_listed(self.extra)}"
        if self.first is None:
            worst = max(self.compared, key=lambda h: h.rho, default=None)
            if worst is None:
                yield "nothing was compared: MINE holds no tensor under a name of REF"
            else:
                yield f"{'everything' if self.holds else 'everything that was compared'} agrees; largest rho: {worst}"
            return
        yield f"first difference: {self.first}"
        if self.looks_like:
            yield f"looks like: {self.looks_like}"
        yield self._verdict(self.first)
        if self.off[1:]:
            yield "differences after it (most likely only because of it):"
            yield from (f"    {h}" for h in self.off[1:_SHOWN])
            if len(self.off) > _SHOWN:
                yield f"    and {len(self.off) - _SHOWN} more"
            yield from (f"{h.name} looks like: {h.looks_like}" for h in self.off[1:] if h.looks_like)

    def _verdict(self, first: Held) -> str:
        before = self.compared[:self.compared.index(first)]
        names = [h.name for h in self.held]
        unseen = [h.name for h in self.held[:names.index(first.name)] if h.kind == "missing"]
        hidden = (f" ({len(unseen)} before it missing in MINE, {unseen[-1]} the last of them: write them to narrow it "
                  f"down)" if unseen else "")
        if not before:
            return f"nothing before it was compared{hidden}: look at the inputs, the weights and {first.name} itself"
        stretch = f"look at the code between {before[-1].name} and {first.name}"
        if first.name.startswith(GRAD) and not any(h.name.startswith(GRAD) for h in before):
            return (f"all {len(before)} tensors of the forward pass agree, those of the backward pass do not{hidden}: "
                    f"{stretch}")
        return f"all {len(before)} before it agree{hidden}: {stretch}"


def _listed(names: Sequence[str]) -> str:
    """The first names, comma-separated. They come from an untrusted file, so unprintable ones are escaped."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:_SHOWN]]
    return f"{', '.join(shown)}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''}"
