"""VeRA: its equation, the pair that all weights share, and PEFT's way of drawing it."""
from __future__ import annotations

import numpy
import pytest

import minipeft
from minipeft.files import read_tensors
from minipeft.laws.models import model_of
from minipeft.methods.vera import VectorBased
from tests.strategies import fractions

TWO_SHAPES = r"\.(q|wo)\.weight$"  # [15, 12] and [12, 17] on the tiny T5


def attached(method=minipeft.VeRA(3, where=TWO_SHAPES), dtype="float64"):
    model = model_of("t5 v1.1", dtype, 0)
    return model, minipeft.attach(model, method, numpy.random.default_rng(1), "a")


def test_the_weight_is_the_equation_with_the_first_rows_of_b_and_the_first_columns_of_a():
    model, attachment = attached()
    rng = numpy.random.default_rng(2)
    for p in attachment.parameters.values():
        p.data = rng.standard_normal(p.shape)
    A, B = (attachment.arrays[f"vera@a.{leaf}"].data for leaf in "AB")
    assert A.shape == (3, 17) and B.shape == (15, 3), "as large as the largest weight needs"
    for name, slot in attachment.places.items():
        d_out, d_in = slot.shape
        d, b = (attachment.parameters[f"{name}@a.{leaf}"].data for leaf in "db")
        wanted = slot.base.data + numpy.diag(b) @ B[:d_out] @ numpy.diag(d) @ A[:, :d_in]
        assert abs(slot.fold().dense().data - wanted).max() < 1e-14


def test_all_weights_share_one_pair_which_is_saved_once_and_never_trained(tmp_path):
    _, attachment = attached()
    assert len({id(array) for place in attachment.places.values() for leaf in "AB"
                for array in [place.attached["a"].arrays[leaf]]}) == 2
    assert not [name for name in attachment.parameters if name.startswith("vera")]
    attachment.save(tmp_path / "file")
    stored = read_tensors(tmp_path / "file")[0]
    assert sorted(key for key in stored if key.startswith("vera")) == ["vera.A", "vera.B"]
    assert len(stored) == 2 + 2 * len(attachment.places)


def test_a_b_and_d_start_as_the_paper_has_them():
    """Kaiming uniform: within +- sqrt(6 / columns), with the variance 2 / columns; d at 0.1, b at 0."""
    _, attachment = attached(minipeft.VeRA(400, where=TWO_SHAPES))
    for leaf in "AB":
        numbers = attachment.arrays[f"vera@a.{leaf}"].data
        assert abs(numbers).max() <= (6 / numbers.shape[1]) ** 0.5
        assert abs(numbers.var() * numbers.shape[1] / 2 - 1) < 0.05  # 3 sigma: 0.9 / sqrt(6000) * 3
    for name, p in attachment.parameters.items():
        assert (p.data == (0.1 if name.endswith(".d") else 0)).all()


def test_the_rank_may_exceed_the_sizes_of_a_weight():
    _, attachment = attached(minipeft.VeRA(100, where=TWO_SHAPES))
    assert attachment.arrays["vera@a.A"].shape == (100, 17)


def test_a_key_fixes_the_numbers_whatever_the_generator_is_and_without_one_they_come_from_it():
    for key, same in ((5, True), (None, False)):
        model = model_of("t5 v1.1", "float64", 0)
        drawn = [minipeft.attach(model, minipeft.VeRA(3, key=key), numpy.random.default_rng(i), f"a{i}").arrays[
            f"vera@a{i}.A"].data for i in range(2)]
        assert (drawn[0] == drawn[1]).all() == same


def test_x_is_not_kept_for_the_backward_pass_because_a_is_frozen():
    """LoRA needs x for dA; here a product keeps only what has the width r or d_out."""
    _, attachment = attached()
    slot = next(iter(attachment.places.values()))
    x = numpy.ones((2, 5, slot.shape[1]))
    kept = []
    token = minipeft.engine.tensor._observer.set(
        lambda forward, inputs, out, vjps, node: kept.extend(
            cell.cell_contents for parent, vjp in (node.edges if node else ()) for cell in vjp.__closure__ or ()))
    try:
        minipeft.value_and_grad(lambda: slot.project(x).sum(), dict(attachment.parameters), unused="zeros")
    finally:
        minipeft.engine.tensor._observer.reset(token)
    assert kept and not any(array is x for array in kept)
    d_out, r = slot.shape[0], attachment.method.rank
    widths = {array.shape[-1] for array in kept if getattr(array, 'ndim', 0) == 3}
    assert widths == {d_out, r}, "of x A^T, and of what b multiplies"


@pytest.mark.parametrize("fields, message", [
    (dict(rank=0), "rank is 0; expected an integer >= 1"), (dict(d_initial=0), "d_initial is 0; expected a finite"),
    (dict(key=-1), "key is -1; expected None or an integer"), (dict(key=2 ** 32), r"expected .* in \[0, 2\^32\)"),
    (dict(key=True), "key is True")])
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"VeRA: {message}|VeRA: key is 4294967296; {message}"):
        minipeft.VeRA(**fields)


def test_a_start_of_d_that_is_infinite_in_the_dtype_of_the_weight_is_refused():
    model = model_of("t5 v1.1", "float32", 0)
    with pytest.raises(ValueError, match=r"VeRA: d_initial is 1e\+39; expected a finite number in float32"):
        minipeft.attach(model, minipeft.VeRA(3, 1e39), numpy.random.default_rng(0))
    assert not model.attachments


def test_the_class_alone_is_the_equation_on_fractions():
    rng = numpy.random.default_rng(0)
    A, B, d, b, W = (fractions(rng.integers(-4, 5, s), 3) for s in ((2, 4), (5, 2), (2,), (3,), (3, 4)))
    piece = VectorBased(A=minipeft.Fixed(A), B=minipeft.Fixed(B), d=minipeft.Parameter(d), b=minipeft.Parameter(b))
    found = piece.over(minipeft.Parameter(W))
    wanted = W + b[:, None] * (B[:3] @ (d[:, None] * A))
    assert (found.dense().data == wanted).all()
    x = fractions(rng.integers(-4, 5, (2, 4)), 5)
    assert (found.project(x).data == x @ wanted.T).all()
    assert (found.rows(numpy.array([2, 0])).data == wanted[[2, 0]]).all()
