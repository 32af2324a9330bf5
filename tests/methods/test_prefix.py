"""Prefix tuning: keys and values in front of those of every attention, of which T5's bias knows where they stand."""
from __future__ import annotations

import pickle
from typing import Any

import numpy
import pytest

import minipeft
from minipeft import PrefixTuning, attach
from minipeft.backend import to_host
from minipeft.laws.bounds import close
from minipeft.laws.models import FAMILIES, bits, logits, moved
from minipeft.methods.prefix import earlier_bias, shifted_bias, without_mlp
from minipeft.nn.positions import RelativeBuckets, bucket
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Piece
from tests.by_hand import put, replug
from tests.models_under_test import Case

RNG, U = numpy.random.default_rng, 2 ** -53
T5S = ("t5 v1.0", "t5 v1.1")
BIASES = ("none", "earlier", "adapterhub")
BATCH = Case(("t5 v1.0", "q and v"), 1, 1, "float64", 0).batch()


def model_of(family: str = "t5 v1.0") -> Any:
    """A model of the family, in float64, in which attention decides, with tables of relative positions as large as the
    scores."""
    model = Case((family, "q and v"), 1, 1, "float64", 0).model()
    for name, p in model.base_parameters.items():
        p.data = p.data * (6 if name.endswith(".o.weight") else 1)
    for stack in (model.encoder, model.decoder):
        if isinstance(stack.position, RelativeBuckets):
            stack.position.weight.base.data = 2 * RNG(1).standard_normal(stack.position.weight.shape)
    return model


def prefixed(method: PrefixTuning, family: str = "t5 v1.0", name: str = "a", on: Any = None) -> Any:
    """A model with the method attached, as after training."""
    model = model_of(family) if on is None else on
    moved(attach(model, method, RNG(2), name), RNG([3, len(model.attachments)]), 0.5)
    return model


def keys_and_values(model: Any, sites: list[str], run: Any) -> dict[str, tuple]:
    """{site: the k and v [batch, key, heads * d_k] that pass there in run()}."""
    seen: dict[str, tuple] = {}

    def probe(name: str) -> Any:
        def piece(k: Any, v: Any, bias: Any) -> tuple:
            seen[name] = k.data, v.data
            return k, v, bias
        return piece

    for name in sites:
        put(model.sites[name], {"probe": probe(name)})
    run()
    for name in sites:
        replug(model.sites[name])
    return seen


def from_tokens(model: Any, site: str, run: Any, at: slice, name: str = "a") -> Any:
    """A prefix of one kind whose K and V are the keys and values of real tokens, those `at` these columns in run()."""
    names = [name for name in model.sites if name.startswith(f"{site}.") and name.endswith(".attn.keys_values")]
    seen = keys_and_values(model, names, run)
    attachment = attach(model, PrefixTuning(at.stop - at.start, site, "earlier"), RNG(0), name)
    for where, (k, v) in seen.items():
        attachment.parameters[f"{where}@{name}.K"].data = k[0, at].copy()
        attachment.parameters[f"{where}@{name}.V"].data = v[0, at].copy()
    return attachment


# ---- the equation


@pytest.mark.parametrize("method", [PrefixTuning(3), PrefixTuning(2, mlp=4)], ids=["plain", "mlp"])
def test_a_prefix_computes_what_the_equation_of_the_paper_says(method):
    """In plain NumPy, per head, at the cross-attention of the first layer."""
    model, site = prefixed(method), "decoder.0.cross.keys_values"
    arrays = {name.rpartition(".")[2]: p.data for name, p in model.attachments["a"].parameters.items()
              if name.startswith((site, "cross@"))}
    if method.mlp:
        h = numpy.tanh(arrays["P"] @ arrays["W"].T + arrays["b"])
        arrays.update({leaf: h @ arrays[f"W_{leaf}"].T + arrays[f"b_{leaf}"] for leaf in "KV"})
    attention, rng = model.decoder.blocks[0].cross, RNG(5)
    x, source = rng.standard_normal((2, 7, 12)), rng.standard_normal((2, 6, 12))
    hidden = numpy.where(rng.random((2, 1, 1, 6)) < 0.3, -numpy.inf, 0.0)
    q, k, v = (y @ part.weight.base.data.T for y, part in zip((x, source, source), (attention.q, attention.k,
                                                                                    attention.v)))
    expected = numpy.empty((2, 7, 15))
    for row in range(2):
        for head in range(3):
            d = slice(5 * head, 5 * head + 5)
            scores = q[row][:, d] @ numpy.concatenate([arrays["K"], k[row]])[:, d].T
            scores[:, len(arrays["K"]):] += hidden[row, 0]
            p = numpy.exp(scores - scores.max(axis=1, keepdims=True))
            expected[row][:, d] = p / p.sum(axis=1, keepdims=True) @ numpy.concatenate([arrays["V"], v[row]])[:, d]
    found = attention(x, source, None, mask=hidden).data
    assert close(found, expected @ attention.o.weight.base.data.T, U)


@pytest.mark.parametrize("sites", ["encoder", ("decoder", "cross"), ("encoder", "decoder", "cross")], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_kind_of_attention_that_is_asked_for_gets_a_prefix_in_every_layer_of_its_stack(sites, family):
    model = model_of(family)
    attachment = attach(model, PrefixTuning(2, sites), RNG(0))
    n, m, inner = model.config.num_layers, model.config.num_decoder_layers, model.sites[
        "encoder.0.attn.keys_values"].width
    depth = {"encoder": n, "decoder": m, "cross": m}
    kinds = (sites,) if isinstance(sites, str) else sites
    assert len(attachment.places) == sum(depth[kind] for kind in kinds)
    assert sum(p.data.size for p in attachment.parameters.values()) == 2 * 2 * inner * len(attachment.places)


def test_where_replaces_the_choice_by_sites_and_is_what_a_file_keeps(tmp_path):
    model = model_of()
    attachment = attach(model, PrefixTuning(2, where=r"decoder\.1\.(attn|cross)"), RNG(0))
    assert list(attachment.places) == ["decoder.1.attn.keys_values", "decoder.1.cross.keys_values"]
    attachment.save(tmp_path / "a")
    other = model_of()
    assert list(minipeft.load(other, tmp_path / "a").places) == list(attachment.places)


@pytest.mark.parametrize("fields, message", [
    ({"length": 0}, "length is 0; expected an integer >= 1"), ({"length": True}, "length is True"),
    ({"bias": "later"}, "bias is 'later'; expected 'none', 'earlier' or 'adapterhub'"),
    ({"mlp": 0}, "mlp is 0; expected an integer >= 1, or None"),
    ({"slices": "shared"}, "slices is 'shared'; expected 'own', 'peft' or an integer >= 1"),
    ({"slices": 0}, "slices is 0; expected 'own', 'peft' or"), ({"slices": None}, "slices is None; expected 'own'"),
    ({"sites": ()}, r"sites is \(\); expected some of encoder, decoder, cross"),
    ({"sites": "head"}, r"sites is \('head',\); expected some of"), ({"sites": 3}, "sites is 3; expected some of"),
    ({"std": -1}, "std is -1; expected a finite number >= 0 without mlp, or None"),
    ({"std": float("nan")}, "std is nan"), ({"std": 0.1, "mlp": 3}, "std is 0.1; expected .* without mlp")])
def test_a_field_out_of_range_is_named(fields, message):
    with pytest.raises(ValueError, match=f"^PrefixTuning: {message}"):
        PrefixTuning(**{"length": 3, **fields})


def test_initial_values_are_small_without_the_network_and_those_of_two_linear_layers_with_it():
    model = Case(("t5 v1.0", "q and v"), 1, 1, "float32", 0).model()
    for std, method in ((0.02, PrefixTuning(200)), (0.5, PrefixTuning(200, std=0.5))):
        attachment = attach(model, method, RNG(0))
        for p in attachment.parameters.values():
            assert p.dtype == "float32" and abs(p.data.std() / std - 1) < 0.1 and abs(p.data.mean()) < 0.1 * std
        attachment.remove()
    arrays = attach(model, PrefixTuning(200, mlp=50), RNG(0)).parameters
    assert abs(arrays["cross@prefixtuning.P"].data.std() - 1) < 0.1
    for name, p in arrays.items():
        leaf = name.rpartition(".")[2]
        if leaf.startswith("b"):
            assert not p.data.any()
        elif leaf != "P":
            bound = p.shape[1] ** -0.5
            assert 0.9 * bound < abs(p.data).max() <= bound


def test_a_spread_that_is_infinite_in_the_dtype_of_the_model_is_refused():
    model = Case(("t5 v1.0", "q and v"), 1, 1, "float32", 0).model()
    with pytest.raises(ValueError, match=r"PrefixTuning: std is 1e\+39; expected a finite number in float32"):
        attach(model, PrefixTuning(2, std=1e39), RNG(0))
    assert not model.attachments


# ---- where the prefix stands


@pytest.mark.parametrize("family", T5S)
def test_a_decoder_prefix_made_of_real_tokens_gives_what_these_tokens_give(family):
    """In logits, and in the ids that are generated with a cache and without."""
    model, ids = model_of(family), BATCH["input_ids"][:1]
    first, rest = numpy.array([[0, 5, 9]]), numpy.array([[7, 2, 11, 3]])
    whole = numpy.concatenate([first, rest], axis=1)
    wanted = model(ids, whole).data[:, 3:]
    attachment = from_tokens(model, "decoder", lambda: model(ids, whole), slice(0, 3))
    assert close(model(ids, rest).data, wanted, U)
    attachment.unplug()
    assert not close(model(ids, rest).data, wanted, U)
    attachment.plug()
    generated, line = model.generate(ids, max_new_tokens=5), [0]
    assert generated.any()
    attachment.unplug()
    while len(line) < generated.shape[1]:  # the base, on the tokens, then the start token, then what it gave
        line.append(int(model(ids, numpy.concatenate([first, [line]], axis=1)).data[0, -1].argmax()))
    assert generated[0].tolist() == line
    attachment.plug()
    assert model.generate(ids, max_new_tokens=5, use_cache=False).tolist() == generated.tolist()


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("family", T5S)
def test_an_encoder_prefix_made_of_real_tokens_gives_what_these_tokens_give(family, padding):
    """Also in a row that is padded on the left: the prefix is next to the text, and takes its distances from there."""
    model = model_of(family)
    first, rest = numpy.array([[4, 5]]), numpy.array([[7, 2, 11, 3, 6]])
    whole = numpy.concatenate([first, rest], axis=1)
    wanted = model.encode(whole).data[:, 2:]
    from_tokens(model, "encoder", lambda: model.encode(whole), slice(0, 2))
    ids, mask = (numpy.pad(x, ((0, 0), (padding, 0))) for x in (rest, numpy.ones_like(rest)))
    assert close(model.encode(ids, mask).data[:, padding:], wanted, U)


def test_of_two_prefixes_of_tokens_the_one_that_is_plugged_later_stands_in_front_of_the_other():
    model, ids = model_of(), BATCH["input_ids"][:1]
    whole, rest = numpy.array([[0, 5, 9, 4, 7, 2, 11, 3]]), numpy.array([[7, 2, 11, 3]])
    wanted = model(ids, whole).data[:, 4:]
    later = from_tokens(model, "decoder", lambda: model(ids, whole), slice(1, 4), "later")
    later.unplug()
    from_tokens(model, "decoder", lambda: model(ids, whole), slice(0, 1), "first").unplug()
    assert close(model(ids, rest, adapter=("later", "first")).data, wanted, U)
    assert not close(model(ids, rest, adapter=("first", "later")).data, wanted, U)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sites", ["cross", ("encoder", "decoder")], ids=str)
def test_where_there_are_no_relative_positions_all_biases_are_nought(family, sites):
    found = [logits(prefixed(PrefixTuning(3, sites, bias), family), BATCH).tobytes() for bias in BIASES]
    assert len(set(found)) == (1 if sites == "cross" or family not in T5S else 3)


def test_the_bias_of_the_prefix_is_that_of_the_distance_to_each_token_in_a_cache_too():
    """By hand, from the table: query i is at p + i, behind padding it counts from the first token."""
    model = model_of()
    position, table = model.decoder.position, model.decoder.position.weight.base.data
    for queries, keys, padding in ((5, 5, 0), (1, 4, 0), (5, 5, 2), (2, 5, 1)):
        bias = numpy.zeros((2, 1, queries, keys))
        bias[1, :, :, :padding] = -numpy.inf
        found = earlier_bias(position, 3, bias).data
        assert found.shape == (2 if padding else 1, 3, queries, 3)
        for row, first in enumerate([0, padding][:len(found)]):
            for i in range(queries):
                at = 3 + max(keys - queries + i - first, 0)
                distance = numpy.arange(3) - at
                ids = bucket(distance, len(table), position.max_distance, position.bidirectional)
                assert numpy.array_equal(found[row, :, i], table[ids].T)


def test_adapterhubs_bias_is_that_of_keys_in_one_line_with_the_prefix_and_of_queries_without_it():
    """By hand, from the table: key j is at j, and the query of the last key at its number among the keys of the row."""
    model, p = model_of(), 3
    for position in (model.encoder.position, model.decoder.position):
        table = position.weight.base.data
        for queries, keys in ((5, 5), (1, 4), (2, 5)):
            bias = RNG(0).standard_normal((2, 3, queries, keys))
            bias[1, :, :, 1] = -numpy.inf
            found, query = shifted_bias(position, p, bias).data, numpy.arange(keys - queries, keys)
            ids = bucket(numpy.arange(p + keys) - query[:, None], len(table), position.max_distance,
                         position.bidirectional)
            expected = numpy.broadcast_to(table[ids].transpose(2, 0, 1), (2, 3, queries, p + keys)).copy()
            expected[1, :, :, p + 1] = -numpy.inf
            assert numpy.array_equal(found, expected)


def test_with_adapterhubs_bias_a_cache_changes_nothing():
    model = prefixed(PrefixTuning(2, bias="adapterhub"))
    ids = BATCH["input_ids"][:1]
    generated = model.generate(ids, max_new_tokens=6)
    assert generated.any() and model.generate(ids, max_new_tokens=6, use_cache=False).tolist() == generated.tolist()


@pytest.mark.parametrize("bias", BIASES)
def test_a_changed_position_table_is_the_tables_of_the_prefix_too_for_all_rows_and_for_each(bias):
    """Selective on the tables: plugged, and in a batch where only some rows see it; its gradient passes the prefix."""
    model = prefixed(PrefixTuning(2, ("encoder", "decoder"), bias))
    table = attach(model, minipeft.Selective(component="position"), RNG(0), "table")
    moved(table, RNG(4), 1.0)
    routing = ["a", ("a", "table"), None, ("table", "a")]
    mixed = logits(model, BATCH, adapter=routing)
    for i, entry in enumerate(routing):
        row = {key: value[i:i + 1] for key, value in BATCH.items()}
        assert close(mixed[i:i + 1], logits(model, row, adapter=[entry]), U)
    changed = model_of()
    for stack, name in ((changed.encoder, "encoder"), (changed.decoder, "decoder")):
        stack.position.weight.base.data = to_host(model.slots[f"{name}.position.weight"].fold().dense().data)
    prefixed(PrefixTuning(2, ("encoder", "decoder"), bias), on=changed)
    assert close(logits(model, BATCH), logits(changed, BATCH), U)
    minipeft.check_gradients(lambda: model.loss(**BATCH, adapter=routing), {
        **table.parameters, **model.attachments["a"].parameters}, RNG(0), each=False)


# ---- copies and files


def test_a_copy_a_pickle_and_a_loaded_prefix_read_the_table_of_their_own_model(tmp_path):
    model = prefixed(PrefixTuning(2, bias="earlier"))
    model.attachments["a"].save(tmp_path / "a")
    fresh = model_of()
    minipeft.load(fresh, tmp_path / "a")
    before = logits(model, BATCH).tobytes()
    for copy in (model.clone(), pickle.loads(pickle.dumps(model)), fresh):
        assert logits(copy, BATCH).tobytes() == before
        positions = {id(copy.encoder.position), id(copy.decoder.position), id(None)}
        assert {id(piece.position) for piece in copy.attachments["a"].at.values()} == positions
        copy.load_state({n: 2 * a if "position" in n else a for n, a in copy.state().items()})
        assert copy.to("numpy") is copy and logits(copy, BATCH).tobytes() != before
        assert logits(model, BATCH).tobytes() == before


def test_a_piece_may_refer_to_places_of_its_model_and_an_array_in_a_place_of_its_own_is_found(monkeypatch):
    class Referring(Piece):
        def __call__(self, k: Any, v: Any, bias: Any) -> tuple:
            return k * self.K[0, 0], v, bias

    for hidden, refused in ((model_of().encoder, True), (Slot("bias", numpy.zeros(3)), True), (None, False)):
        model = model_of()
        monkeypatch.setattr(PrefixTuning, "make", lambda self, name, site, arrays: Referring(
            **arrays, held=hidden or [site, model.encoder]))
        if not refused:
            attach(model, PrefixTuning(2), RNG(0))
            continue
        with pytest.raises(ValueError, match=r"Referring\.held.* is a Parameter that arrays\(\) does not declare"):
            attach(model, PrefixTuning(2), RNG(0))


# ---- the network


def test_without_the_network_the_outputs_have_the_same_bits_and_the_file_holds_k_and_v_alone(tmp_path):
    model = prefixed(PrefixTuning(2, bias="earlier", mlp=4))
    network, lora = model.attachments["a"], attach(model, minipeft.LoRA(2), RNG(0), "above")
    minipeft.value_and_grad(lambda: model.loss(**BATCH), network.parameters)
    wanted = logits(model, BATCH).tobytes()
    plain = without_mlp(network)
    assert plain.state == "off" and plain.name == "a-plain" and logits(model, BATCH).tobytes() == wanted
    assert plain.method == PrefixTuning(2, bias="earlier") and list(plain.places) == list(network.places)
    assert {key.rpartition(".")[2] for key in plain.tensors} == {"K", "V"}
    assert plain.trained_on == network.trained_on.settled(model)
    network.unplug()
    plain.plug()
    assert logits(model, BATCH).tobytes() == wanted
    network.remove()
    plain.save(tmp_path / "plain")
    lora.unplug()
    fresh = model_of()
    minipeft.load(fresh, tmp_path / "plain")
    assert bits(fresh.attachments["a-plain"].tensors) == bits(plain.tensors)
    assert logits(fresh, BATCH).tobytes() == logits(model, BATCH).tobytes()


def test_what_has_no_network_is_refused_and_nothing_is_attached():
    model = prefixed(PrefixTuning(2, mlp=3))
    plain, lora = attach(model, PrefixTuning(2), RNG(0), "plain"), attach(model, minipeft.LoRA(2), RNG(0))
    network = model.attachments["a"]
    for wrong in (plain, lora):
        with pytest.raises(ValueError, match="has no network to drop; expected a prefix with mlp on a model"):
            without_mlp(wrong)
    with pytest.raises(ValueError, match="an attachment named 'plain' is already on this model"):
        without_mlp(network, "plain")
    network.remove()
    with pytest.raises(ValueError, match="removed.* has no network to drop"):
        without_mlp(network)
    assert list(model.attachments) == ["plain", "lora"]


def test_a_network_of_one_kind_is_one_and_those_of_the_three_kinds_are_three():
    model = model_of()
    attachment = attach(model, PrefixTuning(2, mlp=4), RNG(0))
    assert [name for name in attachment.parameters if name.endswith(".P")] == [
        "encoder@prefixtuning.P", "decoder@prefixtuning.P", "cross@prefixtuning.P"]
    pieces = {name: attachment.at[place] for name, place in attachment.places.items()}
    assert pieces["decoder.0.attn.keys_values"].P is pieces["decoder.1.attn.keys_values"].P
    assert pieces["decoder.0.attn.keys_values"].P is not pieces["decoder.0.cross.keys_values"].P


# ---- slices of PEFT's


def t5(layers: int, decoder_layers: int) -> Any:
    return minipeft.T5(minipeft.T5Config(23, d_model=12, d_kv=5, num_heads=3, d_ff=7, num_layers=layers,
                                         num_decoder_layers=decoder_layers), RNG(0), "float64")


@pytest.mark.parametrize("layers, depth, slices, pairs", [
    (2, 2, "peft", [0, 0]), (4, 4, "peft", [0, 4, 0, 4]), (3, 3, "peft", [0, 4, 2]), (4, 3, "peft", [0, 4, 0]),
    (6, 6, "peft", [0, 4, 8, 0, 4, 8]), (2, 4, 4, [0, 4, 0, 4]), (4, 4, 8, [0, 4, 8, 12]), (1, 1, "peft", [0])])
@pytest.mark.parametrize("mlp", [None, 3])
def test_with_slices_the_layers_of_a_decoder_share_their_arrays_as_in_peft(layers, depth, slices, pairs, mlp):
    model = t5(layers, depth)
    attachment = attach(model, PrefixTuning(2, "decoder", slices=slices, mlp=mlp), RNG(0), "a")
    leaves = ("K", "V") if mlp is None else ("W_K", "b_K", "W_V", "b_V")
    first = [f"decoder@a.{leaf}" for leaf in ("P", "W", "b") if mlp]
    assert sorted(attachment.parameters) == sorted(first + [
        f"decoder.slices_{at}_{at + 1}@a.{leaf}" for at in set(pairs) for leaf in leaves])
    pieces = list(attachment.at.values())
    assert [[getattr(a, leaf) is getattr(b, leaf) for b in pieces] for a in pieces for leaf in leaves] == [
        [one == other for other in pairs] for one in pairs for _ in leaves]


def test_slices_are_in_a_file_where_they_are_not_each_layers_own_and_a_loaded_prefix_shares_them_again(tmp_path):
    model = t5(2, 2)
    for name, slices in (("own", "own"), ("peft", "peft")):
        attachment = moved(attach(model, PrefixTuning(2, "decoder", slices=slices), RNG(0), name), RNG(1))
        assert attachment.method.fields().get("slices", "own") == slices
        assert ("slices" in attachment.method.fields()) == (slices == "peft")
        attachment.save(tmp_path / name)
        again = minipeft.load(t5(2, 2), tmp_path / name)
        assert list(again.parameters) == list(attachment.parameters) and bits(again.tensors) == bits(attachment.tensors)
        assert again.method.slices == slices and len(again.parameters) == {"own": 4, "peft": 2}[slices]
        attachment.remove()


@pytest.mark.parametrize("method, message", [
    (PrefixTuning(2, slices="peft"), "slices is 'peft'; expected 'own' for encoder.0.attn.keys_values: PEFT has slices "
                                     "for the self-attention of L = 2 layers of a decoder alone"),
    (PrefixTuning(2, "cross", slices="peft"), "expected 'own' for decoder.0.cross.keys_values"),
    (PrefixTuning(2, "decoder", where="keys_values", slices=3), "slices is 3; expected 'own' for encoder.0.attn"),
    (PrefixTuning(2, "decoder", slices="peft"), "expected 'own' for decoder.2.attn.keys_values: .* L = 2 layers"),
    (PrefixTuning(2, "decoder", slices=1), "slices is 1; expected 'own' for decoder.1.attn.keys_values: .* L = 1")],
    ids=repr)
def test_slices_are_refused_at_a_place_where_peft_has_none(method, message):
    model = t5(2, 3)
    with pytest.raises(ValueError, match=message):
        attach(model, method, RNG(0))
    assert not model.attachments


def test_without_its_network_a_prefix_with_slices_shares_them_still():
    model = t5(4, 4)
    network = moved(attach(model, PrefixTuning(2, "decoder", mlp=3, slices="peft"), RNG(0), "a"), RNG(1))
    before = logits(model, BATCH)
    plain = without_mlp(network)
    assert list(plain.parameters) == [f"decoder.slices_{at}@a-plain.{leaf}" for at in ("0_1", "4_5") for leaf in "KV"]
    network.unplug()
    plain.plug()
    assert logits(model, BATCH).tobytes() == before.tobytes()


# ---- rows of one batch


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_prefixes_of_different_length_and_none_generate_what_each_generates_alone(family, use_cache):
    model = prefixed(PrefixTuning(3, bias="earlier"), family)
    prefixed(PrefixTuning(1, mlp=4), name="b", on=model)
    prefixed(PrefixTuning(2, "cross"), name="c", on=model)
    ids = RNG(6).integers(2, 13, (5, 6))
    mask = numpy.ones((5, 6), int)
    mask[1, :2], mask[4, 4:] = 0, 0
    routing = ["a", "b", None, ("c", "a"), "c"]
    together = model.generate(ids, mask, 5, routing, use_cache)
    assert len({row.tobytes() for row in together}) > 1
    for i, entry in enumerate(routing):
        alone = model.generate(ids[i:i + 1], mask[i:i + 1], 5, [entry], use_cache)[0]
        assert together[i, :len(alone)].tolist() == alone.tolist() and not together[i, len(alone):].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_without_any_token_is_itself_beside_rows_with_a_prefix(family):
    """Its queries see nothing, and average the values of its own keys, not those of the padding."""
    model = prefixed(PrefixTuning(3), family)
    ids, target, mask = BATCH["input_ids"][:3], BATCH["input_ids"][:3, :4], numpy.array([[0] * 6, [1] * 6, [0] * 6])
    routing = [None, "a", "a"]
    mixed = model(ids, target, mask, adapter=routing).data
    for i, entry in enumerate(routing):
        alone = model(ids[i:i + 1], target[i:i + 1], mask[i:i + 1], adapter=[entry]).data
        assert close(mixed[i:i + 1], alone, U)
