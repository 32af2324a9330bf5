"""Flax: nnx.LoRA around nnx.Linear, y = x W + b + x A B.

Flax has no alpha: s = 1. So that the kit can hold it against the paper, alpha / r is folded into B here, and out of its
gradient again: the scale that is tested is this module's, all the rest is Flax's. Flax has no merge either.

    pip install flax==0.12.8 jax
    python -m minipeft.conformance --impl examples.conformance.flax_lora
"""
from importlib.metadata import version

import jax
import numpy
from flax import nnx

jax.config.update("jax_enable_x64", True)  # else float64 is float32

capabilities = dict(name="flax, nnx.LoRA", version=version("flax"),
                    dtypes=["float64", "float32", "bfloat16", "float16"])


class Handle:
    def __init__(self, W, b, A, B, alpha, dtype):
        self.dtype, self.s, self.size = dtype, alpha / len(A), W.shape[::-1]
        kind, rngs = jax.numpy.dtype(dtype), nnx.Rngs(0)
        zeros, fields = nnx.initializers.zeros, dict(dtype=kind, param_dtype=kind, rngs=rngs)
        base = nnx.Linear(*self.size, kernel_init=zeros, **fields)
        self.layer = nnx.LoRA(self.size[0], len(A), self.size[1], base_module=base, a_initializer=zeros, **fields)
        for variable, value in ((base.kernel, W.T), (base.bias, b), (self.layer.lora_a, A.T),
                                (self.layer.lora_b, self.s * B.T)):
            if variable[...].shape != value.shape:
                raise ValueError(f"{value.shape} given, {variable[...].shape} expected")
            variable[...] = jax.numpy.asarray(value, kind)

    def forward(self, x):
        return array(self.layer(jax.numpy.asarray(x, self.dtype)))

    def vjp(self, x, g):
        """The parameters that are of the type LoRAParam get a gradient; so does x."""
        graph, lora, rest = nnx.split(self.layer, nnx.LoRAParam, ...)
        given = jax.numpy.asarray(x, self.dtype)
        _, pullback = jax.vjp(lambda p, t: nnx.merge(graph, p, rest)(t), lora, given)
        grads, dx = pullback(jax.numpy.asarray(g, self.dtype))
        return {"A": array(grads["lora_a"][...]).T, "B": self.s * array(grads["lora_b"][...]).T, "x": array(dx)}


def lora_linear(W, b, A, B, alpha, dtype, *, dropout=0.0):  # nnx.LoRA has no dropout
    return Handle(W, b, A, B, alpha, dtype)


def array(t):
    return numpy.asarray(t).astype(numpy.float64)
