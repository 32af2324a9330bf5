"""Mistakes that people make, and that an error answers with what to do. The training loop's are in tests/train."""
import numpy
import pytest

import minipeft
from minipeft.engine import ops
from tests.models_under_test import Case, bits

CASE = Case(("t5 v1.0", "q and v"), 2, 3, "float32", 0)
RNG = numpy.random.default_rng


def fitted(model, lora, params=None, **options):
    return minipeft.fit(model, lora.parameters if params is None else params,
                        minipeft.Batches([([5, 6, 1], [6, 5, 1])], 1), steps=1, progress=False, **options)


MISTAKES = {
    "an attachment for its parameters": (
        lambda m, a: minipeft.value_and_grad(lambda: m.loss([[5]], [[6]]), a), TypeError,
        "params is Attachment; expected {name: Parameter}: pass its .parameters"),
    "a list of names for parameters": (
        lambda m, a: minipeft.value_and_grad(lambda: m.loss([[5]], [[6]]), ["q"]), TypeError,
        r"params is list; expected {name: Parameter}: pass select\(model, where\)"),
    "a whole batch for its ids": (
        lambda m, a: m.generate({"input_ids": [[5, 6]], "attention_mask": [[1, 1]]}), TypeError,
        r"input_ids is a dict with input_ids, attention_mask; expected ids \[batch, time\]: pass input_ids=batch\["),
    "text for ids": (lambda m, a: m.generate("hello"), TypeError, "input_ids is 'hello'; .* which a tokenizer makes"),
    "a fraction of a token": (lambda m, a: m.generate([[5]], max_new_tokens=2.5), ValueError,
                              "max_new_tokens is 2.5; expected an integer >= 0"),
    "a truth value of tokens": (lambda m, a: m.generate([[5]], max_new_tokens=True), ValueError,
                                "max_new_tokens is True; expected an integer >= 0"),
    "a parameter that is not the model's": (
        lambda m, a: minipeft.report(m, {"mine": minipeft.Parameter(numpy.zeros(2))}), ValueError,
        "params\\['mine'\\] is not a parameter of this model under its name; select"),
    "a folder that is missing": (lambda m, a: a.save("nowhere/at/all.safetensors"), FileNotFoundError,
                                 "nowhere/at/all.safetensors: the folder .*nowhere/at does not exist; create it first"),
    "a home that is not expanded": (lambda m, a: a.save("~/x.safetensors"), FileNotFoundError, "'~' is not expanded"),
    "LoRA on a head that is tied": (
        lambda m, a: minipeft.attach(m, minipeft.LoRA(1, where="head"), RNG(0), "h"), ValueError,
        "the head of this model is tied to the embedding: choose 'embedding'"),
    "training a head that is tied": (
        lambda m, a: minipeft.select(m, r"^head\."), ValueError, "tied to the embedding: choose 'embedding'"),
    "a name of another library": (
        lambda m, a: minipeft.attach(m, minipeft.LoRA(1, where=["q_proj", "v_proj"]), RNG(0), "h"), ValueError,
        r"where='q_proj' matches none of the \d+ matrix names; nearest: encoder.0.attn.q.weight"),
    "the class of a method": (lambda m, a: minipeft.attach(m, minipeft.LoRA, RNG(0)), TypeError,
                              r"expected an object of it, LoRA\(...\)"),
    "a part of a model": (lambda m, a: minipeft.attach(m.encoder, minipeft.LoRA(1), RNG(0)), TypeError,
                          "Stack is not a whole model; pass the model, and choose with `where`"),
    "an array for a truth value": (lambda m, a: bool(ops.add(1.0, numpy.ones(2))), TypeError, "compare its .data"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_what_to_do_and_changes_nothing(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = CASE.model()
    attachment = CASE.attach(model)
    state, before = model.host.now, bits(minipeft.select(model, "."))
    action, kind, message = MISTAKES[mistake]
    with pytest.raises(kind, match=message) as caught:
        action(model, attachment)
    assert len(str(caught.value)) < 600
    assert model.host.now is state and bits(minipeft.select(model, ".")) == before and not list(tmp_path.iterdir())


def test_fit_takes_an_attachment_and_a_report_does_too():
    model = CASE.model()
    lora = CASE.attach(model)
    assert fitted(model, lora, lora).step == 1
    assert minipeft.report(model, lora).trainable == minipeft.report(model).trainable


def test_a_loss_prints_its_number_and_an_array_its_shape():
    model = CASE.model()
    loss = model.loss([[5, 6, 1]], [[6, 1]])
    assert str(loss) == f"Tensor({float(loss)!r} float32)"
    assert str(ops.add(numpy.ones((2, 3)), 1.0)) == "Tensor([2, 3] float64)"


def test_a_bare_word_of_a_list_chooses_whole_segments_in_every_part_of_the_library():
    model = CASE.model()
    chosen = minipeft.attach(model, minipeft.LoRA(1, where=["q", "o"]), RNG(0)).places
    assert chosen and all(name.split(".")[-2] in ("q", "o") for name in chosen)
    assert set(minipeft.select(model, ["q"])) == {n for n in minipeft.select(model, ".") if ".q." in n}
    assert list(minipeft.attach(model, minipeft.Selective(where=["norm"]), RNG(0), "s").places) == [
        "encoder.norm.weight", "decoder.norm.weight"]


@pytest.mark.parametrize("number", [numpy.int64(3), numpy.int32(3), numpy.uint8(3)])
def test_numpy_integers_are_taken_wherever_integers_are(number):
    model = CASE.model()
    for i, method in enumerate((minipeft.LoRA(number), minipeft.Bottleneck(size=number), minipeft.PromptTuning(number),
                                minipeft.Selective(layers=(numpy.int64(0),)), minipeft.Selective(first=numpy.int64(1)),
                                minipeft.Selective(rows=numpy.array([1, 2])))):
        minipeft.attach(model, method, RNG(0), f"a{i}")
    assert model.generate([[5, 6]], max_new_tokens=number).shape[1] <= 4
    assert minipeft.nearest_tokens(model.attachments["a2"], number).cosine_ids.shape == (3, 3)


@pytest.mark.parametrize("number", [numpy.float32(0.5), numpy.float64(0.5)])
def test_numpy_floats_are_taken_wherever_floats_are(number, tmp_path):
    model = CASE.model()
    for i, method in enumerate((minipeft.LoRA(1, alpha=number, dropout=number), minipeft.Bottleneck(scale=number))):
        minipeft.attach(model, method, RNG(0), f"a{i}").save(tmp_path / f"a{i}")
    assert minipeft.load(CASE.model(), tmp_path / "a0").method.alpha == 0.5
    assert set(minipeft.top(minipeft.magnitude(model.base_parameters), number)) <= set(model.base_parameters)


@pytest.mark.parametrize("method", [minipeft.LoRA(numpy.array(2), numpy.array(3.0), dropout=numpy.array(0.1)),
                                    minipeft.PromptTuning(numpy.array(2)), minipeft.Selective(first=numpy.array(1)),
                                    minipeft.Bottleneck(size=numpy.array(2), scale=numpy.array(2.0))])
def test_arrays_without_axes_are_numbers_too_and_can_be_saved(method, tmp_path):
    minipeft.attach(CASE.model(), method, RNG(0), "a").save(tmp_path / "a")
    assert minipeft.load(CASE.model(), tmp_path / "a").state == "plugged"


@pytest.mark.parametrize("call, kind, message", [
    (lambda m, a: minipeft.check_gradients(lambda: m.loss([[5]], [[6]]), a, RNG(0)), TypeError, "pass its .parameters"),
    (lambda m, a: minipeft.check_gradients(lambda: m.loss([[5]], [[6]]), {"a": 1}, RNG(0)), TypeError,
     "params\\['a'\\] is int; expected a Parameter"),
    (lambda m, a: minipeft.value_and_grad(None, a.parameters), TypeError, "step is NoneType; expected a function"),
    (lambda m, a: m([[5]], [[6]], attention_mask={"x": 1}), TypeError, "attention_mask is a dict"),
    (lambda m, a: m([[5, 6], [5, 6]], [[6], [6]], attention_mask=[[1], [1, 1]]), ValueError,
     "attention_mask has rows of different length"),
    (lambda m, a: minipeft.load(m, None), TypeError, "the path of a file is None"),
    (lambda m, a: minipeft.load(m, 3), TypeError, "the path of a file is 3"),
    (lambda m, a: minipeft.load(m, "~/none"), FileNotFoundError, "'~' is not expanded"),
    (lambda m, a: m.load_state(None), TypeError, "arrays is NoneType; expected {name: array}"),
    (lambda m, a: minipeft.T5Config(feed_forward_proj="x"), ValueError, "feed_forward_proj is 'x'; expected one of"),
    (lambda m, a: fitted(m, a, {1: next(iter(a.parameters.values()))}), TypeError, "params has the key 1"),
    (lambda m, a: fitted(m, a, dropout="no"), TypeError, "dropout is 'no'; expected True or False"),
    (lambda m, a: fitted(m, a, log=".run.lock", checkpoint="run"), ValueError, "is the lock file of checkpoint")])
def test_other_mistakes_that_a_review_found(call, kind, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = CASE.model()
    attachment = CASE.attach(model)
    with pytest.raises(kind, match=message):
        call(model, attachment)


def test_a_loss_can_be_formatted():
    loss = CASE.model().loss([[5, 6, 1]], [[6, 1]])
    assert f"{loss:.3f}" == f"{float(loss):.3f}" and f"{loss}" == str(loss)
