"""The sizes of quantized weights: bits of a number, and the bytes that the library's own schemes store."""
import math

import pytest

from minipeft.quant.scheme import SCHEMES, scheme
from minipeft.tools.planning.quantized import KINDS, kind_of, size

BITS = {"nf4": 4.5, "fp4": 4.5, "int2": 4, "int3": 5, "int4": 6, "int8": 10,
        "q4_0": 18 / 4, "q4_1": 20 / 4, "q5_0": 22 / 4, "q5_1": 24 / 4, "q8_0": 34 / 4}


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_takes_its_bits_and_its_share_of_a_block(kind):
    shape = (4096, 4096)
    assert 8 * size(shape, kind) / math.prod(shape) == BITS[kind]


def test_double_quantization_takes_4_126953125_bits():
    shape = (4096, 4096)
    offset = 4
    assert 8 * (size(shape, "nf4", double=True) - offset) / math.prod(shape) == 4.126953125
    assert kind_of("fp4", double=True) is KINDS["fp4"]


@pytest.mark.parametrize("shape", [(64, 96), (48, 512), (3, 64)])
@pytest.mark.parametrize("kind, options", [(kind, {}) for kind in KINDS] + [("nf4", {"double": True})])
def test_the_size_is_that_of_the_arrays_which_the_library_stores(kind, options, shape):
    if kind not in SCHEMES:
        pytest.skip(f"this version of the library has no {kind}")
    stored = sum(math.prod(s) * d.itemsize for s, d in scheme(kind, **options).leaves(shape, "float32").values())
    assert size(shape, kind, **options) == stored


def test_a_partial_last_block_of_nf4_has_a_scale_and_one_of_int4_is_refused():
    assert size((1, 65), "nf4") == 33 + 2 * 4
    with pytest.raises(ValueError, match="65 columns are not whole blocks of 32"):
        size((1, 65), "int4")


def test_unknown_kinds_are_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match="'nf5'; expected one of nf4, fp4, int2"):
        size((4, 64), "nf5")
    with pytest.raises(ValueError, match="int4 has none"):
        size((4, 64), "int4", double=True)
