"""An array laid out anew means what it meant, in value and gradient."""
import numpy
import pytest

import minipeft
from minipeft.engine import ops


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 7), (3, 2, 6, 1), (0, 2, 3, 4)])
def test_key_first_moves_numbers_in_memory_and_nowhere_else(shape, dtype):
    rng = numpy.random.default_rng(0)
    bias = minipeft.Parameter(rng.standard_normal(shape).astype(dtype))
    g = rng.standard_normal(shape).astype(dtype)
    laid = ops.key_first(bias).data
    assert laid.dtype == dtype and numpy.array_equal(laid, bias.data)
    assert laid.transpose(0, 3, 1, 2).flags["C_CONTIGUOUS"]
    _, grads = minipeft.value_and_grad(lambda: (ops.key_first(bias) * g).sum(), {"bias": bias})
    assert numpy.array_equal(grads["bias"], g)
