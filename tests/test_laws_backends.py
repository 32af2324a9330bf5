"""Law 11: backends agree. Every variant of every method lives the same life under the strict namespace, which refuses
what CuPy would refuse, wrap or vary, and under plain arrays: the same bits come out.

(`portable` is NumPy where `segment_sum` goes the way that it goes off NumPy.) A life: attach, two steps, a mixed batch,
generation, save, merge where it can be, load. Training with checkpoints is in test_backend.py, a GPU in
test_cupy_names.py.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest

import minipeft
from minipeft.backend import to_host
from tests.methods_under_test import DTYPES, KINDS, VARIANTS, Variant, fits
from tests.strict_namespace import strict
from tests.test_backend import host, portable

LIVES = [Variant(method, variant, families[i % 2], DTYPES[i // 2 % 2], 3)
         for method, named in VARIANTS.items() for i, variant in enumerate(named)
         for families in KINDS.values() if fits(method, variant, families[i % 2])]


def life(library: Any, case: Variant, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    seen: dict[str, Any] = {}
    model, batch = case.model(), case.batch()
    model.to(library)
    with minipeft.use(library):
        attachment = case.attach(model, "a")
        other = case.attach(model, "b", 3, ("PromptTuning", "2"))
        optimizer, params = minipeft.AdamW(1e-2), {**attachment.parameters, **other.parameters}
        for _ in range(2):
            loss, grads = minipeft.value_and_grad(
                lambda: model.loss(**batch, rng=numpy.random.default_rng(5)), params)
            assert all(isinstance(g, library.ndarray) and g.dtype == case.dtype for g in grads.values())
            optimizer.step(params, grads)
            seen.setdefault("steps", []).append((loss, host(grads), host(params)))
        routing = ["a", None, ("b", "a"), "b"]
        seen["mixed"] = model.loss(**batch, adapter=routing).data.item()
        seen["generated"] = model.generate(batch["input_ids"], batch["attention_mask"], 4, adapter=routing).tolist()
        near = minipeft.nearest_tokens(other, 3, numpy.random.default_rng(0))
        seen["near"] = (near.cosine_ids.tolist(), near.l2.tolist())
        other.unplug()
        for saved, file in ((attachment, "file"), (other, "partner")):  # trained together, so loaded together
            saved.save(folder / file)
        if case.is_weight:
            attachment.merge()
            seen["merged"] = host({"": model.encode(batch["input_ids"])})
            attachment.unmerge()
        attachment.remove()
        other.remove()
        again, partner = minipeft.load(model, [folder / "file", folder / "partner"])
        partner.unplug()
        assert all(isinstance(p.data, library.ndarray) for p in again.arrays.values())
        seen["loaded"] = host({"": model.encode(batch["input_ids"])} | again.tensors)
    return seen


@pytest.mark.parametrize("case", LIVES, ids=lambda c: f"{c.method}: {c.variant}, {c.family}, {c.dtype}")
def test_law_11_a_life_under_the_strict_namespace_is_numpys_bit_for_bit(case, tmp_path):
    assert life(strict, case, tmp_path / "strict") == life(portable, case, tmp_path / "portable")


@pytest.mark.parametrize("variant", VARIANTS["Selective"])
def test_constants_go_to_another_backend_with_the_model_and_come_back(variant):
    """The indices of masks: what is not trained moves too."""
    model = Variant("Selective", variant, "pre-LN", "float32", 1).model()
    attachment = Variant("Selective", variant, "pre-LN", "float32", 1).attach(model)
    before = {name: to_host(p.data).tobytes() for name, p in attachment.arrays.items()}
    model.to(strict)
    assert all(isinstance(p.data, strict.ndarray) for p in attachment.arrays.values())
    model.to("numpy")
    assert {name: p.data.tobytes() for name, p in attachment.arrays.items()} == before
