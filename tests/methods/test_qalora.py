"""QA-LoRA: its equation and its three conventions, and the merge that moves offsets alone."""
from __future__ import annotations

import math
from fractions import Fraction

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft import QALoRA
from minipeft.laws.bounds import tau
from minipeft.laws.models import model_of
from minipeft.methods.lora import LowRank
from minipeft.methods.qalora import POOLINGS, GroupedLowRank
from minipeft.nn.slot import Slot
from minipeft.quant import QuantizedWeight, scheme
from tests.strategies import fractions, seeds

RNG = numpy.random.default_rng
BITS = (2, 3, 4, 8)
U = 2 ** -53
K = {"sum": lambda d_in, g: Fraction(1), "mean": lambda d_in, g: Fraction(1, g),
     "mean * groups": lambda d_in, g: Fraction(d_in // g, g)}


def piece(A, B, scale=Fraction(3, 2), p=0.0):
    return GroupedLowRank(A=minipeft.Parameter(A), B=minipeft.Parameter(B), scale=scale, p=p)


def drawn(seed=0, r=2, d_out=5, g=3, groups=4):
    """(the piece over W0, A, B, W0), of Fractions."""
    rng = RNG(seed)
    A, B, W = (fractions(rng.integers(-4, 5, shape), 2) for shape in ((r, groups), (d_out, r), (d_out, g * groups)))
    return piece(A, B).over(minipeft.Parameter(W)), A, B, W


def slot_of(d_out, d_in, dtype="float64"):
    """A slot of this shape that takes no memory."""
    return Slot("linear", numpy.broadcast_to(numpy.zeros((), dtype), (d_out, d_in)))


# ---- the equation


def test_every_entry_is_that_of_the_equation_number_for_number():
    found, A, B, W = drawn()
    product = B @ A
    wanted = W.copy()
    for o in range(5):
        for i in range(12):
            wanted[o, i] += Fraction(3, 2) * product[o, i // 3]
    x = fractions(RNG(1).integers(-4, 5, (2, 3, 12)), 2)
    assert (found.dense().data == wanted).all() and (found.project(x).data == x @ wanted.T).all()
    assert (found.rows(numpy.array([[4, 0], [4, 2]])).data == wanted[[[4, 0], [4, 2]]]).all()


@given(seeds(), st.sampled_from([(1, 4), (2, 6), (3, 2), (6, 1)]))
def test_it_is_a_lora_whose_columns_of_a_are_repeated_in_value_and_gradients(seed, sizes):
    """dA is then the sum over each group of the gradient of the repeated A; dB and dx are equal."""
    g, groups = sizes
    rng, s = RNG(seed), Fraction(5, 4)
    A, B, W, x, dy = (rng.standard_normal(shape) for shape in (
        (2, groups), (5, 2), (5, g * groups), (3, 4, g * groups), (3, 4, 5)))
    base = minipeft.Parameter(W)
    ours = piece(A, B, s).over(base)
    lora = LowRank(A=minipeft.Parameter(numpy.repeat(A, g, axis=1)), B=minipeft.Parameter(B), scale=s, p=0.0).over(base)
    values, grads = [], []
    for one in (ours, lora):
        at = minipeft.Parameter(x)

        def step():
            values.append(one.project(at))
            return (values[-1] * dy).sum()

        grads.append(minipeft.value_and_grad(step, {"A": one.A, "B": one.B, "x": at})[1])
    pooled = grads[1]["A"].reshape(2, groups, g).sum(axis=2)
    # on either side sums of at most d_in + r + 12 terms, and 4 single roundings
    size = 5 / 4 * g * groups * 2 * 12 * max(abs(part).max() for part in (A, B, W, x, dy, W * 0 + 1)) ** 4
    bound = 2 * tau(numpy.float64(size), g * groups + 2 + 12 + 4, 0, U)
    assert abs(ours.dense().data - lora.dense().data).max() <= bound
    assert abs(values[0].data - values[1].data).max() <= bound and abs(grads[0]["A"] - pooled).max() <= bound
    assert all(abs(grads[0][name] - grads[1][name]).max() <= bound for name in ("B", "x"))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_factor_k_is_the_one_of_the_table_exactly(pooling):
    """alpha / r = 5 / 3 and its k; on a place with patterns, those of the place; and alpha / sqrt(r)."""
    method = QALoRA(3, 5, 4, pooling=pooling, rank_pattern={"^b": 2}, alpha_pattern={"^b": -7})
    for name, s, d_in in (("a", Fraction(5, 3), 12), ("b", Fraction(-7, 2), 20)):
        assert method.scale_at(name, slot_of(6, d_in)) == K[pooling](d_in, 4) * s
    root = QALoRA(3, 5, 4, pooling=pooling, scaling="alpha/sqrt(r)")
    assert root.scale_at("a", slot_of(6, 12)) == K[pooling](12, 4) * (Fraction(5) / Fraction(math.sqrt(3)))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_what_a_place_computes_is_the_pooling_of_its_source(pooling):
    """The paper sums a group, the authors' code takes its mean, and PEFT the mean times the number of groups."""
    model = model_of("t5 v1.1", "float64", 0)
    name = "encoder.0.attn.q.weight"
    attachment = minipeft.attach(model, QALoRA(2, 5, 3, pooling=pooling, where=f"^{name}$"), RNG(1), "a")
    A, B = (attachment.parameters[f"{name}@a.{leaf}"] for leaf in "AB")
    B.data = RNG(2).standard_normal(B.shape)
    slot, x = model.slots[name], RNG(3).standard_normal((2, 3, 12))
    grouped = x.reshape(2, 3, 4, 3)
    pooled = {"sum": grouped.sum(-1), "mean": grouped.mean(-1), "mean * groups": grouped.mean(-1) * 4}[pooling]
    wanted = pooled @ A.data.T @ B.data.T * 2.5
    assert abs(slot.project(x).data - slot.base.project(x).data - wanted).max() < 1e-14


def test_groups_of_one_are_a_lora():
    rng = RNG(0)
    A, B, W, x = (rng.standard_normal(shape) for shape in ((2, 6), (5, 2), (5, 6), (3, 6)))
    method = QALoRA(2, 3, 1, where="^a$")
    ours = method.make("a", slot_of(5, 6), {"A": minipeft.Parameter(A), "B": minipeft.Parameter(B)})
    lora = LowRank(A=minipeft.Parameter(A), B=minipeft.Parameter(B), scale=Fraction(3, 2), p=0.0)
    base = minipeft.Parameter(W)
    assert (ours.over(base).project(x).data == lora.over(base).project(x).data).all()


def test_dropout_acts_on_what_was_pooled_and_on_nothing_else():
    """With p = 1/2, A = B = I and W = 0, each output is 0 or twice the sum of its group."""
    over = piece(numpy.eye(4), numpy.eye(4), Fraction(1), 0.5).over(minipeft.Parameter(numpy.zeros((4, 12))))
    x = RNG(0).standard_normal((50, 12))
    sums, y = x.reshape(50, 4, 3).sum(axis=2), over.project(x, RNG(1)).data
    dropped = y == 0
    assert over.drops and 0.3 < dropped.mean() < 0.7
    assert abs(y - numpy.where(dropped, 0, 2 * sums)).max() < 1e-14
    assert abs(over.project(x).data - sums).max() < 1e-14


def test_x_is_not_kept_for_the_backward_pass_but_its_sums_are():
    """LoRA keeps x for dA. Above a quantized weight, here only [.., L] is kept, and what has the rank as its width."""
    base = QuantizedWeight.of(RNG(0).standard_normal((7, 24)), scheme("int4", group=8))
    over, x = piece(numpy.ones((2, 3)), numpy.ones((7, 2))).over(base), RNG(1).standard_normal((2, 5, 24))
    kept = []
    token = minipeft.engine.tensor._observer.set(
        lambda forward, inputs, out, vjps, node: kept.extend(
            cell.cell_contents for _, vjp in (node.edges if node else ()) for cell in vjp.__closure__ or ()))
    try:
        minipeft.value_and_grad(lambda: over.project(x).sum(), {"A": over.A, "B": over.B})
    finally:
        minipeft.engine.tensor._observer.reset(token)
    shapes = {array.shape for array in kept if isinstance(array, numpy.ndarray)}
    assert (2, 5, 3) in shapes and not [shape for shape in shapes if 24 in shape and len(shape) > 1]


# ---- the start, and the size


def test_a_starts_with_the_entries_of_loras_and_for_means_as_a_linear_layer_of_l_inputs():
    for pooling, columns in (("sum", 256), ("mean", 32), ("mean * groups", 32)):
        arrays = QALoRA(16, group=8, pooling=pooling).arrays("a", slot_of(512, 256), None)
        numbers = arrays["A"].init(arrays["A"].shape, numpy.dtype("float64"), RNG(0))
        assert numbers.shape == (16, 32) and 0.95 * columns ** -0.5 < abs(numbers).max() <= columns ** -0.5
        assert not arrays["B"].init(arrays["B"].shape, numpy.dtype("float64"), RNG(0)).any()


@pytest.mark.parametrize("h, f, n, paper, count", [
    (4096, 11008, 32, "89M", 89_309_184), (5120, 13824, 40, "140M", 139_878_400),
    (6656, 17920, 60, "272M", 272_363_520), (8192, 22016, 80, "447M", 446_545_920)])
def test_the_counts_on_llama_are_those_of_table_2(h, f, n, paper, count):
    """r = 64, g = 32, on the seven linear layers of each block: q, k, v, o [h, h], gate, up [f, h], down [h, f]."""
    method = QALoRA(64, 16, 32)
    shapes = [(h, h)] * 4 + [(f, h)] * 2 + [(h, f)]
    found = n * sum(math.prod(declared.shape) for shape in shapes
                    for declared in method.arrays("a", slot_of(*shape), None).values())
    assert found == count and f"{round(count / 1e6)}M" == paper


# ---- errors


@pytest.mark.parametrize("fields, message", [
    (dict(rank=0), "rank is 0; expected an integer >= 1"), (dict(group=0), "group is 0; expected an integer >= 1"),
    (dict(group=32.0), "group is 32.0; expected an integer"), (dict(alpha=0), "alpha is 0; expected a finite number"),
    (dict(dropout=1), r"dropout is 1; expected a number in \[0, 1\)"),
    (dict(pooling="avg"), r"pooling is 'avg'; expected one of 'sum', 'mean', 'mean \* groups'"),
    (dict(pooling=None), "pooling is None")])
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"QALoRA: {message}"):
        QALoRA(**fields)


@pytest.mark.parametrize("method, message", [
    (QALoRA(2, group=5), r"group is 5, and encoder.0.attn.q.weight has d_in = 12; expected a number that divides it"),
    (QALoRA(13, group=3), r"rank 13 exceeds 12, the largest that encoder.0.attn.q.weight \[15, 12\] can have"),
    (QALoRA(13, group=1), r"rank 13 exceeds 12, the largest that"),
    (QALoRA(1, 3e38, 1, pooling="mean * groups"), r"alpha is 3e\+38; expected a finite k s in float32"),
    (QALoRA(2, group=3, rank_pattern={"nowhere": 1}), "rank_pattern has 'nowhere', which matches none")])
def test_what_does_not_fit_a_model_is_refused_and_changes_nothing(method, message):
    model = model_of("t5 v1.1", "float32", 0)
    with pytest.raises(ValueError, match=message):
        minipeft.attach(model, method, RNG(0))
    assert not model.attachments


def test_with_any_rank_r_may_exceed_the_number_of_groups():
    model = model_of("t5 v1.1", "float32", 0)
    attachment = minipeft.attach(model, QALoRA(5, group=3, any_rank=True), RNG(0), "a")
    assert attachment.parameters["encoder.0.attn.q.weight@a.A"].shape == (5, 4)


# ---- the merge into offsets


def quantized(seed, kind, dyadic, dtype="float64", d_out=5, groups=4, group=4):
    """A QuantizedWeight [d_out, 4 groups]. dyadic: of integers, with the same range in every group, so that scales,
    offsets and numbers are small integers and every sum is exact."""
    rng, top = RNG(seed), 2 ** int(kind[3:]) - 1
    if not dyadic:
        matrix = rng.standard_normal((d_out, groups * group)).astype(dtype)
    else:
        grouped = rng.integers(0, top + 1, (d_out, groups, group))
        grouped[..., 0], grouped[..., 1] = 0, top
        matrix = (grouped - rng.integers(0, top + 1, (d_out, groups, 1))).reshape(d_out, -1).astype(dtype)
    return QuantizedWeight.of(matrix, scheme(kind, group=group))


def same_bits(one, other, *leaves):
    return all(one.arrays[leaf].data.tobytes() == other.arrays[leaf].data.tobytes() for leaf in leaves)


def adapter(seed, dyadic, dtype="float64", d_out=5, groups=2, scale=Fraction(3, 4)):
    """A piece with groups of 8 inputs, for a weight with groups of 4."""
    rng = RNG([seed, 1])
    A, B = (rng.integers(-4, 5, shape) / 4 if dyadic else rng.standard_normal(shape)
            for shape in ((2, groups), (d_out, 2)))
    return piece(A.astype(dtype), B.astype(dtype), scale)


@given(seeds(), st.sampled_from([f"int{bits}" for bits in BITS]), st.sampled_from([2, 4]),
       st.sampled_from(["float64", "float32"]))
def test_the_merge_is_exact_bit_for_bit_on_dyadic_data_and_codes_and_scales_keep_every_bit(seed, kind, groups, dtype):
    """Weights, products and lookups, for groups of the adapter that are those of the weight, or two of them."""
    base = quantized(seed, kind, True, dtype)
    over = adapter(seed, True, dtype, groups=groups).over(base)
    merged, x = over.merged(), RNG(seed).integers(-3, 4, (2, 3, 16)).astype(dtype)
    assert isinstance(merged, QuantizedWeight) and same_bits(merged, base, "codes", "scale")
    assert merged.arrays.keys() == base.arrays.keys() and merged.dtype == dtype
    for found, wanted in ((merged.dense(), over.dense()), (merged.project(x), over.project(x)),
                          (merged.rows(numpy.array([4, 0])), over.rows(numpy.array([4, 0])))):
        assert found.data.dtype == wanted.data.dtype and (found.data == wanted.data).all()
    assert (merged.arrays["offset"].data - base.arrays["offset"].data
            == numpy.repeat(over.change().data, 4 // groups, axis=1)).all()


@given(seeds(), st.sampled_from([f"int{bits}" for bits in BITS]), st.sampled_from([2, 4]))
def test_the_merge_of_any_numbers_is_exact_up_to_two_roundings_on_either_side(seed, kind, groups):
    """Both add the same a q, b and c, with two sums each: a q + (b + c), and (a q + b) + c. So they differ by at most
    2 gamma_2 (|a q| + |b| + |c|), which is 4.5e-16 of this size, and less than 1e-15."""
    base = quantized(seed, kind, False)
    over = adapter(seed, False, groups=groups).over(base)
    merged = over.merged()
    b, c = base.arrays["offset"].data, numpy.repeat(over.change().data, 4 // groups, axis=1)
    parts = [numpy.repeat(abs(part), 4, axis=1) for part in (b, c)]
    size = abs(base.dense().data) + 2 * parts[0] + parts[1]                       # |a q| <= |W~| + |b|
    off = abs(merged.dense().data - over.dense().data)
    assert (off <= 2 * tau(size, 2, 0, U)).all() and (off <= 1e-15 * size).all()
    assert same_bits(merged, base, "codes", "scale")


def test_one_above_a_merged_one_merges_into_the_offsets_too_and_unmerging_gives_every_bit_back():
    model = model_of("t5 v1.1", "float64", 0)
    minipeft.quantize(model, "int4", r"\.(q|v)\.weight$", group=3)
    ids = RNG(0).integers(1, 13, (2, 5))
    found = []
    for i, name in enumerate("ab"):
        found.append(minipeft.attach(model, QALoRA(2, 3, 3 * (i + 1)), RNG(i), name))
        for p in found[-1].parameters.values():
            p.data = RNG([i, 5]).standard_normal(p.shape) * 0.3
    slot = model.slots["encoder.0.attn.q.weight"]
    stored, before = {leaf: array.data.copy() for leaf, array in slot.base.arrays.items()}, model(ids, ids).data
    for one in found:
        one.merge()
    assert isinstance(slot.fold(), QuantizedWeight) and same_bits(slot.fold(), slot.base, "codes", "scale")
    assert not same_bits(slot.fold(), slot.base, "offset")
    assert abs(model(ids, ids).data - before).max() < 1e-12 * abs(before).max()
    for one in found[::-1]:
        one.unmerge()
    assert all(array.data.tobytes() == stored[leaf].tobytes() for leaf, array in slot.base.arrays.items())
    assert model(ids, ids).data.tobytes() == before.tobytes()


@given(seeds(), st.sampled_from(["q4_1", "q5_1"]), st.sampled_from([1, 2]))
def test_in_blocks_of_llama_cpp_m_alone_moves_and_is_rounded_once_to_float16(seed, kind, blocks):
    """For groups of one block or of two. |W~' - (W~ + c)| is at most half a unit in the last place of m', and what
    float32 leaves of d q + m: two roundings on either side."""
    rng = RNG(seed)
    base = QuantizedWeight.of(rng.standard_normal((5, 128)).astype("float32"), scheme(kind))
    over = adapter(seed, False, "float32", groups=4 // blocks).over(base)
    merged, m = over.merged(), base.arrays["m"].data
    assert isinstance(merged, QuantizedWeight) and same_bits(merged, base, *(base.arrays.keys() - {"m"}))
    c = numpy.repeat(over.change().data, blocks, axis=1).astype("float64")
    moved = merged.arrays["m"].data
    assert moved.dtype == "float16" and (moved == (m + c).astype("float16")).all() and (moved != m).any()
    half = numpy.repeat(numpy.spacing(abs(moved)).astype("float64") / 2, 32, axis=1)
    size = abs(base.dense().data.astype("float64")) + numpy.repeat(2 * abs(m.astype("float64")) + abs(c), 32, axis=1)
    off = abs(merged.dense().data.astype("float64") - over.dense().data.astype("float64"))
    assert (off <= half + 2 * tau(size + half, 2, 0, 2 ** -24)).all()


def test_a_zero_point_that_is_rounded_loses_up_to_half_a_step_of_the_change_and_codes_and_scales_stay():
    base = QuantizedWeight.of(RNG(0).standard_normal((5, 16)), scheme("int4", group=4, zero="rounded"))
    over = adapter(0, False, groups=4).over(base)
    merged = over.merged()
    off = abs(merged.dense().data - over.dense().data)
    step = numpy.repeat(base.arrays["scale"].data, 4, axis=1)
    assert isinstance(merged, QuantizedWeight) and same_bits(merged, base, "codes", "scale")
    size = abs(over.dense().data) + abs(base.dense().data) + 32 * step              # a q, a z and a z' are below it
    assert (off <= step / 2 + 2 * tau(size, 5, 0, U)).all() and off.max() > step.max() / 10


BELOW = {"floats": lambda matrix: minipeft.Parameter(matrix),
         "groups that are cut": lambda matrix: QuantizedWeight.of(matrix, scheme("int4", group=16)),
         **{kind: lambda matrix, kind=kind: QuantizedWeight.of(matrix, scheme(kind))
            for kind in ("nf4", "fp4", "q4_0", "q5_0", "q8_0")}}


@pytest.mark.parametrize("below", BELOW)
def test_a_weight_without_an_offset_for_each_group_gives_the_dense_weight(below):
    over = adapter(0, False, groups=64 // 8).over(BELOW[below](RNG(0).standard_normal((5, 64))))
    merged = over.merged()
    assert type(merged) is minipeft.Parameter and (merged.data == over.dense().data).all()


def test_an_offset_that_float16_cannot_hold_gives_the_dense_weight():
    over = piece(numpy.full((1, 1), 1e5), numpy.ones((5, 1)), Fraction(1)).over(
        QuantizedWeight.of(RNG(0).standard_normal((5, 32)), scheme("q4_1")))
    merged = over.merged()
    assert type(merged) is minipeft.Parameter and numpy.isfinite(merged.data).all() and merged.data.min() > 9e4


def test_the_zero_point_form_of_the_paper_is_the_same_weight_and_is_wrong_for_an_added_offset():
    """a (q - z) with z' = z - c / a is a q + (b + c) with b = -a z, number for number. b - c / a is another weight."""
    a, z, c, q = (fractions(RNG(i).integers(1, 9, 6), 4) for i in range(4))
    b = -a * z
    assert (a * (q - (z - c / a)) == a * q + (b + c)).all()
    assert not (a * q + (b - c / a) == a * q + (b + c)).any()
