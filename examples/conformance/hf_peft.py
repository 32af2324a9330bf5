"""Hugging Face PEFT: LoRA on nn.Linear and nn.Embedding, adapters in the dtype of the base.

    pip install peft==0.21.2 torch
    python -m minipeft.conformance --impl examples.conformance.hf_peft
"""
import io
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from importlib.metadata import version
from pathlib import Path

import peft
import torch

capabilities = dict(name="huggingface/peft, autocast_adapter_dtype=False", version=version("peft"),
                    dtypes=["float64", "float32", "bfloat16", "float16"])


class Handle:
    """PEFT on the one module of a model. autocast: whether adapters on a half-precision base are kept in float32,
    PEFT's own default."""

    target = "layer"

    def __init__(self, build, A, B, alpha, dtype, dropout, autocast):
        self.build, self.dtype, self.autocast = build, dtype, autocast
        self.active, config = "default", self.config(A, alpha, dropout)
        self.model = peft.get_peft_model(self.base(), config, autocast_adapter_dtype=autocast).eval()
        self.fill("default", A, B)

    def base(self):
        return torch.nn.Sequential(OrderedDict(layer=self.build())).to(getattr(torch, self.dtype))

    def config(self, A, alpha, dropout=0.0):
        return peft.LoraConfig(r=len(A), lora_alpha=alpha, target_modules=[self.target], lora_dropout=dropout)

    def fill(self, name, A, B):
        keys = sorted(peft.get_peft_model_state_dict(self.model, adapter_name=name))  # that of A, that of B
        peft.set_peft_model_state_dict(self.model, dict(zip(keys, map(torch.tensor, (A, B)))), adapter_name=name)

    @property
    def layer(self):
        return self.model.base_model.model.layer

    def given(self, x):
        return torch.tensor(x) if x.dtype.kind == "i" else torch.tensor(x).to(getattr(torch, self.dtype))

    def forward(self, x):
        return array(self.model(self.given(x)))

    def forward_rows(self, x, rows):
        return array(self.model(self.given(x), adapter_names=[name or "__base__" for name in rows]))

    def forward_train(self, x, keep):
        dropout = self.layer.lora_dropout[self.active]
        factor = self.given(keep) / (1 - dropout.p)
        dropout.forward = lambda given: given * factor  # the mask that the kit asks for, this once
        try:
            return self.forward(x)
        finally:
            del dropout.forward

    def vjp(self, x, g):
        x = self.given(x)
        x.requires_grad = x.is_floating_point()
        self.model.zero_grad()
        self.model(x).backward(self.given(g))
        found = {short(name): p.grad for name, p in self.model.named_parameters()
                 if "lora_" not in name or f".{self.active}" in name}
        return {name: None if p is None else array(p) for name, p in {**found, "x": x.grad}.items()}

    def trainable(self):
        return {short(name) for name, p in self.model.named_parameters() if p.requires_grad}

    def step(self, x, g, lr):
        self.vjp(x, g)
        torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr).step()

    def weight(self):
        return array(self.layer.base_layer.weight)

    def merge(self):
        self.model.merge_adapter()

    def merge_safe(self):
        self.model.merge_adapter(safe_merge=True)

    def unmerge(self):
        self.model.unmerge_adapter()

    def is_merged(self):
        return self.layer.merged

    def add(self, name, A, B, alpha):
        self.model.add_adapter(name, self.config(A, alpha), autocast_adapter_dtype=self.autocast)
        try:
            self.fill(name, A, B)
        except Exception:  # PEFT makes an adapter and fills it in two steps, and knows it after the first
            self.model.delete_adapter(name)
            raise

    def activate(self, names):
        self.model.base_model.enable_adapter_layers()
        if not names:
            self.model.base_model.disable_adapter_layers()
        for name in names:
            self.model.set_adapter(name)
        self.active = names[0] if names else "default"
        if len(names) > 1:
            self.model.base_model.set_adapter(list(names))

    def remove(self, name):
        self.model.delete_adapter(name)

    def save(self):
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, selected_adapters=[self.active])
            if self.active != "default":
                folder = str(Path(folder) / self.active)
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                for path in sorted(Path(folder).iterdir()):
                    archive.write(path, path.name)
        return file.getvalue()

    def load(self, blob):
        with tempfile.TemporaryDirectory() as folder:
            zipfile.ZipFile(io.BytesIO(blob)).extractall(folder)
            self.model = peft.PeftModel.from_pretrained(self.base(), folder, is_trainable=True,
                                                        autocast_adapter_dtype=self.autocast).eval()
        self.active = "default"

    def state_keys(self):
        return {short(name) for name in peft.get_peft_model_state_dict(self.model)}


def short(name, weight="W"):
    """PEFT's name of a parameter as the kit calls it."""
    for part, letter in (("_A", "A"), ("_B", "B"), ("layer.weight", weight), ("layer.bias", "b")):
        if part in name:
            return letter
    return name


def array(t):
    return t.detach().double().numpy()


def linear(W, b):
    layer = torch.nn.Linear(*W.shape[::-1], dtype=torch.float64)
    layer.load_state_dict({"weight": torch.tensor(W), "bias": torch.tensor(b)})
    return layer


def embedding(E):
    return torch.nn.Embedding(*E.shape, _weight=torch.tensor(E))


def lora_linear(W, b, A, B, alpha, dtype, *, dropout=0.0, autocast=False):
    return Handle(lambda: linear(W, b), A, B, alpha, dtype, dropout, autocast)


def lora_embedding(E, A, B, alpha, dtype, *, autocast=False):
    return Handle(lambda: embedding(E), A, B, alpha, dtype, 0.0, autocast)


warnings.filterwarnings("ignore", module="peft")  # of merging what is merged
