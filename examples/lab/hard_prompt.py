"""A hard prompt: the best text to put in front of the input, searched character by character. Nothing is trained.

    argmin over texts t of  mean loss(t + word -> answer)       on training pairs

It is the baseline of every soft prompt: a prompt tuned by gradients may be any vectors, this one only rows of the
embedding table. Coordinate descent: at one place after the other, every character is tried in place of the one that
stands there, then leaving it out. (Shin et al., 2020, arXiv:2010.15980, choose candidates by a gradient; with 59
characters they can all be tried.)
"""
from __future__ import annotations

from typing import Any, Sequence

import minipeft
from data.codec import PAD, Codec, Pair


def search(model: Any, pairs: Sequence[Pair], codec: Codec, starts: Sequence[str],
           sweeps: int = 2) -> tuple[str, float]:
    """(the best prefix found, its loss). pairs: (word, answer); starts: texts of which the best is improved, `sweeps`
    times over all its places, or until a sweep changes nothing."""
    def loss(prefix: str) -> float:
        batch = minipeft.batch_of([(codec.encode(prefix + word), codec.encode(answer)) for word, answer in pairs], PAD)
        return float(model.loss(**batch).data)

    best = min((loss(start), start) for start in starts)
    for _ in range(sweeps):
        before = best
        for place in reversed(range(len(best[1]))):         # from the right: leaving one out moves no later place
            text = best[1]
            tried = [text[:place] + c + text[place + 1:] for c in ("", *codec.characters)]
            best = min(best, *((loss(prefix), prefix) for prefix in tried if prefix != text))
        if best == before:
            break
    return best[1], best[0]
