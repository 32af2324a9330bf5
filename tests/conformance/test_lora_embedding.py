"""LoRA on a table: the reference is checked by hand and by loops, then implementations are held against it."""
import numpy
import pytest

from minipeft.conformance.case import Case
from minipeft.conformance.look import look
from minipeft.conformance.methods.lora_embedding import METHOD
from minipeft.conformance.methods.lora_embedding.equations import exact_values, values
from minipeft.conformance.methods.lora_embedding.ours import lora_embedding
from minipeft.conformance.observe import near
from minipeft.conformance.plugin import Fault
from minipeft.conformance.selftest import drawn, plugin_of
from minipeft.conformance.tolerance import rho

BY_HAND = Case("lora_embedding", "float64", True, {"alpha": 4.0}, {
    "E": numpy.array([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]), "A": numpy.array([[1.0, 2.0, 3.0]]),
    "B": numpy.array([[1.0], [-1.0]]), "ids": numpy.array([[1, 1, 0]]),
    "g": numpy.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]), "h": numpy.array([[1.0, 2.0]]),
    "q": numpy.array([[0.0, 0.0, 1.0]])})


def test_a_table_of_three_rows_by_hand():
    """s = 4; row i of the table is E[i] + 4 (A_i, -A_i)."""
    found = {name: value.exact.tolist() for name, value in values(BY_HAND).items()}
    assert found["E_merged"] == [[5, -4], [8, -7], [17, -7]]
    assert found["y"] == [[[8, -7], [8, -7], [5, -4]]]
    assert found["dA"] == [[0, 0, 0]]              # g B: 1 and -1 at id 1, 0 at id 0
    assert found["dB"] == [[4 * (2 + 1)], [4 * (2 + 1)]]
    assert found["logits"] == [[5 - 8, 8 - 14, 17 - 14]]
    assert found["dA_tied"] == [[0, 0, -4]]        # 4 (h B)^T q = 4 * -1 at id 2
    assert found["dB_tied"] == [[12 + 12], [12 + 24]]  # and 4 h^T (q A^T) = 4 * 3 h


def test_gradients_are_differences_of_the_forward():
    """<g, y> + <q, logits> is of degree two in (A, B): central differences are exact on integers."""
    case = drawn(METHOD, "float64", 3)[1]

    def loss(leaf, change, uses):
        ref = values(case.but({leaf: case[leaf] + change}))
        return (ref["y"].exact * case["g"]).sum() + uses * (ref["logits"].exact * case["q"]).sum()

    for leaf in "AB":
        for uses, name in ((0, f"d{leaf}"), (1, f"d{leaf}_tied")):
            for at in numpy.ndindex(case[leaf].shape):
                change = numpy.zeros(case[leaf].shape)
                change[at] = 1
                slope = (loss(leaf, change, uses) - loss(leaf, -change, uses)) / 2
                assert abs(slope - values(case)[name].exact[at]) < 1e-12


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_fractions_agree_with_long_floats(dtype):
    for case in METHOD.vectors():
        if case.dtype == dtype:
            exact = exact_values(case)
            for name, value in values(case).items():
                assert rho(exact[name].exact, value.exact, case.tau(exact[name])) <= 0.5, (case.label, name)


@pytest.mark.parametrize("build, dtype", [(METHOD.plain, "float64"), (METHOD.plain, "float32"),
                                          (METHOD.plain, "bfloat16"), (lora_embedding, "float64"),
                                          (lora_embedding, "float32")])
def test_no_law_blames_a_correct_implementation(build, dtype):
    plugin = plugin_of(METHOD, build, dtype)
    for case in (plugin.settle(case, METHOD) for case in drawn(METHOD, dtype, 7)):
        for prop in METHOD.properties:
            if prop.applies(case):
                for seen in look(prop, case, plugin, plugin.make(METHOD))[0]:
                    assert not isinstance(seen, Fault) and seen.holds, (prop.id, seen)


def test_ours_gives_every_published_output():
    for case in METHOD.vectors():
        if case.dtype == "float32" and not case.conventions:  # the defaults
            plugin = plugin_of(METHOD, lora_embedding, case.dtype)
            for name, value in exact_values(case).items():
                assert near(case, name, METHOD.outputs[name][1](plugin.make(METHOD), case), value).holds


def test_ids_of_drawn_cases_repeat():
    for seed in range(20):
        case = drawn(METHOD, "float64", seed)[0]
        ids = case["ids"].reshape(-1)
        assert ids[0] == ids[-1] == 0 and 0 <= ids.min() and ids.max() < len(case["E"])


def test_an_adapter_on_a_table_that_is_no_longer_used_is_found_by_four_laws():
    mutant = next(m for m in METHOD.mutants if m.id == "embedding.no_effect_zeros")
    plugin = plugin_of(METHOD, mutant.build, "float32")
    case = plugin.settle(METHOD.vectors()[1].but(dtype="float32"), METHOD)
    failing = {prop.id for prop in METHOD.properties if prop.applies(case)
               and not all(o.holds for o in look(prop, case, plugin, plugin.make(METHOD))[0])}
    assert {"L1", "L2", "L3m", "T1", "T4"} <= failing and not {"L3", "L5", "L6", "T2", "T3"} & failing
