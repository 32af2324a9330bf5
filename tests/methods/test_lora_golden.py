"""LoRA against peft and loralib: logits, merged logits, every gradient of the adapters in tests/fixtures.

peft's names are translated by hand, because reading its files is another part of the library. Tolerances: outputs to
1e-12 and gradients to 1e-10 of the tensor's largest entry."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minipeft import LoRA, Parameter, Selective, T5, attach, value_and_grad
from minipeft.files import read_tensors
from minipeft.methods.merged import MergedLowRank
from minipeft.nn.layers import Linear
from minipeft.nn.module import Model
from tests.methods.golden import close

FIXTURES = Path(__file__).parents[1] / "fixtures"
# {folder: the fields of our LoRA that mean what peft's configuration says, beside r and alpha}
FIELDS: dict[str, dict[str, Any]] = {
    "lora_qv_tied": {}, "lora_all_linear": {"where": r"\.(q|k|v|o|wi_0|wi_1|wo)\.weight$"},
    "lora_rslora": {"where": r"\.(q|k|v|o)\.weight$", "scaling": "alpha/sqrt(r)"},
    "lora_rank_alpha_pattern": {"where": r"\.(q|v|wo)\.weight$",
                                "rank_pattern": {r"^encoder\.1\.attn\.q\.": 5, r"\.wo\.": 2},
                                "alpha_pattern": {r"\.attn\.v\.": 1.5, r"\.wo\.": 16}},
    "lora_modules_to_save": {"where": r"\.q\.weight$"}}


def golden(*path: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES.joinpath(*path)) as arrays:
        return dict(arrays)


def adapted(folder: str) -> tuple[T5, list[Any], dict[str, np.ndarray], dict[str, str]]:
    """(model, attachments, golden, {peft's key: our name}), with peft's A and B in ours; a full copy of a module that
    peft saves is its difference from the base in a Selective."""
    path = FIXTURES / "adapters" / folder
    said, g = json.loads((path / "adapter_config.json").read_text()), golden("adapters", folder, "golden.npz")
    assert said["use_rslora"] == (FIELDS[folder].get("scaling") == "alpha/sqrt(r)") and not said["use_dora"]
    assert [len(said[f]) for f in ("rank_pattern", "alpha_pattern")] == [
        len(FIELDS[folder].get(f, ())) for f in ("rank_pattern", "alpha_pattern")]
    model = T5.from_pretrained(FIXTURES / str(g["base"]), "float64")
    rng = np.random.default_rng(0)
    attachments = [attach(model, LoRA(said["r"], said["lora_alpha"], **FIELDS[folder]), rng)]
    if said["modules_to_save"]:
        attachments.append(attach(model, Selective(component="head"), rng, "head"))
    parameters = {name: p for a in attachments for name, p in a.parameters.items()}
    names = {}
    for key, array in read_tensors(path / "adapter_model.safetensors")[0].items():
        module, _, leaf = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        if not module:  # a full copy
            module = leaf
            array = array.astype("float64") - model.state()[T5.from_hf_name(f"{module}.weight")]
        names[key] = T5.from_hf_name(f"{module}.weight") + (f"@lora.{leaf}" if leaf != module else "@head.d")
        assert parameters[names[key]].shape == array.shape
        parameters[names[key]].data = array.astype("float64")
    assert set(names.values()) == set(parameters), "every one of our arrays is filled from the file"
    return model, attachments, g, names


def run(model: T5, g: dict[str, np.ndarray]) -> np.ndarray:
    return model(g["input_ids"], g["decoder_input_ids"], g["attention_mask"]).data


@pytest.mark.parametrize("folder", FIELDS)
def test_logits_plugged_merged_and_unplugged_are_those_of_peft(folder):
    model, attachments, g, _ = adapted(folder)
    plugged = run(model, g)
    assert close(plugged, g["logits"], 1e-12)
    assert not close(g["logits"], g["logits_base"], 1e-2), "the adapter does something"
    for attachment in attachments:
        attachment.merge()
    assert close(run(model, g), g["logits_merged"], 1e-12)
    for attachment in attachments:
        attachment.unmerge()
    assert np.array_equal(run(model, g), plugged)
    for attachment in attachments:
        attachment.unplug()
    assert close(run(model, g), g["logits_base"], 1e-12)


@pytest.mark.parametrize("folder", FIELDS)
def test_every_gradient_of_the_summed_loss_is_that_of_peft(folder):
    model, attachments, g, names = adapted(folder)
    loss, grads = value_and_grad(
        lambda: model.loss(g["input_ids"], g["labels"], g["attention_mask"]) * int(g["n_label_tokens"]),
        {name: p for a in attachments for name, p in a.parameters.items()})
    assert abs(loss - g["loss_sum"]) <= 1e-12 * g["loss_sum"]
    expected = {key.removeprefix("grad/"): value for key, value in g.items() if key.startswith("grad/")}
    assert set(expected) == set(names)
    for key, value in expected.items():
        assert close(grads[names[key]], value, 1e-10), key


def test_the_merged_table_is_that_of_peft_and_here_the_plugged_one_acts_too():
    """peft's forward on a T5 ignores a LoRA on the shared table, and its merge applies it."""
    folder = FIXTURES / "adapters" / "lora_embedding"
    said, g = json.loads((folder / "adapter_config.json").read_text()), golden("adapters", folder.name, "golden.npz")
    assert close(g["logits_peft_forward"], g["logits_base"], 1e-15), "the defect"
    model = T5.from_pretrained(FIXTURES / str(g["base"]), "float64")
    table = model.state()["embedding.weight"].copy()
    lora = attach(model, LoRA(said["r"], said["lora_alpha"], where="^embedding"), np.random.default_rng(0))
    tensors = read_tensors(folder / "adapter_model.safetensors")[0]
    for ours, theirs in (("A", "B"), ("B", "A")):  # the authors' A and B change places in an embedding
        [array] = [value for key, value in tensors.items() if f"lora_embedding_{theirs}" in key]
        lora.parameters[f"embedding.weight@lora.{ours}"].data = array.astype("float64").T.copy()
    plugged = run(model, g)
    assert close(plugged, g["logits_peft_merged"], 1e-12) and not close(plugged, g["logits_base"], 1e-2)
    lora.merge()
    assert close(run(model, g), g["logits_peft_merged"], 1e-12)
    assert close(model.slots["embedding.weight"].fold().dense().data - table, g["delta_shared"], 1e-12)


# ------------------------------------------------------------------------------------------------------------- loralib

class Lone(Model):
    """A model of one layer."""

    def __init__(self, layer: Linear):
        self.layer = layer


@pytest.mark.parametrize("file", ["linear_fan_in_fan_out", "merged_linear", "merged_linear_all"])
def test_a_linear_layer_is_that_of_loralib_stored_transposed_or_merged(file):
    """fan_in_fan_out stores the weight as [d_in, d_out]. We hold [d_out, d_in], and A and B are the same."""
    g = golden("loralib", f"{file}.npz")
    stored = (lambda w: w.T) if g["fan_in_fan_out"] else (lambda w: w)
    weight = np.ascontiguousarray(stored(g["param/weight"]))
    layer = Linear(weight.copy(), g.get("param/bias"))
    enable = tuple(map(bool, g["enable_lora"])) if "enable_lora" in g else None
    model = Lone(layer)
    lora = attach(model, LoRA(int(g["r"]), int(g["lora_alpha"]), where="weight", enable=enable),
                  np.random.default_rng(0))
    assert isinstance(lora.at[layer.weight], MergedLowRank) == (enable is not None)
    for leaf in "AB":
        assert lora.parameters[f"layer.weight@lora.{leaf}"].shape == g[f"param/lora_{leaf}"].shape
        lora.parameters[f"layer.weight@lora.{leaf}"].data = g[f"param/lora_{leaf}"]
    x = Parameter(g["x"])
    assert close(layer(x).data, g["y"], 1e-12)
    trained = {**{f"lora_{name[-1]}": p for name, p in lora.parameters.items()}, "x": x}
    if "grad/bias" in g:
        trained["bias"] = model.base_parameters["layer.bias"]
    _, grads = value_and_grad(lambda: (layer(x) * g["dy"]).sum(), trained)
    assert {f"grad/{name}" for name in grads} == {key for key in g if key.startswith("grad/")}
    for name, found in grads.items():
        assert close(found, g[f"grad/{name}"], 1e-10), name
    lora.merge()
    merged = layer.weight.fold().dense().data
    assert close(merged, stored(g["merged_weight"]), 1e-12) and close(layer(x).data, g["y_merged"], 1e-12)
    if enable is not None:
        assert close(merged - weight, g["delta_weight"], 1e-12)
        untouched = ~np.repeat(enable, len(weight) // len(enable))
        assert np.array_equal(merged[untouched], weight[untouched])
    lora.unmerge()
    lora.unplug()
    assert layer.weight.fold().dense().data.tobytes() == weight.tobytes(), "here every bit comes back"
    assert close(weight, stored(g["unmerged_weight"]), 1e-12)
