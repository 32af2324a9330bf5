"""The laws of the house for every method on a quantized base: QLoRA is any method there, with no code of its own.

The same functions as `minipeft.laws.check` runs. Half of the models have a quantized embedding table, too. The sizes of
the laws' models (12, 15, 17) have common divisors with no power of 2, so blocks of 32 have models of their own.
"""
from __future__ import annotations

import dataclasses
import re
import zlib
from typing import Any, Callable

import numpy
import pytest

import minipeft
from minipeft import laws
from minipeft.quant.scheme import SCHEMES
from tests.methods_under_test import DTYPES, VARIANTS, Variant, fits
from tests.models_under_test import FAMILIES, bits, model_of

MATRICES = r"\.(attn|cross|ff)\.\w+\.weight$"
TABLE = "^embedding"


def _groups(kind: str, table: bool, keep: bool = False) -> Callable:
    """Integers: rows of 12 and 15 numbers are groups of 3, and those of 17 are one group."""
    def quantize(model: Any) -> None:
        wide = [name for name, slot in model.slots.items() if slot.kind == "linear" and slot.shape[1] == 17]
        minipeft.quantize(model, kind, lambda name: name in wide, keep, group=17)
        pattern = rf"{TABLE}|{MATRICES}" if table else MATRICES
        minipeft.quantize(model, kind, lambda name: name not in wide and re.search(pattern, name) is not None, keep,
                          group=3)
    return quantize


def _blocks(kind: str, table: bool, **options: Any) -> Callable:
    """Blocks of consecutive numbers of any size; the last one is partial."""
    pattern = [TABLE, MATRICES] if table else MATRICES
    return lambda model: minipeft.quantize(model, kind, pattern, **options)


QUANTIZED: dict[str, Callable] = {
    "int4": _groups("int4", False), "int3 and the table": _groups("int3", True),
    "int4, kept": _groups("int4", True, keep=True),
    **({"nf4, double": _blocks("nf4", False, double=True), "nf4 and the table": _blocks("nf4", True, blocksize=32),
        "fp4 and the table": _blocks("fp4", True)} if "nf4" in SCHEMES else {})}


EVERY = [(method, variant) for method, found in VARIANTS.items() for variant in found]


@pytest.mark.parametrize("law", sorted(laws.LAWS))
@pytest.mark.parametrize("method, variant", EVERY, ids=lambda word: word)
def test_every_law_holds_for_every_method_on_a_quantized_base(method, variant, law):
    """On a model, in a dtype and with a quantization that take turns."""
    turn = zlib.crc32(f"{method} {variant} {law}".encode())
    families = [family for family in FAMILIES if fits(method, variant, family)]
    case = Variant(method, variant, families[turn % len(families)], DTYPES[turn // 4 % 2], turn % 1000)
    model = case.model()
    list(QUANTIZED.values())[turn // 8 % len(QUANTIZED)](model)
    before = bits(model.base_arrays)
    try:
        laws.LAWS[law](case.make(model), model, case.seed)
    except laws.DoesNotApply:
        pass
    assert bits(model.base_arrays) == before


def test_the_check_of_a_method_takes_a_quantized_model_and_sees_a_fault_there():
    model = model_of("t5 v1.1", "float64", 0)
    QUANTIZED["int3 and the table"](model)
    report = laws.check(minipeft.LoRA(2, 3), model)
    assert report.ok and len(report.all) == len(laws.LAWS) and not report.skipped, report
    with pytest.raises(laws.Broken, match=r"project\(x\) at .* differs from that of dense\(\)"):
        laws.definition(Forgets(), model, 0)


class WithoutTheBase(minipeft.Reparam):
    """W = W~ + B A, whose product forgets W~."""

    def dense(self) -> Any:
        return self.base.dense() + self.B @ self.A

    def project(self, x: Any, rng: Any = None) -> Any:
        return minipeft.ops.linear(x, self.B @ self.A)


@minipeft.register
@dataclasses.dataclass(frozen=True)
class Forgets(minipeft.Method):
    where: Any = r"\.q\.weight$"

    def arrays(self, name: str, slot: Any, model: Any) -> dict:
        return {"A": minipeft.trained((2, slot.shape[1]), minipeft.normal(0.1)),
                "B": minipeft.trained((slot.shape[0], 2))}

    def make(self, name: str, slot: Any, arrays: Any) -> Any:
        return WithoutTheBase(**arrays)


# ---- blocks of 32


def wide_t5(rng: Any, dtype: str) -> minipeft.T5:
    """Rows of 32, 64 and 96 numbers."""
    return minipeft.T5(minipeft.T5Config(13, 32, 16, 4, 96, 1, 1, 8, 20, feed_forward_proj="gated-gelu",
                                         tie_word_embeddings=False, scale_decoder_outputs=False), rng, dtype)


def wide_transformer(rng: Any, dtype: str) -> minipeft.Transformer:
    """Rows of 32 and 64 numbers, in one table."""
    return minipeft.Transformer(minipeft.TransformerConfig(13, 32, 4, 64, 1, 1), rng, dtype)


ON_BLOCKS = [minipeft.LoRA(3, 5, where=MATRICES), minipeft.DoRA(2, 3), minipeft.IA3(), minipeft.Selective(),
             minipeft.LoRA(2, where=TABLE), minipeft.OFT(4), minipeft.PrefixTuning(2),
             minipeft.Bottleneck("houlsby", size=3), minipeft.QALoRA(1, 2, 32, where=MATRICES)]
KINDS_OF_32 = [kind for kind in ("int4", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0") if kind in SCHEMES]


@pytest.mark.parametrize("kind", KINDS_OF_32)
def test_laws_hold_on_blocks_of_32(kind):
    """Another law for each method; for all kinds together, each law for several methods."""
    for i, method in enumerate(ON_BLOCKS):
        make, dtype = (wide_t5, wide_transformer)[i % 2], DTYPES[(i + KINDS_OF_32.index(kind)) // 2 % 2]
        model = make(numpy.random.default_rng(i), dtype)
        minipeft.quantize(model, kind, [TABLE, MATRICES])
        law = sorted(laws.LAWS)[(i + 3 * KINDS_OF_32.index(kind)) % len(laws.LAWS)]
        try:
            laws.LAWS[law](method, model, i)
        except laws.DoesNotApply:
            pass
