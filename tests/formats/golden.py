"""Directories of PEFT's and AdapterHub's with the numbers that the real library gives for them."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy

import minipeft
from minipeft import T5, value_and_grad
from minipeft.files import read_tensors
from minipeft.formats.peft import save, to_peft
from tests.methods.golden import FIXTURES, close

VALUES, GRADIENTS = 1e-10, 1e-9  # of golden data, as its notes state them: relative to the largest entry


def golden(folder: str) -> tuple[Path, dict, Any]:
    """(the directory below tests/fixtures, golden.npz, its base in float64)."""
    path = FIXTURES / folder
    with numpy.load(path / "golden.npz") as arrays:
        g = dict(arrays)
    return path, g, T5.from_pretrained(FIXTURES / str(g["base"]), "float64")


def logits(model: Any, g: dict) -> numpy.ndarray:
    return model(g["input_ids"], g["decoder_input_ids"], g["attention_mask"]).data


def check(folder: str, tmp_path: Path, key: str = "logits", **options: Any) -> Any:
    """A directory of PEFT's gives PEFT's logits, merged logits and gradients, and is written back as it was, bit for
    bit. key: of the logits. options: of `load`. Returns the attachment, plugged."""
    path, g, model = golden(folder)
    base = logits(model, g)
    attachment = minipeft.load(model, path, **options)
    assert close(logits(model, g), g[key], VALUES)
    assert not close(base, g[key], 1e-2), "the adapter does something"
    expected = {name.removeprefix("grad/"): value for name, value in g.items() if name.startswith("grad/")}
    loss, grads = value_and_grad(lambda: model.loss(g["input_ids"], g["labels"], g["attention_mask"]),
                                 attachment.parameters)
    found = to_peft(attachment, grads)
    if expected:
        assert set(found) == set(expected) and abs(loss - g["loss"]) <= VALUES * g["loss"]
        for name, value in found.items():
            assert close(value * int(g["n_label_tokens"]), expected[name], GRADIENTS), name
    if "logits_merged" in g:
        attachment.merge()
        assert close(logits(model, g), g["logits_merged"], VALUES)
        attachment.unmerge()
    with attachment.off():
        assert logits(model, g).tobytes() == base.tobytes()
    check_written(attachment, path, tmp_path / "written", **options)
    return attachment


def check_written(attachment: Any, path: Path, target: Path, **options: Any) -> None:
    """Written, it has the tensors and the fields of the directory that it came from, and it loads again. options: of
    `load`."""
    save(attachment, target)
    theirs, ours = (read_tensors(folder / "adapter_model.safetensors")[0] for folder in (path, target))
    assert set(ours) == set(theirs)
    values = to_peft(attachment, attachment.tensors)
    for name, array in theirs.items():
        assert numpy.array_equal(ours[name].astype(array.dtype), array), name
        assert numpy.array_equal(values.get(name, ours[name]), ours[name]), name
    again = minipeft.load(attachment.model.clone(), target, name="again", **options)
    assert {k: v.tobytes() for k, v in again.tensors.items()} == {
        k: v.tobytes() for k, v in attachment.tensors.items()}
