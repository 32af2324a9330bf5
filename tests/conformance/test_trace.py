"""A trace holds every site, activation and gradient by name, is what the model computes, and leaves it as it was."""
import copy
import json

import numpy
import pytest

import minipeft
from minipeft.engine.tensor import _observer, _watched
from minipeft.conformance.trace import trace
from minipeft.files import read_tensors
from tests.by_hand import put
from tests.models_under_test import FAMILIES, Case, bits, logits


def case(family: str, seed: int = 3, dtype: str = "float64") -> Case:
    return Case((family, "q and v"), 2, 3, dtype, seed)


def traced(tmp_path, model, batch, **options):
    path = tmp_path / "trace.safetensors"
    trace(model, batch, path, **options)
    tensors, metadata = read_tensors(path)
    return tensors, json.loads(metadata["order"]), metadata


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapted", [False, True])
def test_logits_loss_and_the_gradients_of_all_parameters_are_the_models_own(tmp_path, family, adapted):
    model, batch = case(family).model(), case(family).batch()
    if adapted:
        case(family).attach(model)
    tensors, order, _ = traced(tmp_path, model, batch, samples=0)
    params = minipeft.select(model, ".*")
    loss, grads = minipeft.value_and_grad(lambda: model.loss(**batch), params)
    assert tensors["loss"] == loss and numpy.array_equal(tensors["logits"], logits(model, batch))
    assert {name for name in tensors if name.startswith("grad/")} >= {f"grad/{name}" for name in params}
    for name, grad in grads.items():
        assert numpy.array_equal(tensors[f"grad/{name}"], grad), name
    assert set(order) == set(tensors) and len(order) == len(tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_every_layer_and_their_gradients_are_there(tmp_path, family):
    model, batch = case(family).model(), case(family).batch()
    tensors, _, _ = traced(tmp_path, model, batch, samples=0)
    sites = {name for name, site in model.sites.items() if site.kind != "keys_values"}
    layers = {name.rpartition(".")[0] for name in model.slots}
    tied = {"head"} if family in ("t5 v1.0", "post-LN") else set()
    for name in sites | layers | tied | {"logits", "embedding#2"}:
        assert {name, f"grad/{name}"} <= set(tensors), name
        assert tensors[name].shape == tensors[f"grad/{name}"].shape


def test_the_order_is_that_of_evaluation_and_back(tmp_path):
    _, order, _ = traced(tmp_path, case("pre-LN").model(), case("pre-LN").batch(), samples=0)
    forward = ["input_ids", "embedding", "encoder.input", "encoder.0.attn_norm", "encoder.0.attn.q", "encoder.0.attn.o",
               "encoder.0.attn.out", "encoder.0.ff.wi", "encoder.0", "encoder.norm", "embedding#2", "decoder.0.cross.k",
               "decoder.1", "logits", "loss"]
    backward = [f"grad/{name}" for name in (
        "logits", "head.weight", "decoder.1", "decoder.1.ff.wo.weight", "decoder.0.cross.k", "embedding#2",
        "encoder.norm", "encoder.0.attn.out", "encoder.0.attn.q", "encoder.0.attn.q.weight", "encoder.input",
        "embedding", "embedding.weight")]
    at = [order.index(name) for name in forward + backward]
    assert at == sorted(at)


def test_the_gradient_of_an_activation_is_what_the_loss_does_when_that_is_moved(tmp_path):
    """encoder.0.attn.out is moved by a callable that is plugged there, and the loss by <gradient, direction>."""
    model, batch = case("t5 v1.1").model(), case("t5 v1.1").batch()
    tensors, _, _ = traced(tmp_path, model, batch, samples=0)
    direction = numpy.random.default_rng(0).standard_normal(tensors["encoder.0.attn.out"].shape)
    site = model.sites["encoder.0.attn.out"]

    def loss(t: float) -> float:
        put(site, {"moved": lambda x, n, f: f + t * direction})
        return float(model.loss(**batch).data)

    h = 1e-5
    slope = (tensors["grad/encoder.0.attn.out"] * direction).sum()
    assert slope == pytest.approx((loss(h) - loss(-h)) / (2 * h), rel=1e-7)


def test_what_is_plugged_is_seen_at_its_site_and_what_is_off_is_not(tmp_path):
    model, batch = case("pre-LN").model(), case("pre-LN").batch()
    plain, _, _ = traced(tmp_path, model, batch, samples=0)
    rng = numpy.random.default_rng(0)
    attachment = minipeft.attach(model, minipeft.Bottleneck(), rng, "houlsby")
    for p in attachment.parameters.values():
        p.data = rng.standard_normal(p.shape)
    tensors, _, metadata = traced(tmp_path, model, batch, samples=0)
    assert not numpy.array_equal(tensors["encoder.0.attn.out"], tensors["encoder.0.attn.o"])
    assert {f"grad/{name}" for name in attachment.parameters} <= set(tensors)
    assert json.loads(metadata["attachments"]) == {"houlsby": "plugged"}
    attachment.unplug()
    off, _, _ = traced(tmp_path, model, batch, samples=0)
    assert bits(off) == bits(plain)
    routed, _, metadata = traced(tmp_path, model, {**batch, "adapter": ["houlsby", None, "houlsby", None]}, samples=0)
    assert routed["encoder.0.attn.out"].shape == plain["encoder.0.attn.out"].shape
    assert json.loads(metadata["adapter"]) == ["houlsby", None, "houlsby", None]


def test_a_merged_attachment_is_a_constant(tmp_path):
    model, batch = case("t5 v1.0").model(), case("t5 v1.0").batch()
    attachment = case("t5 v1.0").attach(model)
    attachment.merge()
    tensors, _, _ = traced(tmp_path, model, batch)
    assert "grad/encoder.0.attn.q.weight" not in tensors and "grad/encoder.0.attn.k.weight" in tensors


def test_chosen_parameters_alone_have_gradients_and_what_lies_below_them_has_none(tmp_path):
    model, batch = case("t5 v1.0").model(), case("t5 v1.0").batch()
    tensors, _, _ = traced(tmp_path, model, batch, samples=0, params=minipeft.select(model, r"decoder\.1\.ff"))
    grads = {name for name in tensors if name.startswith("grad/")}
    assert {"grad/decoder.1.ff.wi.weight", "grad/logits", "grad/decoder.1.ff.wi"} <= grads
    assert not any("encoder" in name or "decoder.0" in name or "attn" in name for name in grads)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_noise_is_one_number_for_each_row_and_of_the_size_of_a_few_roundings(tmp_path, family):
    tensors, order, _ = traced(tmp_path, case(family).model(), case(family).batch())
    for name in order:
        if tensors[name].dtype.kind != "f":
            assert f"noise/{name}" not in tensors
            continue
        for prefix in ("noise/", "noise.float16/", "noise.bfloat16/"):
            noise, value = tensors[prefix + name], tensors[name]
            assert noise.shape == value.shape[:-1] and noise.dtype == numpy.float32
            assert (noise >= numpy.float32(1 - 2 ** -23) * (abs(value).max(axis=-1) if value.ndim else value)).all()
        if not name.startswith("grad/"):
            assert tensors[f"noise/{name}"].max() < 100 * abs(tensors[name]).max(), name


@pytest.mark.parametrize("prefix, u", [
    ("noise/", 2 ** -24), ("noise.float16/", 2 ** -11), ("noise.bfloat16/", 2 ** -8)])
def test_a_relu_at_0_may_be_open_or_closed(tmp_path, prefix, u):
    """Its input is brought to 0 but for rounding; opened, it would let its whole gradient through."""
    model, batch = case("t5 v1.0").model(), case("t5 v1.0").batch()
    before, _, _ = traced(tmp_path, model, batch, samples=1)
    n, z = before["encoder.0.ff_norm"][1, 2], before["encoder.0.ff.wi"][1, 2, 4]
    weight = model.encoder.blocks[0].ff.wi.weight.base.data
    weight[4] -= z * n / (n @ n)
    after, _, _ = traced(tmp_path, model, batch, samples=1)
    assert abs(after["encoder.0.ff.wi"][1, 2, 4]) < 1e-14
    gradient = abs(after["grad/encoder.0.ff.wo"][1, 2] @ model.encoder.blocks[0].ff.wo.weight.base.data[:, 4])
    assert after[f"{prefix}grad/encoder.0.ff.wi"][1, 2] >= gradient / u * (1 - 1e-6)
    if u < 1e-6:
        assert before[f"{prefix}grad/encoder.0.ff.wi"][1, 2] < 1e-3 * gradient / u


def test_tracing_changes_no_bit_no_class_and_leaves_nothing_set_and_writes_the_same_twice(tmp_path):
    model, batch = case("post-LN").model(), case("post-LN").batch()
    case("post-LN").attach(model)
    before, kinds = bits(minipeft.select(model, ".*")), {type(place) for _, place in model.named_places()}
    first, order, _ = traced(tmp_path, model, batch)
    again, order_again, _ = traced(tmp_path, copy.deepcopy(model), batch)
    assert bits(first) == bits(again) and order == order_again
    assert bits(minipeft.select(model, ".*")) == before
    assert {type(place) for _, place in model.named_places()} == kinds and type(model) is minipeft.Transformer
    assert _observer.get() is None and _watched.get() is None


@pytest.mark.parametrize("change, error, words", [
    ({"inputs": 1}, TypeError, "inputs"), ({"rng": numpy.random.default_rng(0)}, ValueError, "rng"),
    ({"input_ids": [[99]]}, ValueError, "ids from 0"), ({"adapter": "none"}, ValueError, "not attached")])
def test_a_batch_that_loss_refuses_is_refused_and_nothing_is_written_or_left_set(tmp_path, change, error, words):
    model, batch = case("t5 v1.0").model(), case("t5 v1.0").batch()
    with pytest.raises(error, match=words):
        trace(model, {**batch, **change}, tmp_path / "trace.safetensors")
    assert not list(tmp_path.iterdir()) and _observer.get() is None and _watched.get() is None


def test_what_cannot_be_a_reference_is_refused(tmp_path):
    model, batch = case("t5 v1.0").model(), case("t5 v1.0").batch()
    path = tmp_path / "trace.safetensors"
    with pytest.raises(TypeError, match="not a whole model"):
        trace(model.encoder, batch, path)
    with pytest.raises(ValueError, match="samples"):
        trace(model, batch, path, samples=-1)
    with pytest.raises(ValueError, match="does not depend"):
        trace(model, batch, path, params=minipeft.select(case("t5 v1.0").model(), "embedding"))
    model.embedding.weight.base.data[...] = numpy.inf
    with pytest.raises(ValueError, match="^embedding holds numbers that are not finite"), \
            numpy.errstate(all="ignore"):
        trace(model, batch, path)
    assert not path.exists()
