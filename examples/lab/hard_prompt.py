"""A hard prompt: the best text in front of the input, searched character by character. Nothing is trained.

    argmin over texts t of  mean loss(t + word -> answer)       on training pairs

It is the baseline of every soft prompt. A soft prompt may be any vectors; a hard prompt may only be rows of the
embedding table. The search is coordinate descent: at one position after the other it tries every character, and then
leaving the character out. (Shin et al., 2020, arXiv:2010.15980, choose candidates by a gradient. With 59 characters all
of them can be tried.)
"""
from __future__ import annotations

from typing import Any, Sequence

import minipeft
from data.codec import PAD, Codec, Pair


def search(model: Any, pairs: Sequence[Pair], codec: Codec, starts: Sequence[str],
           sweeps: int = 2) -> tuple[str, float]:
    """(the best prefix that was found, its loss).

    pairs: (word, answer). starts: texts, of which the best is improved. sweeps: how often all its positions are tried;
    the search ends earlier when a sweep changes nothing."""
    def loss(prefix: str) -> float:
        batch = minipeft.batch_of([(codec.encode(prefix + word), codec.encode(answer)) for word, answer in pairs], PAD)
        return float(model.loss(**batch).data)

    best = min((loss(start), start) for start in starts)
    for _ in range(sweeps):
        before = best
        for place in reversed(range(len(best[1]))):         # from the right, where leaving one out moves no later turn
            text = best[1]
            tried = [text[:place] + c + text[place + 1:] for c in ("", *codec.characters)]
            best = min(best, *((loss(prefix), prefix) for prefix in tried if prefix != text))
        if best == before:
            break
    return best[1], best[0]
