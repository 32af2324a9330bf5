"""(IA)^3 against PEFT's, on T5: the numbers in tests/fixtures/adapters/ia3 (gated) and ia3_relu (relu), both with some
negative factors.

The tolerances are the project's: float64 outputs to 1e-12 and gradients to 1e-10 of the tensor's largest entry."""
from __future__ import annotations

import json

import pytest

from minipeft import IA3
from tests.methods.golden import FIXTURES, Golden, as_it_is, our_layer, parts


def our_key(key: str) -> str:
    return f"{our_layer(*parts(r'(.+)[.]ia3_l', key))}@a.l"


@pytest.fixture(params=["ia3", "ia3_relu"])
def case(request):
    config = json.loads((FIXTURES / "adapters" / request.param / "adapter_config.json").read_text())
    assert (config["target_modules"], config["feedforward_modules"]) == (["k", "v", "wo"], ["wo"])
    return Golden.of(request.param, IA3(), our_key, as_it_is)


def test_logits_plugged_merged_and_unplugged_are_those_of_peft(case):
    assert any((value < 0).any() for name, value in case.theirs.items() if ".wo@" in name), "some factors are negative"
    case.check_outputs()


def test_loss_and_every_gradient_are_those_of_peft(case):
    case.check_gradients()
