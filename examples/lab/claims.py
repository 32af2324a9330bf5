"""The closing checks of an example: claims that its figures bear out, or not."""
from __future__ import annotations

import math
from typing import Sequence

from rich.console import Console

Claim = tuple[str, bool]


def failures(claims: Sequence[Claim], console: Console) -> list[str]:
    """Print every claim with "holds" or "FAILS"; return those that fail."""
    for claim, holds in claims:
        console.print(f"  [green]holds[/] {claim}" if holds else f"  [red]FAILS[/] {claim}")
    return [claim for claim, holds in claims if not holds]


def standard_error(percents: Sequence[float], asked: int) -> float:
    """Of the difference of two percentages, or of one, each a share of `asked` words: sqrt(sum p (100 - p) / n).

    A share of 0 or of n words is taken for one of 1 or n - 1, so that no error is 0. Two models asked the same words
    differ by less than this, since what is hard for one is hard for the other: a margin of it is a careful one."""
    least = 100 / asked
    return math.sqrt(sum(p * (100 - p) / asked for p in (min(max(p, least), 100 - least) for p in percents)))
