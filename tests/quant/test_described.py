"""Descriptions of quantized weights: they make the same scheme again, or are refused."""
from __future__ import annotations

import json

import numpy
import pytest

from minipeft.quant import QuantizedWeight, scheme
from minipeft.quant.affine import Affine
from minipeft.quant.described import described, description
from minipeft.quant.scheme import SCHEMES


@pytest.mark.parametrize("kind", sorted(SCHEMES))
def test_a_description_survives_json_and_makes_the_same_scheme_again(kind):
    weight = QuantizedWeight.of(numpy.random.default_rng(0).standard_normal((8, 64)), scheme(kind))
    said = json.loads(json.dumps(description(weight)))
    assert described("w", said, (8, 64)) == weight.scheme and said["kind"] == kind and said["shape"] == [8, 64]


def test_options_that_differ_from_the_defaults_are_described():
    weight = QuantizedWeight.of(numpy.ones((8, 64)), scheme("int3", group=16))
    assert description(weight)["options"]["group"] == 16
    assert described("w", description(weight), (8, 64)) == weight.scheme != scheme("int3")


class Unregistered(Affine):
    """A scheme of a class that SCHEMES does not have, under a kind that is not there, or that means another class."""

    kind = "mine"


class Impostor(Affine):
    kind = "int3"


@pytest.mark.parametrize("cls", [Unregistered, Impostor])
def test_a_scheme_that_nobody_could_make_again_is_not_written(cls):
    weight = QuantizedWeight.of(numpy.ones((8, 64)), cls(3))
    with pytest.raises(ValueError, match="cannot be written: scheme"):
        description(weight)
