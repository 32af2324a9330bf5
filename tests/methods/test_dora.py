"""DoRA: where m starts and on which axis it stands, what is recorded of the norm, rows of zeros."""
from __future__ import annotations

import numpy
import pytest

import minipeft
from minipeft.engine.ops import linear
from minipeft.engine.tensor import _observer, value_and_grad
from minipeft.laws.models import FAMILIES, bits, logits, model_of, moved
from minipeft.methods.dora import lengths
from minipeft.nn.weight import Parameter
from tests.models_under_test import Case

RNG = numpy.random.default_rng
PLACE, TABLE = "encoder.0.attn.q.weight", "embedding.weight"
BATCH = Case(("t5 v1.0", "q and v"), 1, 1, "float64", 0).batch()


def attached(family="t5 v1.0", where=f"^{PLACE}$", dtype="float64", seed=1, **fields):
    """(model, attachment, its slot, its piece), with numbers as after training."""
    model = model_of(family, dtype, 0)
    attachment = moved(minipeft.attach(model, minipeft.DoRA(2, 3, where=where, **fields), RNG(seed), "a"), RNG(seed))
    place = next(iter(attachment.places.values()))
    return model, attachment, place, place.attached["a"]


@pytest.mark.parametrize("norm", ["output", "input"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_m_over_the_norm_is_exactly_1_at_the_start_in_any_order_of_memory(family, dtype, norm):
    model = model_of(family, dtype, 0)
    for p in model.base_parameters.values():
        p.data = numpy.asfortranarray(p.data)
    below = moved(minipeft.attach(model, minipeft.LoRA(3, where=r"\.v\.weight$"), RNG(3), "below"), RNG(4))
    attachment = minipeft.attach(model, minipeft.DoRA(2, 3, norm=norm, where=[r"\.(q|v|wo)\.weight$", "embedding"]),
                                 RNG(1))
    for place in attachment.places.values():
        factor = place.fold().factor().data
        assert factor.shape == ((place.shape[0], 1) if norm == "output" else (1, place.shape[1]))
        assert (factor == 1).all() and factor.dtype == place.dtype
    assert below.state == "plugged"


def test_w_is_m_times_v_over_its_norm_for_rows_and_for_columns():
    for norm, axis in (("output", 1), ("input", 0)):
        _, _, slot, piece = attached(norm=norm)
        V = slot.base.data + 1.5 * piece.B.data @ piece.A.data
        W = slot.fold().dense().data
        assert abs(W - piece.m.data * V / numpy.sqrt((V ** 2).sum(axis, keepdims=True))).max() < 1e-14
        found = numpy.sqrt((W ** 2).sum(axis))
        assert numpy.allclose(found, abs(piece.m.data).ravel(), rtol=1e-14), "each row or column has the length m"


def recorded(run, params, slot):
    """The ops of run() that have a node, in order; the sizes of the arrays that their VJPs hold, without the base."""
    names, sizes = [], []

    def observe(forward, inputs, out, vjps, node):
        if node is not None:
            names.append(forward.__name__)
            sizes.extend(cell.cell_contents.size for _, vjp in node.edges for cell in vjp.__closure__ or ()
                         if isinstance(cell.cell_contents, numpy.ndarray)
                         and not numpy.shares_memory(cell.cell_contents, slot.base.data))
    token = _observer.set(observe)
    try:
        value_and_grad(lambda: run().sum(), params, training=False)
    finally:
        _observer.reset(token)
    return names, sizes


@pytest.mark.parametrize("norm, behind", [  # x m / |V| reaches the base's product as well
    ("output", ["low_rank_linear", "mul", "sum"]), ("input", ["mul", "linear", "low_rank_linear", "sum"])])
def test_the_norm_is_not_recorded_for_a_gradient_that_it_does_not_have(norm, behind):
    _, attachment, slot, _ = attached(norm=norm)
    x = RNG(0).standard_normal((2, 3, slot.shape[1]))
    names, sizes = recorded(lambda: slot.project(x), attachment.parameters, slot)
    assert names == ["div", "reshape", *behind]
    assert max(sizes) < slot.shape[0] * slot.shape[1] <= 180, "no array of the size of W is kept"
    everything = {**attachment.parameters, "W0": slot.base}
    assert "power" not in recorded(lambda: slot.project(x), everything, slot)[0], "also when W0 is trained, too"
    _, through, slot, _ = attached(norm=norm, detach=False)
    assert "power" in recorded(lambda: slot.project(x), through.parameters, slot)[0]


def test_the_gradients_are_lora_s_of_m_over_the_norm_times_g_and_that_of_m_is_by_hand():
    _, attachment, slot, piece = attached()
    x, g = RNG(0).standard_normal((4, slot.shape[1])), RNG(1).standard_normal((4, slot.shape[0]))
    grads = value_and_grad(lambda: (slot.project(x) * g).sum(), attachment.parameters)[1]
    V = slot.base.data + 1.5 * piece.B.data @ piece.A.data
    n = numpy.sqrt((V ** 2).sum(1, keepdims=True))
    scaled = g * (piece.m.data / n).T
    for leaf, wanted in {"A": 1.5 * (scaled @ piece.B.data).T @ x, "B": 1.5 * scaled.T @ (x @ piece.A.data.T),
                         "m": (g * (x @ V.T)).sum(0)[:, None] / n}.items():
        found = grads[f"{PLACE}@a.{leaf}"]
        assert abs(found - wanted).max() < 1e-12 * abs(wanted).max(), leaf


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("norm", ["output", "input"])
def test_a_row_of_zeros_stays_a_row_of_zeros_and_gives_no_nan_in_value_or_gradient(norm, detach):
    model = model_of("t5 v1.0", "float64", 0)
    table = model.slots[TABLE].base
    table.data[(5, slice(None)) if norm == "output" else (slice(None), 5)] = 0
    before = logits(model, BATCH)
    attachment = minipeft.attach(model, minipeft.DoRA(2, where=f"^{TABLE}$", norm=norm, detach=detach), RNG(0))
    assert numpy.array_equal(logits(model, BATCH), before)
    optimizer = minipeft.AdamW(1e-2)
    with numpy.errstate(all="raise", under="ignore"):
        for _ in range(3):
            grads = value_and_grad(lambda: model.loss(**BATCH), attachment.parameters)[1]
            assert all(numpy.isfinite(g).all() for g in grads.values())
            optimizer.step(attachment.parameters, grads)
        W = model.slots[TABLE].fold().dense().data
    assert numpy.isfinite(W).all() and abs(W - table.data).max() > 1e-3
    if norm == "output":
        assert not W[5].any()


def test_lengths_has_the_value_and_the_gradient_of_a_norm_and_0_where_the_norm_has_no_derivative():
    V = Parameter(numpy.array([[3.0, 4.0], [0.0, 0.0]]))
    n, grads = value_and_grad(lambda: (lengths(V, 1) * numpy.array([[1.0], [7.0]])).sum(), {"V": V})
    assert n == 5 + 7 and numpy.allclose(grads["V"], [[0.6, 0.8], [0, 0]], atol=1e-16)


def test_dropout_acts_on_the_input_of_a_alone_and_not_on_a_lookup():
    _, _, slot, piece = attached(dropout=0.5)
    assert slot.fold().drops
    x = RNG(0).standard_normal((2, 3, slot.shape[1]))
    scaled = piece.m.data.ravel() / numpy.sqrt((slot.fold().V().data ** 2).sum(1))
    parts = [(slot.project(x, RNG(seed)).data / scaled - linear(x, slot.base).data) for seed in (1, 2)]
    assert abs(parts[0] - parts[1]).max() > 0.01
    keep = RNG(1).random(x.shape, dtype=numpy.float32) >= 0.5
    wanted = 1.5 * (x * keep * 2) @ piece.A.data.T @ piece.B.data.T
    assert abs(parts[0] - wanted).max() < 1e-13
    _, _, table, _ = attached(where=f"^{TABLE}$", dropout=0.5)
    ids = numpy.array([[1, 2]])
    assert abs(table.rows(ids).data - table.fold().dense().data[ids]).max() < 1e-14


def test_m_starts_at_the_norm_of_what_lies_below_not_of_the_base():
    model, _, slot, piece = attached()
    upper = minipeft.attach(model, minipeft.DoRA(2, 3, where=f"^{PLACE}$"), RNG(5), "b")
    assert numpy.allclose(upper.parameters[f"{PLACE}@b.m"].data, abs(piece.m.data), rtol=1e-14)
    assert abs(abs(piece.m.data) - numpy.linalg.norm(slot.base.data, axis=1, keepdims=True)).max() > 0.1


def test_both_inits_of_a_are_drawn_with_their_spread():
    model = model_of("post-LN", "float64", 0)
    for init, largest, std in (("kaiming", 12 ** -0.5, (3 * 12) ** -0.5), ("gaussian", 9, (3 * 12) ** -0.5)):
        attachment = minipeft.attach(model, minipeft.DoRA(12, init=init, where=r"\.\w+\.weight$"), RNG(0), init)
        drawn = numpy.concatenate([p.data.ravel() for name, p in attachment.parameters.items()
                                   if name.endswith(".A") and p.shape[1] == 12])
        assert abs(drawn).max() <= largest and abs(drawn.std() / std - 1) < 0.05
        assert (abs(drawn).max() > 12 ** -0.5) == (init == "gaussian")
        attachment.remove()


def test_ranks_and_scales_may_differ_from_place_to_place_as_for_lora():
    model = model_of("t5 v1.0", "float64", 0)
    method = minipeft.DoRA(2, 6, init="orthogonal", scaling="alpha/sqrt(r)", rank_pattern={r"\.v\.": 9},
                           alpha_pattern={"^decoder": 5})
    attachment = minipeft.attach(model, method, RNG(0))
    for name, place in attachment.places.items():
        rank, alpha = 9 if ".v." in name else 2, 5 if name.startswith("decoder") else 6
        piece = attachment.at[place]
        assert piece.A.shape == (rank, 12) and abs(float(piece.scale) * rank ** 0.5 / alpha - 1) < 1e-15
        assert numpy.allclose(piece.A.data @ piece.A.data.T, numpy.eye(rank), atol=1e-14)


@pytest.mark.parametrize("fields, message", [
    ({"rank": 0}, "DoRA: rank is 0; expected an integer >= 1"), ({"alpha": 0}, "alpha is 0; expected a finite number"),
    ({"dropout": 1.0}, "dropout is 1.0; expected a number in"),
    ({"init": "zeros"}, "init is 'zeros'; expected one of gaus"),
    ({"detach": 1}, "detach is 1; expected True or False"), ({"norm": "row"}, "norm is 'row'; expected 'output' or")])
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        minipeft.DoRA(**fields)


@pytest.mark.parametrize("norm", ["output", "input"])
@pytest.mark.parametrize("value", [numpy.nan, numpy.inf, 1e20])
def test_a_weight_without_a_finite_norm_is_refused_by_name_and_nothing_is_attached(value, norm):
    model = model_of("t5 v1.0", "float32", 0)
    model.slots["decoder.0.cross.q.weight"].base.data[1, 2] = value
    rng = RNG(0)
    with pytest.raises(ValueError, match=r"DoRA: \|W\| of decoder.0.cross.q.weight is not finite in float32"):
        minipeft.attach(model, minipeft.DoRA(2, norm=norm), rng)
    assert not model.attachments and rng.bit_generator.state == RNG(0).bit_generator.state


def test_a_rank_or_scale_that_does_not_fit_is_refused_before_anything_is_attached():
    model = model_of("t5 v1.0", "float32", 0)
    before = bits(model.state())
    for method, message in ((minipeft.DoRA(13), r"rank 13 exceeds 12, the largest that encoder.0.attn.q.weight"),
                            (minipeft.DoRA(2, 1e39), "alpha is 1e.39; expected a finite alpha / r in float32")):
        with pytest.raises(ValueError, match=message):
            minipeft.attach(model, method, RNG(0))
    assert not model.attachments and bits(model.state()) == before
