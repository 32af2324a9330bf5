"""A LoRA layer in PyTorch, written from the paper, and what plugs it in: the model for a plug-in of your own.

    y = x W^T + b + (alpha/r) (x A^T) B^T          Hu et al., 2021, arXiv:2106.09685, eq. (3)

    python -m minipeft.conformance --impl examples.conformance.plain_torch
"""
import math

import torch
from torch.nn import functional

capabilities = dict(name="plain torch", version=torch.__version__, dtypes=["float64", "float32", "bfloat16", "float16"])


class LoRALinear(torch.nn.Module):
    """The layer, as one writes it without thinking of a test kit."""

    def __init__(self, W, b, A, B, alpha, dropout=0.0):
        super().__init__()
        if not (len(A) == B.shape[1] >= 1 and math.isfinite(alpha)):
            raise ValueError(f"A {tuple(A.shape)}, B {tuple(B.shape)}, alpha {alpha}")
        self.W, self.b = (torch.nn.Parameter(w, requires_grad=False) for w in (W, b))
        self.A, self.B = torch.nn.Parameter(A), torch.nn.Parameter(B)
        self.scale, self.drop, self.kept = alpha / len(A), torch.nn.Dropout(dropout), None
        self.eval()

    def forward(self, x):
        y = functional.linear(x, self.W, self.b)
        if self.kept is None:
            y = y + self.scale * (self.drop(x) @ self.A.T) @ self.B.T
        return y

    def merge(self):
        if self.kept is None:
            self.kept = self.W.data
            self.W.data = self.W.data + self.scale * (self.B.data @ self.A.data)

    def unmerge(self):
        self.W.data, self.kept = self.kept, None


class Handle:
    """What the kit calls: arrays of float64 in, arrays of float64 out. All but forward() is optional."""

    def __init__(self, layer, dtype):
        self.layer, self.dtype, self.merge, self.unmerge = layer, dtype, layer.merge, layer.unmerge

    def forward(self, x):
        return array(self.layer(tensor(x, self.dtype)))

    def vjp(self, x, g):
        x = tensor(x, self.dtype).requires_grad_()
        self.layer.zero_grad()
        self.layer(x).backward(tensor(g, self.dtype))
        named = {**dict(self.layer.named_parameters()), "x": x}
        return {name: None if p.grad is None else array(p.grad) for name, p in named.items()}

    def weight(self):
        return array(self.layer.W)

    def trainable(self):
        return {name for name, p in self.layer.named_parameters() if p.requires_grad}


def lora_linear(W, b, A, B, alpha, dtype, *, dropout=0.0):
    return Handle(LoRALinear(*(tensor(x, dtype) for x in (W, b, A, B)), alpha, dropout), dtype)


def tensor(x, dtype):
    return torch.tensor(x).to(getattr(torch, dtype))


def array(t):
    return t.detach().double().numpy()
