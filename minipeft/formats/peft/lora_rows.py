"""The tensors of a LoRA, DoRA or QA-LoRA in a file of PEFT's, and ours. path is that of the module, r the rank there.

    linear layer       W + s B A             path.lora_A.weight [r, d_in]       path.lora_B.weight [d_out, r]
    embedding table    W + s (B A)^T         path.lora_embedding_A [r, V]       path.lora_embedding_B [d, r]
    QA-LoRA            L = d_in / g groups   path.lora_A.weight [r, L]          path.lora_B.weight [d_out, r]
    DoRA               m                     path.lora_magnitude_vector         [d_out], or [d] of a table
    our PiSSA          A = [A; A0]           B = [B, -B0], of rank 2 r          s (B A - B0 A0) is one product

On a table [V, d] PEFT's factors are those of the transposed weight: our B [V, r] is its A transposed, and our A [r, d]
its B. So its m, one number for each row of the transposed weight, is our m [1, d] of norm="input". The key of m has no
".weight".
"""
from __future__ import annotations

import dataclasses
from typing import Any

import numpy

from minipeft.formats.peft.names import PREFIX
from minipeft.formats.row import Row, transposed


def factors(name: str, slot: Any, path: str, r: int) -> list[Row]:
    """The rows of A [r, d_in] and B [d_out, r] of the slot called `name`, the weight of the module at `path`."""
    d_out, d_in = slot.shape
    if slot.kind == "embedding":
        return [Row(f"{name}.B", f"{PREFIX}{path}.lora_embedding_A", (r, d_out), transposed, transposed),
                Row(f"{name}.A", f"{PREFIX}{path}.lora_embedding_B", (d_in, r), transposed, transposed)]
    return [Row(f"{name}.A", f"{PREFIX}{path}.lora_A.weight", (r, d_in)),
            Row(f"{name}.B", f"{PREFIX}{path}.lora_B.weight", (d_out, r))]


def pooled(name: str, slot: Any, path: str, r: int, groups: int) -> list[Row]:
    """The rows of A [r, groups] and B [d_out, r] of a QA-LoRA on a linear layer. name, slot, path: see `factors`."""
    A, B = factors(name, slot, path, r)
    return [dataclasses.replace(A, shape=(r, groups)), B]


def magnitude(name: str, slot: Any, path: str) -> Row:
    """The row of m [d_out, 1], or [1, d] of a table. name, slot, path: as in `factors`."""
    d_out, d_in = slot.shape
    shape = (1, d_in) if slot.kind == "embedding" else (d_out, 1)
    return Row(f"{name}.m", f"{PREFIX}{path}.lora_magnitude_vector", (max(shape),), lambda m: m.reshape(-1),
               lambda m: m.reshape(shape))


def doubled(name: str, slot: Any, path: str, r: int) -> list[Row]:
    """The rows of A, A0 [r, d_in] and B, B0 [d_out, r] as one product, of rank 2 r. name, slot, path: see `factors`."""
    first, second = factors(name, slot, path, 2 * r)
    rows = []
    for row, start, rest in ((first, numpy.s_[:r], numpy.s_[r:]), (second, numpy.s_[:, :r], numpy.s_[:, r:])):
        fixed = dataclasses.replace(row, ours=f"{row.ours}0", at=rest)
        rows += [dataclasses.replace(row, at=start), fixed if row.ours.endswith(".A") else _minus(fixed)]
    return rows


def _minus(row: Row) -> Row:
    return dataclasses.replace(row, out=lambda array: -row.out(array), back=lambda array: -row.back(array))
