"""A LoRA on a quantized linear layer against bitsandbytes and peft: outputs and gradients of float32 training.

Sums in float32 depend on the order of additions, so two right results differ. Each of them, ours and theirs, is within
the bound of `laws/bounds.py` of the exact result for the same dequantized weight."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from minipeft import LoRA, Parameter, attach, quantize, value_and_grad
from minipeft.laws.bounds import tau, within
from minipeft.nn.layers import Linear
from minipeft.nn.module import Model

FIXTURES = Path(__file__).parents[1] / "fixtures" / "nf4"


class Lone(Model):
    """A model of one layer."""

    def __init__(self, layer: Linear):
        self.layer = layer


@pytest.mark.parametrize("file", ["nf4", "nf4_dq", "fp4"])
def test_outputs_and_gradients_of_a_lora_on_a_quantized_layer_are_those_of_bitsandbytes_and_peft(file):
    with np.load(FIXTURES / f"qlora_{file}.npz") as arrays:
        g = dict(arrays)
    model = Lone(Linear(g["W"].copy(), g.get("bias")))
    quantize(model, file[:3], double=file.endswith("dq"))
    weight = model.layer.weight.base
    leaves = {leaf: array.data for leaf, array in weight.arrays.items()}
    for leaf, array in leaves.items():
        stored = g[leaf if leaf in ("packed", "absmax") else f"dq_{leaf}"]
        assert array.shape == stored.shape and array.tobytes() == stored.tobytes(), leaf
    assert weight.dense().data.tobytes() == g["dequant"].tobytes()

    lora = attach(model, LoRA(int(g["r"]), int(g["lora_alpha"]), where="weight"), np.random.default_rng(0))
    for leaf in "AB":
        lora.parameters[f"layer.weight@lora.{leaf}"].data = g[f"lora_{leaf}"]
    x = Parameter(g["x"])
    found = {"y": model.layer(x).data}
    _, grads = value_and_grad(lambda: (model.layer(x) * g["dy"]).sum(), {**lora.parameters, "x": x})
    found |= {f"d{name[-1]}": grad for name, grad in grads.items()}
    assert set(found) == {"y", "dx", "dA", "dB"}
    assert {leaf: array.data.tobytes() for leaf, array in weight.arrays.items()} == {
        leaf: array.tobytes() for leaf, array in leaves.items()}, "codes and scales stay as they are"

    exact, size = equations(g, lambda a: a), equations(g, abs)
    for name, (value, length) in exact.items():
        bound = tau(size[name][0], length, 4, 2.0 ** -24)  # 4 single roundings: s, the sum of two terms, the bias
        assert found[name].dtype == "float32"
        assert within(found[name], value, bound) and within(g[name], value, bound), name


def equations(g: dict[str, np.ndarray], of) -> dict[str, tuple[np.ndarray, int]]:
    """{"y": (value, length of the longest chain of sums)} in float64, on `of` of every array."""
    W, A, B, x, dy = (of(g[name].astype("float64")) for name in ("dequant", "lora_A", "lora_B", "x", "dy"))
    bias = of(g["bias"].astype("float64")) if "bias" in g else 0
    s, (d_out, d_in), rank = int(g["lora_alpha"]) / int(g["r"]), W.shape, len(A)
    rows = x.size // d_in
    flat_x, flat_dy = x.reshape(rows, d_in), dy.reshape(rows, d_out)
    return {"y": (x @ W.T + bias + s * (x @ A.T) @ B.T, d_in + rank),
            "dx": (dy @ W + s * (dy @ B) @ A, d_out + rank),
            "dA": (s * (flat_dy @ B).T @ flat_x, d_out + rows), "dB": (s * flat_dy.T @ (flat_x @ A.T), d_in + rows)}
