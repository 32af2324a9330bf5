"""The closing checks of an example: claims, each with whether its numbers bear it out."""
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
    """The standard error of a percentage, or of the difference of two: sqrt(sum p (100 - p) / n), n = asked.

    Each percentage is a share of `asked` words. A share of 0 or n words counts as 1 or n - 1, so that no error is 0.
    Two models that are asked the same words differ by less than this, because the same words are hard for both. So a
    margin of this error is a careful one."""
    least = 100 / asked
    return math.sqrt(sum(p * (100 - p) / asked for p in (min(max(p, least), 100 - least) for p in percents)))
