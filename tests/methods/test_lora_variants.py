"""LoRA's other scalings, ranks by place, starts, and projections side by side."""
import json
import math
import re
from fractions import Fraction

import numpy
import pytest

import minipeft
from minipeft.engine.tensor import _observer
from minipeft.files import read_tensors
from minipeft.methods.merged import MergedLowRank
from minipeft.methods.pissa import PrincipalLowRank
from minipeft.nn.fingerprint import fingerprint, sha256
from minipeft.nn.slot import Slot
from tests.adapters import write_signed
from tests.by_hand import piece_on
from tests.models_under_test import Case, bits, logits, trained

RNG = numpy.random.default_rng
CASE = Case(("t5 v1.0", "q and v"), 2, 3, "float64", 0)


def attached(method, family="t5 v1.0", dtype="float64", model=None):
    model = Case((family, "q and v"), 1, 1, dtype, 0).model() if model is None else model
    return model, minipeft.attach(model, method, RNG(0))


# ---- scaling


@pytest.mark.parametrize("scaling, scale", [("alpha/r", Fraction(5, 3)), ("alpha", Fraction(5)),
                                            ("alpha/sqrt(r)", Fraction(5) / Fraction(math.sqrt(3)))])
def test_the_scale_is_what_the_name_of_the_scaling_says(scaling, scale):
    piece = piece_on(minipeft.LoRA(3, 5, scaling=scaling), Slot("linear", RNG(0).standard_normal((6, 4))), RNG(0))
    assert piece.scale == scale
    piece.B.data = RNG(1).standard_normal((6, 3))
    change = piece.dense().data - piece.base.data
    numpy.testing.assert_allclose(change, float(scale) * piece.B.data @ piece.A.data, rtol=1e-12)


def test_where_the_root_of_the_rank_is_an_integer_the_scale_of_rslora_is_exact():
    method = minipeft.LoRA(4, 0.75, scaling="alpha/sqrt(r)")
    assert piece_on(method, Slot("linear", numpy.ones((6, 4))), RNG(0)).scale == Fraction(3, 8)


@pytest.mark.parametrize("scaling", ["", "r", None, 2, ["alpha"], "alpha / r"])
def test_an_unknown_scaling_is_refused(scaling):
    with pytest.raises(ValueError, match=r"LoRA: scaling is .*; expected one of alpha/r, alpha/sqrt\(r\), alpha"):
        minipeft.LoRA(scaling=scaling)


def test_a_scale_that_is_not_finite_in_the_weights_dtype_is_refused_for_each_scaling():
    for fields, match in (({"alpha": 1e39, "scaling": "alpha"}, "alpha is 1e[+]39; expected a finite alpha in float32"),
                          ({"alpha_pattern": {"q": 1e39}}, "alpha_pattern is .*; expected a finite alpha / r")):
        model = Case(("t5 v1.0", "q and v"), 1, 1, "float32", 0).model()
        with pytest.raises(ValueError, match=f"LoRA: {match}"):
            minipeft.attach(model, minipeft.LoRA(2, **fields), RNG(0))
        assert not model.attachments


# ---- patterns


def test_the_first_pattern_that_is_found_in_the_name_of_a_place_gives_its_rank_and_its_alpha():
    ranks, alphas = {r"decoder\.1": 1, r"^decoder": 4, r"\.v\.": 3}, ((r"cross\.q", 7), (r"\.q\.", -1))
    _, lora = attached(minipeft.LoRA(2, 5, rank_pattern=ranks, alpha_pattern=alphas))
    for name, piece in lora.at.items():
        where = next(n for n, place in lora.places.items() if place is name)
        rank = 1 if where.startswith("decoder.1") else 4 if where.startswith("decoder") else 3 if ".v." in where else 2
        alpha = 7 if "cross.q" in where else -1 if ".q." in where else 5
        assert piece.A.shape[0] == piece.B.shape[1] == rank and piece.scale == Fraction(alpha, rank), where
    assert {p.A.shape[0] for p in lora.at.values()} == {1, 2, 3, 4}


def test_a_mapping_and_its_pairs_are_the_same_method_and_a_file_gives_it_back(tmp_path):
    method = minipeft.LoRA(2, rank_pattern={r"\.v\.": numpy.int64(3)}, alpha_pattern={"cross": 1.5, "q": 2})
    pairs = minipeft.LoRA(2, rank_pattern=[[r"\.v\.", 3]], alpha_pattern=(("cross", 1.5), ("q", 2)))
    assert method == pairs and hash(method) == hash(pairs)
    model, lora = attached(method)
    trained(lora, RNG(1)).save(tmp_path / "a")
    loaded = minipeft.load(CASE.model(), tmp_path / "a")
    assert loaded.method.rank_pattern == (("\\.v\\.", 3),) and loaded.method.alpha_pattern == method.alpha_pattern
    assert bits(loaded.tensors) == bits(lora.tensors)
    assert logits(loaded.model, CASE.batch()).tobytes() == logits(model, CASE.batch()).tobytes()


@pytest.mark.parametrize("field, value, expected", [
    ("rank_pattern", {"q": 0}, "an integer >= 1"), ("rank_pattern", {"q": 2.0}, "an integer >= 1"),
    ("rank_pattern", {"(": 2}, "an integer >= 1"), ("rank_pattern", {3: 2}, "an integer >= 1"),
    ("rank_pattern", {"q": True}, "an integer >= 1"), ("rank_pattern", None, "an integer >= 1"),
    ("rank_pattern", "q", "an integer >= 1"), ("rank_pattern", ["q", 2], "an integer >= 1"),
    ("alpha_pattern", {"q": 0}, "a finite number other than 0"), ("alpha_pattern", {"[": 1}, "a finite number"),
    ("alpha_pattern", {"q": math.inf}, "a finite number other than 0"), ("alpha_pattern", (("q", 1, 2),), "a finite")])
def test_a_malformed_pattern_is_refused_with_the_name_of_its_field(field, value, expected):
    with pytest.raises(ValueError, match=f"LoRA: {field} is .*; expected .regular expression: {expected}"):
        minipeft.LoRA(**{field: value})


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_place_is_refused_when_it_is_attached(field):
    """Also where it matches a name of the model that `where` does not choose."""
    for pattern in ("k_proj", r"\.k\.weight$"):
        model, rng = CASE.model(), RNG(0)
        with pytest.raises(ValueError, match=f"LoRA: {field} has .*{re.escape(repr(pattern)[1:-1])}.*, which matches "
                                             f"none of the 10 places; expected one found in encoder.0.attn.q.weight"):
            minipeft.attach(model, minipeft.LoRA(2, **{field: {"q": 2, pattern: 2}}), rng)
        assert not model.attachments and rng.bit_generator.state == RNG(0).bit_generator.state


def test_a_rank_of_a_pattern_above_what_a_matrix_can_have_is_refused():
    with pytest.raises(ValueError, match=r"rank 13 exceeds 12, the largest that decoder.0.attn.q.weight \[15, 12\]"):
        attached(minipeft.LoRA(2, rank_pattern={"decoder": 13}))


def test_at_their_defaults_the_new_fields_are_in_no_file_and_change_no_fingerprint():
    assert minipeft.LoRA(2).fields() == {"rank": 2, "alpha": 16, "dropout": 0.0, "init": "gaussian"}
    assert set(minipeft.LoRA(2, scaling="alpha", enable=[True]).fields()) == {
        "rank", "alpha", "dropout", "init", "scaling", "enable"}


# ---- inits


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_of_an_embedding_table_is_drawn_as_the_init_says(init):
    """kaiming: N(0, 1), as peers draw the factor that is not 0. Five deviations of the mean square, sqrt(2 / N)."""
    slot = Slot("embedding", numpy.zeros((90, 50)))
    a = piece_on(minipeft.LoRA(40, init=init), slot, RNG(0)).A.data
    assert abs((a * a).mean() / (1 if init == "kaiming" else 1 / 150) - 1) < 5 * math.sqrt(2 / a.size)
    assert abs(a).max() > 3 * a.std(), "it is normal"


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_orthogonal_rows_are_those_of_a_qr_decomposition_with_a_positive_diagonal(dtype):
    """A^T R = G^T, so A G^T = R: upper triangular, its diagonal positive. That is what makes A unique."""
    slot, u = Slot("linear", numpy.zeros((30, 20), dtype)), numpy.finfo(dtype).eps
    a = piece_on(minipeft.LoRA(7, init="orthogonal"), slot, RNG(3)).A.data.astype("float64")
    assert abs(a @ a.T - numpy.eye(7)).max() < 20 * u
    r = a @ RNG(3).standard_normal((7, 20)).T
    assert abs(numpy.tril(r, -1)).max() < 100 * u and (numpy.diagonal(r) > 1).all()


def test_each_projection_that_is_enabled_has_orthonormal_rows_of_its_own():
    slot = Slot("linear", numpy.zeros((12, 5)))
    a = piece_on(minipeft.LoRA(3, init="orthogonal", enable=(True, True, False)), slot, RNG(0)).A.data
    assert a.shape == (6, 5) and all(abs(p @ p.T - numpy.eye(3)).max() < 1e-14 for p in (a[:3], a[3:]))
    assert abs(a[:3] @ a[3:].T).max() > 0.1


@pytest.mark.parametrize("init", ["kaiming", "orthogonal", "pissa"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_attaching_changes_no_output_whatever_the_init(init, dtype):
    for family in ("t5 v1.0", "pre-LN"):
        case = Case((family, "q and v"), 1, 1, dtype, 4)
        model = case.model()
        before = logits(model, case.batch())
        minipeft.attach(model, minipeft.LoRA(5, -7, init=init, where=r"^embedding|\.(q|wo)\.weight$"), RNG(0))
        assert numpy.array_equal(logits(model, case.batch()), before)


# ---- PiSSA


@pytest.mark.parametrize("alpha", [7, -7])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_pissa_starts_from_the_largest_singular_directions_of_the_weight(alpha, shape):
    slot = Slot("linear", RNG(0).standard_normal(shape))
    piece = piece_on(minipeft.LoRA(3, alpha, init="pissa"), slot, RNG(0))
    w, s = slot.base.data, alpha / 3
    u, sigma, vt = numpy.linalg.svd(w, full_matrices=False)
    assert piece.A.data.tobytes() == piece.A0.data.tobytes() and piece.B.data.tobytes() == piece.B0.data.tobytes()
    assert piece.A.data is not piece.A0.data and piece.B.data is not piece.B0.data
    numpy.testing.assert_allclose(s * piece.B.data @ piece.A.data, u[:, :3] * sigma[:3] @ vt[:3], atol=1e-13)
    for gram in (piece.A.data @ piece.A.data.T, piece.B.data.T @ piece.B.data):  # sqrt(S_r / |s|) on either side
        numpy.testing.assert_allclose(gram, numpy.diag(sigma[:3] / abs(s)), atol=1e-13)
    numpy.testing.assert_allclose(numpy.linalg.norm(w - s * piece.B0.data @ piece.A0.data, 2), sigma[3], rtol=1e-12)


def test_pissa_decomposes_a_float32_weight_in_float64_and_rounds_once():
    slot = Slot("linear", RNG(0).standard_normal((40, 30)).astype("float32"))
    piece = piece_on(minipeft.LoRA(3, init="pissa"), slot, RNG(0))
    u, sigma, vt = numpy.linalg.svd(slot.base.data.astype("float64"), full_matrices=False)
    root = numpy.sqrt(sigma[:3] / (16 / 3))
    for found, wanted in ((piece.A0.data, root[:, None] * vt[:3]), (piece.B0.data, u[:, :3] * root)):
        assert found.dtype == "float32" and abs(found - wanted).max() <= 2.0 ** -24 * abs(wanted).max()


def test_pissa_is_the_equation_in_a_product_a_lookup_and_a_merge():
    slot = Slot("embedding", RNG(0).standard_normal((9, 6)))
    piece = piece_on(minipeft.LoRA(2, 5, init="pissa"), slot, RNG(0))
    for at, p in enumerate((piece.A, piece.B)):
        p.data += RNG(at).standard_normal(p.shape)
    W = slot.base.data + 2.5 * (piece.B.data @ piece.A.data - piece.B0.data @ piece.A0.data)
    x, ids = RNG(1).standard_normal((2, 3, 6)), numpy.array([[1, 8, 1]])
    numpy.testing.assert_allclose(piece.project(x).data, x @ W.T, rtol=1e-12)
    numpy.testing.assert_allclose(piece.rows(ids).data, W[ids], rtol=1e-12)
    numpy.testing.assert_allclose(piece.merged().data, W, rtol=1e-12)


def test_pissa_decomposes_the_weight_as_it_is_with_everything_that_is_plugged_once_for_each_place(monkeypatch):
    model = CASE.model()
    below = CASE.attach(model, "below")
    weights, svd = [], numpy.linalg.svd
    monkeypatch.setattr(numpy.linalg, "svd", lambda w, **options: weights.append(w) or svd(w, **options))
    pissa = minipeft.attach(model, minipeft.LoRA(2, 2, init="pissa"), RNG(0), "pissa")
    assert len(weights) == len(pissa.places) == 10
    for w, (name, slot) in zip(weights, pissa.places.items()):
        assert w.dtype == "float64" and numpy.array_equal(w, slot.fold(["below"]).dense().data), name
        assert not numpy.array_equal(w, slot.base.data)
    assert set(pissa.parameters) == {f"{name}@pissa.{leaf}" for name in pissa.places for leaf in "AB"}
    assert below.state == "plugged" and all(isinstance(p, PrincipalLowRank) for p in pissa.at.values())


def test_pissa_forms_no_product_of_the_size_of_the_weight():
    slot, made = Slot("linear", RNG(0).standard_normal((7, 11))), []
    piece = piece_on(minipeft.LoRA(2, init="pissa", dropout=0.5), slot, RNG(0))
    token = _observer.set(lambda forward, inputs, out, vjps, node: made.append(out.shape))
    try:
        piece.project(numpy.ones((2, 3, 11)), RNG(0))
    finally:
        _observer.reset(token)
    assert (7, 11) not in made and (2, 3, 7) in made


@pytest.mark.parametrize("spoil, match", [
    (lambda w: w.__setitem__((1, 2), numpy.nan), r"encoder.0.attn.q.weight holds NaN or infinity"),
    (lambda w: w.__setitem__((1, 2), -numpy.inf), r"encoder.0.attn.q.weight holds NaN or infinity"),
    (lambda w: w.__setitem__(..., 0), r"encoder.0.attn.q.weight has rank 0; expected at least 2"),
    (lambda w: w.__setitem__(..., numpy.pad([[1.0]], [(0, n - 1) for n in w.shape])), r".* has rank 1; expected at l")])
def test_pissa_refuses_a_weight_that_it_cannot_decompose_and_changes_nothing(spoil, match):
    model, rng = CASE.model(), RNG(0)
    spoil(model.slots["encoder.0.attn.q.weight"].base.data)
    with pytest.raises(ValueError, match=f"LoRA: init is 'pissa', and {match}"):
        minipeft.attach(model, minipeft.LoRA(2, init="pissa"), rng)
    assert not model.attachments and rng.bit_generator.state == RNG(0).bit_generator.state


def test_pissa_refuses_a_rank_that_is_too_large_a_scale_that_is_too_small_and_projections_side_by_side():
    with pytest.raises(ValueError, match="rank 13 exceeds 12"):
        attached(minipeft.LoRA(13, init="pissa"))
    with pytest.raises(ValueError, match="and s is 1e-90; expected a larger one: A and B of .* are not finite in floa"):
        attached(minipeft.LoRA(1, 1e-90, init="pissa"), dtype="float32")
    with pytest.raises(ValueError, match=r"LoRA: enable is \(True,\); expected None where init is 'pissa'"):
        minipeft.LoRA(init="pissa", enable=(True,))


# ---- projections side by side


def merged(enable=(True, False, True), rank=2, p=0.0, d_out=12, seed=0):
    slot = Slot("linear", RNG(seed).standard_normal((d_out, 5)))
    piece = piece_on(minipeft.LoRA(rank, 3, p, enable=enable), slot, RNG(seed))
    piece.B.data = RNG([seed, 1]).standard_normal(piece.B.shape)
    return slot, piece


@pytest.mark.parametrize("enable", [(True, False, True), (False, True), (True,), (True, True, True, True)])
def test_each_enabled_projection_is_a_lora_of_its_own_and_the_others_are_the_base(enable):
    slot, piece = merged(enable)
    n, k, x = len(enable), sum(enable), RNG(1).standard_normal((2, 3, 5))
    d = 12 // n
    assert isinstance(piece, MergedLowRank) and piece.A.shape == (2 * k, 5) and piece.B.shape == (k * d, 2)
    W, at = slot.base.data.copy(), 0
    for i, on in enumerate(enable):
        if on:
            A, B = piece.A.data[2 * at:2 * at + 2], piece.B.data[d * at:d * at + d]
            W[i * d:i * d + d] += 1.5 * B @ A
            at += 1
    found = piece.dense().data
    numpy.testing.assert_allclose(found, W, rtol=1e-12)
    assert numpy.array_equal(found[~numpy.repeat(enable, d)], slot.base.data[~numpy.repeat(enable, d)])
    numpy.testing.assert_allclose(piece.project(x).data, x @ W.T, rtol=1e-12)


@pytest.mark.parametrize("enable", [(), (False,), (False, False), (1, 0), True, "qv", ("True",), [None]])
def test_an_enable_that_chooses_nothing_or_is_no_booleans_is_refused(enable):
    with pytest.raises(ValueError, match="LoRA: enable is .*; expected booleans, one of them True"):
        minipeft.LoRA(enable=enable)


@pytest.mark.parametrize("fields, match", [
    ({"where": "^embedding"}, "embedding.weight is an embedding table; expected a matrix that holds projections"),
    ({"where": r"\.q\.weight$", "enable": (True, False)}, r"q.weight has d_out = 15; expected a number of parts that"),
    ({"rank": 6}, r"rank 6 exceeds 5, the largest that a part of encoder.0.attn.q.weight \[15, 12\] can have")])
def test_an_enable_that_does_not_fit_a_place_is_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        attached(minipeft.LoRA(**{"rank": 2, "enable": (True, False, True), **fields}))


def test_projections_side_by_side_form_no_product_of_the_size_of_the_weight():
    (_, piece), made = merged(d_out=21), []
    token = _observer.set(lambda forward, inputs, out, vjps, node: made.append(out.shape))
    try:
        piece.project(numpy.ones((2, 3, 5)))
    finally:
        _observer.reset(token)
    assert (2, 3, 4) in made and not {(21, 5), (7, 5)} & set(made)


# ---- files of 0.2


def test_a_file_with_the_old_name_of_an_init_is_read_without_a_warning_and_its_fingerprint_is_the_same(
        tmp_path, recwarn):
    """Also one that was trained on top of it, whose file holds the fingerprint that 0.2 computed."""
    model = CASE.model()
    lower = trained(minipeft.attach(model, minipeft.LoRA(2, init="kaiming"), RNG(0), "lower"), RNG(1))
    upper = minipeft.attach(model, minipeft.LoRA(2), RNG(2), "upper")
    _, grads = minipeft.value_and_grad(lambda: model.loss(**CASE.batch()), upper.parameters)
    minipeft.AdamW().step(upper.parameters, grads)
    lower.save(tmp_path / "lower")
    upper.save(tmp_path / "upper")
    tensors, metadata = read_tensors(tmp_path / "lower")
    assert '"init": "kaiming"' in metadata["method"]
    old = {**metadata, "method": metadata["method"].replace("kaiming", "uniform")}
    write_signed(tmp_path / "old", tensors, old)
    target = CASE.model()
    loaded, _ = minipeft.load(target, [tmp_path / "old", tmp_path / "upper"])
    assert loaded.method.init == "kaiming" and not recwarn.list
    assert logits(target, CASE.batch()).tobytes() == logits(model, CASE.batch()).tobytes()
    said = json.dumps({"kind": "LoRA", "rank": 2, "alpha": 16, "dropout": 0.0, "init": "uniform"}, sort_keys=True)
    assert lower.layer.content == sha256([said.encode(), fingerprint(lower.tensors).encode()])
