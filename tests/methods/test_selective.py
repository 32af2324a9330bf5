"""Selective tuning: which slots are chosen, what a mask and rows leave alone, W0 + d against W, files of indices."""
import json

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.engine.tensor import _observer
from minipeft.files import read_tensors
from tests.adapters import write_signed
from minipeft.laws.bounds import WHOLE_MODEL, close, close_gradients
from tests.models_under_test import FAMILIES, TIED, Case, bits, logits, same_values

U, RNG = 2.0 ** -53, numpy.random.default_rng
TABLE, QUERY, BIAS = "embedding.weight", "encoder.0.attn.q.weight", "decoder.0.ff.wi.bias"
every_family = pytest.mark.parametrize("family", FAMILIES)


def case_of(family, dtype="float64", seed=0):
    return Case((family, "q and v"), 1, 1, dtype, seed)


def model_of(family, dtype="float64", seed=0):
    """A base without zeros and ones in its biases and norms."""
    return case_of(family, dtype, seed).model()


def moved(model, method, name="selective", seed=0):
    """An attachment as it might be after training: no d is 0."""
    rng = RNG(seed)
    attachment = minipeft.attach(model, method, rng, name)
    for p in attachment.parameters.values():
        p.data = (0.2 * rng.standard_normal(p.shape)).astype(p.dtype)
    return attachment


def dense(model, name):
    """The weight that a slot has with what is plugged."""
    return model.slots[name].fold().dense().data


def train(model, params, batch, steps, optimizer):
    for _ in range(steps):
        optimizer.step(params, minipeft.value_and_grad(lambda: model.loss(**batch), params)[1])


# ---- fields


@pytest.mark.parametrize("fields, message", [
    ({"component": "heads"}, "component is .*; expected some of attention, feed-forward, embedding, norm, position, h"),
    ({"component": ("norm", 3)}, "component"), ({"component": 5}, "component is 5"),
    *(({name: ()}, rf"{name} is \(\); expected some of ") for name in ("component", "type")),
    ({"component": ({},)}, r"component is \({},\)"), ({"type": ["bias", ["matrix"]]}, "type is"),
    ({"type": "biases"}, "type is .*; expected some of bias, norm weight, matrix"), ({"type": {"bias"}}, "type is"),
    *(({end: value}, f"{end} is {value!r}; expected a number of blocks, at least 1, or None")
      for end in ("first", "last") for value in (-1, 0, 1.0, True, "1")),
    *(({"layers": value}, "layers is .*; expected indices of blocks, at least one")
      for value in ((), [], True, "0", (0.0,), (True,), (None,), {0})),
    *(({"rows": value}, "rows is .*; expected distinct ids, at least one")
      for value in ((), [], range(0), 3, (-1,), (1, 1), (1.0,), (True,), "1", {1})),
    *(({"mask": value}, "mask is .*; expected {slot name: array}, and no rows beside it")
      for value in ({}, [1], numpy.ones(3, bool), "w")),
    ({"mask": {QUERY: [0]}, "rows": (1,)}, "mask is .* no rows beside it")])
def test_a_field_out_of_range_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=f"Selective: {message}"):
        minipeft.Selective(**fields)


def test_what_means_the_same_is_the_same_method():
    assert minipeft.Selective("norm", type="bias") == minipeft.Selective(("norm",), type=["bias"])
    assert minipeft.Selective(layers=-1) == minipeft.Selective(layers=[numpy.int64(-1)]) != minipeft.Selective(layers=0)
    assert minipeft.Selective(rows=range(3)) == minipeft.Selective(rows=numpy.arange(3)) == minipeft.Selective(
        rows=[numpy.int64(0), 1, 2])


def test_nothing_is_asked_by_default():
    method = minipeft.Selective()
    assert {name: value for name, value in vars(method).items() if value is not None} == {"where": ""}


# ---- which slots


def chosen(family, **fields):
    return list(minipeft.Selective(**fields).places(model_of(family)))


@every_family
def test_it_chooses_by_component_type_layer_and_name_in_model_order(family):
    names = list(model_of(family).slots)
    assert chosen(family) == names
    for fields, holds in (
            ({"component": "attention"}, lambda n: ".attn." in n or ".cross." in n),
            ({"component": ("norm", "feed-forward")}, lambda n: "norm." in n or ".ff." in n),
            ({"component": "embedding"}, lambda n: n == TABLE),
            ({"type": "matrix"}, lambda n: "norm" not in n and not n.endswith("bias")),
            ({"type": "norm weight"}, lambda n: "norm" in n and n.endswith("weight")),
            ({"where": r"^decoder.*\.k\."}, lambda n: n.startswith("decoder") and ".k." in n),
            ({"first": 1}, lambda n: n.startswith(("encoder.0.", "decoder.0.")))):
        assert chosen(family, **fields) == [n for n in names if holds(n)] != []


@pytest.mark.parametrize("family, blocks", [("t5 v1.0", "encoder.0 decoder.1"), ("t5 v1.1", "encoder.1 decoder.0"),
                                            ("post-LN", "encoder.1 decoder.0"), ("pre-LN", "encoder.0 decoder.1")])
def test_the_last_layer_is_each_stacks_own(family, blocks):
    for fields in ({"layers": (-1,)}, {"layers": -1}, {"last": 1}):
        assert {n[:9] for n in chosen(family, **fields)} == set(blocks.split())
    deeper = "encoder.1" if "encoder.1" in blocks else "decoder.1"
    assert {n[:9] for n in chosen(family, layers=(1,))} == {deeper}, "the other stack has no layer 1"


@every_family
def test_conditions_that_are_given_together_must_all_hold(family):
    single = {"component": ("attention", "norm"), "type": ("matrix", "norm weight"), "last": 1, "where": r"\.[qo]\.|ff"}
    apart = [set(chosen(family, **{key: value})) for key, value in single.items()]
    together = chosen(family, **single)
    assert set(together) == set.intersection(*apart) and len(together) == 8


@pytest.mark.parametrize("family, fields, message", [
    ("t5 v1.0", {"type": "bias"}, "^type 'bias': the model has none; it has matrix, norm weight$"),
    ("t5 v1.0", {"type": ("matrix", "bias")}, "^type 'bias': the model has none; it has matrix, norm weight$"),
    ("t5 v1.0", {"component": "head"}, "^component 'head': the model has none; its head is tied to the embedding; it "
     "has embedding, position, attention, norm, feed-forward$"),
    ("t5 v1.0", {"component": ("norm", "head")}, "^component 'head': the model has none; its head is tied to the emb"),
    ("post-LN", {"component": "position"}, "^component 'position': the model has none; it has embedding, attention, "),
    ("pre-LN", {"layers": (2,)}, "^layers 2: the model has no such block; it has encoder 0 to 0, decoder 0 to 1$"),
    ("pre-LN", {"layers": (0, -3)}, "^layers 0 or -3: the model has no such block; it has encoder 0 to 0, decoder 0 "),
    ("pre-LN", {"first": 3}, "^first 3: the model has no such block"),
    ("pre-LN", {"last": 3, "first": 1}, "^first 1, last 3: the model has no such block"),
    ("pre-LN", {"component": "position", "last": 2},
     "^component 'position', last 2: no parameter of the model meets all of these$"),
    ("pre-LN", {"component": "embedding", "layers": 0}, "^component 'embedding', layers 0: no parameter of the model "),
    ("t5 v1.1", {"component": "norm", "where": "attn.q"}, "where='attn.q' matches none of the 9 parameter names"),
    ("t5 v1.1", {"component": "norm", "rows": (1,)}, "Selective: rows chooses nothing: the other conditions leave no"),
    ("t5 v1.1", {"rows": (1, 13)}, r"rows holds 13; embedding.weight \[13, 12\] has rows 0 to 12"),
    ("t5 v1.1", {"mask": {"nonesuch": [0]}}, "mask names 'nonesuch', which the model lacks, or a condition leaves out"),
    ("t5 v1.1", {"mask": {QUERY: [0]}, "component": "norm"}, f"mask names '{QUERY}', which the model lacks, or a cond"),
    ("t5 v1.1", {"mask": {QUERY: [180]}}, rf"the mask of {QUERY} is int64 \[1\]; expected booleans \[15, 12\] \(of "
     r"0 and 1: mask.astype\(bool\)\), or distinct flat indices from 0 to 179$"),
    ("t5 v1.1", {"mask": {QUERY: numpy.zeros((15, 12), bool)}}, f"^the mask of {QUERY} is False everywhere: it chooses "
     "nothing; leave the name out$"),
    ("t5 v1.1", {"mask": {QUERY: numpy.ones((15, 12), int)}}, rf"^the mask of {QUERY} is int64 \[15, 12\]; expected boo"
     r"leans \[15, 12\] \(of 0 and 1: mask.astype\(bool\)\)")])
def test_what_chooses_nothing_or_does_not_fit_raises_and_names_the_condition(family, fields, message):
    """Before a number is drawn, and nothing is attached."""
    model, rng = model_of(family), RNG(0)
    state = rng.bit_generator.state
    with pytest.raises(ValueError, match=message):
        minipeft.attach(model, minipeft.Selective(**fields), rng)
    assert rng.bit_generator.state == state and not model.attachments
    assert not any(place.attached for _, place in model.named_places())


def test_bitfit_trains_the_biases_of_a_transformer_alone():
    """Ben Zaken et al.: every bias, those of norms included. 3 blocks: 4 + 4 + 4 + 4 linear ones of attentions, 2 of
    each feed-forward, and a norm's for each sublayer."""
    model = model_of("post-LN")
    attachment = minipeft.attach(model, minipeft.Selective(type="bias"), RNG(0))
    assert list(attachment.places) == [n for n in model.slots if n.endswith(".bias")]
    assert len(attachment.places) == 4 * 4 + 3 * 2 + 7
    assert minipeft.report(model).trainable == 4 * 4 * 12 + 3 * (17 + 12) + 7 * 12
    _, grads = minipeft.value_and_grad(lambda: model.loss(**case_of("post-LN").batch()), attachment.parameters)
    # a key's bias adds one number to all scores of a query, which softmax ignores: its gradient is rounding
    largest = max(abs(g).max() for g in grads.values())
    assert all((abs(g).max() < WHOLE_MODEL * U * largest) == (".k.bias" in name) for name, g in grads.items())


def test_rows_are_those_of_the_embedding_table_and_not_of_a_head_of_its_own():
    model = model_of("t5 v1.1")
    attachment = minipeft.attach(model, minipeft.Selective(rows=(5, 2)), RNG(0), "a")
    assert {name: p.data.shape for name, p in attachment.arrays.items()} == {f"{TABLE}@a.d": (2, 12)}
    d = attachment.parameters[f"{TABLE}@a.d"]
    d.data = numpy.stack([numpy.full(12, 1.0), numpy.full(12, 8.0)])
    different = dense(model, TABLE) - model.state()[TABLE]
    assert numpy.flatnonzero(different.any(axis=1)).tolist() == [2, 5] and abs(different[5] - 8).max() < 1e-14
    assert "head.weight" not in attachment.places


@pytest.mark.parametrize("family", TIED)
def test_what_is_done_to_a_tied_table_is_done_at_the_head_as_well(family):
    """One slot, one d, whose gradient is that of the whole table, encoder, decoder and head."""
    case, model = case_of(family), model_of(family)
    wanted = minipeft.value_and_grad(lambda: model.loss(**case.batch()), minipeft.select(model, "^embedding"))[1]
    attachment = minipeft.attach(model, minipeft.Selective(component="embedding"), RNG(0), "a")
    found = minipeft.value_and_grad(lambda: model.loss(**case.batch()), attachment.parameters)[1]
    assert close_gradients({TABLE: found[f"{TABLE}@a.d"]}, wanted, U) is None
    hidden = RNG(1).standard_normal((1, 2, 12))
    attachment.parameters[f"{TABLE}@a.d"].data += 1.0
    assert numpy.allclose(model.head(hidden).data, hidden @ (model.state()[TABLE] + 1).T, rtol=1e-13, atol=1e-13)


# ---- W0 + d


def masks_of(model, share, seed):
    """Random masks of three slots: a matrix, a table, and a vector."""
    rng, vector = RNG(seed), "decoder.0.ff_norm.weight"
    found = {name: rng.random(model.slots[name].base.shape) < share for name in (QUERY, TABLE, vector)}
    for mask in found.values():
        mask.reshape(-1)[0] = True
    return found


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@every_family
def test_only_what_is_masked_ever_differs_from_the_base(family, dtype):
    """Six steps of AdamW with momentum and strong decay: outside of the mask, and in every other slot, each bit of W is
    that of W0; and W0 is what it was."""
    case, model = case_of(family, dtype), model_of(family, dtype)
    masks, base = masks_of(model, 0.3, 1), bits(model.state())
    attachment = minipeft.attach(model, minipeft.Selective(mask=masks), RNG(0))
    train(model, attachment.parameters, case.batch(), 6, minipeft.AdamW(0.05, weight_decay=0.5))
    assert bits(model.state()) == base
    for name in model.slots:
        different = dense(model, name) != model.state()[name]
        assert different.any() == (name in masks)
        if name in masks:  # a row of the table that the batch lacks has no gradient there, unless the table is tied
            assert not different[~masks[name]].any() and different[masks[name]].mean() > 0.5
    attachment.unplug()
    assert same_values(logits(model, case.batch()), logits(model_of(family, dtype), case.batch()))


def test_only_the_rows_that_were_named_are_trained():
    case, model = case_of("t5 v1.0"), model_of("t5 v1.0")
    batch = case.batch()
    rows = sorted({int(i) for i in batch["input_ids"].reshape(-1)})[:3]
    attachment = minipeft.attach(model, minipeft.Selective(rows=tuple(rows[::-1])), RNG(0))
    train(model, attachment.parameters, batch, 4, minipeft.AdamW(0.05, weight_decay=0.5))
    different = (dense(model, TABLE) != model.state()[TABLE]).all(axis=1)
    assert numpy.flatnonzero(different).tolist() == rows
    assert numpy.array_equal((dense(model, TABLE) != model.state()[TABLE]).any(axis=1), different)


@given(st.integers(0, 999), st.sampled_from(list(FAMILIES)))
def test_the_gradient_of_d_is_that_of_w_at_its_elements_in_their_order(seed, family):
    """At d = 0 the two forwards are equal in every value; a matrix product with W0 + d is that with W0."""
    case, model = case_of(family, seed=seed), model_of(family, seed=seed)
    batch, masks = case.batch(), masks_of(model, 0.4, seed)
    whole = minipeft.value_and_grad(lambda: model.loss(**batch), {n: model.slots[n].base for n in masks})[1]
    flat = {n: RNG(seed).permutation(numpy.flatnonzero(mask)) for n, mask in masks.items()}
    attachment = minipeft.attach(model, minipeft.Selective(mask=flat), RNG(0), "a")
    found = minipeft.value_and_grad(lambda: model.loss(**batch), attachment.parameters)[1]
    assert list(found) == [f"{n}@a.d" for n in masks]
    assert close_gradients(found, {f"{n}@a.d": whole[n][mask] for n, mask in masks.items()}, U) is None


@every_family
@pytest.mark.parametrize("masked", [False, True])
def test_training_d_is_training_w(family, masked):
    """Four steps of AdamW without decay, beside direct tuning of the same elements.

    With eps = 1 a step's change is a smooth function of the gradients, of derivative at most 2 lr; the default eps
    would divide rounding by rounding where a gradient is 0. So the two stay within the roundings of four models."""
    case, model, direct = case_of(family), model_of(family), model_of(family)
    masks = masks_of(model, 0.3, 1)
    attachment = minipeft.attach(model, minipeft.Selective(**{"mask": masks} if masked else {
        "where": [f"^{name}$" for name in masks]}), RNG(0))
    options = {"lr": 0.05, "eps": 1.0, "weight_decay": 0.0}
    train(model, attachment.parameters, case.batch(), 4, minipeft.AdamW(**options))
    params, optimizer = {n: direct.slots[n].base for n in masks}, minipeft.AdamW(**options)
    for _ in range(4):
        _, grads = minipeft.value_and_grad(lambda: direct.loss(**case.batch()), params)
        optimizer.step(params, {n: g * masks[n] if masked else g for n, g in grads.items()})
    for name in masks:
        assert close(dense(model, name), direct.state()[name], U), name
        assert not close(dense(model, name), model.state()[name], 2.0 ** -24), "it was trained"
    assert close(logits(model, case.batch()), logits(direct, case.batch()), 4 * U)


@pytest.mark.parametrize("fields", [{"where": f"^{TABLE}|attn.q"}, {"rows": (1, 4)}, {"mask": {QUERY: [3, 50]}}])
def test_weight_decay_pulls_d_to_0_and_w_back_to_the_base(fields):
    """Gradients of 0: a step is d (1 - lr decay) and nothing else; here d / 2, which is exact."""
    model = model_of("t5 v1.0")
    attachment = moved(model, minipeft.Selective(**fields))
    params, base, optimizer = attachment.parameters, bits(model.state()), minipeft.AdamW(1.0, weight_decay=0.5)
    start = {name: p.data.copy() for name, p in params.items()}
    for _ in range(3):
        optimizer.step(params, {name: numpy.zeros(p.shape) for name, p in params.items()})
    assert all(numpy.array_equal(p.data, start[name] / 8) for name, p in params.items())
    for _ in range(300):
        optimizer.step(params, {name: numpy.zeros(p.shape) for name, p in params.items()})
    assert all(same_values(dense(model, name), model.state()[name]) for name in attachment.places)
    assert bits(model.state()) == base


def test_moments_gradient_and_file_are_of_the_size_of_d(tmp_path):
    model, batch = model_of("t5 v1.0", "float32"), case_of("t5 v1.0").batch()
    attachment, optimizer = minipeft.attach(model, minipeft.Selective(mask={QUERY: [7, 3]}), RNG(0), "a"), \
        minipeft.AdamW()
    train(model, attachment.parameters, batch, 1, optimizer)
    assert {n: m.shape for n, m in optimizer.m.items()} == {f"{QUERY}@a.d": (2,)} == {
        n: v.shape for n, v in optimizer.v.items()}
    attachment.save(tmp_path / "a")
    tensors = read_tensors(tmp_path / "a")[0]
    assert {n: (t.shape, str(t.dtype)) for n, t in tensors.items()} == {
        f"{QUERY}.d": ((2,), "float32"), f"{QUERY}.indices": ((2,), "int32")}


def test_a_lookup_adds_up_the_rows_that_it_looks_up_and_no_whole_table():
    model, made = model_of("t5 v1.1"), []
    attachment = moved(model, minipeft.Selective(component="embedding"))
    ids = numpy.array([[3, 3, 5]])
    token = _observer.set(lambda name, inputs, out, *_: made.append(out.shape))
    try:
        found = model.embed(ids).data
    finally:
        _observer.reset(token)
    assert (13, 12) not in made and made and numpy.array_equal(found, dense(model, TABLE)[ids])
    attachment.unplug()
    assert numpy.array_equal(model.embed(ids).data, model.state()[TABLE][ids])


@every_family
def test_two_tasks_are_served_by_one_base_and_swapped_without_a_trace(family):
    case, model = case_of(family), model_of(family)
    batch, base = case.batch(), logits(model, case.batch())
    a = moved(model, minipeft.Selective(rows=(2, 3, 5)), "a", 1)
    outputs = {"a": logits(model, batch)}
    a.unplug()
    b = moved(model, minipeft.Selective("norm", last=1), "b", 2)
    outputs["b"] = logits(model, batch)
    assert not close(outputs["a"], base, 2.0 ** -24) and not close(outputs["b"], outputs["a"], 2.0 ** -24)
    for _ in range(2):
        b.unplug()
        a.plug()
        assert logits(model, batch).tobytes() == outputs["a"].tobytes()
        a.unplug()
        assert same_values(logits(model, batch), base)
        b.plug()
        assert logits(model, batch).tobytes() == outputs["b"].tobytes()
    mixed = logits(model, batch, adapter=["a", "b", None, "a"])
    rows = numpy.stack([outputs["a"][0], outputs["b"][1], base[2], outputs["a"][3]])
    assert close(mixed, rows, U)


def test_two_differences_on_one_slot_add_up_and_merge_one_after_the_other():
    model = model_of("t5 v1.0")
    lower = moved(model, minipeft.Selective(where=f"^{QUERY}$"), "lower", 1)
    upper = moved(model, minipeft.Selective(mask={QUERY: [5, 100]}), "upper", 2)
    wanted = model.state()[QUERY] + lower.parameters[f"{QUERY}@lower.d"].data
    wanted.reshape(-1)[[5, 100]] += upper.parameters[f"{QUERY}@upper.d"].data
    assert numpy.array_equal(dense(model, QUERY), wanted)
    lower.merge()
    upper.merge()
    assert numpy.array_equal(dense(model, QUERY), wanted)
    upper.unmerge()
    lower.unmerge()
    lower.unplug()
    assert (dense(model, QUERY) != model.state()[QUERY]).sum() == 2


# ---- files of indices


FILES = {"mask": {"mask": {QUERY: [100, 7, 30], BIAS: [2, 0]}}, "rows": {"rows": (6, 2)},
         "whole": {"type": "norm weight"}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{which: (path, tensors, metadata, logits with it)}."""
    folder, found = tmp_path_factory.mktemp("selective"), {}
    for which, fields in FILES.items():
        model = model_of("post-LN", "float32")
        moved(model, minipeft.Selective(**fields), "mine").save(folder / which)
        found[which] = (folder / which, *read_tensors(folder / which), logits(model, case_of("post-LN").batch()))
    return found


@pytest.mark.parametrize("which", FILES)
def test_what_was_saved_comes_back(saved, tmp_path, which):
    path, tensors, metadata, output = saved[which]
    model = model_of("post-LN", "float32")
    attachment = minipeft.load(model, path)
    assert bits(attachment.tensors) == bits(tensors) and "mask" not in json.loads(metadata["method"])
    assert logits(model, case_of("post-LN").batch()).tobytes() == output.tobytes()
    assert set(attachment.places) == set(json.loads(metadata["places"]))
    attachment.save(tmp_path / "again")
    assert bits(read_tensors(tmp_path / "again")[0]) == bits(tensors)
    if which == "mask":
        assert tensors[f"{QUERY}.indices"].tolist() == [7, 30, 100] and tensors[f"{BIAS}.indices"].tolist() == [0, 2]


def refused(path, message):
    """Loading raises, and the model has every bit and nothing attached."""
    model = model_of("post-LN", "float32")
    before, output = bits(model.state()), logits(model, case_of("post-LN").batch())
    with pytest.raises(ValueError, match=message):
        minipeft.load(model, path)
    assert not model.attachments and not any(p.attached or p.entries for _, p in model.named_places())
    assert bits(model.state()) == before and logits(model, case_of("post-LN").batch()).tobytes() == output.tobytes()


I_Q, I_B, I_T, D_T = f"{QUERY}.indices", f"{BIAS}.indices", f"{TABLE}.indices", f"{TABLE}.d"
MASK_RULE = "expected booleans .*, or distinct flat indices"


@pytest.mark.parametrize("which, change, message", [
    ("mask", lambda t: t.update({I_Q: t[I_Q][::-1].copy()}), "the indices of .* do not ascend"),
    ("mask", lambda t: t.update({I_Q: t[I_Q][[0, 0, 1]]}), f"the mask of {QUERY} is int32 .*{MASK_RULE}"),
    ("mask", lambda t: t[I_Q].__setitem__(2, 144), f"the mask of {QUERY} .*{MASK_RULE} from 0 to 143"),
    ("mask", lambda t: t[I_Q].__setitem__(0, -1), MASK_RULE), ("mask", lambda t: t[I_B].__setitem__(0, 2), MASK_RULE),
    ("mask", lambda t: t.update({I_Q: t[I_Q].astype("float32")}), f"the mask of {QUERY} is float32 .*{MASK_RULE}"),
    ("mask", lambda t: t.update({I_Q: t[I_Q].astype("uint8")}), f"{I_Q} has dtype uint8; expected int32"),
    ("mask", lambda t: t.update({I_Q: t[I_Q][:, None]}), MASK_RULE),
    ("mask", lambda t: t.update({I_Q: t[I_Q][:0]}), MASK_RULE),
    ("mask", lambda t: t.update({I_Q: t[I_Q][:2]}), rf"{QUERY}.d has shape \[3\]; expected \[2\]"),
    ("mask", lambda t: t.update({I_Q: numpy.ones((12, 12), bool)}), r"has shape .*; expected \[144\]"),
    ("mask", lambda t: t.pop(I_Q), f"where='.*' matches none of the 1 parameter names; nearest: {BIAS}"),
    ("mask", lambda t: (t.pop(I_Q), t.pop(I_B)), r"has shape \[\d\]; expected \["),
    ("mask", lambda t: t.update({"head.weight.indices": t[I_Q]}), "mask names 'head.weight', which the model lacks"),
    ("mask", lambda t: t.update({I_T: t[I_Q]}), f"'{I_T}' is not expected"),
    ("mask", lambda t: t.pop(f"{QUERY}.d"), f"'{QUERY}.d' is missing"),
    ("mask", lambda t: t.update({f"{QUERY}.d": t[f"{QUERY}.d"].astype("int64")}), "expected floating point"),
    ("rows", lambda t: t.update({I_T: numpy.arange(24)}), "slot name: array}, and no rows beside it$"),
    ("rows", lambda t: t.update({D_T: t[D_T][:1]}), rf"{D_T} has shape \[1, 12\]; expected \[2, 12\]"),
    ("rows", lambda t: t.update({D_T: t[D_T].reshape(-1)}), rf"{D_T} has shape \[24\]; expected \[2, 12\]"),
    ("rows", lambda t: t.update({D_T: t[D_T].T}), rf"{D_T} has shape \[12, 2\]; expected \[2, 12\]"),
    ("rows", lambda t: t.update({D_T: t[D_T].astype("int32")}), f"{D_T} has dtype int32; expected floating point"),
    ("rows", lambda t: t[D_T].__setitem__((1, 3), numpy.inf), f"{D_T} holds numbers that are not finite in float32"),
    ("rows", lambda t: t.update({f"{TABLE}.e": t.pop(D_T)}), f"'{D_T}' is missing"),
    ("whole", lambda t: t.update({"decoder.0.ff_norm.weight.indices": numpy.arange(12)}), "matches none of the 1 "),
    ("whole", lambda t: t[next(iter(t))].__setitem__(0, numpy.nan), "not finite")])
def test_a_damaged_file_is_refused_and_leaves_the_model_as_it_was(saved, tmp_path, which, change, message):
    tensors = {name: array.copy() for name, array in saved[which][1].items()}
    change(tensors)
    write_signed(tmp_path / "a", tensors, saved[which][2])
    refused(tmp_path / "a", message)


@pytest.mark.parametrize("which, changes, message", [
    ("rows", {"rows": [2]}, rf"{D_T} has shape \[2, 12\]; expected \[1, 12\]"),
    ("rows", {"rows": []}, r"rows is \(\)"),
    ("rows", {"rows": [6, 2, 3]}, "has shape"), ("rows", {"rows": None}, r"has shape \[2, 12\]; expected \[13, 12\]"),
    ("rows", {"rows": [6, 13]}, "rows holds 13"), ("rows", {"rows": [2, 2]}, "rows is"),
    ("rows", {"rows": 2}, "rows is"),
    ("rows", {"component": "norm"}, "leave no embedding table"), ("mask", {"mask": {}}, "mask"),
    ("mask", {"type": ["matrix"]}, f"mask names '{BIAS}'"), ("mask", {"rows": [1]}, "does not fit this model"),
    ("whole", {"type": ["matrix"]}, "matches none"),
    ("whole", {"layers": [9]}, "layers 9: the model has no such block"),
    ("whole", {"last": True}, "last is True"), ("whole", {"share": 0.5}, "the field 'share' is unknown")])
def test_tampered_fields_are_refused(saved, tmp_path, which, changes, message):
    _, tensors, metadata, _ = saved[which]
    fields = {**json.loads(metadata["method"]), **changes}
    write_signed(tmp_path / "a", tensors, {**metadata, "method": json.dumps(fields)})
    refused(tmp_path / "a", message)


@pytest.mark.parametrize("which, message", [("mask", "from 0 to 35"), ("rows", r"shape \[2, 12\]; expected \[2, 6\]"),
                                            ("whole", r"shape \[12\]; expected \[6\]")])
def test_a_narrower_model_with_all_the_places_is_refused_even_by_force(saved, which, message):
    model = minipeft.Transformer(minipeft.TransformerConfig(13, 6, 3, 17, 2, 1), RNG(0))
    with pytest.raises(ValueError, match=message):
        minipeft.load(model, saved[which][0], force=True)
    assert not model.attachments
