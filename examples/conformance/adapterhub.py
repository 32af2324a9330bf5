"""AdapterHub's adapters: bottleneck adapters in the feed-forward layer of a tiny T5's encoder.

The layer is asked for what it makes of the sublayer's output F and the stream x; T5 itself computes neither here.
seq_bn is Pfeiffer's placement, double_seq_bn Houlsby's, par_bn the parallel one.

    pip install adapters==1.3.0 torch
    python -m minipeft.conformance --impl examples.conformance.adapterhub
"""
import logging
import tempfile
from importlib.metadata import version
from pathlib import Path

import adapters
import torch
from adapters.methods.bottleneck import BottleneckLayer
from transformers import T5Config, T5EncoderModel

capabilities = dict(name="AdapterHub adapters", version=version("adapters"),
                    dtypes=["float64", "float32", "bfloat16", "float16"])

CONFIGS = {"houlsby": adapters.DoubleSeqBnConfig, "pfeiffer": adapters.SeqBnConfig, "parallel": adapters.ParBnConfig}
ACTIVATIONS = {"gelu_tanh": "gelu_new"}  # as transformers calls it
NAMES = {"adapter_down.0.weight": "D", "adapter_down.0.bias": "b_D", "adapter_up.weight": "U", "adapter_up.bias": "b_U"}

logging.getLogger("adapters").setLevel(logging.ERROR)  # that no adapter is active yet


class Handle:
    def __init__(self, D, b_D, U, b_U, dtype, activation, placement, scale):
        self.dtype, (m, d) = dtype, D.shape
        config = CONFIGS[placement](non_linearity=ACTIVATIONS.get(activation, activation), scaling=float(scale),
                                    reduction_factor=d / (m + 0.5))  # the width is d // reduction_factor
        self.model = T5EncoderModel(T5Config(vocab_size=1, d_model=d, d_kv=1, d_ff=1, num_layers=1, num_heads=1))
        adapters.init(self.model)
        self.model.add_adapter("a", config)
        self.model.train_adapter("a")
        self.use("a")
        state = dict(zip(NAMES, map(torch.tensor, (D, b_D, U, b_U))))
        self.adapter.load_state_dict(state)

    def use(self, name):
        self.model.to(getattr(torch, self.dtype)).eval()
        self.layer = [m for m in self.model.modules() if isinstance(m, BottleneckLayer) and name in m.adapters][-1]
        self.name, self.adapter = name, self.layer.adapters[name]

    def given(self, *arrays):
        return [torch.tensor(x)[None].to(getattr(torch, self.dtype)) for x in arrays]

    def run(self, x, F):
        return self.layer.bottleneck_layer_forward(F, x, None)

    def forward(self, x, n, F):
        return array(self.run(*self.given(x, F))[0])

    def vjp(self, x, n, F, g):
        x, F, g = self.given(x, F, g)
        self.model.zero_grad()
        self.run(x.requires_grad_(), F.requires_grad_()).backward(g)
        grads = {name: array(p.grad) for name, p in self.parameters().items()}
        return {**grads, "x": array(x.grad[0]), "F": array(F.grad[0]), "n": None}

    def parameters(self):
        return {NAMES[name]: p for name, p in self.adapter.named_parameters()}

    def trainable(self):
        return {name for name, p in self.parameters().items() if p.requires_grad}

    def save(self):
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_adapter(folder, self.name)
            return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    def load(self, files):
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            name = self.model.load_adapter(folder, load_as="loaded")
        self.model.set_active_adapters(name)
        self.use(name)


def bottleneck_adapter(D, b_D, U, b_U, dtype, *, activation="relu", placement="houlsby", scale=1.0):
    return Handle(D, b_D, U, b_U, dtype, activation, placement, scale)


def array(t):
    return t.detach().double().numpy()
