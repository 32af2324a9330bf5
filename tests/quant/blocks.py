"""Matrices for the tests of llama.cpp's blocks, and what the `gguf` package makes of them."""
from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.strategies import seeds

SHAPE = (5, 96)


def _kind(kind: str) -> Any:
    import gguf
    return getattr(gguf.GGMLQuantizationType, kind.upper())


def gguf_blocks(kind: str, matrix: np.ndarray) -> np.ndarray:
    """The bytes that gguf makes of a matrix. It warns where it casts NaN."""
    import gguf
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(matrix, _kind(kind))


def gguf_numbers(kind: str, data: np.ndarray) -> np.ndarray:
    """The matrix that gguf makes of bytes."""
    import gguf
    return gguf.quants.dequantize(data, _kind(kind))


def _sparse(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(SHAPE) * (rng.random(SHAPE) < 0.05)


def _constant(rng: np.random.Generator) -> np.ndarray:
    return np.repeat(rng.standard_normal((5, 3)), 32, axis=1) * rng.choice([0, 1e-9, 1, 1e3])


def _zeros(rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random(SHAPE) < 0.5, -0.0, 0.0)


def _mostly_zeros(rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random(SHAPE) < 0.9, -0.0, rng.standard_normal(SHAPE))


def _ties(rng: np.random.Generator) -> np.ndarray:
    """Integers and halves, with the largest at the end of the codes, so that 1/d is exact and ties occur."""
    w = rng.integers(-14, 15, SHAPE) / 2
    w[:, ::32] = rng.choice([-8, 8, 127 / 2, 15 / 2], (5, 3))
    return w * 2.0 ** rng.integers(-8, 4)


KINDS_OF_WEIGHTS = {
    "normal": lambda rng: rng.standard_normal(SHAPE) * 10.0 ** rng.integers(-4, 4),
    "one-sided": lambda rng: rng.random(SHAPE) * rng.choice([-1, 1]),
    "far from 0": lambda rng: 1000 + rng.standard_normal(SHAPE) * 10.0 ** rng.integers(-5, 3),
    "rows of other sizes": lambda rng: rng.standard_normal(SHAPE) * np.exp2(rng.integers(-20, 12, (5, 1))),
    "sparse": _sparse, "constant": _constant, "zeros": _zeros, "mostly zeros": _mostly_zeros, "ties": _ties}
SUBNORMAL = {
    "tiny rows": lambda rng: rng.standard_normal(SHAPE) * np.exp2(rng.integers(-149, -100, (5, 1))),
    "all exponents": lambda rng: rng.standard_normal(SHAPE) * np.exp2(rng.integers(-149, 10, SHAPE)),
    "units of the smallest": lambda rng: rng.integers(-20, 21, SHAPE) * 2.0 ** -149}


def weights(subnormal: bool = True) -> st.SearchStrategy[np.ndarray]:
    """float32 matrices of five rows of three blocks."""
    makers = {**KINDS_OF_WEIGHTS, **(SUBNORMAL if subnormal else {})}
    return st.builds(lambda name, seed: makers[name](np.random.default_rng(seed)).astype("float32"),
                     st.sampled_from(list(makers)), seeds())
