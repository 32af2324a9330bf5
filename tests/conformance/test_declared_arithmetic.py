"""Correct implementations in an arithmetic that they declare: none of them may fail, whatever is drawn."""
import types

import numpy
import pytest

from minipeft.conformance import check
from minipeft.conformance.arithmetic import UNIT, on_grid
from minipeft.conformance.methods.lora_linear.plain import LoraLinear


def rounded_to(kind, x):
    """float32 numbers with the digits of `kind`; to nearest, ties to even."""
    if kind == "bfloat16":
        return on_grid(x, "bfloat16")
    digits, exponent = numpy.frexp(x)
    return numpy.ldexp(numpy.rint(digits / UNIT[kind]) * UNIT[kind], exponent)


@pytest.mark.parametrize("seed", [0, 2, 5])
@pytest.mark.parametrize("kind", ["tf32", "bfloat16"])
def test_products_of_rounded_inputs_conform_where_that_is_declared(kind, seed):
    """B (A x) rounds four inputs on its way, not two."""
    class Tensor(LoraLinear):
        def __init__(self, *args, **fields):
            super().__init__(*args, **fields)
            mm = self.e.mm
            self.e.mm = lambda a, b: mm(rounded_to(kind, a), rounded_to(kind, b))

    capabilities = {"dtypes": ["float32"], "arith": {"float32": {"multiply": kind}}}
    report = check(types.SimpleNamespace(capabilities=capabilities, lora_linear=Tensor), ["lora_linear"], vectors=False,
                   cases=25, seed=seed)
    assert report.failures == [], str(report)
    capabilities.pop("arith")
    undeclared = check(types.SimpleNamespace(capabilities=capabilities, lora_linear=Tensor), ["lora_linear"], cases=5)
    assert {"L1", "L2"} <= {r.id for r in undeclared.failures}
