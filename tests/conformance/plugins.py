"""Plug-ins that misbehave, each in its own way; the tests name them by attribute: `bad("hangs")` is a module's name."""
from __future__ import annotations

import sys
import textwrap
from pathlib import Path

LAYER = """
import os, time
import numpy as np
capabilities = dict(name="bad", version="1", dtypes=["float64"])
class Layer:
    def __init__(self, W, b, A, B, s):
        self.W, self.b, self.A, self.B, self.s, self.merged = W, b, A, B, s, False
    def forward(self, x):
        return x @ self.W.T + self.b + self.s * (x @ self.A.T) @ self.B.T
    def vjp(self, x, g):
        return {"A": self.s * (g @ self.B).T @ x, "B": self.s * g.T @ (x @ self.A.T),
                "x": g @ self.W + self.s * g @ self.B @ self.A}
    def weight(self):
        return self.W + self.merged * self.s * self.B @ self.A
    def merge(self):
        self.merged = True
def lora_linear(W, b, A, B, alpha, dtype, *, dropout=0.0):
    if A.shape[0] < 1 or A.shape[0] != B.shape[1] or A.shape[1] != W.shape[1] or B.shape[0] != W.shape[0]:
        raise ValueError("shapes")
    if not np.isfinite(float(alpha)):
        raise ValueError("alpha")
    return Layer(W, b, A, B, alpha / len(A))
"""


def module(folder: Path, monkeypatch, name: str, change: str = "") -> str:
    """A module in `folder` with the layer above and `change` below it; its name. Importable in this process and in
    those that it starts."""
    (folder / f"{name}.py").write_text(LAYER + textwrap.dedent(change), "utf-8")
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop(name, None)
    return name
