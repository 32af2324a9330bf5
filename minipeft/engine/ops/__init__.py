"""Differentiable functions on Tensors and arrays.

`primitives.py`: one forward and one VJP per input. `definitions.py`: softmax, attention, ... as the papers write
them, composed of primitives. `fused.py`: the same names as one node each, equal in value and gradient (law 9, fused =
definition). Models call the fused ops, and this package exports them.
"""
from minipeft.engine.ops import operators as _operators  # noqa: F401  (gives Tensor its +, *, @, ...)
from minipeft.engine.ops.drop import dropout  # noqa: F401
from minipeft.engine.ops.fused import (  # noqa: F401
    attention, cross_entropy, dequantized_linear, embedding, gelu, gelu_tanh, layer_norm, linear, low_rank_linear,
    rms_norm, rotate, silu, softmax, toeplitz)
from minipeft.engine.ops.layout import key_first  # noqa: F401
from minipeft.engine.ops.linalg import solve  # noqa: F401
from minipeft.engine.ops.primitives import (  # noqa: F401
    add, concat, div, erf, exp, index, log, matmul, matrix_transpose, mean, mul, neg, power, relu, reshape, scatter,
    sub, sum, tanh, transpose, where)
