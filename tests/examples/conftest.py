"""Modules of examples/ are imported as the programs import them: with the program's folder on sys.path."""
import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Import a module of examples/ by name: a program, "lab.tables", "data.g2p"."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture
def bench(monkeypatch):
    """Import a module of examples/benchmark by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmark"))
    return importlib.import_module
