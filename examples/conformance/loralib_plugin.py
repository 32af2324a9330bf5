"""loralib: its Linear, which merges in eval() and unmerges in train(); so `merge` here is eval(), `unmerge` train().

loralib evaluates what is merged only. To see the layer unmerged in evaluation, its dropout alone is put into eval().

    pip install loralib==0.1.2 torch
    python -m minipeft.conformance --impl examples.conformance.loralib_plugin
"""
import io
from importlib.metadata import version

import loralib
import torch

capabilities = dict(name="loralib", version=version("loralib"), dtypes=["float64", "float32", "bfloat16", "float16"])


class Handle:
    def __init__(self, W, b, A, B, alpha, dtype, dropout):
        self.dtype, self.base = dtype, (W, b)
        self.build(A.shape[0], alpha, dropout)
        self.layer.load_state_dict({"weight": tensor(W), "bias": tensor(b), "lora_A": tensor(A), "lora_B": tensor(B)})
        self.layer.bias.requires_grad = False  # as loralib.mark_only_lora_as_trainable does for a whole model

    def build(self, r, alpha, dropout=0.0):
        self.alpha, self.shape = alpha, self.base[0].shape[::-1]
        self.layer = loralib.Linear(*self.shape, r=r, lora_alpha=alpha, lora_dropout=dropout).to(torch_type(self.dtype))
        self.unmerge()

    def forward(self, x):
        return array(self.layer(tensor(x, self.dtype)))

    def vjp(self, x, g):
        x = tensor(x, self.dtype).requires_grad_()
        self.layer.zero_grad()
        self.layer(x).backward(tensor(g, self.dtype))
        named = {"W": self.layer.weight, "b": self.layer.bias, "A": self.layer.lora_A, "B": self.layer.lora_B, "x": x}
        return {name: None if p.grad is None else array(p.grad) for name, p in named.items()}

    def weight(self):
        return array(self.layer.weight)

    def merge(self):
        self.layer.eval()

    def unmerge(self):
        self.layer.train()
        if self.layer.lora_dropout is not None and hasattr(self.layer.lora_dropout, "eval"):
            self.layer.lora_dropout.eval()

    def is_merged(self):
        return self.layer.merged

    def save(self):
        """A checkpoint as training scripts write it: the state_dict of the module, and how it was built."""
        file = io.BytesIO()
        torch.save({"state": self.layer.state_dict(), "r": self.layer.r, "alpha": self.alpha}, file)
        return file.getvalue()

    def load(self, blob):
        saved, before = torch.load(io.BytesIO(blob), weights_only=True), self.layer
        self.build(saved["r"], saved["alpha"])
        fresh, self.layer = self.layer, before  # a state that does not fit raises here, and leaves the layer as it was
        fresh.load_state_dict(saved["state"])
        self.layer = fresh


def lora_linear(W, b, A, B, alpha, dtype, *, dropout=0.0):
    return Handle(W, b, A, B, alpha, dtype, dropout)


class Table(Handle):
    """Its Embedding."""

    def __init__(self, E, A, B, alpha, dtype):
        self.dtype, self.base = dtype, (E, None)
        self.build(A.shape[0], alpha)
        self.layer.load_state_dict({"weight": tensor(E), "lora_A": tensor(A), "lora_B": tensor(B)})

    def build(self, r, alpha, dropout=0.0):
        self.alpha, shape = alpha, self.base[0].shape
        self.layer = loralib.Embedding(*shape, r=r, lora_alpha=alpha).to(torch_type(self.dtype))
        self.layer.train()

    def forward(self, ids):
        return array(self.layer(torch.tensor(ids)))

    def vjp(self, ids, g):
        self.layer.zero_grad()
        self.layer(torch.tensor(ids)).backward(tensor(g, self.dtype))
        named = {"E": self.layer.weight, "A": self.layer.lora_A, "B": self.layer.lora_B}
        return {name: None if p.grad is None else array(p.grad) for name, p in named.items()}

    def unmerge(self):
        self.layer.train()


def lora_embedding(E, A, B, alpha, dtype):
    return Table(E, A, B, alpha, dtype)


def torch_type(dtype):
    return getattr(torch, dtype)


def tensor(x, dtype="float64"):
    return torch.tensor(x).to(torch_type(dtype))


def array(t):
    return t.detach().double().numpy()
