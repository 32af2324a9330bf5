"""Selective tuning against PEFT on T5: LN tuning (tests/fixtures/adapters/ln_tuning), where PEFT stores whole weights,
so that d is their weight less the base's; and SHiRA (tests/fixtures/zoo/shira_t5), which trains single elements.

The tolerances are the project's: float64 outputs to 1e-12 and gradients to 1e-10 of the tensor's largest entry."""
from __future__ import annotations

import numpy
import pytest

from minipeft import T5, Selective, attach, value_and_grad
from minipeft.files import read_tensors
from tests.methods.golden import FIXTURES, Golden, close, our_layer, parts


def our_key(key: str) -> str:
    return f"{our_layer(*parts(r'(.+)[.]ln_tuning_layers[.]weight', key))}.weight@a.d"


def difference(model, name, weight):
    return weight - model.state()[name.partition("@")[0]]


@pytest.fixture
def case():
    return Golden.of("ln_tuning", Selective(component="norm"), our_key, difference)


def test_logits_plugged_merged_and_unplugged_are_those_of_peft(case):
    case.check_outputs()


def test_loss_and_every_gradient_are_those_of_peft(case):
    case.check_gradients()


def test_the_norms_of_both_stacks_are_among_them(case):
    norms = {name.partition(".weight@")[0] for name in case.theirs}
    assert {"encoder.norm", "decoder.norm", "encoder.0.attn_norm", "decoder.1.cross_norm", "decoder.1.ff_norm"} <= norms


def test_elements_at_given_indices_are_those_of_shira_in_logits_merged_logits_and_gradients():
    """W + sparse(indices, w) is W0 + scatter(d, i): a mask."""
    folder = FIXTURES / "zoo" / "shira_t5"
    with numpy.load(folder / "golden.npz") as arrays:
        g = dict(arrays)
    theirs = read_tensors(folder / "adapter_model.safetensors")[0]
    model = T5.from_pretrained(FIXTURES / str(g["base"]), "float64")
    masks, values, expected = {}, {}, {}
    for key in (key for key in g if key.startswith("indices/")):
        layer, long = f"{our_layer(key.removeprefix('indices/'))}.weight", f"base_model.model.{key[8:]}.shira_weight"
        masks[layer] = numpy.ravel_multi_index(g[key], model.slots[layer].shape)
        order = numpy.argsort(masks[layer])
        values[f"{layer}@a.d"], expected[f"{layer}@a.d"] = theirs[long][order], g[f"grad/{long}"][order]
    attachment = attach(model, Selective(mask=masks), numpy.random.default_rng(0), "a")
    assert set(values) == set(attachment.parameters) and len(values) == 12
    base = model(g["input_ids"], g["decoder_input_ids"], g["attention_mask"]).data
    for name, array in values.items():
        attachment.parameters[name].data = array.astype("float64")

    def logits():
        return model(g["input_ids"], g["decoder_input_ids"], g["attention_mask"]).data

    assert close(logits(), g["logits"], 1e-12) and not close(base, g["logits"], 1e-2)
    loss, grads = value_and_grad(lambda: model.loss(g["input_ids"], g["labels"], g["attention_mask"]),
                                 attachment.parameters)
    assert abs(loss - g["loss"]) <= 1e-12 * g["loss"]
    for name, wanted in expected.items():
        assert close(grads[name] * int(g["n_label_tokens"]), wanted, 1e-10), name
    attachment.merge()
    assert close(logits(), g["logits_merged"], 1e-12)
