"""The suite runs in parallel, with one BLAS thread in each process, and on the same examples every time.

    pytest                          everything, one process per core
    pytest -m quick                 in about a minute: each test of the library once, on fewer examples
    pytest -n 0 tests/nn            without parallel processes

Hypothesis runs the laws on the same examples every time: a red test is red for everybody.
`pytest --hypothesis-profile=quick` runs a tenth of them.
"""
import gc
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is loaded; more threads would fight over the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

for profile, examples in (("laws", 100), ("quick", 10)):
    settings.register_profile(profile, max_examples=examples, deadline=None, derandomize=True,
                              suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile("laws")


def pytest_configure(config: pytest.Config) -> None:
    """`-m quick` means few examples too; a profile that is asked for counts more."""
    asked = config.getoption("hypothesis_profile", None)
    if asked is None and config.getoption("markexpr", "") == "quick":
        settings.load_profile("quick")


# Not quick: other programs are run, examples are trained, whole models are compared at length.
SLOW = ("test_planted_bugs.py", "examples/", "test_readme.py", "conformance/", "attacks/",
        "train/test_resume", "test_claims.py", "engine/test_xray.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test is quick with the first of its parameters, unless it is marked slow or lies in a slow file."""
    seen: set[str] = set()
    for item in items:
        name = item.nodeid.partition("[")[0].removeprefix("tests/")
        if name not in seen and not name.startswith(SLOW) and item.get_closest_marker("slow") is None:
            item.add_marker("quick")
        seen.add(name)


def pytest_collection_finish() -> None:
    """What is loaded by now lives until the end: the garbage collector need not look through it a thousand times."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
