"""A quantized weight behaves as any other weight, and is its decoded matrix in every way."""
import copy
import pickle
import weakref

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.nn.weight import Fixed, Parameter
from minipeft.quant import QuantizedWeight, scheme
from minipeft.quant.scheme import SCHEMES
from minipeft.quant.weight import CHUNK, decoded
from tests.methods_under_test import HALF

RNG = numpy.random.default_rng
KINDS = [("int2", {}), ("int3", {}), ("int4", {}), ("int8", {"group": 16}),
         *[(kind, options) for kind, options in (("nf4", {}), ("nf4", {"double": True, "blocksize": 32}), ("fp4", {}),
                                                 ("q4_0", {}), ("q4_1", {}), ("q5_0", {}), ("q5_1", {}), ("q8_0", {}))
           if kind in SCHEMES]]


def weight(kind, options, dtype="float32", shape=(7, 96), seed=0, keep=False):
    W = RNG(seed).standard_normal(shape).astype(dtype)
    return W, QuantizedWeight.of(W, scheme(kind, **options), keep)


@pytest.mark.parametrize("kind, options", KINDS)
@HALF
@given(st.sampled_from(["float32", "float64"]), st.integers(1, 9), st.sampled_from([32, 64, 96]), st.integers(0, 999))
def test_products_rows_and_gradients_are_those_of_the_decoded_matrix(kind, options, dtype, d_out, d_in, seed):
    W, quantized = weight(kind, options, dtype, (d_out, d_in), seed)
    dense = Parameter(quantized.dense().data)
    assert (quantized.shape, quantized.dtype) == ((d_out, d_in), W.dtype) == (dense.shape, dense.dtype)
    rng = RNG(seed)
    x, g = (rng.standard_normal((2, 3, n)).astype(dtype) for n in (d_in, d_out))
    ids = rng.integers(0, d_out, (2, 3))
    x = Parameter(x)
    (one, dx), (other, dy) = (minipeft.value_and_grad(lambda: (w.project(x) * g).sum(), {"x": x})
                              for w in (quantized, dense))
    assert one == other and dx["x"].tobytes() == dy["x"].tobytes()
    assert quantized.project(x).data.tobytes() == dense.project(x).data.tobytes()
    assert quantized.rows(ids).data.tobytes() == dense.rows(ids).data.tobytes()
    assert quantized.rows(ids).dtype == W.dtype


@pytest.mark.parametrize("kind, options", KINDS)
def test_a_matrix_of_more_rows_than_one_chunk_is_decoded_as_a_whole_one(kind, options):
    """The rows of a chunk are decoded by themselves; block by block the numbers are the same."""
    shape = (2 * CHUNK // 96 + 5, 96)
    _, quantized = weight(kind, options, shape=shape)
    dense = quantized.dense().data
    rows = numpy.array([0, shape[0] // 2, CHUNK // 96 - 1, CHUNK // 96, shape[0] - 1])
    assert quantized.rows(rows).data.tobytes() == dense[rows].tobytes()


@pytest.mark.parametrize("kind, options", KINDS)
def test_arrays_have_the_shapes_and_dtypes_that_the_scheme_announces_and_are_never_trained(kind, options):
    _, quantized = weight(kind, options)
    announced = quantized.scheme.leaves((7, 96), "float32")
    assert {leaf: (a.shape, a.dtype) for leaf, a in quantized.arrays.items()} == {
        leaf: (tuple(shape), numpy.dtype(dtype)) for leaf, (shape, dtype) in announced.items()}
    assert all(type(a) is Fixed for a in quantized.arrays.values()) and not quantized.drops
    assert quantized.nbytes == sum(a.data.nbytes for a in quantized.arrays.values()) and quantized.kept_bytes == 0


@pytest.mark.parametrize("keep", [False, True])
def test_requantized_it_has_the_same_scheme_dtype_and_way_of_keeping(keep):
    W, quantized = weight("int4", {}, keep=keep)
    again = quantized.requantized((2 * W).astype("float64"))
    assert (again.scheme, again.dtype, again.keep) == (quantized.scheme, W.dtype, keep)
    assert (again.dense().data == 2 * quantized.dense().data).all(), "scales double, codes stay"
    assert again.kept_bytes == quantized.kept_bytes == keep * W.nbytes


@pytest.mark.parametrize("method, most", [
    (minipeft.LoRA(2), 1), (minipeft.QALoRA(2, group=32), 1), (minipeft.DoRA(2), 1), (minipeft.IA3(), 1),
    (minipeft.VeRA(2), 1), (minipeft.LoHa(2), 1), (minipeft.OFT(4, where=["q", "v"]), 1), (minipeft.Bottleneck(), 1),
    (minipeft.HiRA(2), 7)], ids=lambda value: type(value).__name__)
def test_in_a_step_one_decoded_matrix_is_alive_at_a_time_but_in_hira(method, most, monkeypatch):
    """HiRA multiplies the entries of W~, and needs them for its gradients: those of its six places stay, as its page
    says, and one more is in use."""
    config = minipeft.T5Config(vocab_size=20, d_model=32, d_kv=16, num_heads=2, d_ff=32, num_layers=1,
                               num_decoder_layers=1, dropout_rate=0.0)
    model = minipeft.T5(config, RNG(0))
    minipeft.quantize(model, "int4")
    attachment = minipeft.attach(model, method, RNG(0))
    made, largest = [], 0

    def watched(*args):
        nonlocal largest
        made.append(weakref.ref(found := decoded(*args)))
        largest = max(largest, sum(one() is not None for one in made))
        return found

    monkeypatch.setattr("minipeft.quant.weight.decoded", watched)
    ids = numpy.array([[3, 4, 5]])
    minipeft.value_and_grad(lambda: model.loss(ids, ids), attachment.parameters)
    assert largest == most and not any(one() is not None for one in made)


def test_shifted_it_has_the_same_codes_and_scales_and_other_offsets():
    _, quantized = weight("int4", {}, "float64")
    delta = RNG(1).integers(-8, 8, (7, 3)) / 4
    moved = quantized.shifted(delta)
    assert abs(moved.dense().data - (quantized.dense().data + numpy.repeat(delta, 32, axis=1))).max() < 1e-14
    for leaf in ("codes", "scale"):
        assert moved.arrays[leaf].data is quantized.arrays[leaf].data
    with pytest.raises(ValueError, match="expected groups that hold whole groups|groups"):
        quantized.shifted(numpy.zeros((7, 5)))


def test_without_keep_no_number_stays_and_with_keep_the_same_array_is_given_again():
    _, quantized = weight("int4", {})
    assert quantized.dense().data is not quantized.dense().data and quantized._kept is None
    _, kept = weight("int4", {}, keep=True)
    assert kept.dense().data is kept.dense().data
    assert kept.dense().data.tobytes() == quantized.dense().data.tobytes()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_a_copy_keeps_no_numbers_of_the_first(copied):
    _, kept = weight("int4", {}, keep=True)
    kept.dense()
    twin = copied(kept)
    assert twin._kept is None and twin.dense().data.tobytes() == kept.dense().data.tobytes()
    assert twin.dense().data is not kept.dense().data


def test_kept_numbers_are_decoded_again_when_an_array_is_another():
    _, kept = weight("int4", {}, keep=True)
    before = kept.dense().data
    kept.arrays["offset"].data = kept.arrays["offset"].data + 1
    assert abs(kept.dense().data - before - 1).max() < 1e-6


def test_what_it_cannot_be_is_refused():
    W, quantized = weight("int4", {})
    for array in (W * numpy.float32(numpy.nan), W + numpy.float32(numpy.inf)):
        with pytest.raises(ValueError, match="it holds NaN or infinity; expected finite numbers"):
            QuantizedWeight.of(array, scheme("int4"))
        with pytest.raises(ValueError, match="it holds NaN or infinity"):
            quantized.requantized(array)
    with pytest.raises(ValueError, match="it has dtype int64; expected floating-point numbers"):
        QuantizedWeight.of(numpy.ones((2, 32), "int64"), scheme("int4"))
    with pytest.raises(TypeError, match=r"a quantized weight is a matrix \[7, 96\], and no vector"):
        quantized.vector()
    assert repr(quantized) == "QuantizedWeight(int4, groups of 32, [7, 96], float32)"


@pytest.mark.parametrize("keep", [True, False])
def test_a_weight_that_is_made_of_another_keeps_its_numbers_if_that_one_does(keep):
    W = RNG(0).standard_normal((3, 12))
    weight = QuantizedWeight.of(W, scheme("int4", group=4), keep)
    assert weight.shifted(numpy.ones((3, 3))).keep is weight.requantized(2 * W).keep is keep
