"""Text as ids: one character is one token, 0 is padding and the start, 1 is the end."""
from __future__ import annotations

import dataclasses
from typing import Iterable, Sequence

Pair = tuple[str, str]          # (prompt, answer)
PAD, EOS = 0, 1


@dataclasses.dataclass(frozen=True)
class Codec:
    """Turns text into ids and back. characters: those that can be spelled; the i-th (from 0) has id i + 2."""

    characters: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ids", {c: i + 2 for i, c in enumerate(self.characters)})

    @property
    def vocab_size(self) -> int:
        """Padding, eos, and the characters."""
        return 2 + len(self.characters)

    def encode(self, text: str) -> list[int]:
        """One id for each character, then eos. Raises KeyError for a character that cannot be spelled."""
        return [self._ids[c] for c in text] + [EOS]     # type: ignore[attr-defined]

    def decode(self, ids: Iterable[int]) -> str:
        """The characters up to eos. The start token and padding are skipped."""
        text = []
        for i in ids:
            if i == EOS:
                break
            if i > EOS:
                text.append(self.characters[i - 2])
        return "".join(text)

    def ids_of(self, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
        """(source ids, target ids) of (prompt, answer)."""
        return [(self.encode(prompt), self.encode(answer)) for prompt, answer in pairs]
