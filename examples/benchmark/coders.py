"""The sides of the part `quantize`: a library's quantizing and dequantizing of one float32 matrix, on one core.

    codes = encode(W),   W~ = decode(codes)        both as a user of the library calls them

bitsandbytes has NF4 and FP4, and gguf the blocks of llama.cpp. No library was found that has QA-LoRA's groups of
integers and runs without a GPU. Each side is imported in its own process alone (see worker.py).
"""
from __future__ import annotations

import abc
import contextlib
import importlib.metadata
from typing import Any, Callable

import numpy

import minipeft
from minipeft.quant import QuantizedWeight, scheme

Pair = tuple[Callable[[Any], Any], Callable[[Any], Any]]       # encode, decode


class Coder(abc.ABC):
    """A library that quantizes. `coder` gives encode and decode of a kind, as minipeft names it."""

    running = contextlib.nullcontext

    def matrix(self, values: numpy.ndarray) -> Any:
        """`values` as the library takes them."""
        return values

    @abc.abstractmethod
    def coder(self, kind: str, options: dict[str, Any]) -> Pair:
        """encode and decode of `kind`, with `options` as `minipeft.quant.scheme` takes them."""

    def synchronize(self) -> None:
        """There is nothing to wait for on one core."""

    @abc.abstractmethod
    def about(self) -> dict[str, Any]:
        """The versions of the library and of what it computes with."""


class Ours(Coder):
    """`encode` makes the weight that `minipeft.quantize` puts into a model; `decode` is its dense()."""

    def coder(self, kind: str, options: dict[str, Any]) -> Pair:
        chosen = scheme(kind, **options)
        return lambda W: QuantizedWeight.of(W, chosen), lambda weight: weight.dense().data

    def about(self) -> dict[str, Any]:
        return {"minipeft": minipeft.__version__, "NumPy": numpy.__version__}


class Bitsandbytes(Coder):
    """bitsandbytes' kernels for the CPU, in C++."""

    def __init__(self) -> None:
        import bitsandbytes
        import torch
        self.torch, self.library = torch, bitsandbytes
        torch.set_num_threads(1)

    def matrix(self, values: numpy.ndarray) -> Any:
        return self.torch.from_numpy(values)

    def coder(self, kind: str, options: dict[str, Any]) -> Pair:
        functional, double = self.library.functional, options.get("double", False)
        return (lambda W: functional.quantize_4bit(W, blocksize=64, compress_statistics=double, quant_type=kind),
                lambda codes: functional.dequantize_4bit(*codes))

    def about(self) -> dict[str, Any]:
        return {"bitsandbytes": self.library.__version__, "torch": self.torch.__version__}


class Gguf(Coder):
    """gguf.quants, the NumPy code of llama.cpp's own package."""

    def __init__(self) -> None:
        import gguf
        self.library = gguf

    def coder(self, kind: str, options: dict[str, Any]) -> Pair:
        quants, number = self.library.quants, self.library.GGMLQuantizationType[kind.upper()]
        return lambda W: quants.quantize(W, number), lambda codes: quants.dequantize(codes, number)

    def about(self) -> dict[str, Any]:
        return {"gguf": importlib.metadata.version("gguf"), "NumPy": numpy.__version__}


def made(library: str) -> Coder:
    """The side of "minipeft", "bitsandbytes" or "gguf"."""
    return {"minipeft": Ours, "bitsandbytes": Bitsandbytes, "gguf": Gguf}[library]()
