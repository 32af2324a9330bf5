"""What the golden tests share: the comparison `close`, and adapters of PEFT on T5 (tests/fixtures/adapters) under our
names."""
from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Callable

import numpy

from minipeft import T5, attach, value_and_grad
from minipeft.files import read_tensors

FIXTURES = Path(__file__).parents[1] / "fixtures"
PREFIX = "base_model.model."


def close(found: numpy.ndarray, expected: numpy.ndarray, tolerance: float) -> bool:
    """Relative to the tensor's largest entry."""
    return found.shape == expected.shape and bool(abs(found - expected).max() <= tolerance * abs(expected).max())


def our_layer(theirs: str) -> str:
    """encoder.0.attn.q, of PEFT's base_model.model.encoder.block.0.layer.0.SelfAttention.q."""
    return T5.from_hf_name(theirs.removeprefix(PREFIX) + ".weight").removesuffix(".weight")


@dataclasses.dataclass
class Golden:
    """A folder of PEFT's. model: its base. attachment: a method of ours on it, "a", with their numbers. g: golden.npz.
    theirs: {our name: their array, float64}. expected: {our name: their gradient of the summed loss}."""

    model: Any
    attachment: Any
    g: dict
    theirs: dict
    expected: dict

    @classmethod
    def of(cls, folder: str, method: Any, our_key: Callable[[str], str],
           array: Callable[[Any, str, numpy.ndarray], numpy.ndarray]) -> "Golden":
        """our_key: their key -> our name of a parameter. array: (model, our name, their array) -> ours."""
        path = FIXTURES / "adapters" / folder
        with numpy.load(path / "golden.npz") as arrays:
            g = dict(arrays)
        model = T5.from_pretrained(FIXTURES / str(g["base"]), "float64")
        attachment = attach(model, method, numpy.random.default_rng(0), "a")
        theirs = {our_key(key): value.astype("float64")
                  for key, value in read_tensors(path / "adapter_model.safetensors")[0].items()}
        assert set(theirs) == set(attachment.parameters), "their adapters and ours stand at the same places"
        for name, value in theirs.items():
            p = attachment.parameters[name]
            p.data = numpy.ascontiguousarray(array(model, name, value)).reshape(p.shape)
        expected = {our_key(key.removeprefix("grad/")): value for key, value in g.items() if key.startswith("grad/")}
        return cls(model, attachment, g, theirs, expected)

    def logits(self) -> numpy.ndarray:
        g = self.g
        return self.model(g["input_ids"], g["decoder_input_ids"], g["attention_mask"]).data

    def check_outputs(self, tolerance: float = 1e-12) -> None:
        """Plugged, merged and unplugged, the logits are theirs."""
        assert close(self.logits(), self.g["logits"], tolerance)
        assert not close(self.g["logits"], self.g["logits_base"], 1e-2), "the adapter does something"
        self.attachment.merge()
        assert close(self.logits(), self.g["logits_merged"], tolerance)
        self.attachment.unmerge()
        self.attachment.unplug()
        assert close(self.logits(), self.g["logits_base"], tolerance)
        self.attachment.plug()

    def check_gradients(self, tolerance: float = 1e-10) -> None:
        """The loss is theirs, and so is every gradient: of the summed loss, relative to its largest entry."""
        g = self.g
        loss, grads = value_and_grad(lambda: self.model.loss(g["input_ids"], g["labels"], g["attention_mask"]),
                                     self.attachment.parameters)
        assert abs(loss - g["loss"]) <= 1e-12 * g["loss"]
        assert set(self.expected) == set(grads), "every golden gradient, and no other"
        for name, value in self.expected.items():
            assert close(grads[name] * int(g["n_label_tokens"]), value.reshape(grads[name].shape), tolerance), name


def parts(pattern: str, key: str) -> tuple:
    """The groups of `pattern`, which the whole key matches."""
    found = re.fullmatch(pattern, key)
    assert found, key
    return found.groups()


def as_it_is(model: Any, name: str, value: numpy.ndarray) -> numpy.ndarray:
    return value
