"""AdapterHub's folders give AdapterHub's numbers, and are written back as they were."""
from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest

import minipeft
from minipeft import value_and_grad
from minipeft.files import read_tensors
from minipeft.formats import adapterhub
from tests.formats.adapterhub.folders import BOTTLENECKS, FOLDERS
from tests.formats.golden import GRADIENTS, VALUES, golden, logits
from tests.methods.golden import FIXTURES, close


PREFIXES = ("prefix_flat", "prefix_mlp", "union")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_of_adapterhub_gives_its_logits_and_gradients_and_is_written_back(folder, tmp_path):
    path, g, model = golden(str(FOLDERS[folder].relative_to(FIXTURES)))
    base = logits(model, g)
    assert close(base, g["logits_base"], VALUES) and not close(base, g["logits"], 1e-2), "the adapter does something"
    attachment = adapterhub.load(model, path, as_adapterhub=True) if folder in PREFIXES else minipeft.load(model, path)
    assert (attachment.name, attachment.state) == (folder, "plugged")
    assert close(logits(model, g), g["logits"], VALUES)
    loss, grads = value_and_grad(lambda: model.loss(g["input_ids"], g["labels"], g["attention_mask"]),
                                 attachment.parameters)
    expected = {name.removeprefix("grad/"): value for name, value in g.items() if name.startswith("grad/")}
    found = adapterhub.to_adapterhub(attachment, grads)
    assert set(expected) == {key for key in found if ".pool." not in key}
    assert abs(loss - g["loss"]) <= VALUES * g["loss"]
    for name, value in expected.items():
        assert close(found[name] * int(g["n_label_tokens"]), value, GRADIENTS), name
    if folder in ("lora", "dora", "ia3"):
        attachment.merge()
        assert close(logits(model, g), g["logits"], VALUES)
        attachment.unmerge()
    with attachment.off():
        assert logits(model, g).tobytes() == base.tobytes()
    written_back(attachment, path, tmp_path / "written")


def written_back(attachment, path: Path, target: Path) -> None:
    """Written, it has the tensors and the fields of the folder that it came from, and it loads again."""
    adapterhub.save(attachment, target)
    theirs, ours = (read_tensors(folder / "adapter.safetensors")[0] for folder in (path, target))
    assert set(ours) == set(theirs)
    for name, array in theirs.items():
        assert numpy.array_equal(ours[name].astype(array.dtype), array), name
    assert sorted(ours) == sorted(adapterhub.to_adapterhub(attachment, attachment.tensors))
    before, after = (json.loads((folder / "adapter_config.json").read_text()) for folder in (path, target))
    assert after == before
    attachment.source = None  # what is written of the method alone means the same
    adapterhub.save(attachment, target.with_name("from the method"))
    for folder in (target, target.with_name("from the method")):
        again = adapterhub.load(attachment.model.clone(), folder, "again", as_adapterhub=True)
        assert again.method == attachment.method and list(again.places) == list(attachment.places)
        assert {k: v.tobytes() for k, v in again.tensors.items()} == {
            k: v.tobytes() for k, v in attachment.tensors.items()}


@pytest.mark.parametrize("folder", BOTTLENECKS)
def test_a_bottleneck_has_the_equation_of_its_configuration(folder):
    config = json.loads((FOLDERS[folder] / "adapter_config.json").read_text())["config"]
    attachment = minipeft.load(golden(f"bottleneck/{folder}")[2], FOLDERS[folder])
    method = attachment.method
    assert method.placement == folder.removesuffix("_cross") and method.activation == config["non_linearity"]
    assert method.scale == config["scaling"] and method.size == 16 // config["reduction_factor"]
    assert any(".cross." in name for name in attachment.places) == config["cross_adapter"]
