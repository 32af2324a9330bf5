"""Keras: Dense.enable_lora, on the torch backend (any would do; autograd is the backend's).

Keras has no merge(): saving a layer merges, and what is loaded into a plain Dense is the merged kernel. `merge` here is
that path. Kernels are [in, out], A [in, r], B [r, out].

    pip install keras==3.15.1 torch
    python -m minipeft.conformance --impl examples.conformance.keras_lora
"""
import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras  # noqa: E402
import torch  # noqa: E402

capabilities = dict(name="keras, Dense.enable_lora", version=keras.__version__,
                    dtypes=["float64", "float32", "bfloat16", "float16"])


class Handle:
    def __init__(self, W, b, A, B, alpha, dtype):
        self.dtype, self.merged = dtype, False
        self.layer = dense(W.shape, dtype)
        self.layer.set_weights([W.T, b])
        self.layer.bias.trainable = False
        self.layer.enable_lora(len(A), lora_alpha=alpha)
        self.layer.lora_kernel_a.assign(A.T)
        self.layer.lora_kernel_b.assign(B.T)

    def forward(self, x):
        return array(self.layer(tensor(x, self.dtype)))

    def vjp(self, x, g):
        x, layer = tensor(x, self.dtype).requires_grad_(), self.layer
        for v in layer.variables:
            v.value.grad = None
        layer(x).backward(tensor(g, self.dtype))
        found = {"W": layer._kernel, "b": layer.bias, "A": layer.lora_kernel_a, "B": layer.lora_kernel_b}
        grads = {name: v.value.grad for name, v in found.items()}
        return {**{name: None if v is None else array(v).T for name, v in grads.items()}, "x": array(x.grad)}

    def trainable(self):
        names = {"kernel": "W", "bias": "b", "lora_kernel_a": "A", "lora_kernel_b": "B"}
        return {names[v.name] for v in self.layer.trainable_variables}

    def weight(self):
        return array(self.layer._kernel).T

    def merge(self):
        """Saved and loaded, as Keras does it."""
        if self.merged:
            return
        store, merged = {}, dense(self.layer._kernel.shape[::-1], self.dtype)
        self.layer.save_own_variables(store)
        merged.load_own_variables(store)
        self.layer, self.merged = merged, True

    def is_merged(self):
        return self.merged


def dense(shape, dtype):
    layer = keras.layers.Dense(shape[0], dtype=dtype)
    layer.build((None, shape[1]))
    return layer


def lora_linear(W, b, A, B, alpha, dtype, *, dropout=0.0):  # Keras has no dropout here
    return Handle(W, b, A, B, alpha, dtype)


def tensor(x, dtype):
    return torch.tensor(x).to(getattr(torch, dtype))


def array(t):
    return keras.ops.convert_to_tensor(t).detach().double().numpy()
