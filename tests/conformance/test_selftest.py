"""The self-test is itself to be trusted: it says what is wrong when something is. (That nothing is wrong, CI asks of
the whole of it; here a few methods and dtypes are asked.)"""
import dataclasses

import pytest

from minipeft.conformance import selftest
from minipeft.conformance.method import Mutant, Property
from minipeft.conformance.methods import all_methods
from minipeft.conformance.methods.lora_linear.laws import forward
from minipeft.conformance.methods.lora_linear.plain import LoraLinear

SCALES = ("lora.scale_forgotten", "lora.scale_alpha", "lora.scale_times_rank", "lora.scale_sqrt", "lora.scale_twice")


@pytest.fixture
def small(monkeypatch):
    """lora_linear with one property and two mutants, so that it is quick; `put` replaces more of it."""
    def put(**fields):
        method = all_methods()["lora_linear"]
        mutants = tuple(m for m in method.mutants if m.id in SCALES[:2])
        changed = dataclasses.replace(method, **{
            "properties": (Property("L1", "V: forward", ("forward",), forward),), "mutants": mutants, **fields})
        monkeypatch.setattr(selftest, "all_methods", lambda: {"lora_linear": changed})
        monkeypatch.setattr("minipeft.conformance.stages.all_methods", lambda: {"lora_linear": changed})
        monkeypatch.setattr(selftest, "_held", lambda pairs: (selftest.held(*pair) for pair in pairs))
        return selftest.self_test(dtypes=["float32"])
    return put


def test_all_is_well_where_it_is(small, capsys):
    assert small() == 0
    assert "2 of   2 planted bugs found" in capsys.readouterr().out


def test_a_mutant_that_survives_is_named(small, capsys):
    mutants = (Mutant("lora.no_bug", "ScaleForgotten", LoraLinear), *all_methods()["lora_linear"].mutants[:1])
    assert small(mutants=mutants) == 1
    assert "WRONG  lora_linear float32: lora.no_bug is not found" in capsys.readouterr().out


def test_a_mutant_that_is_said_to_be_below_the_resolution_and_is_not_is_named(small, capsys):
    mutants = (dataclasses.replace(all_methods()["lora_linear"].mutants[0], below={"float32": "too small"}),)
    assert small(mutants=mutants) == 1
    assert "is declared to be below the resolution (too small), but is found" in capsys.readouterr().out


def test_a_property_that_finds_nothing_is_named(small, capsys):
    idle = Property("L0", "M: nothing", (), lambda case, make: iter(()))
    assert small(properties=(*all_methods()["lora_linear"].properties[:1], idle)) == 1
    assert "lora_linear: L0 (M: nothing) finds no planted bug" in capsys.readouterr().out


def test_a_plain_implementation_that_fails_is_named(small, capsys):
    assert small(plain=all_methods()["lora_linear"].mutants[0].build) == 1
    assert "the plain implementation fails L1" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", selftest.DTYPES)
def test_scale_bugs_are_more_than_ten_bounds_away_on_the_layer_of_the_notes(dtype):
    """N 7, in 48, out 33, r 3, alpha 5: the worst rho of forward, gradients and merged weight, over five seeds."""
    import numpy

    from minipeft.conformance.look import look
    from minipeft.conformance.numbers import floats

    method = all_methods()["lora_linear"]
    for mutant in (m for m in method.mutants if m.id in SCALES):
        plugin = selftest.plugin_of(method, mutant.build, dtype)
        for seed in range(5):
            rng = numpy.random.default_rng(seed)
            case = method.draw(rng, dtype, False, {"N": 7, "in": 48, "out": 33, "r": 3})
            arrays = {name: floats(rng, array.shape, dtype) for name, array in case.arrays.items()}
            case = plugin.settle(case.but(arrays, {"alpha": 5.0}), method)
            seen = [o for prop in method.properties if prop.id in ("L1", "L2", "L3")
                    for o in look(prop, case, plugin, plugin.make(method))[0]]
            worst = max(o.rho for o in seen)
            assert worst > 10, (mutant.id, seed, worst)
