"""An adapter of a base and of its quantizations: a warning between them, an error elsewhere."""
import json
import warnings

import pytest

import minipeft
from minipeft.attaching import adapter_file
from minipeft.attaching.load import load as load_of_ours
from minipeft.attaching.trained_on import content_of_base, origin_of
from minipeft.files import read_tensors, write_tensors
from tests.adapters import write_signed
from tests.models_under_test import Case, bits, logits

CASE = Case(("t5 v1.1", "q and v"), 2, 3, "float32", 0)
BATCH = CASE.batch()
QV = r"\.(q|v)\.weight$"
SAYS = {"int4": "8 matrices in int4, groups of 3", "int8": "8 matrices in int8, groups of 4"}


def base(kind="plain", case=CASE):
    model = case.model()
    if kind != "plain":
        minipeft.quantize(model, kind, QV, group=3 if kind == "int4" else 4)
    return model


def trained(model, path, name="lora"):
    lora = CASE.attach(model, name)
    params = lora.parameters
    minipeft.AdamW(1e-2).step(params, minipeft.value_and_grad(lambda: model.loss(**BATCH), params)[1])
    lora.save(path)
    return lora


def warned(model, path, *parts, load=minipeft.load):
    """The load warns once, at the line that called it, and names the file and all the parts."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = load(model, path)
    assert len(seen) == 1 and seen[0].category is UserWarning and seen[0].filename == __file__
    assert all(part in str(seen[0].message) for part in (str(path), *parts)), str(seen[0].message)
    return found


ACROSS = {("plain", "int4"): ["trained on the original of this base, which is quantized here", SAYS["int4"]],
          ("int4", "plain"): ["trained on this base quantized", SAYS["int4"], "here it is not quantized"],
          ("int4", "int8"): ["another quantization of the same original", SAYS["int4"], "here: ", SAYS["int8"]]}


@pytest.mark.parametrize("load", [minipeft.load, load_of_ours])
@pytest.mark.parametrize("there, here", ACROSS)
def test_a_load_on_a_relative_of_the_base_warns_and_names_both_sides(tmp_path, there, here, load):
    lora = trained(base(there), tmp_path / "a")
    model = base(here)
    loaded = warned(model, tmp_path / "a", *ACROSS[there, here], "evaluate it here", load=load)
    assert bits(loaded.tensors) == bits(lora.tensors) and loaded.state == "plugged"
    assert loaded.trained_on == lora.trained_on, "it was trained there, and is not by being loaded here"


@pytest.mark.parametrize("kind", ["plain", "int4"])
def test_a_load_on_the_same_base_does_not_warn(tmp_path, kind):
    model = base(kind)
    trained(model, tmp_path / "a")
    fresh = base(kind)
    minipeft.load(fresh, tmp_path / "a")
    assert logits(fresh, BATCH).tobytes() == logits(model, BATCH).tobytes()


def test_two_quantizations_of_one_name_and_other_numbers_are_told_apart(tmp_path):
    trained(base("int4"), tmp_path / "a")
    wide = CASE.model()
    twin = type(wide)(wide.config, None, "float64")
    twin.load_state(wide.state())
    minipeft.quantize(twin, "int4", QV, group=3)
    warned(twin, tmp_path / "a", "quantized to other codes or scales, as in another dtype", SAYS["int4"])


@pytest.mark.parametrize("there", ["plain", "int4"])
@pytest.mark.parametrize("here", ["plain", "int4"])
def test_a_load_on_a_base_of_other_weights_is_refused(tmp_path, there, here):
    trained(base(there), tmp_path / "a")
    stranger = base(here, Case(CASE.place, 2, 3, "float32", 1))
    with pytest.raises(ValueError, match="made for another base model"):
        minipeft.load(stranger, tmp_path / "a")
    assert not stranger.attachments
    minipeft.load(stranger, tmp_path / "a", force=True)


def test_force_neither_checks_nor_warns_and_warnings_as_errors_change_nothing(tmp_path):
    trained(base("int4"), tmp_path / "a")
    model = base()
    with pytest.raises(UserWarning):
        minipeft.load(model, tmp_path / "a")
    assert not model.attachments
    minipeft.load(model, tmp_path / "a", force=True)


@pytest.mark.parametrize("change", ["trained", "replaced", "by hand"])
def test_a_base_that_changed_after_it_was_quantized_has_no_origin_and_no_relatives(tmp_path, change):
    trained(base(), tmp_path / "a")
    model = base("int4")
    origin = origin_of(model)
    assert origin.base == content_of_base(base()) and origin.quantization == SAYS["int4"]
    state = {name: array.copy() for name, array in model.state().items()}
    if change == "trained":
        params = minipeft.select(model, "norm")
        minipeft.AdamW(1e-2).step(params, minipeft.value_and_grad(lambda: model.loss(**BATCH), params)[1])
    elif change == "replaced":
        model.load_state({**state, "embedding.weight": state["embedding.weight"] + 1})
    else:
        model.slots["encoder.0.attn.q.weight"].base.arrays["codes"].data[:] = 0
    assert origin_of(model) is None
    with pytest.raises(ValueError, match="made for another base model"):
        minipeft.load(model, tmp_path / "a")
    model.load_state(state)
    assert origin_of(model) == origin


def test_a_base_that_is_quantized_in_two_steps_has_the_origin_of_the_first():
    model = base("int4")
    minipeft.quantize(model, "int2", r"\.k\.weight$", group=6)
    assert origin_of(model).base == content_of_base(base())
    assert origin_of(model).quantization == f"{SAYS['int4']}; 4 matrices in int2, groups of 6"


def test_the_file_of_an_adapter_on_a_base_that_is_not_quantized_is_as_before(tmp_path):
    trained(base(), tmp_path / "a")
    assert set(read_tensors(tmp_path / "a")[1]) == {"format", "version", "signature", *adapter_file.SIGNED}


def test_the_origin_in_a_file_is_signed(tmp_path):
    trained(base("int4"), tmp_path / "a")
    tensors, metadata = read_tensors(tmp_path / "a")
    assert json.loads(metadata["origin"]) == {"base": content_of_base(base()), "quantization": SAYS["int4"]}
    for other in ({**metadata, "origin": metadata["origin"].replace("int4", "int3")},
                  {name: text for name, text in metadata.items() if name != "origin"}):
        write_tensors(tmp_path / "b", tensors, other)
        with pytest.raises(ValueError, match="its metadata was changed after it was written"):
            minipeft.load(base("int4"), tmp_path / "b")


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"base": "x"}', '{"base": "x", "quantization": 3}',
                                  '{"base": "x", "quantization": "y", "more": "z"}', '{"base": "x", "base": "y"}'])
def test_a_malformed_origin_is_refused_with_the_name_of_the_file(tmp_path, text):
    trained(base("int4"), tmp_path / "a")
    tensors, metadata = read_tensors(tmp_path / "a")
    write_tensors(tmp_path / "b", tensors, {**metadata, "origin": text})
    with pytest.raises(ValueError, match=f"{tmp_path / 'b'}: .*origin"):
        minipeft.load(base("int4"), tmp_path / "b")


def test_a_stranger_cannot_write_to_the_terminal_through_an_origin(tmp_path):
    trained(base("int4"), tmp_path / "a")
    tensors, metadata = read_tensors(tmp_path / "a")
    origin = {**json.loads(metadata["origin"]), "quantization": "\x1b[2J" + "9" * 10_000}
    write_signed(tmp_path / "b", tensors, {**metadata, "origin": json.dumps(origin)})
    with pytest.warns(UserWarning) as seen:
        minipeft.load(base(), tmp_path / "b")
    assert "\x1b" not in str(seen[0].message) and len(str(seen[0].message)) < 1000


# ---- other records


def test_adapters_below_and_together_are_asked_for_as_before(tmp_path):
    model = base("int4")
    lower = trained(model, tmp_path / "a", "a")
    upper = trained(model, tmp_path / "b", "b")
    assert upper.trained_on.below == (lower.layer,) and upper.trained_on.origin == origin_of(model)
    with pytest.raises(ValueError, match="was trained on top of attachment 'a'"):
        minipeft.load(base("int4"), tmp_path / "b", force=False)
    with pytest.warns(UserWarning, match="trained on this base quantized") as seen:
        minipeft.load(base(), [tmp_path / "a", tmp_path / "b"])
    assert len(seen) == 2


def test_one_that_was_never_trained_names_the_base_it_is_on_and_training_it_elsewhere_names_that(tmp_path):
    CASE.attach(base("int4")).save(tmp_path / "a")
    loaded = warned(base(), tmp_path / "a", "trained on this base quantized")
    params = loaded.parameters
    minipeft.AdamW(1e-2).step(params, minipeft.value_and_grad(lambda: loaded.model.loss(**BATCH), params)[1])
    loaded.save(tmp_path / "b")
    assert "origin" not in read_tensors(tmp_path / "b")[1]
    minipeft.load(base(), tmp_path / "b")


def test_combined_and_extracted_ones_have_the_origin_of_their_base(tmp_path):
    model = base("int4")
    trained(model, tmp_path / "a", "a")
    minipeft.combine([model.attachments["a"]], [2.0]).save(tmp_path / "c")
    warned(base(), tmp_path / "c", "trained on this base quantized")
    model, tuned = base("int4"), base("int4")
    tuned.slots["head.weight"].base.data = tuned.slots["head.weight"].base.data * 2
    minipeft.extract(model, tuned, 2).save(tmp_path / "e")
    warned(base(), tmp_path / "e", "trained on this base quantized")


def test_adapters_of_a_base_and_of_its_quantization_are_not_combined(tmp_path):
    trained(base(), tmp_path / "a", "a")
    model = base("int4")
    trained(model, tmp_path / "b", "b")
    model.attachments["b"].unplug()
    a = warned(model, tmp_path / "a", "trained on the original")
    with pytest.raises(ValueError, match=r"'b', 'a' were trained on different bases \(a base and its quantization"):
        minipeft.combine([model.attachments["b"], a], [0.5, 0.5])
