"""Added biases: y = x W^T + b where there was no b. And the place of an absent bias, which no count or file knows."""
from __future__ import annotations

import pickle

import numpy
import pytest

import minipeft
from minipeft.engine.tensor import _observer
from minipeft.laws.models import FAMILIES, bits, logits, model_of, moved
from minipeft.laws.values import _ops_run
from minipeft.nn.absent import ABSENT, Absent, is_absent
from tests.models_under_test import Case

RNG = numpy.random.default_rng
T5S = ("t5 v1.0", "t5 v1.1")
BATCH = Case(("t5 v1.0", "q and v"), 1, 1, "float64", 0).batch()


def attached(family="t5 v1.0", dtype="float64", seed=1, **fields):
    model = model_of(family, dtype, 0)
    return model, moved(minipeft.attach(model, minipeft.AddedBias(**fields), RNG(0), "a"), RNG(seed))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("family", T5S)
def test_each_layer_gives_x_w_plus_b_in_its_own_dtype(family, dtype):
    model, attachment = attached(family, dtype)
    assert len(attachment.parameters) == len(attachment.places) > 20
    for layer, name in ((model.encoder.blocks[0].attn.v, "encoder.0.attn.v"),
                        (model.decoder.blocks[0].ff.wo, "decoder.0.ff.wo")):
        x = RNG(2).standard_normal((2, 6, layer.weight.shape[1])).astype(dtype)
        y, b = layer(x).data, attachment.parameters[f"{name}.bias@a.b"].data
        assert y.dtype == dtype and numpy.array_equal(y, layer.weight.project(x).data + b) and b.any()


def test_by_default_it_chooses_all_layers_of_blocks_but_k_whose_bias_no_softmax_sees():
    model, attachment = attached("t5 v1.1")
    layers = {name.removesuffix(".weight") for name in model.slots if name.endswith(".weight")
              and ("attn." in name or "cross." in name or ".ff." in name)}
    assert {name.removesuffix(".bias") for name in attachment.places} == {n for n in layers if not n.endswith(".k")}
    model, attachment = attached("t5 v1.0", where=r"\.k\.bias$")
    before = logits(model, BATCH)
    attachment.unplug()
    assert abs(before - logits(model, BATCH)).max() < 1e-12 * abs(before).max(), "it changes nothing but roundings"


def test_the_head_may_get_a_bias_also_where_it_is_tied_to_the_table():
    for family in FAMILIES:
        model, attachment = attached(family, where="^head")
        after = logits(model, BATCH)
        attachment.unplug()
        b = attachment.parameters["head.bias@a.b"].data
        assert b.shape == (13,) and numpy.array_equal(after, logits(model, BATCH) + b)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_absent_bias_is_in_no_list_count_file_or_fingerprint_of_the_model(family):
    model = model_of(family, "float64", 0)
    absent = {name: place for name, place in model.named_places() if is_absent(place)}
    has_biases = not family.startswith("t5")
    assert absent and (list(absent) == ["head.bias"]) == has_biases
    for listed in (model.slots, model.sites, model.base_parameters, model.state(), minipeft.select(model, ".")):
        assert not set(absent) & set(listed) and not any(name.startswith(tuple(absent)) for name in listed)
    assert minipeft.report(model).all == sum(p.data.size for p in model.base_parameters.values())
    whole = minipeft.attach(model, minipeft.Selective(), RNG(0))
    assert list(whole.places) == list(model.slots)
    for place in absent.values():
        assert (place.kind, place.base.arrays, place.base.drops) == (ABSENT, {}, False)
        assert not place.vector().data.any() and place.vector().shape == place.shape and place.dtype == "float64"


def test_an_absent_bias_is_no_matrix_and_its_place_pickles_and_follows_the_weight():
    model = model_of("t5 v1.0", "float64", 0)
    place = model.encoder.blocks[0].attn.q.bias
    assert isinstance(place.base, Absent) and place.shape == (15,)
    for use in (place.base.project, place.base.rows):
        with pytest.raises(TypeError, match="a bias"):
            use(numpy.zeros(3))
    for twin in (model.clone(), pickle.loads(pickle.dumps(model))):
        assert logits(twin, BATCH).tobytes() == logits(model, BATCH).tobytes()
        layer = twin.encoder.blocks[0].attn.q
        assert layer.bias.base._of is layer.weight is not model.encoder.blocks[0].attn.q.weight


@pytest.mark.parametrize("family", T5S)
def test_without_an_added_bias_the_model_runs_no_addition_for_it(family):
    """Every `add` of a bare T5 is one of x + F: two for each encoder block, three for each decoder block, and the
    scores' position biases are inside of attention."""
    model = model_of(family, "float64", 0)
    bare = _ops_run(model, BATCH)
    attachment = minipeft.attach(model, minipeft.AddedBias(), RNG(0))
    plugged = _ops_run(model, BATCH)
    attachment.unplug()
    assert _ops_run(model, BATCH) == bare
    adds = [sum(op == "add" for op, _ in ops) for ops in (bare, plugged)]
    c = model.config
    assert adds[0] == 2 * c.num_layers + 3 * c.num_decoder_layers
    assert adds[1] - adds[0] == 2 * len(attachment.parameters), "0 + b, and y + b"


def test_db_is_the_sum_of_g_and_x_is_not_kept():
    model, attachment = attached(where=r"encoder\.0\.ff\.wi")
    layer = model.encoder.blocks[0].ff.wi
    x, g = RNG(2).standard_normal((2, 6, 12)), RNG(3).standard_normal((2, 6, 17))
    held = []
    token = _observer.set(lambda forward, inputs, out, vjps, node: held.extend(
        (forward.__name__, parent.op) for parent, _ in (node.edges if node else ())))
    try:
        grads = minipeft.value_and_grad(lambda: (layer(x) * g).sum(), attachment.parameters)[1]
    finally:
        _observer.reset(token)
    assert numpy.allclose(grads["encoder.0.ff.wi.bias@a.b"], g.sum((0, 1)), rtol=1e-13)
    assert "linear" not in [op for op, _ in held], "the product with W is not recorded"


def test_one_lies_above_another_and_each_adds_its_own():
    model, attachment = attached()
    upper = moved(minipeft.attach(model, minipeft.AddedBias(), RNG(0), "b"), RNG(4))
    layer, x = model.encoder.blocks[0].attn.q, RNG(2).standard_normal((2, 6, 12))
    b = [a.parameters[f"encoder.0.attn.q.bias@{a.name}.b"].data for a in (attachment, upper)]
    wanted = layer.weight.project(x).data + (b[0] + b[1])
    assert numpy.array_equal(layer(x).data, wanted)
    attachment.merge()
    upper.merge()
    assert numpy.array_equal(layer(x).data, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_bias_is_not_silently_left_out_of_a_model_s_file(family, tmp_path):
    model, attachment = attached(family, where="^head|attn.q.bias" if family in T5S else "^head")
    for state in ("plugged", "merged"):
        if state == "merged":
            attachment.merge()
        with pytest.raises(ValueError, match=r"'a' cannot be saved as a part of the model: it adds .*bias, and the"):
            model.save_pretrained(tmp_path / "model", merged=True)
        assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "base", merged=False)
    again = type(model).from_pretrained(tmp_path / "base", "float64")
    assert bits(again.state()) == bits(model.state())


def test_a_model_whose_layers_have_biases_is_refused_with_the_method_for_it():
    model = model_of("post-LN", "float64", 0)
    with pytest.raises(ValueError, match=r"AddedBias: where=.* nearest: head.bias; it is for layers without a bias .*"
                                         r"Selective\(type='bias'\)"):
        minipeft.attach(model, minipeft.AddedBias(), RNG(0))
    assert not model.attachments


def test_the_report_counts_added_biases_as_biases():
    model, attachment = attached()
    own = sum(p.data.size for p in attachment.parameters.values())
    report = minipeft.report(model)
    assert report.methods == {"a": {"bias": own}} and report.trainable == own
