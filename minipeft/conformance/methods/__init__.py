"""The methods that the kit checks, in the order of its reports."""
from __future__ import annotations

import functools
import importlib

from minipeft.conformance.method import Method

NAMES = ("lora_linear", "lora_embedding", "bottleneck_adapter", "selective", "soft_prompt", "lora_training")


@functools.cache
def all_methods() -> dict[str, Method]:
    """{name: Method}, one for each folder of this package."""
    return {name: importlib.import_module(f"{__name__}.{name}").METHOD for name in NAMES}
