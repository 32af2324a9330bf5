"""Differentiable functions on Tensors and arrays.

`primitives.py`: one forward and one VJP per input. `definitions.py`: softmax, attention, ... as the papers write
them, composed of primitives. `fused.py`: the same names as one node each, equal in value and gradient (law 9); these
are what the models call, and what this package exports.
"""
from minipeft.engine.ops import operators as _operators  # noqa: F401  (gives Tensor its +, *, @, ...)
from minipeft.engine.ops.drop import dropout  # noqa: F401
from minipeft.engine.ops.fused import (attention, cross_entropy, embedding, gelu, gelu_tanh, key_first,  # noqa: F401
                                layer_norm, linear, low_rank_linear, rms_norm, silu, softmax, toeplitz)
from minipeft.engine.ops.primitives import (add, concat, div, erf, exp, index, log, matmul, mean, mul,  # noqa: F401
                                     neg, power, relu, reshape, scatter, sub, sum, matrix_transpose, tanh, transpose,
                                     where)
