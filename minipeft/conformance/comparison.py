"""What came of holding one run against another: every tensor, the first that is off, and the verdict in words."""
from __future__ import annotations

import dataclasses
from typing import Iterator, Sequence

from minipeft.conformance.recording import GRAD

_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Held:
    """One tensor. kind: "within", "off", "shape", "not finite" or "missing". rho is infinite where there is none.
    where, got, want, tau: of the element that is worst. looks_like: what MINE looks like beside REF, or ""."""

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
    """held: every tensor of REF in its order; what it looks like is said of the first that is off, and of the first
    whose numbers are. extra: names that REF does not know. partial: whether MINE may leave tensors out."""

    held: tuple[Held, ...]
    extra: tuple[str, ...]
    dtype: str
    partial: bool

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
    def looks_like(self) -> str:
        """What the first one off looks like, in words, or ""."""
        return self.first.looks_like if self.first else ""

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
            yield from (f"{h.name} looks like: {h.looks_like}" for h in self.off[1:] if h.looks_like)

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
    """Names from a file that is not trusted: what does not print is written so that it does."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:_SHOWN]]
    return f"{', '.join(shown)}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''}"
