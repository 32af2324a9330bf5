"""Selective tuning of the norms against PEFT's LN tuning, on T5: the numbers in tests/fixtures/adapters/ln_tuning. PEFT
stores whole weights, so d is their weight less the base's.

The tolerances are the project's: float64 outputs to 1e-12 and gradients to 1e-10 of the tensor's largest entry."""
from __future__ import annotations

import pytest

from minipeft import Selective
from tests.methods.golden import Golden, our_layer, parts


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
