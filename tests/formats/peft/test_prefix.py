"""Prefix tuning in PEFT's files, whose layers may share their slices."""
from __future__ import annotations

import re

import numpy
import pytest

import minipeft
from minipeft import PrefixTuning, Transformer, TransformerConfig, attach
from minipeft.formats.peft import save, to_peft
from minipeft.laws.models import bits, logits, moved
from minipeft.methods.prefix import without_mlp
from tests.formats.golden import check
from tests.formats.peft.prompt_folders import KEY, RNG, batch, changed, fields, prefix_folder, stored, t5
from tests.methods.golden import FIXTURES

DECODER = r"decoder.{}.attn.keys_values"


def slices(rows: numpy.ndarray, d: int = 12) -> list[numpy.ndarray]:
    """The slices [P, d] of prompt_embeddings [P, 2 L d]."""
    return [rows[:, at:at + d] for at in range(0, rows.shape[1], d)]


def pairs(attachment: minipeft.Attachment) -> list[tuple]:
    """(K, V) of each layer of the decoder."""
    return [(piece.K.data, piece.V.data) for piece in attachment.at.values()]


@pytest.mark.parametrize("source, method", [
    ("prefix_tuning", PrefixTuning(3, "decoder", "earlier", slices="peft")),
    ("prefix_tuning_even", PrefixTuning(2, "decoder", "earlier", slices=4)),
    ("prefix_tuning_odd", PrefixTuning(2, "decoder", "earlier")),
    ("prefix_tuning_wide", PrefixTuning(2, "decoder", "earlier", slices="peft"))], ids=["tied", "even", "odd", "wide"])
def test_a_directory_of_peft_gives_its_logits_and_gradients_and_is_written_back_with_the_slices_that_it_never_reads(
        source, method, tmp_path):
    attachment = check(f"adapters/{source}", tmp_path, as_peft=True)
    said = fields(FIXTURES / "adapters" / source)
    assert attachment.method == method and {key: fields(tmp_path / "written")[key] for key in said} == said
    assert len(attachment.places) == attachment.model.config.num_decoder_layers


@pytest.mark.parametrize("source", ["prefix_tuning", "prefix_tuning_even", "prefix_tuning_wide"])
def test_D1_layers_that_share_slices_are_loaded_when_it_is_asked_for_and_never_otherwise(source):
    path = FIXTURES / "adapters" / source
    model = minipeft.T5.from_pretrained(FIXTURES / fields(path)["base_model_name_or_path"])
    layers = fields(path)["num_layers"]
    for load in (minipeft.load, minipeft.formats.peft.load):
        with pytest.raises(ValueError, match=re.escape(
                f"{path}: PEFT's prefix tuning is not that of the paper here: with num_layers {layers}, layers i and "
                f"i + {layers // 2} of the decoder read the same slices of prompt_embeddings as their keys and values, "
                f"and {layers} of the {2 * layers} slices are never used. Pass as_peft=True")):
            load(model, path)
        assert not model.attachments
        load(model, path, as_peft=True).remove()


@pytest.mark.parametrize("layers, depth, given, first", [
    (1, 1, None, [0]), (3, 3, None, [0, 4, 2]), (5, 5, None, [0, 4, 8, 2, 6]), (2, 1, None, [0]), (4, 2, None, [0, 4]),
    (3, 2, None, [0, 4]), (2, 2, 3, [0, 4]), (2, 2, 4, [0, 4]), (1, 2, 6, [0, 4]), (2, 3, 3, [0, 4, 2])])
def test_where_no_layers_share_a_slice_the_file_is_a_prefix_like_any_other_and_loads_as_it_is(
        layers, depth, given, first, tmp_path):
    """With an odd number of layers, or twice as many as the decoder has. Here and in PEFT layer i takes its keys from
    slice 4 i mod 2 L, its values from the next one. The others are kept."""
    path = prefix_folder(tmp_path / "a", given or layers, **{"num_layers": given} if given else {})
    attachment = minipeft.load(t5(layers, depth), path)
    cut = slices(stored(path))
    for (k, v), at in zip(pairs(attachment), first, strict=True):
        assert numpy.array_equal(k, cut[at]) and numpy.array_equal(v, cut[at + 1])
    assert len({id(p) for p in attachment.parameters.values()}) == 2 * depth
    save(attachment, tmp_path / "b")
    assert numpy.array_equal(stored(tmp_path / "b"), stored(path))
    assert fields(tmp_path / "b")["num_layers"] == (given or layers)
    again = minipeft.load(t5(layers, depth), tmp_path / "b", as_peft=True)
    assert again.method == attachment.method and bits(again.tensors) == bits(attachment.tensors)


@pytest.mark.parametrize("layers, depth, given, first", [
    (2, 2, None, [0, 0]), (4, 4, None, [0, 4, 0, 4]), (4, 3, None, [0, 4, 0]), (6, 5, None, [0, 4, 8, 0, 4]),
    (2, 4, 4, [0, 4, 0, 4]), (1, 2, 2, [0, 0])])
def test_layers_that_share_a_slice_have_one_array_and_the_sum_of_their_gradients(layers, depth, given, first, tmp_path):
    path = prefix_folder(tmp_path / "a", given or layers, **{"num_layers": given} if given else {})
    model, apart = t5(layers, depth), t5(layers, depth)
    attachment = minipeft.load(model, path, as_peft=True)
    cut = slices(stored(path))
    for (k, v), at in zip(pairs(attachment), first, strict=True):
        assert numpy.array_equal(k, cut[at]) and numpy.array_equal(v, cut[at + 1])
    assert list(attachment.parameters) == [f"decoder.slices_{at}_{at + 1}@a.{leaf}" for at in dict.fromkeys(first)
                                           for leaf in "KV"]
    own = attach(apart, PrefixTuning(2, "decoder", "earlier"), RNG(0), "own")
    for i, pair in enumerate(pairs(attachment)):
        for leaf, array in zip("KV", pair):
            own.parameters[f"{DECODER.format(i)}@own.{leaf}"].data = array.copy()
    assert logits(model, batch()).tobytes() == logits(apart, batch()).tobytes()
    whole, summed = (minipeft.value_and_grad(lambda: m.loss(**batch()), a.parameters)[1]
                     for m, a in ((model, attachment), (apart, own)))
    found = slices(to_peft(attachment, whole)[KEY])
    for at, g in enumerate(found):
        start, leaf = at - at % 2, "KV"[at % 2]
        expected = sum(summed[f"{DECODER.format(i)}@own.{leaf}"] for i in range(depth) if first[i] == start)
        assert numpy.allclose(g, expected, rtol=1e-12, atol=1e-15) and (start in first) == bool(g.any())


def test_the_network_of_a_projected_prefix_is_not_in_the_file_and_its_fields_are_kept(tmp_path):
    path = prefix_folder(tmp_path / "a", 3, prefix_projection=True, encoder_hidden_size=99, init_weights="zero")
    attachment = minipeft.load(t5(3, 3), path)
    assert numpy.array_equal(pairs(attachment)[0][0], slices(stored(path))[0])
    save(attachment, tmp_path / "b")
    written = fields(tmp_path / "b")
    assert (written["prefix_projection"], written["encoder_hidden_size"], written["init_weights"]) == (True, 99, "zero")


@pytest.mark.parametrize("sizes, values, message", [
    ((2, 3), {}, "PEFT cannot run this prefix on this model: num_layers is 2, by default that of the encoder; expected "
                 "at least 3, the layers of the decoder"),
    ((2, 2), {"num_layers": 1}, "num_layers is 1, by default .*; expected at least 2"),
    ((2, 2, 5), {}, "PEFT cannot run this prefix on this model: token_dim is 12 and num_attention_heads 3; expected 15 "
                    r"\(heads \* d_kv\) and 3"),
    ((2, 2), {"num_attention_heads": 4}, "token_dim is 12 and num_attention_heads 4; expected 12"),
    ((2, 2), {"token_dim": 24}, "token_dim is 24 and num_attention_heads 3; expected 12"),
    ((2, 2), {"num_layers": 3}, r"has shape \[2, 48\]; expected \[2, 72\]: a row for each of num_virtual_tokens \(2\)"
                                r", and 2 \* num_layers \(3\) slices of token_dim \(12\) numbers"),
    ((2, 2), {"num_layers": 10 ** 18}, r"has shape \[2, 48\]; expected \[2, 24000000000000000000\]"),
    ((2, 2), {"num_virtual_tokens": 3}, r"has shape \[2, 48\]; expected \[3, 48\]"),
    ((2, 2), {"num_layers": "2"}, "num_layers is '2'; expected an integer >= 1"),
    ((2, 2), {"num_transformer_submodules": 1}, "num_transformer_submodules is 1, which changes what PREFIX_TUNING"),
    ((2, 2), {"task_type": "CAUSAL_LM"}, "task_type is 'CAUSAL_LM'; expected 'SEQ_2_SEQ_LM'"),
    ((2, 2), {"prompt_tuning_init_state_dict_path": True}, "a field of PREFIX_TUNING that is not known"),
], ids=str)
def test_D13_what_peft_cannot_run_and_what_does_not_fit_is_refused_by_name(sizes, values, message, tmp_path):
    layers, depth, d_kv = (*sizes, 4)[:3]
    model = t5(layers, depth, d_kv=d_kv)
    path = prefix_folder(tmp_path / "a", layers, **values)
    with pytest.raises(ValueError, match=message):
        minipeft.load(model, path, as_peft=True)
    assert not model.attachments


def test_a_missing_task_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match="task_type is missing; expected it in a file of PREFIX_TUNING"):
        minipeft.load(t5(), changed("prefix_tuning", tmp_path / "a", ("task_type",)), as_peft=True)


# ---- written


@pytest.mark.parametrize("sizes, shared, layers", [
    ((2, 2), "peft", 2), ((2, 2), "own", 3), ((4, 4), "peft", 4), ((4, 4), "own", 5), ((3, 3), "own", 3),
    ((1, 1), "own", 1), ((2, 3), "own", 3), ((1, 4), "own", 5), ((2, 4), 4, 4), ((4, 2), "own", 4),
    ((3, 2), "peft", 3)])
def test_a_prefix_made_here_is_written_with_as_many_slices_as_it_needs_and_every_field_that_peft_has(
        sizes, shared, layers, tmp_path):
    model = t5(*sizes, d_kv=5)
    attachment = moved(attach(model, PrefixTuning(2, "decoder", "earlier", slices=shared), RNG(0), "mine"), RNG(1))
    save(attachment, tmp_path / "a")
    assert fields(tmp_path / "a") == {
        "peft_type": "PREFIX_TUNING", "task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 2, "num_layers": layers,
        "token_dim": 15, "num_attention_heads": 3, "num_transformer_submodules": 2, "prefix_projection": False,
        "encoder_hidden_size": 15, "init_weights": None, "modules_to_save": None, "inference_mode": True,
        "auto_mapping": None, "base_model_name_or_path": None, "revision": None, "peft_version": "0.21.2"}
    cut = slices(stored(tmp_path / "a"), 15)
    assert len(cut) == 2 * layers
    for i, (k, v) in enumerate(pairs(attachment)):
        at = 4 * i % (2 * layers)
        assert numpy.array_equal(cut[at], k) and numpy.array_equal(cut[at + 1], v)
    assert sum(s.any() for s in cut) == len(attachment.parameters), "the others are zeros"
    before = logits(model, batch())
    attachment.unplug()
    minipeft.load(model, tmp_path / "a", as_peft=True)
    assert logits(model, batch()).tobytes() == before.tobytes()


@pytest.mark.parametrize("method, message", [
    (PrefixTuning(2, bias="earlier"),
     "this prefix is at encoder.0.attn.keys_values; expected sites='decoder': PEFT has a prefix in the self-attention "
     "of every layer of the decoder, and nowhere else"),
    (PrefixTuning(2, ("decoder", "cross"), "earlier"), "this prefix is at decoder.0.cross.keys_values; expected"),
    (PrefixTuning(2, "decoder", "earlier", where=r"decoder\.0\.attn"), "this prefix leaves out some layers; expected"),
    (PrefixTuning(2, "decoder"), "bias is 'none'; expected 'earlier': PEFT's prefix stands in front of the tokens"),
    (PrefixTuning(2, "decoder", "earlier", mlp=4), "mlp is 4; expected None: .* save what .*without_mlp gives"),
    (PrefixTuning(2, "decoder", "earlier", mlp=4, slices="peft"), "mlp is 4; expected None")], ids=repr)
def test_what_peft_cannot_hold_is_refused_with_the_reason_and_nothing_is_written(method, message, tmp_path):
    attachment = attach(t5(), method, RNG(0), "a")
    for write in (lambda: save(attachment, tmp_path / "a"), lambda: to_peft(attachment, attachment.tensors)):
        with pytest.raises(ValueError, match=message):
            write()
    assert not list(tmp_path.iterdir())


def test_a_prefix_on_another_model_than_t5_is_not_written(tmp_path):
    config = TransformerConfig(23, d_model=12, num_heads=3, d_ff=7, num_layers=1, num_decoder_layers=1)
    attachment = attach(Transformer(config, RNG(0)), PrefixTuning(2, "decoder", "earlier"), RNG(0))
    with pytest.raises(ValueError, match="Transformer is no model of Hugging Face's"):
        save(attachment, tmp_path / "a")


@pytest.mark.parametrize("shared", ["own", "peft"])
def test_a_prefix_that_was_trained_through_a_network_is_written_without_it(shared, tmp_path):
    model = t5(4, 4)
    network = moved(attach(model, PrefixTuning(2, "decoder", "earlier", mlp=5, slices=shared), RNG(0), "net"), RNG(1))
    before = logits(model, batch())
    save(without_mlp(network), tmp_path / "a")
    fresh = t5(4, 4)
    loaded = minipeft.load(fresh, tmp_path / "a", as_peft=shared == "peft")
    assert logits(fresh, batch()).tobytes() == before.tobytes()
    assert len(loaded.parameters) == {"own": 8, "peft": 4}[shared]


def test_D15_a_loaded_prefix_is_trained_further_and_what_it_never_reads_is_written_back(tmp_path):
    path = prefix_folder(tmp_path / "a", 4)
    model = t5(4, 4)
    attachment = minipeft.load(model, path, as_peft=True)
    _, grads = minipeft.value_and_grad(lambda: model.loss(**batch()), attachment.parameters)
    minipeft.AdamW(1e-2).step(attachment.parameters, grads)
    attachment.save(tmp_path / "ours")  # in our own file, too
    save(attachment, tmp_path / "b")
    for at, (old, new) in enumerate(zip(slices(stored(path)), slices(stored(tmp_path / "b")), strict=True)):
        assert numpy.array_equal(old, new) == (at in (2, 3, 6, 7))
    for again in (tmp_path / "ours", tmp_path / "b"):
        fresh = t5(4, 4)
        loaded = minipeft.load(fresh, again, name="again", as_peft=True)
        assert bits(loaded.tensors) == bits(attachment.tensors)
        assert logits(fresh, batch()).tobytes() == logits(model, batch()).tobytes()
        with loaded.off():
            assert logits(fresh, batch()).tobytes() == logits(t5(4, 4), batch()).tobytes()
