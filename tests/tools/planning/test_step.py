"""A planned step is the measured one: against `xray` and against what Python allocates, for methods and sizes."""
import resource
import tracemalloc

import numpy
import pytest

import minipeft
from minipeft.tools.planning.configs import of_values
from minipeft.tools.planning.loading import WORK
from minipeft.tools.planning.methods import known, made
from minipeft.tools.planning.settings import Settings
from minipeft.tools.planning.step import planned
from tests.tools.planning.models import D64, D256, LLAMAS, SMALL, llama, t5

TOLERANCE = 0.10  # `xray` does not see temporaries inside an op
SMALLER = t5(64, 16, 4, 256, 2, 128), {"batch": 8, "source": 24, "target": 16}


def in_the_step(step):
    """Bytes at the peak of a step beyond weights, adapter and optimizer, which are there before it."""
    return sum(n for what, n in step.phases[step.training].items() if what not in ("weights", "adapter", "optimizer"))


def real(config, method, sizes, rng=None):
    """(a step of the real model, its parameters, the model)."""
    model = minipeft.T5(config, numpy.random.default_rng(0))
    params = minipeft.select(model, ".*") if method is None else minipeft.attach(
        model, method, numpy.random.default_rng(0)).parameters
    numbers = numpy.random.default_rng(1)
    ids, labels = (numbers.integers(2, config.vocab_size, (sizes["batch"], sizes[name]))
                   for name in ("source", "target"))
    return lambda: model.loss(ids, labels, rng=rng), params, model


def allocated(step, params):
    """The peak of what Python allocates in a step, by tracemalloc."""
    minipeft.value_and_grad(step, params, training=False)
    tracemalloc.start()
    try:
        minipeft.value_and_grad(step, params, training=False)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", [  # the library's own: other tests in this process may have registered theirs
    name for name, maker in known().items() if name != "biases"
    and type(maker() or minipeft.LoRA()).__module__.startswith("minipeft.")])
def test_a_step_of_every_method_takes_what_the_xray_of_the_real_step_says(name):
    config, sizes = SMALLER
    method = made(name, config, 2 if name == "qalora" else None)      # which has d_in / 32 groups, and no larger rank
    step, params, _ = real(config, method, sizes)
    plan = planned(config, method, Settings(**sizes))
    assert in_the_step(plan) == pytest.approx(minipeft.xray(step, params).peak_bytes, rel=TOLERANCE)
    assert plan.trained == sum(p.data.size for p in params.values())


@pytest.mark.parametrize("size, name", [(D64, "lora"), (D64, "full"), (D256, "lora")])
def test_a_step_takes_what_python_allocates(size, name):
    config, sizes = size
    method = made(name, config)
    step, params, _ = real(config, method, sizes)
    assert in_the_step(planned(config, method, Settings(**sizes))) == pytest.approx(
        allocated(step, params), rel=TOLERANCE)


def test_dropout_takes_its_masks():
    config, sizes = t5(64, 16, 4, 256, 2, 128, dropout_rate=0.1), SMALLER[1]
    method = minipeft.LoRA(8)
    step, params, _ = real(config, method, sizes, numpy.random.default_rng(2))
    plan, without = (planned(config, method, Settings(**sizes, dropout=p)) for p in (None, 0.0))
    assert in_the_step(plan) == pytest.approx(minipeft.xray(step, params).peak_bytes, rel=TOLERANCE)
    assert in_the_step(plan) > 1.3 * in_the_step(without)
    assert planned(SMALLER[0], method, Settings(**sizes, dropout=0.1)) == plan


def test_a_decoder_and_a_method_have_dropout_of_their_own():
    config = of_values(llama(40, 56, 2, 4, 100))
    sizes = {"batch": 2, "source": 20, "target": 12}
    plain, dropped, of_method = (planned(config, minipeft.LoRA(4, dropout=p), Settings(**sizes, dropout=q))
                                 for p, q in ((0.0, None), (0.0, 0.1), (0.1, None)))
    scores = plain.phases["forward"]["scores"]
    assert scores == 2 * 4 * 2 * 4 * 32 * 32                              # layers, bytes, batch, heads, tokens twice
    assert dropped.phases["forward"]["scores"] == 3 * scores
    assert of_method.phases["forward"]["activations"] > plain.phases["forward"]["activations"]


def test_a_quantized_step_takes_what_python_allocates_and_so_does_quantizing():
    config, sizes = D256[0], {"batch": 4, "source": 32, "target": 32}
    method = minipeft.LoRA(8)
    plan = planned(config, method, Settings(**sizes, quantize="int4"))
    model = minipeft.T5(config, numpy.random.default_rng(0))
    tracemalloc.start()
    try:
        quantized = minipeft.quantize(model, "int4")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    own = sum(p.data.nbytes for p in minipeft.T5(config, None).base_parameters.values())
    assert own + peak == pytest.approx(plan.totals["quantize"], rel=TOLERANCE)
    assert plan.phases["quantize"]["weights"] == own and WORK == 6
    weights = sum(a.data.nbytes for a in model.base_arrays.values())
    assert plan.phases["forward"]["weights"] == weights < own and quantized.after
    params = minipeft.attach(model, method, numpy.random.default_rng(0)).parameters
    ids = numpy.ones((4, 32), "int64")
    found = allocated(lambda: model.loss(ids, ids), params)
    assert in_the_step(plan) == pytest.approx(found, rel=TOLERANCE)


def test_loading_holds_the_file_beside_the_model(tmp_path):
    config = D256[0]
    minipeft.T5(config, numpy.random.default_rng(0)).save_pretrained(tmp_path)
    tracemalloc.start()
    try:
        minipeft.T5.from_pretrained(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    plan = planned(config, minipeft.LoRA(8), Settings())
    assert plan.totals["load"] == pytest.approx(peak, rel=TOLERANCE)


def test_the_size_of_the_adapter_file_is_that_of_the_saved_one_without_its_metadata(tmp_path):
    config, sizes = SMALLER
    model = minipeft.T5(config, numpy.random.default_rng(0))
    minipeft.attach(model, minipeft.LoRA(8), numpy.random.default_rng(0)).save(tmp_path / "a.safetensors")
    saved = (tmp_path / "a.safetensors").stat().st_size
    assert 0 < saved - planned(config, minipeft.LoRA(8), Settings(**sizes)).file < 3000


def test_the_peak_is_the_largest_of_the_phases_and_each_phase_the_sum_of_its_purposes():
    step = planned(*[SMALL[0], minipeft.LoRA(8)], Settings(**SMALL[1], quantize="nf4", double=True))
    assert list(step.phases) == ["load", "quantize", "forward", "backward", "optimizer"]
    assert step.totals == {phase: sum(parts.values()) for phase, parts in step.phases.items()}
    assert step.peak == max(step.totals.values()) == step.totals[step.at]
    assert all(n > 0 for parts in step.phases.values() for n in parts.values())


def test_a_model_that_is_quantized_as_it_is_read_is_never_whole_in_floating_point():
    settings = dict(SMALL[1], dtype="bfloat16", quantize="nf4", double=True)
    whole, streamed = (planned(SMALL[0], minipeft.LoRA(8), Settings(**settings, streaming=s)) for s in (False, True))
    table = 2 * 32128 * 512
    assert streamed.phases["load"] == {"weights": streamed.phases["forward"]["weights"], "temporaries": 2 * table}
    assert whole.phases["load"]["weights"] == 2 * whole.base and "quantize" not in streamed.phases
    steps = [{phase: step.phases[phase] for phase in ("forward", "backward", "optimizer")}
             for step in (whole, streamed)]
    assert steps[0] == steps[1]


def test_full_fine_tuning_is_16_bytes_a_parameter_in_float32_and_12_in_half_precision_before_activations():
    config = SMALL[0]
    for dtype, weight, gradient in (("float32", 4, 4), ("bfloat16", 2, 2)):
        step = planned(config, None, Settings(batch=1, source=1, target=1, dtype=dtype))
        parts = step.phases["optimizer"]
        assert parts["weights"] == weight * step.base and parts["gradients"] == gradient * step.base
        assert parts["optimizer"] == 8 * step.base and step.trained == step.base


def test_the_optimizer_and_the_master_copies_count_for_what_is_trained_alone():
    config, method = SMALL[0], minipeft.LoRA(8)
    step = planned(config, method, Settings(dtype="float16", optimizer="adamw8bit", master=True))
    parts = step.phases["optimizer"]
    assert parts["optimizer"] == round(2.03125 * step.trained) and parts["master copies"] == 4 * step.trained
    assert parts["adapter"] == parts["gradients"] == 2 * step.trained
    assert "optimizer" not in planned(config, method, Settings(optimizer="sgd")).phases["forward"]
    assert "master copies" not in planned(config, method, Settings(master=True)).phases["forward"]


def test_the_scores_are_three_arrays_with_dropout_and_one_without():
    config = t5(64, 16, 4, 256, 1, 128, dropout_rate=0.1)
    one = 4 * 8 * 4 * (24 * 24 + 16 * 16 + 16 * 24)          # bytes: batch, heads, and query times key of three kinds
    sizes = SMALLER[1]
    assert planned(config, minipeft.LoRA(8), Settings(**sizes, dropout=0)).phases["forward"]["scores"] == one
    assert planned(config, minipeft.LoRA(8), Settings(**sizes)).phases["forward"]["scores"] == 3 * one


def test_the_logits_of_half_precision_are_cast_to_float32():
    config = t5(16, 8, 2, 32, 1, 4096)
    half = planned(config, minipeft.LoRA(2), Settings(batch=8, source=4, target=16, dtype="bfloat16"))
    single = planned(config, minipeft.LoRA(2), Settings(batch=8, source=4, target=16))
    logits = 8 * 16 * 4096
    assert half.phases["forward"]["casts"] == 4 * logits and "casts" not in single.phases["forward"]
    assert half.phases["forward"]["logits"] >= (2 + 4) * logits


def test_casting_the_rest_to_float32_adds_two_bytes_for_each_number_that_is_not_quantized():
    config, method = SMALL[0], minipeft.LoRA(8)
    s = {"dtype": "bfloat16", "quantize": "nf4", "batch": 1, "source": 2, "target": 2}
    cast, plain = (planned(config, method, Settings(**s, cast_rest=c)) for c in (True, False))
    rest = 32128 * 512 + 2 * 32 * 8 + 512 * (2 * 6 + 1 + 3 * 6 + 1)     # the table, two sets of buckets, the norms
    assert cast.phases["optimizer"]["casts"] == 2 * rest and "casts" not in plain.phases["optimizer"]
    assert cast.phases["forward"]["weights"] == plain.phases["forward"]["weights"]


def test_checkpointing_keeps_one_block_and_the_inputs_of_the_others():
    config, method = of_values(LLAMAS["7B"]), minipeft.LoRA(8)
    s = {"batch": 2, "source": 100, "target": 28, "dtype": "bfloat16"}
    whole, kept = (planned(config, method, Settings(**s, checkpointing=c)) for c in (False, True))
    inputs = 31 * 2 * 128 * 4096 * 2
    assert kept.phases["optimizer"] == whole.phases["optimizer"]
    assert inputs < kept.phases["backward"]["activations"] < inputs + whole.phases["backward"]["activations"] / 16
    assert kept.phases["backward"]["gradients"] == 2 * kept.trained
    assert kept.totals["backward"] < whole.totals["backward"]


def test_nothing_of_a_large_model_is_allocated():
    config = of_values(LLAMAS["65B"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = planned(config, minipeft.LoRA(8), Settings())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before    # KiB here, bytes on other systems
    assert step.peak > 4 * 65 * 10 ** 9 and grown < 2 ** 16
