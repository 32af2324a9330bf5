"""Draws live cases with Hypothesis. It draws only sizes and a seed, so that it varies shapes and not digits.

It steers toward larger rho (`hypothesis.target`). Hypothesis does not shrink the cases: `shrink.py` does, since it
knows which axes belong together, and leaves smaller layers.
"""
from __future__ import annotations

from typing import Callable

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.method import Method

MISSING = "drawing cases needs hypothesis: pip install 'minipeft[conformance]'"


def available() -> bool:
    """Whether Hypothesis is installed."""
    try:
        import hypothesis  # noqa: F401
    except ImportError:
        return False
    return True


def search(method: Method, dtype: str, exact: bool, count: int, seed: int,
           check: Callable[[Case], dict[str, float]]) -> None:
    """Calls check(case) for `count` cases of the method, exact or bounded, in this dtype. check returns {label: rho};
    Hypothesis tries to make each of these larger. seed: of the draws."""
    import hypothesis
    from hypothesis import strategies

    ranges = dict(method.sizes)
    low, high = max(a for a, _ in ranges.values()), min(b for _, b in ranges.values())
    free = strategies.fixed_dictionaries({axis: strategies.integers(a, b) for axis, (a, b) in ranges.items()})
    equal = strategies.integers(low, max(low, high)).map(lambda n: dict.fromkeys(ranges, n))
    some = strategies.tuples(free, strategies.integers(low, max(low, high)), strategies.sets(
        strategies.sampled_from(sorted(ranges)))).map(lambda t: {**t[0], **dict.fromkeys(t[2], t[1])})

    @hypothesis.settings(max_examples=count, database=None, deadline=None, derandomize=False,
                         phases=(hypothesis.Phase.generate, hypothesis.Phase.target),
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.seed(seed)
    @hypothesis.given(sizes=free | equal | some, number=strategies.integers(0, 2 ** 32 - 1))
    def run(sizes: dict[str, int], number: int) -> None:
        case = method.draw(numpy.random.default_rng(number), dtype, exact, sizes)
        for label, rho in check(case).items():
            if 0 < rho < float("inf"):
                hypothesis.target(rho, label=label)

    run()
