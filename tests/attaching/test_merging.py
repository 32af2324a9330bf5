"""Where an attachment is merged into, and how much of its change is lost there."""
import re

import numpy
import pytest

import minipeft
from minipeft.nn.merge_report import MergeReport
from minipeft.files import read_tensors
from minipeft.laws.models import moved
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Parameter
from minipeft.nn.wide import OnOriginal
from minipeft.quant import QuantizedWeight
from tests.models_under_test import Case, bits, logits

RNG = numpy.random.default_rng
CASE = Case(("pre-LN", "q and v"), 2, 3, "float32", 0)
BATCH = CASE.batch()
Q = "encoder.0.attn.q.weight"
KINDS = {"int4": {"group": 3}, "nf4": {"double": True}, "fp4": {"blocksize": 32}}


def base(kind="int4", where=r"\.(q|v)\.weight$", case=CASE):
    model = case.model()
    if kind != "plain":
        minipeft.quantize(model, kind, where, **KINDS[kind])
    return model


def dense(model, name=Q):
    return model.slots[name].fold().dense().data.astype("float64")


def lost(model, W, W_merged, attachment, name=Q):
    """|(W' - W~) - d| / |d| with d = s B A, by hand."""
    A, B = (attachment.tensors[f"{name}.{leaf}"].astype("float64") for leaf in "AB")
    d = 1.5 * B @ A  # alpha / rank = 3 / 2
    return numpy.linalg.norm(W_merged - W - d) / numpy.linalg.norm(d)


# ---- three ways


@pytest.mark.parametrize("kind", KINDS)
def test_by_default_the_sum_with_the_dequantized_weight_is_stored_as_a_float_weight(kind):
    model = base(kind)
    lora = CASE.attach(model)
    W, unmerged = model.slots[Q].base.dense().data.astype("float64"), dense(model)
    report = lora.merge()
    assert isinstance(report, MergeReport) and set(report.errors) == set(report.dtypes) == set(lora.places)
    assert set(report.dtypes.values()) == {"float32"}
    assert type(model.slots[Q].merged[0].merged) is Parameter and dense(model).tobytes() == unmerged.tobytes()
    wanted = lost(model, W, dense(model), lora)
    assert abs(report.errors[Q] - wanted) < 1e-9 and 0 < report.worst < 1e-5  # rounding to float32


@pytest.mark.parametrize("kind", KINDS)
def test_requantized_the_sum_has_codes_and_scales_of_its_own(kind):
    model = base(kind)
    lora = CASE.attach(model)
    W, total, codes = model.slots[Q].base.dense().data, dense(model), bits(model.state())
    report = lora.merge(into="requantized")
    constant = model.slots[Q].merged[0].merged
    again = QuantizedWeight.of(total.astype("float32"), model.slots[Q].base.scheme)
    assert bits(constant.arrays) == bits(again.arrays) and bits(model.state()) == codes
    assert set(report.dtypes.values()) == {str(model.slots[Q].base.scheme)}
    assert abs(report.errors[Q] - lost(model, W, dense(model), lora)) < 1e-6 * report.errors[Q]
    assert 0.02 < report.worst < 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [lambda model: model, lambda model: model.state()])
def test_over_the_originals_the_sum_is_that_of_the_float_model_and_the_error_is_the_gap_of_the_bases(kind, given):
    """For a LoRA d does not depend on the weight, so what is lost is exactly |W - W~| / |d|."""
    model, plain = base(kind), base("plain")
    lora, reference = CASE.attach(model), CASE.attach(plain)
    report = lora.merge(given(base("plain")))
    assert logits(model, BATCH).tobytes() != logits(plain, BATCH).tobytes(), "other weights are still quantized"
    reference.merge()
    for name in lora.places:
        assert dense(model, name).tobytes() == dense(plain, name).tobytes()
        A, B = (lora.tensors[f"{name}.{leaf}"].astype("float64") for leaf in "AB")
        W, W_q = plain.slots[name].base.data, model.slots[name].base.dense().data
        gap = numpy.linalg.norm(W.astype("float64") - W_q) / numpy.linalg.norm(1.5 * B @ A)
        assert abs(report.errors[name] - gap) < 1e-5 * gap
    assert set(report.dtypes.values()) == {"float32"}


@pytest.mark.parametrize("into", [None, "requantized", "original"])
@pytest.mark.parametrize("method", [minipeft.LoRA(2, 3), minipeft.DoRA(2, 3), minipeft.IA3(),
                                    minipeft.OFT(4, ["q", "v"]), minipeft.Selective(component="attention")],
                         ids=lambda m: type(m).__name__)
def test_every_bit_comes_back_after_every_merge(into, method):
    model = base()
    a = moved(minipeft.attach(model, method, RNG(1), "a"), RNG(2), 0.1)
    before, out, own = bits(model.state()), logits(model, BATCH).tobytes(), bits(a.tensors)
    report = a.merge(base("plain") if into == "original" else into)
    assert set(report.dtypes) == set(a.places)
    merged = logits(model, BATCH).tobytes()
    assert (merged != out) or into is None
    with a.off():
        assert logits(model, BATCH).tobytes() == logits(base(), BATCH).tobytes()
    assert logits(model, BATCH).tobytes() == merged
    a.unmerge()
    assert (bits(model.state()), bits(a.tensors), logits(model, BATCH).tobytes()) == (before, own, out)
    a.unplug()
    assert logits(model, BATCH).tobytes() == logits(base(), BATCH).tobytes()
    a.remove()


@pytest.mark.parametrize("kind, ratio, requantized, original, codes", [
    ("nf4", 0.05, 1.02, 1.84, 0.97), ("nf4", 0.30, 0.32, 0.31, 0.40)])
def test_the_losses_of_a_merge_are_those_found_on_weights_of_bitsandbytes(kind, ratio, requantized, original, codes):
    """NF4, W ~ N(0, 0.02), 512 x 512, rank 8, |d| / |W| = ratio: requantized, 102 % and 32 % of d are lost, and 97 %
    and 40 % of the codes stay; over the original weights, 184 % and 31 % are lost. A float weight loses rounding."""
    same, (plain, again, over) = losses(kind, ratio)
    assert plain < 1e-6 and abs(again - requantized) < 0.01 and abs(over - original) < 0.01
    assert abs(same - codes) < 0.01


def losses(kind, ratio):
    """(the share of the codes of 4 bits that requantizing leaves as they are; the errors of the three merges, this one
    in the middle)."""
    rng = RNG(0)
    W = (0.02 * rng.standard_normal((512, 512))).astype("float32")
    model = One(W)
    minipeft.quantize(model, kind, "weight")
    lora = minipeft.attach(model, minipeft.LoRA(8, 8, where="weight"), rng)
    A, B = lora.parameters["weight@lora.A"], lora.parameters["weight@lora.B"]
    B.data = rng.standard_normal((512, 8)).astype("float32")
    B.data *= ratio * numpy.linalg.norm(W) / numpy.linalg.norm(B.data @ A.data)
    errors = []
    for into in (None, {"weight": W}, "requantized"):
        errors.append(lora.merge(into).errors["weight"])
        constant = model.slots["weight"].merged[0].merged
        lora.unmerge()
    before, after = (next(iter(weight.arrays.values())).data for weight in (model.slots["weight"].base, constant))
    same = ((before >> 4 == after >> 4).mean() + (before & 15 == after & 15).mean()) / 2
    return same, (errors[0], errors[2], errors[1])


class One(minipeft.Transformer):
    """A model of one matrix."""

    def __init__(self, W):
        self.weight = Slot("linear", W)


# ---- reports


def test_a_merge_into_a_plain_base_is_not_measured_and_the_report_says_so():
    model = base("plain")
    report = CASE.attach(model).merge()
    assert report.errors == {} and report.worst == 0 and set(report.dtypes.values()) == {"float32"}
    lines = str(report).splitlines()
    assert re.fullmatch(rf"{Q} +float32 +not measured", lines[1]) and lines[-1].startswith("not measured: the base is ")
    assert len(lines) == 1 + len(report.dtypes) + 1


def test_a_report_of_both_kinds_of_weight_says_for_each_how_it_is_stored():
    model = base("int4", [Q])
    report = CASE.attach(model).merge("requantized")
    assert set(report.errors) == {Q} and report.dtypes[Q] == "int4, groups of 3"
    assert set(report.dtypes.values()) == {"int4, groups of 3", "float32"}
    lines = str(report).splitlines()
    assert re.fullmatch(rf"{Q} +int4, groups of 3 +{report.errors[Q]:.2e}", next(x for x in lines if x.startswith(Q)))
    assert len({line.index("int4" if "int4" in line else "float32") for line in lines[1:-2]}) == 1


def test_an_adapter_that_changes_nothing_loses_nothing_anywhere():
    """Q(W~) = W~, so that codes and scales stay as they are."""
    model = base("nf4", "ff")
    a = minipeft.attach(model, minipeft.LoRA(2, where="ff"), RNG(0))
    assert a.merge().worst == 0
    a.unmerge()
    plain = base("plain")
    minipeft.quantize(plain, "nf4", "ff")
    b = minipeft.attach(plain, minipeft.LoRA(2, where="ff"), RNG(0))
    assert b.merge("requantized").worst == 0


def test_a_stack_is_merged_each_into_its_own_choice():
    model = base()
    lower, upper = CASE.attach(model, "lower"), CASE.attach(model, "upper", 3)
    below = model.slots[Q].base.dense().data
    first = lower.merge("requantized")
    middle = model.slots[Q].merged[0].merged
    second = upper.merge("requantized")
    assert isinstance(model.slots[Q].merged[1].merged, QuantizedWeight)
    assert abs(first.errors[Q] - lost(model, below, middle.dense().data, lower)) < 1e-6
    assert abs(second.errors[Q] - lost(model, middle.dense().data, dense(model), upper)) < 1e-6
    upper.unmerge()
    assert upper.merge().worst < 1e-5


# ---- refused, and nothing has changed


def refused(a, error, match, into):
    state, own = a.model.host.now, bits(a.model.state())
    with pytest.raises(error, match=match):
        a.merge(into)
    assert a.model.host.now is state and bits(a.model.state()) == own


def test_requantized_on_a_base_without_quantized_weights_is_refused():
    a = CASE.attach(base("plain"))
    refused(a, ValueError, "'lora' cannot be merged into quantized weights: none of its weights is", "requantized")


def test_another_word_or_type_is_refused():
    a = CASE.attach(base())
    refused(a, ValueError, "into is 'requantised'; expected 'requantized', the original weights", "requantised")
    refused(a, TypeError, "into is list; expected", [1])
    refused(a, TypeError, "into is bool; expected", True)


@pytest.mark.parametrize("change, match", [
    (lambda W: None, f"the original weights lack {Q};"),
    (lambda W: W.T[:, :-1], r"is float32 \[12, 11\]; expected float32"),
    (lambda W: W.astype("float64"), r"is float64 \[12, 12\]; expected float32 \[12, 12\]"),
    (lambda W: W * numpy.float32(numpy.inf), "holds NaN or infinity"), (lambda W: 3, "is 3; expected float32")])
def test_originals_that_do_not_fit_are_refused_by_name(change, match):
    a, originals = CASE.attach(base()), dict(base("plain").state())
    with numpy.errstate(invalid="ignore"):
        originals[Q] = change(originals[Q])
    if originals[Q] is None:
        del originals[Q]
    refused(a, ValueError, match, originals)


def test_originals_that_are_quantized_themselves_are_refused():
    a = CASE.attach(base())
    refused(a, ValueError, rf"lack {Q} \(they hold {Q}.codes: they are quantized themselves\)", base())


def test_a_model_that_is_not_the_original_is_named_in_a_warning(recwarn):
    model, other = base(), base("plain")
    a = CASE.attach(model)
    a.merge(base("plain"))
    a.unmerge()
    assert not recwarn, "this is the original, in every bit"
    other.slots[Q].base.data = other.slots[Q].base.data * 2
    with pytest.warns(UserWarning, match="is merged over weights that are not the original ones"):
        a.merge(other)
    assert a.state == "merged"


def test_originals_go_below_the_lowest_attachment_alone():
    model = base()
    lower, upper = CASE.attach(model, "lower"), CASE.attach(model, "upper", 3)
    refused(upper, ValueError, "it lies on top of 'lower'; merge the lowest attachment over them", base("plain"))
    lower.merge(base("plain"))
    refused(upper, ValueError, "it lies on top of 'lower'", base("plain"))
    upper.merge()
    plain = base("plain")
    for i, name in enumerate(("lower", "upper")):
        CASE.attach(plain, name, 2 + i).merge()
    assert dense(model).tobytes() == dense(plain).tobytes()


def test_a_sum_that_is_not_finite_is_not_quantized():
    a = CASE.attach(base())
    a.parameters[f"{Q}@lora.B"].data[0, 0] = numpy.inf
    with numpy.errstate(all="ignore"):
        refused(a, ValueError, f"at {Q} its sum with the base holds NaN or infinity", "requantized")


@pytest.mark.parametrize("into", [None, "requantized"])
def test_hidden_states_are_refused_as_ever(into):
    a = minipeft.attach(base(), minipeft.PrefixTuning(2), RNG(0), "p")
    refused(a, ValueError, "'p' cannot be merged: at .* it acts on hidden states", into)


# ---- saved


@pytest.mark.parametrize("into", ["requantized", "original"])
def test_the_constant_that_was_chosen_is_what_is_saved_and_the_error_is_that_of_the_change(tmp_path, into):
    model = base()
    a = CASE.attach(model)
    report = a.merge(base("plain") if into == "original" else into)
    assert type(model.slots[Q].merged[0].merged) is (OnOriginal if into == "original" else QuantizedWeight)
    twin = model.clone()
    assert type(twin.slots[Q].merged[0].merged) is type(model.slots[Q].merged[0].merged)
    saved = model.save_pretrained(tmp_path, merged=True)
    if into == "original":
        assert (read_tensors(tmp_path / "model.safetensors")[0][Q] == dense(model)).all()
    assert abs(saved.errors[Q] - report.errors[Q]) < 1e-4 * report.errors[Q]
