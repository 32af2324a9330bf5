"""What an adapter's file says of the weights that its tensors were trained on, and what a load makes of it."""
import json
import warnings

import numpy
import pytest

import minipeft
from minipeft.files import read_tensors
from minipeft.train import best
from tests.adapters import write_signed
from tests.models_under_test import Case, bits, logits, same_values

CASE = Case(("t5 v1.0", "q and v"), 2, 3, "float32", 0)
RNG = numpy.random.default_rng
V1 = "tests/fixtures/minipeft_v1"


def train(model, *attachments, steps=2, **options):
    """Steps of a loop that is written by hand, of all these attachments together."""
    params = {name: p for a in attachments for name, p in a.parameters.items()}
    optimizer = minipeft.AdamW(1e-2)
    for _ in range(steps):
        _, grads = minipeft.value_and_grad(lambda: model.loss(**CASE.batch(), **options), params)
        optimizer.step(params, grads)


def stacked(*names, joint=False):
    """A model with LoRAs on top of each other, each trained when it was attached; or all of them together."""
    model = CASE.model()
    for i, name in enumerate(names):
        attachment = minipeft.attach(model, minipeft.LoRA(2), RNG(i), name)
        if not joint:
            train(model, attachment)
    if joint:
        train(model, *model.attachments.values())
    return model


def saved(folder, model):
    """Every attachment in a file of its name."""
    for name, attachment in model.attachments.items():
        attachment.save(folder / name)
    return [folder / name for name in model.attachments]


def names(path, key):
    return [layer["name"] for layer in json.loads(read_tensors(path)[1][key])]


def refused(files, match, model=None, **options):
    """A load raises, and changes nothing."""
    model = CASE.model() if model is None else model
    before, state = bits(minipeft.select(model, ".")), model.host.now
    with pytest.raises(ValueError, match=match):
        minipeft.load(model, files, **options)
    assert model.host.now is state and bits(minipeft.select(model, ".")) == before


# ---- below


def test_one_that_was_trained_above_another_needs_it_and_not_the_other_way_round(tmp_path):
    model = stacked("a", "b")
    output = logits(model, CASE.batch())
    a, b = saved(tmp_path, model)
    assert (names(a, "below"), names(b, "below")) == ([], ["a"])
    refused(b, "b: was trained on top of attachment 'a', which is not plugged here with the same tensors; load and ")
    fresh = CASE.model()
    minipeft.load(fresh, a)
    assert minipeft.load(fresh, b).state == "plugged"
    assert same_values(logits(fresh, CASE.batch()), output)


@pytest.mark.parametrize("moves", [
    lambda a, b: (a.unplug(), a.plug()), lambda a, b: b.unplug(), lambda a, b: (b.unplug(), a.unplug(), b.plug()),
    lambda a, b: a.merge(), lambda a, b: (b.unplug(), a.remove())])
def test_what_is_plugged_when_it_is_saved_does_not_matter(tmp_path, moves):
    model = stacked("a", "b")
    moves(*model.attachments.values())
    saved(tmp_path, model)
    if "a" in model.attachments:
        assert names(tmp_path / "a", "below") == []
        assert minipeft.load(CASE.model(), tmp_path / "a").state == "plugged"
    assert names(tmp_path / "b", "below") == ["a"]
    refused(tmp_path / "b", "was trained on top of attachment 'a'")


def test_content_counts_and_not_the_name(tmp_path):
    model = stacked("a", "b")
    a, b = saved(tmp_path, model)
    fresh = CASE.model()
    minipeft.load(fresh, a, name="other")
    stacked_again = minipeft.load(fresh, b)
    stacked_again.save(tmp_path / "again")
    assert read_tensors(tmp_path / "again")[1] == read_tensors(b)[1], "a file that is loaded and saved says the same"

    impostor = CASE.model()
    minipeft.attach(impostor, minipeft.LoRA(2), RNG(9), "a")
    refused(b, "'a', which is not plugged here with the same tensors", impostor)
    off = CASE.model()
    minipeft.load(off, a).unplug()
    refused(b, "'a', which is not plugged here with the same tensors", off)


def test_alpha_is_part_of_the_content(tmp_path):
    model = stacked("a", "b")
    a, b = saved(tmp_path, model)
    tensors, metadata = read_tensors(a)
    method = {**json.loads(metadata["method"]), "alpha": 5}
    write_signed(tmp_path / "stronger", tensors, {**metadata, "method": json.dumps(method)})
    fresh = CASE.model()
    minipeft.load(fresh, tmp_path / "stronger")
    refused(b, "'a', which is not plugged here", fresh)


def test_what_lay_below_is_what_it_was_then_and_not_what_became_of_it(tmp_path):
    model = stacked("a", "b")
    a, b = model.attachments.values()
    a.save(tmp_path / "a before")
    b.unplug()
    train(model, a)
    saved(tmp_path, model)
    fresh = CASE.model()
    minipeft.load(fresh, tmp_path / "a")
    refused(tmp_path / "b", "'a', which is not plugged here with the same tensors", fresh)
    fresh.attachments["a"].remove()
    minipeft.load(fresh, tmp_path / "a before", name="a")
    assert minipeft.load(fresh, tmp_path / "b").state == "plugged"


def test_numbers_that_are_written_by_hand_into_what_lies_below_are_seen(tmp_path):
    model = stacked("a", "b")
    a, b = model.attachments.values()
    a.save(tmp_path / "before")
    for p in a.parameters.values():
        p.data[0, 0] += 1
    saved(tmp_path, model)
    fresh = CASE.model()
    minipeft.load(fresh, tmp_path / "a")
    refused(tmp_path / "b", "'a', which is not plugged here with the same tensors", fresh)
    train(model, b)
    b.save(tmp_path / "b")
    assert minipeft.load(fresh, tmp_path / "b").state == "plugged"


def test_what_lies_above_or_is_off_is_not_recorded(tmp_path):
    model = CASE.model()
    a, b, c = (minipeft.attach(model, minipeft.LoRA(1), RNG(i), n) for i, n in enumerate("abc"))
    b.unplug()
    train(model, a)
    train(model, c)
    saved(tmp_path, model)
    assert [names(tmp_path / n, "below") for n in "abc"] == [[], [], ["a"]]


def test_a_prompt_depends_on_a_lora_that_shares_no_place_with_it(tmp_path):
    model = CASE.model()
    minipeft.attach(model, minipeft.LoRA(1), RNG(0), "lower")
    prompt = minipeft.attach(model, minipeft.PromptTuning(2), RNG(1), "prompt")
    train(model, prompt)
    saved(tmp_path, model)
    assert names(tmp_path / "prompt", "below") == ["lower"]
    refused(tmp_path / "prompt", "was trained on top of attachment 'lower'")


def test_the_order_of_what_lies_below_counts(tmp_path):
    model = stacked("a", "b", "c")
    a, b, c = saved(tmp_path, model)
    assert names(c, "below") == ["a", "b"]
    fresh = CASE.model()
    first = minipeft.load(fresh, a)
    minipeft.load(fresh, b)
    first.unplug()
    first._above = frozenset()  # so that it goes on top
    first.plug()
    refused(c, "attachment 'b', which is plugged in another order here", fresh)


def test_rows_that_choose_what_they_see_record_what_they_saw(tmp_path):
    model = CASE.model()
    a, b = (minipeft.attach(model, minipeft.LoRA(1), RNG(i), n) for i, n in enumerate("ab"))
    a.unplug()
    b.unplug()
    train(model, b, adapter=("a", "b"))
    b.save(tmp_path / "above")
    train(model, b, adapter="b")
    b.save(tmp_path / "alone")
    assert (names(tmp_path / "above", "below"), names(tmp_path / "alone", "below")) == (["a"], [])


def test_a_loop_over_parts_of_a_model_counts_too(tmp_path):
    """Not the model's own forward, but its encoder, called by hand."""
    model = CASE.model()
    minipeft.attach(model, minipeft.LoRA(1), RNG(0), "a")
    b = minipeft.attach(model, minipeft.LoRA(1, where="encoder"), RNG(1), "b")
    x = model.embed(numpy.array([[3, 4, 5]]))
    minipeft.value_and_grad(lambda: (model.encoder(x)[0] ** 2).sum(), b.parameters)
    b.save(tmp_path / "b")
    assert names(tmp_path / "b", "below") == ["a"]


def test_a_copy_goes_on_with_its_own_record(tmp_path):
    model = stacked("a", "b")
    twin = model.clone()
    twin.attachments["a"].unplug()
    train(twin, twin.attachments["b"])
    for which, folder in ((model, "m"), (twin, "t")):
        which.attachments["b"].save(tmp_path / folder)
    assert (names(tmp_path / "m", "below"), names(tmp_path / "t", "below")) == (["a"], [])


# ---- together


def test_adapters_that_were_trained_together_load_in_one_call_in_any_order_and_none_alone(tmp_path):
    model = stacked("a", "b", joint=True)
    output = logits(model, CASE.batch())
    a, b = saved(tmp_path, model)
    assert [names(a, k) for k in ("below", "together")] == [[], ["b"]]
    assert [names(b, k) for k in ("below", "together")] == [["a"], ["a"]]
    refused(a, "a: was trained together with attachment 'b', .*load both in one call")
    refused(b, "b: was trained on top of attachment 'a'")
    for files in ([a, b], (b, a)):
        fresh = CASE.model()
        loaded = minipeft.load(fresh, files)
        assert [x.name for x in loaded] == [f.name for f in files] and fresh.plugged == ("a", "b")
        assert same_values(logits(fresh, CASE.batch()), output)
    fresh = CASE.model()
    minipeft.load(fresh, [a, b], name=["p", "q"])
    assert fresh.plugged == ("p", "q")
    fresh.attachments["q"].remove()
    assert minipeft.load(fresh, b).state == "plugged", "its partner is here"


def test_two_that_see_different_rows_are_not_trained_together(tmp_path):
    model = CASE.model()
    a, b = (minipeft.attach(model, minipeft.LoRA(1), RNG(i), n) for i, n in enumerate("ab"))
    train(model, a, b, adapter=["a", "b", "a", None])
    saved(tmp_path, model)
    assert [names(tmp_path / n, k) for n in "ab" for k in ("below", "together")] == [[], [], [], []]


def test_of_a_partner_the_numbers_count_that_it_had_when_the_common_steps_were_over(tmp_path):
    model = stacked("a", "b", joint=True)
    a, b = model.attachments.values()
    a.save(tmp_path / "partner")
    train(model, a)           # alone, while b lies above it and is not trained
    saved(tmp_path, model)
    partner = json.loads(read_tensors(tmp_path / "b")[1]["together"])[0]["content"]
    fresh = CASE.model()
    loaded = minipeft.load(fresh, tmp_path / "partner", force=True)
    assert loaded.layer.content == partner and minipeft.load(fresh, tmp_path / "b").state == "plugged"
    assert minipeft.load(CASE.model(), tmp_path / "a").state == "plugged", "its last steps were alone"
    refused([tmp_path / "a", tmp_path / "b"], "was trained on top of attachment 'a'")


def test_a_partner_that_is_removed_is_remembered(tmp_path):
    model = stacked("a", "b", joint=True)
    a, b = model.attachments.values()
    a.save(tmp_path / "a")
    content = a.layer.content
    b.unplug()
    a.remove()
    b.save(tmp_path / "b")
    assert json.loads(read_tensors(tmp_path / "b")[1]["below"]) == [{"name": "a", "content": content}]
    assert len(minipeft.load(CASE.model(), [tmp_path / "a", tmp_path / "b"])) == 2


def test_of_several_files_all_are_attached_or_none(tmp_path):
    model = stacked("a", "b")
    a, b = saved(tmp_path, model)
    refused([a, tmp_path / "b", a], "two of the files are called 'a'")
    refused([a, b], "already on this model", stacked("b"))
    refused([], "0 files")
    refused([a, b], "2 files and 1 names", name=["x"])
    (tmp_path / "half").write_bytes(b.read_bytes()[:-5])
    refused([a, tmp_path / "half"], "half")


# ---- the base


@pytest.mark.parametrize("change", [
    dict(scale_decoder_outputs=False), dict(feed_forward_proj="gelu"), dict(layer_norm_epsilon=1e-3),
    dict(relative_attention_max_distance=21), dict(num_heads=5, d_kv=3)])
def test_a_t5_that_computes_something_else_on_the_same_tensors_is_another_base(tmp_path, change):
    config = minipeft.T5Config(13, 12, 3, 5, 17, 1, 2, 8, 20)
    model = minipeft.T5(config, RNG(0))
    minipeft.attach(model, minipeft.LoRA(1), RNG(1)).save(tmp_path / "a")
    other = minipeft.T5(minipeft.T5Config(**{**config.to_dict(), **change, "tie_word_embeddings": True}), None)
    if "num_heads" not in change:
        other.load_state(model.state())
        refused(tmp_path / "a", "made for another base model, of other tensors or another configuration", other)
    same = minipeft.T5(minipeft.T5Config(**{**config.to_dict(), "dropout_rate": 0.5, "initializer_factor": 2.0,
                                            "eos_token_id": 3, "pad_token_id": 2}), None)
    same.load_state(model.state())
    assert minipeft.load(same, tmp_path / "a").state == "plugged"


@pytest.mark.parametrize("change", [dict(num_heads=6), dict(pre_norm=True), dict(activation="gelu"),
                                    dict(layer_norm_eps=0.1)])
def test_a_transformer_that_computes_something_else_on_the_same_tensors_is_another_base(tmp_path, change):
    config = minipeft.TransformerConfig(13, 12, 3, 17, 1, 1)
    model = minipeft.Transformer(config, RNG(0))
    minipeft.attach(model, minipeft.LoRA(1), RNG(1)).save(tmp_path / "a")
    for fields, fits in ((change, False), (dict(label_smoothing=0.1, max_length=99, dropout_rate=0.0), True)):
        other = minipeft.Transformer(minipeft.TransformerConfig(**{**config.to_dict(), **fields}), None)
        other.load_state(model.state())
        if fits:
            assert minipeft.load(other, tmp_path / "a").state == "plugged"
        else:
            refused(tmp_path / "a", "made for another base model", other)


def test_two_words_for_one_activation_are_one_base(tmp_path):
    config = minipeft.T5Config(13, 12, 3, 5, 17, 1, 1, 8, 20, feed_forward_proj="gated-gelu")
    model = minipeft.T5(config, RNG(0))
    minipeft.attach(model, minipeft.LoRA(1), RNG(1)).save(tmp_path / "a")
    other = minipeft.T5(minipeft.T5Config(**{**config.to_dict(), "feed_forward_proj": "gated-gelu_new"}), None)
    other.load_state(model.state())
    assert minipeft.load(other, tmp_path / "a").state == "plugged"


def test_the_base_is_the_one_it_was_trained_on_and_not_the_one_it_was_saved_with(tmp_path):
    model, other = CASE.model(), Case(CASE.place, 2, 3, "float32", 7).model()
    old = {name: array.copy() for name, array in model.state().items()}
    a = minipeft.attach(model, minipeft.LoRA(2), RNG(0), "a")
    train(model, a)
    model.load_state(other.state())
    a.save(tmp_path / "a")
    refused(tmp_path / "a", "made for another base", other)
    assert minipeft.load(CASE.model(), tmp_path / "a").state == "plugged"
    train(model, a)
    a.save(tmp_path / "a")
    refused(tmp_path / "a", "made for another base")
    assert minipeft.load(other, tmp_path / "a").state == "plugged"
    model.load_state(old)
    a.remove()
    minipeft.attach(model, minipeft.LoRA(2), RNG(0), "new").save(tmp_path / "new")
    assert minipeft.load(CASE.model(), tmp_path / "new").state == "plugged", "never trained: the base that is there"


@pytest.mark.parametrize("later", ["saved at once", "the base is trained on", "the base is replaced"])
def test_a_base_that_is_trained_in_the_same_steps_counts_as_it_is_when_they_are_over(tmp_path, later):
    model = CASE.model()
    a = minipeft.attach(model, minipeft.LoRA(2), RNG(0), "a")
    where = minipeft.select(model, r"^encoder\.norm")
    both = {**a.parameters, **where}
    optimizer = minipeft.AdamW(1e-2)
    for params in (both, both, where) if later == "the base is trained on" else (both, both):
        if params is where:
            wanted = {name: array.copy() for name, array in model.state().items()}
        _, grads = minipeft.value_and_grad(lambda: model.loss(**CASE.batch()), params)
        optimizer.step(params, grads)
    if later != "the base is trained on":
        wanted = {name: array.copy() for name, array in model.state().items()}
    if later == "the base is replaced":
        model.load_state(CASE.model().state())
    a.save(tmp_path / "a")
    fits = CASE.model()
    refused(tmp_path / "a", "made for another base", fits)
    fits.load_state(wanted)
    assert minipeft.load(fits, tmp_path / "a").state == "plugged"


def test_a_base_that_is_written_by_hand_before_more_training_is_seen(tmp_path):
    model = CASE.model()
    a = minipeft.attach(model, minipeft.LoRA(2), RNG(0), "a")
    train(model, a)
    for p in model.base_parameters.values():
        p.data *= numpy.float32(1.5)
    a.save(tmp_path / "before")
    assert minipeft.load(CASE.model(), tmp_path / "before").state == "plugged"
    train(model, a)
    a.save(tmp_path / "after")
    refused(tmp_path / "after", "made for another base")


# ---- the file itself


def test_texts_that_were_altered_and_not_signed_are_refused(tmp_path):
    saved(tmp_path, stacked("a"))
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(whole.replace(b'\\"alpha\\": 16', b'\\"alpha\\": 61'))
    assert (tmp_path / "a").read_bytes() != whole
    refused(tmp_path / "a", "its metadata was changed after it was written: the signature does not match")


def test_a_flipped_bit_of_a_number_is_seen(tmp_path):
    saved(tmp_path, stacked("a"))
    whole = bytearray((tmp_path / "a").read_bytes())
    whole[-3] ^= 1
    (tmp_path / "a").write_bytes(whole)
    refused(tmp_path / "a", "a: .*damaged")


def test_files_use_the_names_of_the_field(tmp_path):
    model = CASE.model()
    minipeft.attach(model, minipeft.Selective(type="norm weight"), RNG(0), "norms").save(tmp_path / "norms")
    said = json.loads(read_tensors(tmp_path / "norms")[1]["method"])
    assert said["type"] == ["norm weight"]
    assert minipeft.load(CASE.model(), tmp_path / "norms").method.type == ("norm weight",)


@pytest.mark.parametrize("name", ["lora", "bottleneck", "norms", "mask", "prompt"])
def test_a_file_of_version_1_gives_what_it_gave_and_says_that_it_is_one(tmp_path, name):
    golden, model = numpy.load(f"{V1}/golden.npz"), CASE.model()
    with pytest.warns(UserWarning, match="is an adapter file of version 1, which names the attachments that were plug"):
        attachment = minipeft.load(model, f"{V1}/{name}.safetensors")
    found = logits(model, CASE.batch())
    assert abs(found - golden[name]).max() <= 2 ** -20 * abs(golden[name]).max()
    attachment.save(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minipeft.load(again := CASE.model(), tmp_path / "again")
    assert same_values(logits(again, CASE.batch()), found)


def test_a_file_of_version_1_is_read_with_its_own_meaning():
    """What was plugged when it was saved has to be plugged under that name; the base is its tensors."""
    model = CASE.model()
    refused(f"{V1}/above.safetensors", "was trained on top of attachment 'lora'", model)
    with pytest.warns(UserWarning, match="version 1"):
        minipeft.load(model, f"{V1}/lora.safetensors")
        minipeft.load(model, f"{V1}/above.safetensors").save
    golden = numpy.load(f"{V1}/golden.npz")["above"]
    assert abs(logits(model, CASE.batch()) - golden).max() <= 2 ** -20 * abs(golden).max()
    other = CASE.model()
    with pytest.warns(UserWarning, match="version 1"):
        minipeft.load(other, f"{V1}/lora.safetensors", name="renamed")
    refused(f"{V1}/above.safetensors", "was trained on top of attachment 'lora'", other)


# ---- what a review found


def test_two_forwards_in_one_step_are_recorded_together(tmp_path):
    """In whichever order they are called: b was trained above a."""
    for i, adapters in enumerate(((("a", "b"), "b"), ("b", ("a", "b")))):
        model = CASE.model()
        b = [minipeft.attach(model, minipeft.LoRA(1), RNG(j), n) for j, n in enumerate("ab")][1]
        minipeft.value_and_grad(lambda: model.loss(**CASE.batch(), adapter=adapters[0])
                                + model.loss(**CASE.batch(), adapter=adapters[1]), b.parameters)
        b.save(tmp_path / str(i))
        assert names(tmp_path / str(i), "below") == ["a"]


def test_gradients_that_are_for_no_update_are_no_training(tmp_path):
    model = CASE.model()
    minipeft.attach(model, minipeft.LoRA(1), RNG(0), "a")
    b = minipeft.attach(model, minipeft.LoRA(1), RNG(1), "b")
    minipeft.fisher(lambda: model.loss(**CASE.batch()), b.parameters)
    minipeft.xray(lambda: model.loss(**CASE.batch()), b.parameters)
    assert b.trained_on is None
    b.save(tmp_path / "b")
    assert names(tmp_path / "b", "below") == []


@pytest.mark.parametrize("how", ["trained", "put back by name"])
def test_a_base_that_is_trained_or_put_back_while_nothing_is_attached_is_another_one(tmp_path, how):
    model = CASE.model()
    minipeft.attach(model, minipeft.LoRA(1), RNG(0), "a").save(tmp_path / "a")
    model.attachments["a"].remove()
    params = minipeft.select(model, "^embedding")
    for p in params.values():  # only where the probe of the base does not look
        change = numpy.zeros_like(p.data)
        change[4, 5] = 1
    if how == "trained":
        minipeft.value_and_grad(lambda: model.loss(**CASE.batch()), params)
        for p in params.values():
            p.data += change
    else:
        other = {name: minipeft.Parameter(p.data + change) for name, p in params.items()}
        best.keep(tmp_path / "best", None, other)
        minipeft.restore(params, tmp_path / "best")
    refused(tmp_path / "a", "made for another base model", model)


def test_a_file_without_its_digest_is_refused(tmp_path):
    saved(tmp_path, stacked("a"))
    raw = (tmp_path / "a").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + n])
    del header["__metadata__"]["tensors_sha256"]
    text = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n:])
    refused(tmp_path / "a", "damaged: tensors_sha256, the digest of its tensors, is missing")


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    model = stacked("a")
    saved(tmp_path, model)
    before = (tmp_path / "a").read_bytes()
    next(iter(model.attachments["a"].parameters.values())).data[0, 0] = numpy.nan
    with pytest.raises(ValueError, match="holds NaN or infinity: .*a is not written"):
        model.attachments["a"].save(tmp_path / "a")
    model.attachments["a"].merge()
    for merged in (True, False):
        if merged:
            with pytest.raises(ValueError, match="holds NaN or infinity"):
                model.save_pretrained(tmp_path / "m", merged=merged)
            assert not (tmp_path / "m").exists()
    assert (tmp_path / "a").read_bytes() == before


def test_the_best_weights_of_another_alpha_or_another_base_are_not_put_into_an_adapter(tmp_path):
    a = stacked("a").attachments["a"]
    a.save(tmp_path / "a")
    minipeft.restore(a, tmp_path / "a")
    stronger = minipeft.attach(CASE.model(), minipeft.LoRA(2, 400), RNG(0))
    elsewhere = minipeft.attach(Case(CASE.place, 2, 3, "float32", 7).model(), minipeft.LoRA(2), RNG(0))
    for attachment, words in ((stronger, "its method is"), (elsewhere, "it was trained on another base")):
        before = bits(attachment.parameters)
        with pytest.raises(ValueError, match=f"does not fit: {words}"):
            minipeft.restore(attachment, tmp_path / "a")
        assert bits(attachment.parameters) == before


def test_files_of_a_float64_stack_fit_the_float32_model(tmp_path):
    narrow = CASE.model()
    wide = minipeft.T5(narrow.config, None, "float64")
    wide.load_state(narrow.state())
    for i, name in enumerate("ab"):
        train(wide, minipeft.attach(wide, minipeft.LoRA(2), RNG(i), name))
    assert len(minipeft.load(narrow, saved(tmp_path, wide))) == 2
