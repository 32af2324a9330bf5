"""The Transformer against torch.nn.Transformer, in float64: post-LN with ReLU, pre-LN with exact GELU."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from minipeft import Parameter, Transformer, TransformerConfig, value_and_grad
from minipeft.files import read_tensors
from minipeft.models.torch_names import from_torch

FIXTURES = Path(__file__).parents[1] / "fixtures" / "vaswani"
CASES = ["post_relu", "pre_gelu"]


def built(case: str) -> tuple[Transformer, dict[str, np.ndarray]]:
    """Our model with torch's weights, and torch's numbers. torch has no positions: here they are a table of zeros."""
    values = json.loads((FIXTURES / case / "config.json").read_text())
    config = TransformerConfig(
        vocab_size=2, d_model=values["d_model"], num_heads=values["nhead"], d_ff=values["dim_feedforward"],
        num_layers=values["num_encoder_layers"], num_decoder_layers=values["num_decoder_layers"],
        pre_norm=values["norm_first"], activation=values["activation"], layer_norm_eps=values["layer_norm_eps"],
        final_norm=True, positions="learned", max_length=7)
    model = Transformer(config, None, "float64")
    body = from_torch(read_tensors(FIXTURES / case / "model.safetensors")[0])
    outside = {n: p.data for n, p in model.base_parameters.items() if n.endswith("position.weight") or "embed" in n}
    model.load_state({**body, **outside})
    with np.load(FIXTURES / case / "golden.npz") as golden:
        return model, dict(golden)


def ran(model: Transformer, golden: dict[str, np.ndarray], src: Parameter, tgt: Parameter):
    mask = ~golden["src_key_padding_mask"]
    memory, mask = model.encoder(src, mask)
    return model.decoder(tgt, None, memory, mask)[0]


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    """Relative to the tensor's largest entry."""
    return found.shape == expected.shape and np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_the_output_is_that_of_torch_to_1e_12(case):
    model, golden = built(case)
    output = ran(model, golden, Parameter(golden["src"]), Parameter(golden["tgt"]))
    assert output.dtype == np.float64 and close(output.data, golden["output"], 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_is_that_of_torch_to_1e_10(case):
    model, golden = built(case)
    src, tgt = Parameter(golden["src"]), Parameter(golden["tgt"])
    expected = from_torch({k.removeprefix("grad/"): v for k, v in golden.items() if k.startswith("grad/")})
    body = {name: p for name, p in model.base_parameters.items() if "position" not in name and "embed" not in name}
    assert set(expected) == set(body), "torch gives a gradient for each parameter of the body"
    loss, grads = value_and_grad(lambda: (ran(model, golden, src, tgt) * golden["cotangent"]).sum(),
                                 {**body, "src": src, "tgt": tgt})
    # of a sum of terms of both signs: relative to the largest partial sum that it may pass through
    scale = np.abs(golden["output"] * golden["cotangent"]).sum()
    assert abs(loss - (golden["output"] * golden["cotangent"]).sum()) <= 1e-12 * scale
    expected |= {"src": golden["dsrc"], "tgt": golden["dtgt"]}
    for name, g in grads.items():
        if name.endswith("k.bias"):  # zero in theory: a softmax does not see what is added to all its scores
            largest = np.abs(expected[name.replace("k.bias", "q.bias")]).max()
            assert np.abs(g).max() <= 1e-10 * largest >= np.abs(expected[name]).max(), name
        else:
            assert close(g, expected[name], 1e-10), name


@pytest.mark.parametrize("case", CASES)
def test_the_output_depends_on_every_weight_that_is_mapped(case):
    """A table that exchanged two tensors of one shape, or dropped one, would not pass unseen."""
    model, golden = built(case)
    before = ran(model, golden, Parameter(golden["src"]), Parameter(golden["tgt"])).data
    for name, p in model.base_parameters.items():
        if "position" in name or "embed" in name or name.endswith("k.bias"):
            continue
        kept = p.data
        p.data = kept * 1.01 + 0.01
        changed = ran(model, golden, Parameter(golden["src"]), Parameter(golden["tgt"])).data
        p.data = kept
        assert not close(changed, before, 1e-9), name


def test_the_table_maps_each_tensor_of_torch_to_one_name_and_reaches_all_of_ours():
    model, _ = built("pre_gelu")
    state = read_tensors(FIXTURES / "pre_gelu" / "model.safetensors")[0]
    packed = [key for key in state if "in_proj" in key]
    found = from_torch(state)
    assert len(found) == len(state) + 2 * len(packed), "no two keys have one name"
    assert sum(a.size for a in found.values()) == sum(a.size for a in state.values())
    missing = set(model.base_parameters) - set(found)
    assert missing == {"embedding.weight", "encoder.position.weight", "decoder.position.weight"}
    q, k, v = (found[f"decoder.1.cross.{part}.weight"] for part in "qkv")
    assert np.array_equal(np.concatenate([q, k, v]), state["decoder.layers.1.multihead_attn.in_proj_weight"])


@pytest.mark.parametrize("key", ["encoder.layers.0.multihead_attn.in_proj_weight", "encoder.layers.0.norm3.weight",
                                 "encoder.layers.x.linear1.weight", "encoder.layers.0.linear3.weight", "src_mask",
                                 "encoder.layers.0.self_attn.in_proj_weight_g", "module.encoder.norm.weight",
                                 "decoder.layers.0.self_attn.in_proj.weight", "encoder.norm.scale", ""])
def test_a_key_that_torch_does_not_have_is_refused(key):
    with pytest.raises(ValueError, match="not a key of torch.nn.Transformer"):
        from_torch({key: np.zeros((6, 2))})


@pytest.mark.parametrize("shape", [(7, 2), (), (1,)])
def test_a_packed_projection_that_is_not_three_is_refused(shape):
    with pytest.raises(ValueError, match="in_proj_weight has shape .*3 blocks"):
        from_torch({"encoder.layers.0.self_attn.in_proj_weight": np.zeros(shape)})
