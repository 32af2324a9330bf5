"""LoRA: its fields, how it starts, its dropout, its gradients, and what it never computes."""
import dataclasses
import math
from fractions import Fraction

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.engine import ops
from minipeft.engine.tensor import _observer
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Parameter
from minipeft.engine.ops.drop import dropout_mask
from minipeft.laws.bounds import tau, wide, within
from tests.by_hand import piece_on
from tests.models_under_test import Case, bits, logits

U = 2.0 ** -53


def lowrank(rank=3, alpha=5, dropout=0.0, d_out=6, d_in=4, seed=0, init="gaussian", dtype="float64", train=True):
    """(slot, piece): a LoRA by itself; with `train`, B is not 0."""
    rng = numpy.random.default_rng(seed)
    slot = Slot("linear", rng.standard_normal((d_out, d_in)).astype(dtype))
    piece = piece_on(minipeft.LoRA(rank, alpha, dropout, init=init), slot, rng)
    if train:
        piece.B.data = rng.standard_normal((d_out, rank)).astype(dtype)
    return slot, piece


# ---- fields


@pytest.mark.parametrize("rank", [0, -1, 1.0, 2.5, True, "8", None, numpy.bool_(True), numpy.int64(0)])
def test_a_rank_that_is_no_integer_of_at_least_1_is_refused(rank):
    with pytest.raises(ValueError, match=r"LoRA: rank is .*; expected an integer >= 1"):
        minipeft.LoRA(rank=rank)


@pytest.mark.parametrize("alpha", [0, 0.0, -0.0, math.nan, math.inf, -math.inf, True, "16", None, 10 ** 400])
def test_an_alpha_that_is_0_or_not_finite_or_no_number_is_refused(alpha):
    with pytest.raises(ValueError, match=r"LoRA: alpha is .*; expected a finite number other than 0"):
        minipeft.LoRA(alpha=alpha)


@pytest.mark.parametrize("dropout", [-0.1, 1, 1.0, 1.5, math.nan, math.inf, True, "0.1", None])
def test_a_dropout_outside_0_to_1_is_refused(dropout):
    with pytest.raises(ValueError, match=r"LoRA: dropout is .*; expected a number in \[0, 1\)"):
        minipeft.LoRA(dropout=dropout)


@pytest.mark.parametrize("init", ["normal", "", None, 0, ["gaussian"]])
def test_an_unknown_start_is_refused(init):
    with pytest.raises(ValueError, match="LoRA: init is .*; expected one of gaussian, kaiming, orthogonal, pissa"):
        minipeft.LoRA(init=init)


@pytest.mark.parametrize("rank, alpha", [(1, 1e300), (8, 1e300), (1, -3.5e38), (2, 10 ** 39)])
def test_an_alpha_whose_scale_is_not_finite_in_the_weights_dtype_is_refused_before_anything_is_drawn(rank, alpha):
    """3.5e38 is above the largest float32, 3.4028...e38; in float64 all of these are numbers like any other."""
    case, rng = Case(("t5 v1.0", "q and v"), rank, alpha, "float32", 0), numpy.random.default_rng(0)
    model, state = case.model(), rng.bit_generator.state
    with pytest.raises(ValueError) as error:
        minipeft.attach(model, case.method, rng)
    assert str(error.value) == f"LoRA: alpha is {alpha!r}; expected a finite alpha / r in float32"
    assert rng.bit_generator.state == state and not model.attachments
    wide = dataclasses.replace(case, dtype="float64")
    model = wide.model()
    before = logits(model, wide.batch())
    minipeft.attach(model, case.method, rng)
    assert numpy.array_equal(logits(model, wide.batch()), before)


def test_it_is_alpha_over_r_that_must_be_finite_and_not_alpha():
    model = Case(("t5 v1.0", "q and v"), 1, 1, "float32", 0).model()
    assert minipeft.attach(model, minipeft.LoRA(8, 2e39), numpy.random.default_rng(0)).state == "plugged"


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="lora_alpha"):
        minipeft.LoRA(rank=8, lora_alpha=16)


def test_a_method_cannot_be_changed_after_it_was_made():
    with pytest.raises(dataclasses.FrozenInstanceError):
        minipeft.LoRA().rank = 4


def test_by_default_it_acts_on_q_and_v_of_every_attention():
    for family in ("t5 v1.1", "post-LN"):
        model = Case((family, "q and v"), 1, 1, "float64", 0).model()
        places = minipeft.LoRA(rank=2).places(model)
        assert list(places) == [n for n in model.slots if n.endswith((".q.weight", ".v.weight"))] and len(places) > 7


@pytest.mark.parametrize("rank, where", [(13, "^embedding"), (10 ** 6, ".")])
def test_a_rank_above_what_a_matrix_can_have_is_refused_with_the_matrix(rank, where):
    model = Case(("t5 v1.0", "q and v"), 1, 1, "float64", 0).model()
    with pytest.raises(ValueError, match=rf"rank {rank} exceeds 12, the largest that embedding.weight \[13, 12\]"):
        minipeft.attach(model, minipeft.LoRA(rank=rank, where=where), numpy.random.default_rng(0))


def test_a_rank_as_large_as_the_smaller_side_is_allowed():
    model = Case(("t5 v1.0", "q and v"), 1, 1, "float64", 0).model()
    assert minipeft.attach(model, minipeft.LoRA(rank=12), numpy.random.default_rng(0)).state == "plugged"


@pytest.mark.parametrize("where", ["norm", "bias", "position", "encoder.input", "out$"])
def test_it_acts_on_matrices_alone(where):
    """Not on norm scales, biases, position tables or sites, whose names would match."""
    model = Case(("pre-LN", "q and v"), 1, 1, "float64", 0).model()
    with pytest.raises(ValueError, match=f"where='{where.replace('$', '[$]')}' matches none of the .* matrix names"):
        minipeft.LoRA(rank=1, where=where).places(model)


# ---- how it starts


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
@pytest.mark.parametrize("d_in", [50, 400])
def test_a_starts_with_variance_1_over_3_d_in_and_b_at_0(init, d_in):
    """N = 32 d_in numbers. Of a sample of variance v and fourth moment m: the mean has deviation sqrt(v / N), the mean
    square sqrt((m - v^2) / N), m = 3 v^2 for a Gaussian and 9/5 v^2 for a uniform. Five deviations."""
    _, piece = lowrank(32, d_out=64, d_in=d_in, init=init, train=False)
    a, v = piece.A.data, 1 / (3 * d_in)
    spread = math.sqrt(((3 if init == "gaussian" else 9 / 5) - 1) / a.size)
    assert a.shape == (32, d_in) and piece.B.shape == (64, 32) and not piece.B.data.any()
    assert abs(a.mean()) < 5 * math.sqrt(v / a.size)
    assert abs((a * a).mean() / v - 1) < 5 * spread
    bound = 1 / math.sqrt(d_in)
    beyond = (abs(a) > bound).mean()  # P(|N(0, v)| > sqrt(3 v)) = 0.083
    assert beyond == 0 and abs(a).max() > 0.99 * bound if init == "kaiming" else 0.07 < beyond < 0.1


def test_what_is_drawn_depends_on_the_generator_alone():
    first, second, other = (lowrank(seed=seed, train=False)[1].A.data for seed in (3, 3, 4))
    assert first.tobytes() == second.tobytes() != other.tobytes()


def test_float32_and_float64_start_from_the_same_numbers():
    narrow, full = (lowrank(dtype=dtype, train=False)[1].A.data for dtype in ("float32", "float64"))
    assert narrow.dtype == numpy.float32 and numpy.array_equal(narrow, full.astype(numpy.float32))


@pytest.mark.parametrize("alpha, scale", [(16, Fraction(16, 3)), (0.5, Fraction(1, 6)), (-2, Fraction(-2, 3))])
def test_the_scale_is_alpha_over_rank_exactly(alpha, scale):
    assert lowrank(3, alpha)[1].scale == scale


# ---- gradients: the equations of the module docstring, in NumPy


@given(st.integers(0, 999), st.integers(1, 4), st.sampled_from(["float64", "float32"]))
def test_gradients_are_those_of_the_docstring_and_sum_over_the_batch(seed, rank, dtype):
    slot, piece = lowrank(rank, seed=seed, dtype=dtype)
    rng = numpy.random.default_rng([seed, 1])
    x, g = Parameter(rng.standard_normal((2, 5, 4)).astype(dtype)), rng.standard_normal((2, 5, 6)).astype(dtype)
    leaves = {"x": x, "W": slot.base, "A": piece.A, "B": piece.B}
    _, grads = minipeft.value_and_grad(lambda: ops.sum(ops.mul(piece.project(x), g)), leaves)
    wx, wg, w, a, b = wide(x).reshape(10, 4), wide(g).reshape(10, 6), *map(wide, (slot.base, piece.A, piece.B))
    s, u = wide(numpy.float64(5)) / rank, U if dtype == "float64" else 2.0 ** -24

    def formulas(x, g, w, a, b, s):
        return {"A": s * (g @ b).T @ x, "B": s * g.T @ (x @ a.T), "x": (g @ w + s * (g @ b) @ a).reshape(2, 5, 4),
                "W": g.T @ x}

    wanted, magnitude = formulas(wx, wg, w, a, b, s), formulas(*map(abs, (wx, wg, w, a, b, s)))
    lengths = {"A": 6 + 10 + 2, "B": 4 + 10 + 2, "x": 6 + rank + 3, "W": 10}  # conformance table; N = 10 rows
    reference = float(numpy.finfo(numpy.longdouble).eps)
    for name, n in lengths.items():
        assert within(grads[name], wanted[name], tau(magnitude[name], n, 5, u) + tau(magnitude[name], n, 5, reference))


def test_the_dense_gradient_is_never_formed_and_no_array_of_its_shape():
    """Batch 2, time 3, sizes 7 x 11: of all arrays that ops and VJPs make, none is [7, 11] but the weight itself."""
    slot, piece = lowrank(2, d_out=7, d_in=11)
    x, made = numpy.ones((2, 3, 11)), []

    def observe(forward, inputs, out, vjps, node):
        made.append(out.shape)
        if node is not None:
            node.edges = [(parent, lambda g, vjp=vjp: made.append(vjp(g).shape) or vjp(g))
                          for parent, vjp in node.edges]

    token = _observer.set(observe)
    try:
        _, grads = minipeft.value_and_grad(lambda: ops.sum(piece.project(x)), {"A": piece.A, "B": piece.B})
    finally:
        _observer.reset(token)
    assert set(grads) == {"A", "B"} and {(2, 3, 7), (2, 11), (7, 2)} <= set(made)
    assert not {(7, 11), (11, 7)} & set(made)


# ---- dropout


@given(st.integers(0, 999), st.sampled_from([0.1, 0.5, 0.9]))
def test_dropout_acts_on_the_input_of_a_alone_with_the_mask_drawn_for_it(seed, p):
    slot, piece = lowrank(dropout=p, seed=seed)
    x = numpy.random.default_rng([seed, 1]).standard_normal((2, 5, 4))
    found = piece.project(x, numpy.random.default_rng(seed)).data
    mask = dropout_mask(x.shape, p, numpy.random.default_rng(seed), x.dtype)
    assert set(mask.reshape(-1)) <= {0.0, 1 / (1 - p)}
    wanted = ops.low_rank_linear(slot.base.project(x), x * mask, piece.A, piece.B, scale=piece.scale).data
    assert found.tobytes() == wanted.tobytes()


def test_the_base_path_is_never_dropped():
    slot, piece = lowrank(dropout=0.9, train=False)  # B = 0: only the base path is left
    x = numpy.random.default_rng(1).standard_normal((3, 5, 4))
    assert numpy.array_equal(piece.project(x, numpy.random.default_rng(0)).data, slot.base.project(x).data)


def test_dropout_keeps_the_expected_value_and_drops_a_share_p():
    """Mean of m / (1 - p), m ~ Bernoulli(1 - p), over N draws: deviation sqrt(p / (1 - p) / N). Five of them."""
    p, n = 0.3, 40_000
    _, piece = lowrank(1, 1, dropout=p, d_out=1, d_in=1)
    piece.base.data[...], piece.A.data[...], piece.B.data[...] = 0, 1, 1
    y = piece.project(numpy.ones((1, n, 1)), numpy.random.default_rng(0)).data
    assert abs(y.mean() - 1) < 5 * math.sqrt(p / (1 - p) / n)
    assert abs((y == 0).mean() - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_every_attachment_and_layer_draws_a_mask_of_its_own():
    _, piece = lowrank(1, 1, dropout=0.5, d_out=1, d_in=1)
    piece.base.data[...], piece.A.data[...], piece.B.data[...] = 0, 1, 1
    rng, x = numpy.random.default_rng(0), numpy.ones((1, 64, 1))
    assert piece.project(x, rng).data.tobytes() != piece.project(x, rng).data.tobytes()


def test_evaluation_knows_no_dropout():
    """Two evaluations are equal in every bit, and equal those of the same LoRA without dropout."""
    case, outputs = Case(("post-LN", "every linear"), 2, 3, "float32", 5), []
    for dropout in (0.0, 0.9):
        model = case.model()
        attachment = minipeft.attach(model, dataclasses.replace(case.method, dropout=dropout),
                                     numpy.random.default_rng(0))
        for p in attachment.parameters.values():
            p.data += p.dtype.type(0.1)
        outputs += [logits(model, case.batch()), logits(model, case.batch())]
    assert len({y.tobytes() for y in outputs}) == 1
    assert not numpy.array_equal(logits(model, case.batch(), rng=numpy.random.default_rng(0)), outputs[0])


def test_dropout_does_not_act_on_a_lookup_nor_on_what_is_merged():
    case = Case(("t5 v1.0", "embedding"), 2, 3, "float64", 0)
    model = case.model()
    attachment = minipeft.attach(model, dataclasses.replace(case.method, dropout=0.9), numpy.random.default_rng(0))
    ids = case.batch()["input_ids"]
    for p in attachment.parameters.values():
        p.data = p.data + 0.1
    slot = attachment.places["embedding.weight"]
    assert model.embedding(ids).data.tobytes() == slot.rows(ids).data.tobytes()
    attachment.merge()
    hidden, rng = numpy.ones((1, 2, 12)), numpy.random.default_rng(7)
    state = rng.bit_generator.state
    assert slot.project(hidden, rng).data.tobytes() == slot.project(hidden).data.tobytes()
    assert rng.bit_generator.state == state, "a merged weight drew a mask"


def test_without_dropout_training_draws_nothing():
    _, piece = lowrank()
    rng = numpy.random.default_rng(0)
    state = rng.bit_generator.state
    piece.project(numpy.ones((1, 2, 4)), rng)
    assert rng.bit_generator.state == state


def test_attaching_leaves_the_base_arrays_where_they_are():
    case = Case(("t5 v1.1", "mixture"), 2, 3, "float32", 0)
    model = case.model()
    before = bits(model.state())
    case.attach(model).merge()
    assert bits(model.state()) == before


def test_numbers_of_numpy_are_numbers():
    assert minipeft.LoRA(numpy.int64(2), numpy.float32(4)) == minipeft.LoRA(2, 4.0)
