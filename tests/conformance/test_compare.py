"""A port that is right agrees, one that is wrong is told where it first goes wrong; files are not trusted."""
import copy
import dataclasses
import functools
import json
import math
import re
import tempfile
from pathlib import Path

import numpy
import pytest

import minipeft
from minipeft.conformance.compare import compare, main
from minipeft.conformance.recording import convert
from minipeft.conformance.trace import trace
from minipeft.files import read_metadata, read_tensors, write_tensors
from minipeft.engine.ops import attention
from tests.models_under_test import FAMILIES, Case


def case(family, seed=3, dtype="float64"):
    return Case((family, "q and v"), 2, 3, dtype, seed)


@dataclasses.dataclass
class Pair:
    """A reference's file, and a port: the same model in float32, to be broken."""

    ref: str
    mine: str
    model: object
    batch: dict

    def held(self, **options):
        trace(self.model, self.batch, self.mine, samples=0)
        return compare(self.mine, self.ref, **options)

    def changed(self, **options):
        """MINE traced, then `options` = {name: function of its tensor}."""
        trace(self.model, self.batch, self.mine, samples=0)
        tensors, _ = read_tensors(self.mine)
        tensors.update({name: numpy.asarray(change(tensors[name]), order="C") for name, change in options.items()})
        write_tensors(self.mine, tensors)
        return compare(self.mine, self.ref)


@functools.cache
def traced(family, seed, adapted):
    """A model, its batch, and the bytes of its trace."""
    model, batch = case(family, seed).model(), case(family, seed).batch()
    if adapted:
        case(family, seed).attach(model)
    with tempfile.TemporaryDirectory() as folder:
        trace(model, batch, path := Path(folder) / "ref.safetensors")
        return model, batch, path.read_bytes()


@pytest.fixture
def pair(tmp_path):
    def of(family, seed=3, adapted=True):
        model, batch, written = traced(family, seed, adapted)
        ref, batch, port = tmp_path / "ref.safetensors", copy.deepcopy(batch), model.clone()
        ref.write_bytes(written)
        convert(port, "float32", None)
        return Pair(ref, tmp_path / "mine.safetensors", port, batch)
    return of


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [0, 3])
def test_the_same_model_in_float32_agrees_and_its_rho_is_neither_near_1_nor_vacuous(pair, family, seed):
    held = pair(family, seed).held()
    assert held.holds and held.dtype == "float32" and not held.missing and not held.extra
    assert 0.1 < max(h.rho for h in held.held) < 0.5


def test_a_float64_run_agrees_with_itself_to_the_last_bit_and_a_shuffled_sum_within_its_own_bound(pair):
    p = pair("pre-LN")
    convert(p.model, "float64", None)
    assert {h.rho for h in p.held().held} != {0.0}  # its weights went through float32
    assert not p.held().holds
    p.model = case("pre-LN").model()
    case("pre-LN").attach(p.model)
    assert {h.rho for h in p.held().held} == {0.0}
    held = p.changed(logits=lambda x: x * (1 + 2 ** -52))
    assert held.holds and held.dtype == "float64" and max(h.rho for h in held.held) > 0.01


def scaled_q(p):
    q = p.model.encoder.blocks[0].attn.q
    for array in [*q.weight.base.arrays.values(), *q.bias.base.arrays.values()]:  # a T5 has no bias
        array.data *= numpy.float32(math.sqrt(12))
    return "encoder.0.attn.q", r"MINE = 3.4641\d* x REF, and that is sqrt\(d_model\)"


def without_mask(p):
    del p.batch["attention_mask"]
    return "encoder.0.attn.o", ""


def transposed_k(p):
    base = p.model.decoder.blocks[0].cross.k.weight.base
    base.data = numpy.ascontiguousarray(base.data.T)
    return "decoder.0.cross.k", ""


def another_eps(p):
    p.model.encoder.blocks[0].ff_norm.eps *= 10
    return "encoder.0.ff_norm", "MINE = 0.99999|^$"


def no_bias(p):
    p.model.decoder.blocks[0].ff.wo.bias.base.data[...] = 0
    return "decoder.0.ff.wo", "one vector added to every row"


def another_head(p):
    p.model.decoder.blocks[0].attn.heads = 4
    return "decoder.0.attn.o", ""


def no_scores_scale(p):
    p.model.decoder.blocks[0].cross.scale = 1.0
    return "decoder.0.cross.o", ""


def lora_unscaled(p):
    for slot in p.model.slots.values():
        for piece in slot.attached.values():
            piece.scale *= 2
    return "encoder.0.attn.q", ""


BUGS = [("t5 v1.1", scaled_q), ("post-LN", scaled_q), ("t5 v1.0", without_mask), ("t5 v1.1", without_mask),
        ("post-LN", transposed_k), ("t5 v1.0", another_eps), ("pre-LN", another_eps), ("post-LN", no_bias),
        ("post-LN", another_head), ("pre-LN", no_scores_scale), ("t5 v1.0", lora_unscaled)]


@pytest.mark.parametrize("family, plant", BUGS, ids=[f"{plant.__name__} {family}" for family, plant in BUGS])
def test_the_first_tensor_that_a_planted_bug_reaches_is_named(pair, family, plant):
    p = pair(family, adapted=plant is lora_unscaled)
    name, looks_like = plant(p)
    held = p.held()
    assert not held.holds and held.first.name == name
    assert re.search(looks_like, held.looks_like) if looks_like else not held.looks_like
    assert f"first difference: {name}: rho" in str(held) and f"and {name}" in str(held)
    assert all(h.rho < 0.5 for h in held.compared[:held.compared.index(held.first)])


def test_without_a_mask_a_row_that_is_padded_on_the_left_gets_positions_of_another_shape(pair):
    """All rows count from column 0 then, and one table does for all of them."""
    p = pair("pre-LN")
    without_mask(p)
    assert re.search(r"first difference: encoder.position: has shape \[6, 12\]; expected \[4, 6, 12\]", str(p.held()))


def test_a_forgotten_mask_is_off_in_the_rows_that_have_one_and_nowhere_else(pair):
    p = pair("t5 v1.0")
    p.batch["attention_mask"][1:] = 1  # in the port; the reference also masks a token of the last row
    assert p.held().first.name == "attention_mask"
    tensors, _ = read_tensors(p.mine)
    write_tensors(p.mine, {name: x for name, x in tensors.items() if name != "attention_mask"})
    held = compare(p.mine, p.ref)
    assert re.search(r"first difference: encoder.0.attn.o: .* numbers wrong, all in \[3, 0:6, 0:12\]", str(held))


def test_a_missing_term_of_a_gradient_is_named_with_the_forward_that_agrees(pair, monkeypatch):
    p = pair("t5 v1.1")
    monkeypatch.setattr("minipeft.nn.attention.attention", lambda q, k, v, *more, **options: attention(
        q, minipeft.stop_gradient(k), v, *more, **options))
    held = p.held()
    assert held.first.name == "grad/decoder.0.attn_norm" and "grad/decoder.0.attn.k.weight" in held.missing
    assert "(4 before it missing in MINE, grad/decoder.0.attn.k.weight the last of them" in str(held)
    assert "between grad/decoder.0.attn.q.weight and grad/decoder.0.attn_norm" in str(held)


def test_a_loss_that_is_a_sum_shows_in_the_first_gradient_of_all(pair):
    p = pair("t5 v1.1")
    trace(p.model, p.batch, p.mine, samples=0)
    tensors, _ = read_tensors(p.mine)
    tokens = int((p.batch["labels"] != -100).sum())
    write_tensors(p.mine, {name: x * tokens if name.startswith("grad/") else x for name, x in tensors.items()})
    held = compare(p.mine, p.ref)
    assert held.first.name == "grad/logits" and held.looks_like == f"MINE = {tokens} x REF"
    assert "tensors of the forward pass agree, those of the backward pass do not" in str(held)


@pytest.mark.parametrize("name, change, words", [
    ("grad/decoder.0.attn.q.weight", numpy.transpose, "the transpose of REF"),
    ("grad/encoder.0.ff.wi.weight", numpy.transpose, "the transpose of REF"),
    ("encoder.0.attn.q", lambda x: x.transpose(1, 0, 2), r"REF with its axes in the order \[1, 0, 2\]"),
    ("grad/encoder.0.attn.v.weight", lambda x: x / 17, r"MINE = 0.0588\d* x REF, and that is 1/d_ff"),
    ("grad/encoder.0.attn.v.weight", lambda x: -x, "MINE = -1 x REF, and that is -1"),
    ("grad/encoder.0.attn.v.weight", lambda x: 1.23 * x, "MINE = 1.23 x REF$"),
    ("grad/encoder.0.attn.v.weight", lambda x: 0 * x, "zero everywhere"),
    ("decoder.0.attn.v", lambda x: x[[1, 2, 3, 0]], r"another order along axis 0: MINE holds REF's \[1, 2, 3, 0\]"),
    ("decoder.0.attn.v", lambda x: x.reshape(4, 7, 3, 4).swapaxes(2, 3).reshape(4, 7, 12), "order along axis 2"),
    ("logits", lambda x: x + numpy.arange(13, dtype="float32"), "one vector added to every row"),
    ("logits", lambda x: x.reshape(28, 13), "REF in another shape"),
    ("logits", lambda x: x[:, :-1], ""),
    ("loss", lambda x: 1.5 * x, ""), ("loss", lambda x: x / 12, "1/d_model")])
def test_what_a_wrong_tensor_looks_like_is_said(pair, name, change, words):
    held = pair("post-LN").changed(**{name: change})
    assert [h.name for h in held.off] == [name] and held.first.name == name
    assert re.search(words, held.looks_like) if words else not held.looks_like


@pytest.mark.parametrize("name, change", [("loss", lambda x: x[None]), ("loss", lambda x: x[None, None]),
                                          ("logits", lambda x: x[:, :, None]), ("attention_mask", lambda x: x[:, None]),
                                          ("encoder.position", lambda x: x[None])])
def test_axes_of_length_1_are_no_difference(pair, name, change):
    p = pair("post-LN")
    assert p.changed(**{name: change}).holds
    held = p.changed(**{name: lambda x: change(x + numpy.ones_like(x))})
    assert held.first.name == name and held.first.kind == "off"


@pytest.mark.parametrize("name, change, kind", [
    ("loss", lambda x: numpy.stack([x, x]), "shape"), ("logits", lambda x: x * numpy.float32(numpy.nan), "not finite"),
    ("labels", lambda x: numpy.roll(x, 1, 0), "off")])
def test_what_is_off_in_numbers_has_its_likeness_whatever_else_is_off_before_it(pair, name, change, kind):
    p = pair("post-LN")
    a = next(n for n in json.loads(read_metadata(p.ref)["order"]) if n.startswith("grad/") and n.endswith("lora.A"))
    held = p.changed(**{name: change, a: numpy.transpose})
    assert [h.name for h in held.off] == [name, a] and held.first.kind == kind and not held.looks_like
    assert held.off[1].kind == "shape"
    held = p.changed(**{name: change, a: lambda x: 1.5 * x})
    assert (held.first.name, held.off[1].looks_like) == (name, "MINE = 1.5 x REF")
    assert f"\n{a} looks like: MINE = 1.5 x REF" in str(held)


def test_a_transposed_gradient_is_told_behind_a_loss_written_as_a_vector(pair):
    p = pair("post-LN")
    a = next(n for n in json.loads(read_metadata(p.ref)["order"]) if n.startswith("grad/") and n.endswith("lora.A"))
    held = p.changed(loss=numpy.ascontiguousarray, **{a: numpy.transpose})
    assert held.first.name == a and held.looks_like == "the transpose of REF"


def test_integers_and_truths_are_held_to_the_last_bit(pair, tmp_path):
    ref, mine = tmp_path / "a", tmp_path / "b"
    _, metadata = read_tensors(pair("post-LN").ref)
    for want, got, words in ((numpy.array([2 ** 53, 1]), numpy.array([2 ** 53 + 1, 1]),
                              "got 9007199254740993, want 9007199254740992"),
                             (numpy.array([True, True]), numpy.array([False, True]), "got False, want True"),
                             (numpy.array([True, True]), numpy.array([numpy.nan, 1]), "where REF has True")):
        noise = {f"{prefix}/loss": numpy.array(1.0) for prefix in ("noise", "noise.float16", "noise.bfloat16")}
        write_tensors(ref, {"ids": want, "loss": numpy.array(1.0), **noise},
                      {**metadata, "order": '["ids", "loss"]'})
        write_tensors(mine, {"ids": got, "loss": numpy.array(1.0)})
        held = compare(mine, ref)
        assert held.first.name == "ids" and words in str(held), str(held)
        write_tensors(mine, {"ids": want, "loss": numpy.array(1.0)})
        assert compare(mine, ref).holds


@pytest.mark.parametrize("size, factor, words", [
    (1.0, 2.0 ** 997, r"MINE = 1\.3\d*e\+300 x REF"), (2.0, -1e308, ""), (1e-160, 4.0, "MINE = 4 x REF"),
    (1e-300, 4.0, "MINE = 4 x REF"), (1e300, 2.0 ** -997, r"MINE = 7\S*e-301 x REF")])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_numbers_of_any_size_are_held_and_described_without_a_warning(pair, tmp_path, size, factor, words, noise):
    ref, mine = tmp_path / "a", tmp_path / "b"
    x = numpy.array([[1.0, -3.0, 2.0], [4.0, 0.5, 0.25]]) * size
    _, metadata = read_tensors(pair("post-LN").ref)
    rows = {f"{prefix}/x": noise * abs(x).max(1) for prefix in ("noise", "noise.float16", "noise.bfloat16")}
    write_tensors(ref, {"x": x, **rows}, {**metadata, "order": '["x"]'})
    with numpy.errstate(over="ignore"):
        write_tensors(mine, {"x": numpy.clip(x * factor, -1.7e308, 1.7e308)})
    held = compare(mine, ref)
    assert held.first.name == "x"
    assert re.match(words, held.looks_like) if words else not held.looks_like


def test_a_name_that_does_not_print_is_written_so_that_it_does(pair):
    p = pair("t5 v1.0")
    trace(p.model, p.batch, p.mine, samples=0)
    tensors, _ = read_tensors(p.mine)
    write_tensors(p.mine, {**tensors, "a\neverything agrees\x1b[2J": tensors["loss"]})
    assert "ignored: 'a\\neverything agrees\\x1b[2J'" in str(compare(p.mine, p.ref))


def test_where_it_is_worst_is_said_with_both_numbers(pair):
    def spoil(x):
        x = x.copy()
        x[2, 3, 5] += 0.25
        return x

    held = pair("pre-LN").changed(**{"encoder.0.attn.out": spoil})
    want = read_tensors(pair("pre-LN").ref)[0]["encoder.0.attn.out"][2, 3, 5]
    assert held.first.where == (2, 3, 5) and held.first.got == pytest.approx(want + 0.25, abs=1e-5)
    assert held.first.want == want and "1 of 288 numbers wrong, all in [2, 3, 5]" in str(held)


@pytest.mark.parametrize("spoilt", [numpy.nan, numpy.inf])
def test_a_number_that_is_none_is_off_wherever_it_is(pair, spoilt):
    def spoil(x):
        x = x.copy()
        x[1, 2, 3] = spoilt
        return x

    held = pair("pre-LN").changed(**{"encoder.0.attn.out": spoil})
    assert held.first.kind == "not finite" and f"holds {spoilt} at [1, 2, 3]" in str(held)


def test_what_is_missing_fails_unless_it_may_be_and_what_was_given_may_be(pair):
    p = pair("t5 v1.0")
    trace(p.model, p.batch, p.mine, samples=0)
    tensors, _ = read_tensors(p.mine)
    kept = {name: tensors[name] for name in ("logits", "loss", "decoder.1")}
    write_tensors(p.mine, {**kept, "mine": tensors["loss"]})
    held = compare(p.mine, p.ref)
    assert not held.holds and held.first is None and "input_ids" not in held.missing
    assert "missing in MINE (--partial allows it): embedding, encoder.input" in str(held)
    assert held.extra == ("mine",) and "not in REF, ignored: mine" in str(held)
    assert compare(p.mine, p.ref, partial=True).holds
    write_tensors(p.mine, {**kept, "decoder.1": 2 * kept["decoder.1"]})
    held = compare(p.mine, p.ref, partial=True)
    assert re.search(r"nothing before it was compared \(\d+ before it missing in MINE", str(held))
    write_tensors(p.mine, {"mine": tensors["loss"]})
    held = compare(p.mine, p.ref, partial=True)
    assert not held.holds and "nothing was compared" in str(held)


def test_other_inputs_are_seen_first(pair):
    held = pair("t5 v1.0").changed(labels=lambda x: numpy.roll(x, 1, 0))
    assert held.first.name == "labels" and not held.holds


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_told_from_what_is_stored_or_said_and_bugs_show_in_it(pair, family, dtype):
    p = pair(family)
    trace(p.model, p.batch, p.mine, samples=0)
    tensors, _ = read_tensors(p.mine)
    write_tensors(p.mine, tensors, dtype=dtype)
    held = compare(p.mine, p.ref)
    assert held.dtype == dtype and held.holds
    rounded, _ = read_tensors(p.mine)
    write_tensors(p.mine, rounded)  # half precision's values in a float32 file
    assert not compare(p.mine, p.ref).holds and compare(p.mine, p.ref, dtype=dtype).holds
    scaled_q(p)
    trace(p.model, p.batch, p.mine, samples=0)
    assert compare(p.mine, p.ref, dtype=dtype).first.name == "encoder.0.attn.q"


def spoilt(metadata=None, **tensors):
    def change(found, said):
        said.update(metadata or {})
        found.update(tensors)
    return change


@pytest.mark.parametrize("change, words", [
    (spoilt({"format": "other"}), "metadata format"), (spoilt({"order": "["}), "not valid JSON"),
    (spoilt({"order": "[" * 100_000}), "not valid JSON"), (spoilt({"order": '{"a": 1}'}), "not a list"),
    (spoilt({"order": '["loss", "loss"]'}), "not a list"), (spoilt({"order": '["gone"]'}), "not a list"),
    (spoilt({"order": '[["loss"]]'}), "not a list"),
    (spoilt({"order": '["a\\nb"]'}, **{"a\nb": numpy.array(1.0)}), "not a list.*printable"),
    (spoilt({"dtype": "float8"}), "dtype is 'float8'"),
    (spoilt({"order": '["labels"]'}), "holds no noise"),
    (spoilt(**{"noise/loss": numpy.array(-1.0)}), "noise of loss"),
    (spoilt(**{"noise.float16/loss": numpy.array(numpy.nan)}), "noise of loss"),
    (spoilt(**{"noise/logits": numpy.zeros((4, 7, 13))}), "noise of logits"),
    (spoilt(**{"noise/logits": numpy.zeros((4, 7), "int64")}), "noise of logits"),
    (spoilt(loss=numpy.array(numpy.inf)), "loss holds numbers that are not finite")])
def test_a_reference_that_is_none_is_refused(pair, change, words):
    p = pair("t5 v1.0")
    tensors, metadata = read_tensors(p.ref)
    change(tensors, metadata)
    write_tensors(p.ref, tensors, metadata)
    trace(p.model, p.batch, p.mine, samples=0)
    with pytest.raises(ValueError, match=words):
        compare(p.mine, p.ref)


@pytest.mark.parametrize("config", ["[", "3", '{"d_model": "large"}', '{"d_model": 1e400}',
                                    f'{{"d_model": 1{"0" * 400}}}'])
def test_a_configuration_that_means_nothing_only_costs_the_names_of_factors(pair, config):
    p = pair("post-LN", adapted=False)
    tensors, metadata = read_tensors(p.ref)
    write_tensors(p.ref, tensors, {**metadata, "config": config})
    scaled_q(p)
    assert re.fullmatch(r"MINE = 3.4641\d* x REF", p.held().looks_like)


def test_the_command_says_what_it_found_and_how_by_its_exit_code(pair, capsys):
    p = pair("post-LN", adapted=False)
    held = p.held()
    assert main([str(p.mine), str(p.ref)]) == 0
    assert f"{len(held.held)} agree, 0 differ\neverything agrees; largest rho" in capsys.readouterr().out
    assert main([str(p.mine), str(p.ref), "--all"]) == 0
    assert capsys.readouterr().out.count("within") == len(held.held)
    scaled_q(p)
    p.held()
    assert main([str(p.mine), str(p.ref), "--partial"]) == 1
    out = capsys.readouterr().out
    assert "look at the code between encoder.position and encoder.0.attn.q" in out
    assert "differences after it (most likely only because of it):\n    encoder.0.attn.o" in out
    assert main([str(p.mine), str(p.mine)]) == 2 and "traced with samples=0" in capsys.readouterr().err
    p.mine.write_bytes(p.mine.read_bytes()[:-7])
    assert main([str(p.mine), str(p.ref)]) == 2 and "bytes" in capsys.readouterr().err
    assert main([str(p.ref) + ".none", str(p.ref)]) == 2 and capsys.readouterr().err
    assert main([]) == 2 and "usage" in capsys.readouterr().err
    assert main([str(p.mine), str(p.ref), "--dtype", "int8"]) == 2 and capsys.readouterr().err
    assert main(["--help"]) == 0 and "forward hook" in capsys.readouterr().out


# A port, for an example: transformers' T5, its tensors caught by hooks and written under our names.

SITES = {r"(encoder|decoder)\.(\d+)\.attn\.out": r"\1.block.\2.layer.0.SelfAttention",
         r"(decoder)\.(\d+)\.cross\.out": r"\1.block.\2.layer.1.EncDecAttention",
         r"(encoder)\.(\d+)\.ff\.out": r"\1.block.\2.layer.1.DenseReluDense",
         r"(decoder)\.(\d+)\.ff\.out": r"\1.block.\2.layer.2.DenseReluDense",
         r"(encoder|decoder)\.(\d+)": r"\1.block.\2"}


def module_of(name):
    """The module of transformers' T5 whose output is called `name` here, or None."""
    for pattern, theirs in SITES.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, theirs, name)
    try:
        return minipeft.T5.to_hf_name(f"{name}.weight").removesuffix(".weight")
    except ValueError:
        return None


def write_mine(theirs, batch, ref, mine):
    """Run a transformers T5 on the batch and write what its modules return, and the gradients, under our names."""
    torch = pytest.importorskip("torch")
    names, seen = {module_of(name): name for name in json.loads(read_metadata(ref)["order"])
                   if not name.startswith("grad/") and "#" not in name}, {}

    def catch(name):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            if name.endswith("position"):
                output = output.permute(2, 0, 1)[None]  # [query, key, heads]; it is not in the graph: no gradient
            else:
                output.retain_grad()
            seen[name if name not in seen else f"{name}#2"] = output
        return hook

    for name, module in theirs.named_modules():
        if name in names:
            module.register_forward_hook(catch(names[name]))
    output = theirs(**{key: torch.tensor(value) for key, value in batch.items()})
    output.loss.backward()
    seen.update(logits=output.logits, loss=output.loss)
    tensors = {name: x.detach().numpy() for name, x in seen.items()}
    tensors.update({f"grad/{name}": x.grad.numpy() for name, x in seen.items() if x.retains_grad})
    tensors.update({f"grad/{minipeft.T5.from_hf_name(name)}": p.grad.numpy() for name, p in theirs.named_parameters()})
    write_tensors(mine, tensors)


@pytest.mark.parametrize("family", ["t5 v1.0", "t5 v1.1"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_t5_is_ours_tensor_by_tensor(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model, batch = case(family).model(), case(family).batch()
    ref, mine = tmp_path / "ref.safetensors", tmp_path / "mine.safetensors"
    trace(model, batch, ref)
    model.save_pretrained(tmp_path / "model", dtype="float32")
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    write_mine(theirs, batch, ref, mine)
    held = compare(mine, ref, partial=True)
    assert held.holds, str(held)
    assert len(held.compared) >= 0.9 * len(held.held) and 0.01 < max(h.rho for h in held.compared) < 0.5
    theirs.encoder.block[0].layer[0].SelfAttention.q.weight.data *= 1.001
    theirs.zero_grad()
    write_mine(theirs, batch, ref, mine)
    assert compare(mine, ref, partial=True).first.name == "encoder.0.attn.q"
