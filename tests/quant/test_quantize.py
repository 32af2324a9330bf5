"""`quantize`: in place, all or nothing, and nothing else in the library minds."""
import dataclasses
import gc
import pickle
import re
import sys
import tracemalloc
import weakref

import numpy
import pytest

import minipeft
from minipeft.attaching.report import component
from minipeft.attaching.trained_on import origin_of
from minipeft.laws.models import moved
from minipeft.nn.weight import Fixed, Parameter
from minipeft.quant import QuantizedWeight, scheme
from minipeft.quant.quantize import Quantized
from tests.models_under_test import Case, bits, logits
from tests.strict_namespace import strict

RNG = numpy.random.default_rng
CASE = Case(("t5 v1.1", "q and v"), 2, 3, "float32", 0)
TIED = Case(("t5 v1.0", "q and v"), 2, 3, "float64", 0)
Q, WO = "encoder.0.attn.q.weight", "encoder.0.ff.wo.weight"
ROWS_OF_12 = r"\.(q|k|v|wi_0|wi_1)\.weight$"
BATCH = CASE.batch()


def quantized(case=CASE, where=ROWS_OF_12, **options):
    model = case.model()
    minipeft.quantize(model, "int4", where, **{"group": 3, **options})
    return model


def pairs(n=6):
    rng = RNG(5)
    return [(rng.integers(1, 13, 5).tolist(), rng.integers(1, 13, 4).tolist()) for _ in range(n)]


def step_of(model, **options):
    return lambda: model.loss(**BATCH, **options)


# ---- in place


def test_the_weight_is_the_decoded_one_and_everything_else_keeps_its_bits():
    model, plain = quantized(), CASE.model()
    chosen = [name for name in plain.slots if re.search(ROWS_OF_12, name)]
    assert len(chosen) == 18 and all(isinstance(model.slots[name].base, QuantizedWeight) for name in chosen)
    for name, slot in plain.slots.items():
        if name in chosen:
            W, found = slot.base.data, model.slots[name].base.dense().data
            half = (W.reshape(len(W), -1, 3).max(2) - W.reshape(len(W), -1, 3).min(2)) / 30  # half a step of 15
            assert found.dtype == W.dtype
            assert (abs(found - W).reshape(len(W), -1, 3) <= half[..., None] * (1 + 1e-5) + 1e-7).all()
        else:
            assert model.slots[name].base.data.tobytes() == slot.base.data.tobytes()
    by_hand = CASE.model()
    for name in chosen:
        by_hand.slots[name].base.data = model.slots[name].base.dense().data
    assert logits(model, BATCH).tobytes() == logits(by_hand, BATCH).tobytes()
    assert model.generate(BATCH["input_ids"]).tolist() == by_hand.generate(BATCH["input_ids"]).tolist()


def test_by_default_all_linear_weights_but_the_head_are_quantized():
    model = minipeft.T5(minipeft.T5Config(13, 32, 16, 4, 96, 1, 1, tie_word_embeddings=False), RNG(0))
    done = minipeft.quantize(model, "int4")
    assert set(done.errors) == {name for name, slot in model.slots.items() if slot.kind == "linear"} - {"head.weight"}
    assert isinstance(model.slots["head.weight"].base, Parameter)


def test_the_report_of_quantize_has_bytes_and_errors_and_is_a_table():
    model, plain = CASE.model(), CASE.model()
    done = minipeft.quantize(model, "int4", [Q], group=3)
    W, dense = plain.slots[Q].base.data, model.slots[Q].base.dense().data
    assert done.before == {Q: 15 * 12 * 4} and done.after == {Q: 15 * 6 + 2 * 15 * 4 * 4} and done.kept == 0
    error = numpy.linalg.norm(dense.astype("float64") - W) / numpy.linalg.norm(W.astype("float64"))
    assert abs(done.errors[Q] - error) < 1e-6 * error and 0.01 < error < 0.1
    first, row, last = str(done).splitlines()
    assert row.split() == [Q, "570", "720", f"{error:.2e}"]
    assert last.split(maxsplit=3)[3] == f"int4, groups of 3: 0.792 of the bytes; the largest error is {error:.2e}"
    kept = minipeft.quantize(CASE.model(), "int4", [Q], keep=True, group=3)
    assert kept.kept == 720 and ", and 720 bytes of dequantized numbers are kept; the largest" in str(kept)


def test_the_float_weights_are_gone_from_memory():
    model = minipeft.Transformer(minipeft.TransformerConfig(32, 128, 4, 512, 2, 2), RNG(0))
    minipeft.attach(model, minipeft.LoRA(2), RNG(0))
    logits(model, BATCH)
    there = [weakref.ref(slot.base.data) for slot in model.slots.values() if slot.kind == "linear"]
    assert len(there) == 2 * 4 + 2 * 8 + 4 + 4
    tracemalloc.start()
    try:
        done = minipeft.quantize(model, "int4")
        logits(model, BATCH)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert all(array() is None for array in there)
    assert held < 1.2 * sum(done.after.values()) < 0.3 * sum(done.before.values())


def test_no_dense_matrix_outlives_its_use():
    """W~ of 2 MiB is made for each of six products and again for each of their gradients, and dropped every time.
    `xray` finds no kept byte; the most that the allocator sees at once is one W~ and the parts of a chunk of it."""
    weight = QuantizedWeight.of(RNG(0).standard_normal((512, 1024)).astype("float32"), scheme("int4"))
    x, dense = Parameter(RNG(1).standard_normal((4, 1024)).astype("float32")), 512 * 1024 * 4

    def step():
        y = x
        for _ in range(6):
            y = weight.project(y)[:, :1] * x
        return (y * y).sum()

    entries = [entry for entry in minipeft.xray(step, {"x": x}).entries if entry.op == "dequantized_linear"]
    assert len(entries) == 6 and all(entry.kept == ("x",) and entry.kept_bytes == 0 for entry in entries)
    tracemalloc.start()
    try:
        start = tracemalloc.get_traced_memory()[0]
        minipeft.value_and_grad(step, {"x": x})
        peak = tracemalloc.get_traced_memory()[1] - start
    finally:
        tracemalloc.stop()
    assert dense < peak < 2 * dense


def test_codes_get_no_gradient_and_no_moments_and_keep_their_bits():
    model = quantized()
    lora = CASE.attach(model)
    codes = {name: a for name, a in model.base_arrays.items() if isinstance(a, Fixed)}
    assert len(codes) == 18 * 3 and not set(codes) & set(minipeft.select(model, "."))
    before = bits(codes)
    seen = minipeft.xray(step_of(model), minipeft.select(model, "."))
    products = [entry for entry in seen.entries if entry.op == "dequantized_linear"]
    assert len(products) >= 18 and all([name for name, _ in entry.vjps] == ["x"] for entry in products)
    assert all(entry.kept_bytes == 0 for entry in products)
    optimizer = minipeft.AdamW(1e-2)
    for _ in range(2):
        optimizer.step(lora.parameters, minipeft.value_and_grad(step_of(model), lora.parameters)[1])
    assert bits(codes) == before and set(optimizer.m) == set(lora.parameters)


@pytest.mark.parametrize("table", [False, True])
def test_kept_numbers_change_no_bit(table):
    where = [ROWS_OF_12, "^embedding"] if table else ROWS_OF_12
    found = []
    for keep in (False, True, True):
        model = quantized(TIED, where, keep=keep)
        lora = TIED.attach(model)
        if len(found) == 2:
            minipeft.value_and_grad(step_of(model), lora.parameters)  # by now they are kept
        loss, grads = minipeft.value_and_grad(step_of(model), lora.parameters)
        found.append((loss, bits(grads), logits(model, BATCH).tobytes()))
    assert found[0] == found[1] == found[2]


def test_a_quantized_table_is_looked_up_and_multiplied_by_as_its_dense_form():
    model, by_hand = quantized(TIED, "^embedding"), TIED.model()
    table = model.slots["embedding.weight"].base
    by_hand.slots["embedding.weight"].base.data = table.dense().data
    ids = numpy.array([[3, 0, 12], [3, 3, 1]])
    assert table.rows(ids).data.tobytes() == table.dense().data[ids].tobytes()
    assert logits(model, BATCH).tobytes() == logits(by_hand, BATCH).tobytes()
    assert len([a for a in model.base_arrays if a.startswith("embedding")]) == 3, "tied: one table, one set of codes"


# ---- with attachments


@pytest.mark.parametrize("stack", [["LoRA"], ["LoRA", "IA3"], ["off", "LoRA"], ["LoRA", "norms", "LoRA"]])
def test_the_order_of_attaching_and_quantizing_does_not_matter(stack):
    methods = {"LoRA": minipeft.LoRA(2, where=r"\.(q|wo|k)\.weight$"), "IA3": minipeft.IA3(),
               "norms": minipeft.Selective(component="norm"), "off": minipeft.LoRA(1)}

    def attached(model):
        for i, name in enumerate(stack):
            a = moved(minipeft.attach(model, methods[name], RNG(i), f"a{i}"), RNG([i, 1]))
            if name == "off":
                a.unplug()
        return model

    first, second = attached(quantized()), attached(CASE.model())
    minipeft.quantize(second, "int4", ROWS_OF_12, group=3)
    assert bits(first.state()) == bits(second.state()) and first.host.origin == second.host.origin
    params = [minipeft.select(model, "@") for model in (first, second)]
    (one, grads), (other, others) = (minipeft.value_and_grad(step_of(model), p, unused="zeros")
                                     for model, p in zip((first, second), params))
    assert one == other and bits(grads) == bits(others)
    assert logits(first, BATCH).tobytes() == logits(second, BATCH).tobytes()
    plugged = first.plugged
    for name in reversed(plugged):
        first.attachments[name].unplug()
    assert logits(first, BATCH).tobytes() == logits(quantized(), BATCH).tobytes()


def test_rows_of_a_mixed_batch_see_the_quantized_base_under_their_own_attachments():
    model = quantized()
    CASE.attach(model, "a"), CASE.attach(model, "b", 3)
    mixed = logits(model, BATCH, adapter=["a", None, ("a", "b"), {"b": 0.5}])
    for i, who in enumerate(["a", None, ("a", "b"), {"b": 0.5}]):
        alone = logits(model, {name: x[i:i + 1] for name, x in BATCH.items()}, adapter=[who])
        assert abs(mixed[i:i + 1] - alone).max() < 1e-4 * abs(alone).max()


def test_a_record_of_a_base_that_was_trained_too_is_settled_before_the_base_is_quantized():
    model = CASE.model()
    lora = CASE.attach(model)
    params = {**lora.parameters, **minipeft.select(model, "head")}
    minipeft.AdamW(1e-2).step(params, minipeft.value_and_grad(step_of(model), params)[1])
    assert lora.trained_on.base is None
    twin = model.clone().attachments["lora"]
    minipeft.quantize(model, "int4", ROWS_OF_12, group=3)
    assert lora.trained_on == twin.trained_on.settled(twin.model) and lora.trained_on.base is not None


# ---- refused, and nothing has changed


def refused(error, match, model=None, kind="int4", where=ROWS_OF_12, **options):
    model = CASE.model() if model is None else model
    before, bases = bits(model.state()), {name: slot.base for name, slot in model.slots.items()}
    with pytest.raises(error, match=match):
        minipeft.quantize(model, kind, where, **{"group": 3, **options})
    assert all(slot.base is bases[name] for name, slot in model.slots.items()) and bits(model.state()) == before
    assert model.host.origin is None or model.host.origin[0]


def test_a_numpy_bool_says_whether_to_keep():
    assert quantized(keep=numpy.True_).slots[Q].base.keep is True


def test_an_unknown_kind_option_or_value_is_refused():
    refused(ValueError, "kind is 'int5'; expected one of int2, int3, int4", kind="int5")
    refused(ValueError, "int4 has no option 'bits'; expected group, zero, stored", bits=4)
    refused(ValueError, "group is 0; expected an integer >= 2", group=0)
    refused(ValueError, "keep is 1; expected True or False", keep=1)


def test_a_shape_that_the_kind_cannot_hold_is_refused_by_name_and_nothing_is_replaced():
    refused(ValueError, rf"{WO} \[12, 17\]: int4, groups of 3: 17 columns are not whole groups", where=[Q, WO])


@pytest.mark.parametrize("number", [numpy.nan, numpy.inf, -numpy.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(number):
    model = CASE.model()
    model.slots["decoder.0.attn.k.weight"].base.data[3, 4] = number
    refused(ValueError, r"decoder.0.attn.k.weight \[15, 12\]: it holds NaN or infinity", model)


def test_other_numbers_than_floating_point_ones_are_refused():
    model = CASE.model()
    model.slots[Q].base.data = model.slots[Q].base.data.astype(object)
    with pytest.raises(ValueError, match=f"{Q} .*: it has dtype object; expected floating-point numbers"):
        minipeft.quantize(model, "int4", [Q], group=3)


def test_a_weight_that_is_quantized_already_is_refused_and_others_can_follow():
    model = quantized(where=[Q])
    refused(ValueError, f"{Q} is quantized already \\(QuantizedWeight\\(int4, groups of 3", model)
    minipeft.quantize(model, "int8", [WO], group=17)
    assert model.host.origin[1].quantization == "1 matrix in int4, groups of 3; 1 matrix in int8, groups of 17"


def test_a_weight_under_a_merged_attachment_is_refused_and_one_beside_it_is_not():
    model = CASE.model()
    CASE.attach(model).merge()
    refused(ValueError, "cannot be quantized while 'lora' is merged: unmerge first", model)
    minipeft.quantize(model, "int4", r"\.k\.weight$", group=3)


def test_a_part_of_a_model_and_a_pattern_without_a_matrix_are_refused():
    refused(ValueError, "where", where="norm")
    refused(ValueError, "where", where="nothing")
    with pytest.raises(TypeError, match="Stack is not a whole model"):
        minipeft.quantize(CASE.model().encoder, "int4")


def test_an_interrupt_leaves_all_weights_as_they_were(monkeypatch):
    model = CASE.model()

    class Fails(dict):
        def items(self):
            for i, pair in enumerate(super().items()):
                if i == 3:
                    raise KeyboardInterrupt
                yield pair

    module = sys.modules["minipeft.quant.quantize"]  # the package has a function of this name
    put = module._put
    monkeypatch.setattr(module, "_put", lambda model, slots, made, original: put(model, slots, Fails(made), original))
    refused(KeyboardInterrupt, None, model)


def test_an_interrupt_while_the_new_base_is_fingerprinted_leaves_no_base_without_an_origin(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    model = CASE.model()
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["minipeft.quant.quantize"], "has_origin", interrupted)
        refused(KeyboardInterrupt, None, model)
    minipeft.quantize(model, "int4", ROWS_OF_12, group=3)
    assert origin_of(model) is not None


# ---- what the rest of the library makes of it


def test_the_report_counts_a_quantized_weight_by_its_shape_and_its_bytes_as_they_are():
    model, plain = quantized(), CASE.model()
    found, wanted = minipeft.report(model), minipeft.report(plain)
    assert found.components == wanted.components and found.all == wanted.all == sum(found.components.values())
    assert found.weight_bytes == sum(p.data.nbytes for p in model.base_arrays.values()) < wanted.weight_bytes
    free = sum(p.data.size for p in model.base_parameters.values())
    assert found.trainable == free and found.training_bytes == 3 * 4 * free
    kept = minipeft.report(quantized(keep=True))
    assert kept.weight_bytes == found.weight_bytes + 4 * sum(
        numpy.prod(slot.shape) for slot in model.slots.values() if isinstance(slot.base, QuantizedWeight))
    lora = CASE.attach(model)
    found = minipeft.report(model)
    assert found.trainable == sum(p.data.size for p in lora.parameters.values()) and found.all == wanted.all + \
        found.trainable
    assert component(f"{Q}", model.slots[Q]) == "attention"


def test_names_of_arrays_are_those_of_the_slot_and_the_leaf():
    model = quantized(where=[Q])
    assert [name for name in model.state() if name.startswith(Q)] == [f"{Q}.codes", f"{Q}.scale", f"{Q}.offset"]
    assert Q not in minipeft.select(model, ".") and set(model.base_arrays) == set(model.state())


def test_state_goes_into_another_model_that_is_quantized_alike():
    model, other = quantized(), Case(("t5 v1.1", "q and v"), 2, 3, "float32", 1).model()
    minipeft.quantize(other, "int4", ROWS_OF_12, keep=True, group=3)
    assert logits(other, BATCH).tobytes() != logits(model, BATCH).tobytes()
    other.load_state(model.state())
    assert logits(other, BATCH).tobytes() == logits(model, BATCH).tobytes()


def test_kept_numbers_follow_every_state_that_is_loaded():
    """Two loads between two products: an old array's address may be used again."""
    states = [quantized(dataclasses.replace(CASE, seed=seed)).state() for seed in (1, 2, 3)]
    model, plain = quantized(keep=True), quantized()
    for state in (*states, *states):
        logits(model, BATCH)
        model.load_state(states[0])
        for other in (model, plain):
            other.load_state(state)
        assert logits(model, BATCH).tobytes() == logits(plain, BATCH).tobytes()


@pytest.mark.parametrize("leaf, change, match", [
    ("codes", lambda a: a.astype("uint16"), "has dtype uint16; expected uint8"),
    ("codes", lambda a: a.astype("int8"), "has dtype int8; expected a kind of uint8"),
    ("codes", lambda a: a[:, :-1], r"has shape \[15, 5\]; expected \[15, 6\]"),
    ("scale", lambda a: a * numpy.float32(numpy.nan), "not finite"),
    ("offset", lambda a: a.astype("int64"), "has dtype int64; expected a kind of float32")])
def test_tampered_arrays_are_refused_by_name_and_nothing_is_replaced(leaf, change, match):
    model = quantized()
    before = bits(model.state())
    with pytest.raises(ValueError, match=f"{Q}.{leaf} {match}|{Q}.{leaf} holds numbers that are {match}"):
        model.load_state({**model.state(), f"{Q}.{leaf}": change(model.state()[f"{Q}.{leaf}"])})
    assert bits(model.state()) == before


def test_any_codes_of_the_right_shape_and_dtype_are_weights():
    model = quantized()
    model.load_state({name: numpy.full_like(a, 255) if a.dtype == "uint8" else a for name, a in model.state().items()})
    assert numpy.isfinite(logits(model, BATCH)).all()


@pytest.mark.parametrize("copied", [lambda m: m.clone(), lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("keep", [False, True])
def test_a_copy_computes_the_same_with_arrays_of_its_own_and_knows_its_origin(copied, keep):
    model = quantized(keep=keep)
    CASE.attach(model)
    wanted, twin = logits(model, BATCH).tobytes(), copied(model)
    assert logits(twin, BATCH).tobytes() == wanted and bits(twin.state()) == bits(model.state())
    assert not {id(a.data) for a in twin.base_arrays.values()} & {id(a.data) for a in model.base_arrays.values()}
    assert origin_of(twin) == origin_of(model) is not None
    if keep:
        assert len(pickle.dumps(model)) < len(pickle.dumps(quantized(keep=False))) + 20_000


def test_a_model_moves_to_a_device_with_its_codes_and_computes_there():
    model = quantized(TIED, [ROWS_OF_12, "^embedding"], keep=True)
    lora = TIED.attach(model)
    loss, grads = minipeft.value_and_grad(step_of(model), lora.parameters)
    model.to(strict)
    with minipeft.use(strict):
        assert all(isinstance(a.data, strict.ndarray) for a in model.base_arrays.values())
        there, others = minipeft.value_and_grad(step_of(model), lora.parameters)
        assert float(there) == float(loss)
        assert {name: minipeft.to_host(g).tobytes() for name, g in others.items()} == {
            name: g.tobytes() for name, g in grads.items()}
        report = lora.merge("requantized")
        assert set(report.errors) == set(lora.places)
    model.to("numpy")


def test_a_model_that_lives_on_a_device_can_be_quantized_there():
    here, there = quantized(), CASE.model().to(strict)
    with minipeft.use(strict):
        done = minipeft.quantize(there, "int4", ROWS_OF_12, group=3)
    assert isinstance(done, Quantized)
    assert bits(there.to("numpy").state()) == bits(here.state())


def test_a_run_on_a_quantized_base_resumes_to_the_same_bits_and_not_on_another_quantization(tmp_path):
    def run(model, steps, path, **options):
        lora = CASE.attach(model)
        minipeft.fit(model, lora, minipeft.Batches(pairs(), 2), steps=steps, optimizer=minipeft.AdamW(1e-2),
                     checkpoint=path, progress=False, **options)
        return bits(lora.tensors)

    wanted = run(quantized(), 6, tmp_path / "whole")
    run(quantized(), 3, tmp_path / "half")
    assert run(quantized(), 6, tmp_path / "half") == wanted
    run(quantized(), 3, tmp_path / "again")
    for other in (CASE.model(), quantized(group=6)):
        with pytest.raises(ValueError, match="frozen weights"):
            run(other, 6, tmp_path / "again")


def test_the_best_weights_of_a_run_are_restored_on_the_same_quantization_alone(tmp_path):
    model = quantized()
    lora = CASE.attach(model)
    lora.save(tmp_path / "best")
    minipeft.restore(lora, tmp_path / "best")
    other = CASE.attach(quantized(group=6))
    with pytest.raises(ValueError, match="it was trained on another quantization of the same original"):
        minipeft.restore(other, tmp_path / "best")
