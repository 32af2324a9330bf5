"""MLX: mlx_lm's LoRALinear. Its `scale` is a factor, not an alpha: hence the convention scaling "alpha".

    pip install "mlx[cpu]==0.32.4" mlx-lm==0.32.2
    python -m minipeft.conformance --impl examples.conformance.mlx_lora
"""
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
import numpy
from mlx_lm.tuner.lora import LoRALinear

mx.set_default_device(mx.cpu)

capabilities = dict(name="mlx-lm, LoRALinear", version=f"{version('mlx-lm')} on mlx {version('mlx')}",
                    dtypes=["float64", "float32", "bfloat16", "float16"],
                    conventions={"lora_linear": {"scaling": "alpha"}})


class Handle:
    def __init__(self, W, b, A, B, alpha, dtype, dropout):
        self.kind = getattr(mx, dtype)
        linear = nn.Linear(*W.shape[::-1])
        linear.weight, linear.bias = self.given(W), self.given(b)
        self.layer = LoRALinear.from_base(linear, r=len(A), dropout=dropout, scale=alpha)
        self.layer.freeze()
        self.layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
        self.layer.load_weights([("lora_a", self.given(A.T)), ("lora_b", self.given(B.T))], strict=False)
        self.layer.eval()

    def given(self, x):
        return mx.array(x, dtype=self.kind)

    def forward(self, x):
        return array(self.layer(self.given(x)))

    def vjp(self, x, g):
        def scalar(parameters, x):
            self.layer.update(parameters)
            return (self.layer(x) * self.given(g)).sum()

        grads, dx = mx.grad(scalar, argnums=(0, 1))(self.layer.trainable_parameters(), self.given(x))
        names = {"lora_a": "A", "lora_b": "B"}
        return {**{names.get(name, name): array(value).T for name, value in grads.items() if name in names},
                "x": array(dx)}

    def trainable(self):
        names = {"lora_a": "A", "lora_b": "B", "linear": "W"}
        return {names[name] for name, value in self.layer.trainable_parameters().items() if len(value)}

    def weight(self):
        return array((self.layer.linear if isinstance(self.layer, LoRALinear) else self.layer).weight)

    def merge(self):
        self.layer = self.layer.fuse()

    def is_merged(self):
        return not isinstance(self.layer, LoRALinear)


def lora_linear(W, b, A, B, alpha, dtype, *, dropout=0.0):
    return Handle(W, b, A, B, alpha, dtype, dropout)


def array(t):
    return numpy.array(t.astype(mx.float64))
