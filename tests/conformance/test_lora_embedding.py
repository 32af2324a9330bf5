"""LoRA on a table: the reference is checked by hand and by loops, then implementations are held against it."""
import numpy
import pytest
import safetensors.numpy

from minipeft.conformance.case import Case
from minipeft.conformance.look import fails, look
from minipeft.conformance.methods.lora_embedding import METHOD
from minipeft.conformance.methods.lora_embedding.equations import exact_values, values
from minipeft.conformance.methods.lora_embedding.ours import lora_embedding
from minipeft.conformance.methods.lora_embedding.plain import LoraEmbedding
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


def failing(build, dtype, cases):
    """The ids of the laws that fail on any of the cases."""
    plugin = plugin_of(METHOD, build, dtype)
    settled = [plugin.settle(case, METHOD) for case in cases]
    return {prop.id for case in settled for prop in METHOD.properties
            if prop.applies(case) and fails(look(prop, case, plugin, plugin.make(METHOD))[0])}


class Composed(LoraEmbedding):
    """Rows of E + s (B A)^T by products with unit vectors; the head a product with the same."""

    def table(self):
        return self.E if self.kept is not None else self.merged()

    def forward(self, ids):
        return self.e.mm(numpy.eye(len(self.E))[self.checked(ids)], self.table())

    def head(self, h):
        return self.e.mm(h[:, ::-1], self.table()[:, ::-1].T)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_table_that_is_composed_before_it_is_used_is_not_blamed(dtype):
    assert failing(Composed, dtype, [case for seed in range(4) for case in drawn(METHOD, dtype, seed)]) == set()


@pytest.mark.parametrize("dtype, A, B, E, g", [
    ("bfloat16", 1.2578125, 1.8046875, 0.2734375, 0.041259765625),
    ("float16", 0.5927734375, 0.521484375, 0.365966796875, 0.0086669921875)])
def test_a_correct_step_that_leaves_y_as_it_was_in_half_precision_is_not_blamed(dtype, A, B, E, g):
    one, ids = numpy.ones((1, 1)), numpy.zeros((1, 1), int)
    case = Case("lora_embedding", dtype, False, {"alpha": 1.0}, {
        "E": E * one, "A": A * one, "B": B * one, "ids": ids, "g": g * one[None], "h": one, "q": one})
    table = LoraEmbedding(E * one, A * one, B * one, 1.0, dtype)
    before = table.forward(ids)
    table.step(ids, case["g"], 0.125)
    assert table.forward(ids) == before
    assert failing(LoraEmbedding, dtype, [case]) == set()


class StepAscends(LoraEmbedding):
    def step(self, ids, g, lr):
        super().step(ids, g, -lr)


class StepSquaresRate(LoraEmbedding):
    def step(self, ids, g, lr):
        super().step(ids, g, lr * lr)


class ScaleStaleInVjp(LoraEmbedding):
    def __init__(self, *args):
        super().__init__(*args)
        self.first = self.scale()

    def vjp(self, ids, g):
        alpha, self.alpha = self.alpha, self.first * len(self.A)
        found = super().vjp(ids, g)
        self.alpha = alpha
        return found


class TiedIdsWrap(LoraEmbedding):
    def vjp_tied(self, ids, g, h, q):
        return super().vjp_tied(ids % len(self.E), g, h, q)


class LoadTakesAlphaFirst(LoraEmbedding):
    def load(self, blob):
        self.alpha = float(safetensors.numpy.load(blob)["alpha"])
        super().load(blob)


@pytest.mark.parametrize("build, law", [(StepAscends, "L7v"), (StepSquaresRate, "L7v"), (ScaleStaleInVjp, "L13"),
                                        (TiedIdsWrap, "X2"), (LoadTakesAlphaFirst, "L13x")])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_bug_of_what_a_table_keeps_is_found_by_the_law_about_it(build, law, dtype):
    assert law in failing(build, dtype, drawn(METHOD, dtype, 1))
