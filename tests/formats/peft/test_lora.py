"""LoRA and DoRA in PEFT's files."""
import functools
import json
import math

import numpy
import pytest

import minipeft
from minipeft import DoRA, LoRA, T5, attach, combine
from minipeft.files import read_tensors
from minipeft.formats.peft import save, to_peft
from minipeft.formats.peft.codec import CODECS
from tests.formats.edited import CONFIG, GONE, WEIGHTS, edited
from tests.formats.golden import VALUES, check, check_written, golden, logits
from tests.methods.golden import FIXTURES, close

FOLDERS = ("lora_qv", "lora_qv_tied", "lora_all_linear", "lora_rslora", "lora_rank_alpha_pattern", "lora_layers",
           "dora", "dora_patterns")
FLOAT32 = 2e-6  # of the largest logit: what PEFT's float32 decomposition leaves of PiSSA
QV = "adapters/lora_qv"
Q0 = "base_model.model.encoder.block.0.layer.0.SelfAttention.q"


@functools.cache
def base(name="v11"):
    """A model on which nothing may stay."""
    return T5.from_pretrained(FIXTURES / "t5" / name)


def refused(path, match):
    """The directory is refused in these words, with its name, and nothing changes."""
    with pytest.raises(ValueError, match=match) as error:
        minipeft.load(base(), path)
    assert str(path) in str(error.value) and not base().attachments


def written(attachment, target):
    """(fields, tensors) of the attachment as it is saved."""
    save(attachment, target)
    return json.loads((target / CONFIG).read_text()), read_tensors(target / WEIGHTS)[0]


# ---- as the real library computes


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_directory_of_peft_gives_its_logits_gradients_and_merged_logits_and_is_written_back(folder, tmp_path):
    check(f"adapters/{folder}", tmp_path)


@pytest.mark.parametrize("folder", ["lora_embedding", "dora_embedding"])
def test_an_adapter_of_the_shared_table_acts_wherever_the_table_is_used_and_this_is_said(folder, tmp_path):
    """In PEFT it acts once it is merged, and not before."""
    with pytest.warns(UserWarning, match="PEFT's own forward ignores what is stored for 'shared'"):
        check(f"adapters/{folder}", tmp_path, "logits_peft_merged")


def test_pissa_is_relative_to_the_principal_part_of_the_base_and_is_written_back(tmp_path):
    path, g, model = golden("adapters/lora_pissa")
    before = logits(model, g)
    attachment = minipeft.load(model, path)
    assert close(logits(model, g), g["logits"], FLOAT32) and attachment.method.init == "pissa"
    attachment.merge()
    assert close(logits(model, g), g["logits_merged"], FLOAT32)
    attachment.unmerge()
    with attachment.off():
        assert logits(model, g).tobytes() == before.tobytes()
    check_written(attachment, path, tmp_path / "written")
    as_lora = minipeft.load(model.clone(), edited("adapters/lora_pissa", tmp_path / "lora",
                                                  {"init_lora_weights": True}))
    assert not close(logits(as_lora.model, g), g["logits"], 1e-2), "it means something else as a plain LoRA"


def test_pissa_is_relative_to_the_base_whatever_is_plugged_when_it_is_loaded():
    path, g, model = golden("adapters/lora_pissa")
    other = minipeft.load(model, FIXTURES / QV)
    attachment = minipeft.load(model, path)
    other.unplug()
    assert close(logits(model, g), g["logits"], FLOAT32) and attachment.state == "plugged"


def test_two_directories_on_one_model_see_the_rows_that_they_are_for():
    path, g, model = golden("adapters/mixed_batch")
    a, b = (minipeft.load(model, path / name) for name in "ab")
    names = [None if name == "__base__" else str(name) for name in g["adapter_names"]]
    mixed = model(g["input_ids"], g["decoder_input_ids"], g["attention_mask"], adapter=names).data
    assert close(mixed, g["logits"], VALUES)
    for one, other in ((a, b), (b, a)):
        with other.off():
            assert close(logits(model, g), g[f"logits_{one.name}"], VALUES)


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_a_combination_that_peft_made_is_the_one_that_is_made_of_its_directories_here(how):
    path, g, model = golden("adapters/weighted")
    theirs = minipeft.load(model, path / how)
    assert close(logits(model, g), g[f"logits_{how}"], VALUES)
    theirs.unplug()
    a, b = (minipeft.load(model, path / name) for name in "ab")
    for one, other in ((a, b), (b, a)):
        with other.off():
            assert close(logits(model, g), g[f"logits_{one.name}"], VALUES)
    combine([a, b], g["weights"].tolist(), how, None if how == "cat" else int(g["svd_rank"]))
    assert close(logits(model, g), g[f"logits_{how}"], VALUES)


# ---- fields


@pytest.mark.parametrize("fields, match", [
    ({"lora_alpha": GONE}, "lora_alpha is missing"), ({"lora_alpha": None}, "lora_alpha is null"),
    ({"lora_alpha": 0}, "lora_alpha is 0; expected a finite number other than 0"),
    ({"lora_alpha": "16"}, "lora_alpha is '16'"), ({"lora_alpha": True}, "lora_alpha is True"),
    ({"lora_alpha": math.nan}, "lora_alpha is nan"), ({"alpha_pattern": {"q": 0}}, r"alpha_pattern\['q'\] is 0"),
    ({"alpha_pattern": {"nothing": None}}, r"alpha_pattern\['nothing'\] is None"),
    ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]"), ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] is 0"),
    ({"rank_pattern": {"q": "4"}}, r"rank_pattern\['q'\] is '4'"), ({"rank_pattern": {"(": 4}}, "regular expression"),
    ({"r": GONE}, "r is missing"), ({"r": 0}, "r is 0; expected an integer >= 1"), ({"r": 4.0}, "r is 4.0"),
    ({"use_rslora": "false"}, "use_rslora is 'false'; expected true or false"), ({"use_dora": 1}, "use_dora is 1"),
    ({"fan_in_fan_out": "x"}, "fan_in_fan_out is 'x'"), ({"lora_dropout": 1}, "lora_dropout is 1"),
    ({"lora_dropout": "0.1"}, "lora_dropout is '0.1'"), ({"use_dora": True}, "has no lora_magnitude_vector"),
    ({"lora_bias": True}, "lora_bias is True, which changes what LORA computes"),
    ({"use_qalora": "yes"}, "use_qalora is 'yes'; expected true or false"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is"),
    ({"target_parameters": ["mlp.experts"]}, "target_parameters is"), ({"arrow_config": {"top_k": 3}}, "arrow_config"),
    ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens is"), ({"kasa_config": {"beta": 1}}, "kasa_config is"),
    ({"use_magic": "full"}, "use_magic is 'full', a field of LORA that is not known"),
    ({"magic": True}, "magic is True, a field of LORA that is not known"), ({"magic_scale": 2}, "magic_scale is 2, a"),
    ({"magic": {"a": 1}}, "magic is {'a': 1}, a field of LORA that is not known"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is"), ({"velora_config": {"num_groups": 2}}, "velora_config is"),
    ({"monteclora_config": {"a": 1}}, "monteclora_config is"), ({"megatron_config": {"a": 1}}, "megatron_config is"),
    ({"init_lora_weights": "pissa_niter_16"}, "'pissa_niter_16': PEFT changes the base"),
    ({"init_lora_weights": "olora"}, "'olora': PEFT changes the base when it loads"),
    ({"init_lora_weights": "corda"}, "'corda': PEFT changes"),
    ({"init_lora_weights": "loftq"}, "'loftq': PEFT changes"),
    ({"init_lora_weights": "lora_ga"}, "'lora_ga': PEFT changes"), ({"init_lora_weights": "x"}, "is 'x'; expected"),
    ({"init_lora_weights": 1}, "init_lora_weights is 1; expected"), ({"target_modules": []}, "chooses none of the"),
    ({"target_modules": ["layer_norm"]}, "layer_norm, a weight of the kind 'norm'"),
    ({"target_modules": ".*relative_attention_bias"}, "relative_attention_bias, a weight of the kind 'position'"),
    ({"target_modules": ["q", "k"]}, "Not expected: .*v.lora.* Missing: .*k.lora"),
    ({"target_modules": ["(a+)+$"]}, "chooses none"), ({"r": 8}, "truncated, with 3 of 8 rows"),
    ({"r": 2}, r"has shape \[3, 16\]; expected \[2, 16\]$")])
def test_a_field_that_cannot_be_honored_is_refused_by_its_name(fields, match, tmp_path):
    refused(edited(QV, tmp_path / "a", fields), match)


def test_fields_that_change_no_output_of_a_trained_file_are_kept_and_written_back(tmp_path):
    fields = {"init_lora_weights": "orthogonal", "eva_config": {"rho": 2.0}, "qalora_group_size": 8,
              "a_note": "mine", "steps": 1000, "loftq_config": {"loftq_bits": 4}, "revision": "main",
              "lora_dropout": 0.1, "task_type": None}
    attachment = minipeft.load(base().clone(), edited(QV, tmp_path / "a", fields))
    config, _ = written(attachment, tmp_path / "b")
    assert {field: config[field] for field in fields} == fields
    for start in (False, None, "Gaussian", "mica"):
        path = edited(QV, tmp_path / f"start {start}", {"init_lora_weights": start})
        again = minipeft.load(base().clone(), path)
        assert written(again, tmp_path / f"again {start}")[0]["init_lora_weights"] == (True if start is None else start)
        assert all(numpy.array_equal(array, again.tensors[key]) for key, array in attachment.tensors.items())


def test_dropout_is_that_of_the_file(tmp_path):
    attachment = minipeft.load(base().clone(), edited(QV, tmp_path / "a", {"lora_dropout": 0.25}))
    assert attachment.method.dropout == 0.25


def test_every_field_that_peft_would_fill_in_with_something_else_is_written(tmp_path):
    """And all others of version 0.21.2, with the value that it has there by default; sorted by name."""
    theirs = json.loads((FIXTURES / QV / CONFIG).read_text())
    attachment = attach(base().clone(), LoRA(4, 12), numpy.random.default_rng(0))
    config, _ = written(attachment, tmp_path / "a")
    assert config == {**theirs, "base_model_name_or_path": None, "r": 4, "lora_alpha": 12, "lora_dropout": 0.0}
    assert list(config) == sorted(config)


def test_rank_and_alpha_are_looked_up_one_by_one(tmp_path):
    """huggingface/peft #2194: an alpha was lost where its key was not that of the rank."""
    path = edited(QV, tmp_path / "a", {"alpha_pattern": {"encoder.block.0.layer.0.SelfAttention.q": 64},
                                       "rank_pattern": {"SelfAttention.q": 2}},
                  lambda t: {k: a[:2] if "SelfAttention.q.lora_A" in k else a[:, :2] if "SelfAttention.q.lora_B" in k
                             else a for k, a in t.items()})
    a = minipeft.load(base().clone(), path)
    usual = json.loads((FIXTURES / QV / CONFIG).read_text())["lora_alpha"]
    q0, q1, c = (f"{name}.q.weight" for name in ("encoder.0.attn", "encoder.1.attn", "decoder.0.cross"))
    at = [(a.method.rank_at(name, a.places[name]), a.method.alpha_at(name)) for name in (q0, q1, c)]
    assert at == [(2, 64), (2, usual), (3, usual)]
    config, _ = written(a, tmp_path / "b")
    assert config["alpha_pattern"] == {"encoder.block.0.layer.0.SelfAttention.q": 64}
    assert list(config["rank_pattern"].values()) == [2] * 4


# ---- what is said


def put(key, array):
    return lambda tensors: {**tensors, key: array}


def loaded_with(match, path):
    with pytest.warns(UserWarning, match=match) as said:
        attachment = minipeft.load(base().clone(), path)
    assert len(said) == 1 and str(path) in str(said[0].message)
    assert len(attachment.source.notes) == 1
    return attachment


def test_a_key_of_a_pattern_that_matches_nothing_is_said(tmp_path):
    """huggingface/peft #3582: it was silent."""
    loaded_with("alpha_pattern has '\\^q' .1 in all., which no adapted module matches",
                edited(QV, tmp_path / "a", {"alpha_pattern": {"^q": 100}}))
    loaded_with("rank_pattern has 'wo'", edited(QV, tmp_path / "b", {"rank_pattern": {"wo": 2}}))


@pytest.mark.parametrize("missing", [GONE, None])
def test_without_targets_they_are_those_of_the_tensors_and_this_is_said_where_peft_would_take_others(missing, tmp_path):
    fields = {"target_modules": missing}
    attachment = minipeft.load(base().clone(), edited(QV, tmp_path / "a", fields))
    assert attachment.source.notes == () and len(attachment.places) == 12
    some = loaded_with("target_modules is not given; it was taken from the tensors. PEFT would take q and v",
                       edited(QV, tmp_path / "b", fields, lambda t: {k: a for k, a in t.items() if ".q." in k}))
    assert len(some.places) == 6 and written(some, tmp_path / "c")[0]["target_modules"] == ["q"]
    head = put("base_model.model.lm_head.weight", numpy.zeros((53, 16), "f4"))
    refused(edited(QV, tmp_path / "copy", fields, head), "base_model.model.lm_head.weight should be a copy of the base")
    refused(edited(QV, tmp_path / "d", fields, lambda t: {f"x{i}": a for i, a in enumerate(t.values())}),
            "no tensor belongs to a module of this model: 'x0', 'x1', 'x10'")
    refused(edited(QV, tmp_path / "e", fields, lambda t: {k: a for k, a in t.items() if k != f"{Q0}.lora_B.weight"}),
            rf"Missing: '{Q0}.lora_B.weight' \(1 in all\)")


def test_weights_of_t5_are_never_fan_in_fan_out_and_this_is_said(tmp_path):
    attachment = loaded_with("fan_in_fan_out is true", edited(QV, tmp_path / "a", {"fan_in_fan_out": True}))
    plain = minipeft.load(base().clone(), FIXTURES / QV)
    assert {k: a.tobytes() for k, a in attachment.tensors.items()} == {
        k: a.tobytes() for k, a in plain.tensors.items()}
    assert written(attachment, tmp_path / "b")[0]["fan_in_fan_out"] is False


@pytest.mark.parametrize("change", [
    lambda key: f"_orig_mod.{key}", lambda key: key.replace("base_model.model.", "base_model.model.module."),
    lambda key: f"base_model.model.{key}", lambda key: key.removeprefix("base_model.model."),
    lambda key: key.replace(".weight", ".default.weight"), lambda key: f"language_model.{key}"])
def test_changed_keys_are_read_under_the_right_ones_and_this_is_said(change, tmp_path):
    """In PEFT such a file loads with a warning, and the outputs are those of the base."""
    plain = minipeft.load(base().clone(), FIXTURES / QV)
    path = edited(QV, tmp_path / "a", tensors=lambda t: {change(key): array for key, array in t.items()})
    attachment = loaded_with(r"keys were read under the names that PEFT gives them \(24 in all\)", path)
    assert {k: a.tobytes() for k, a in attachment.tensors.items()} == {
        k: a.tobytes() for k, a in plain.tensors.items()}
    assert set(written(attachment, tmp_path / "b")[1]) == set(read_tensors(FIXTURES / QV / WEIGHTS)[0])


def test_a_magnitude_vector_of_a_live_model_is_read(tmp_path):
    path = edited("adapters/dora", tmp_path / "a", tensors=lambda t: {
        key.replace("magnitude_vector", "magnitude_vector.default.weight"): array for key, array in t.items()})
    assert isinstance(loaded_with("keys were read under", path).method, DoRA)


# ---- tensors


@pytest.mark.parametrize("tensors, dtype, match", [
    (lambda t: {}, None, "holds no tensor at all: this adapter does nothing"),
    (put(f"{Q0}.lora_A.weight", numpy.zeros((0, 16), "f4")), None, "no number at all"),
    (put(f"{Q0}.lora_A.weight", numpy.zeros((2, 16), "f4")), None, "truncated, with 2 of 3 rows"),
    (put(f"{Q0}.lora_B.weight", numpy.zeros((12, 3), "f4")), None, "truncated, with 12 of 24 rows"),
    (put(f"{Q0}.lora_B.weight", numpy.zeros((24, 2), "f4")), None, "truncated, with 2 of 3 columns"),
    (put(f"{Q0}.lora_A.weight", numpy.zeros((16, 3), "f4")), None, r"has shape \[16, 3\]; expected \[3, 16\]"),
    (put(f"{Q0}.lora_A.weight", numpy.zeros((3, 16), "i4")), None, "expected floating point"),
    (put(f"{Q0}.lora_A.weight", numpy.full((3, 16), numpy.nan, "f4")), None, "lora_A.weight holds NaN or infinity"),
    (put(f"{Q0}.lora_B.weight", numpy.full((24, 3), numpy.inf, "f4")), "float16", "lora_B.weight holds NaN or inf"),
    (put(f"{Q0}.lora_B.weight", numpy.full((24, 3), numpy.nan, "f4")), "bfloat16", "lora_B.weight holds NaN or inf"),
    (put(f"{Q0}.lora_B.weight", numpy.full((24, 3), 1e300)), None, "not finite in float32"),
    (put(f"{Q0}.lora_magnitude_vector", numpy.zeros(24, "f4")), None, "Not expected: .*lora_magnitude_vector"),
    (put("x.lora_A.weight", numpy.zeros((3, 16), "f4")), None, r"Not expected: 'x.lora_A.weight' \(1 in all\)")])
def test_tensors_that_do_not_fit_are_refused(tensors, dtype, match, tmp_path):
    refused(edited(QV, tmp_path / "a", {}, tensors, dtype), match)


def test_where_the_tensors_are_not_those_of_the_configuration_the_error_says_what_may_be_wrong(tmp_path):
    for fields, said in (
            ({"target_modules": ["q", "value", "v_"]}, "none. In target_modules, 'value', 'v_' chooses no module of "),
            ({"base_model_name_or_path": "flan-t5-xl", "target_modules": ["v"]}, "none. The file calls its base 'flan-"
             "t5-xl'. Expected a model like the one that it was trained on, and the configuration that was saved"),
            ({"base_model_name_or_path": None, "target_modules": ["q", "k", "v"]}, r"\(12 in all\). Expected a model")):
        refused(edited(QV, tmp_path / str(len(said)), fields), said)


def test_a_vector_that_dora_lacks_at_one_place_is_missed(tmp_path):
    refused(edited("adapters/dora", tmp_path / "a", {}, lambda t: {
        key: a for key, a in t.items() if key != f"{Q0}.lora_magnitude_vector"}), "Missing: .*q.lora_magnitude_vector")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_pointer_of_git_lfs_is_named(name, tmp_path):
    path = edited(QV, tmp_path / "a")
    (path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    refused(path, f"{name} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")


# ---- starts that change the base, and mixtures


def test_pissa_needs_a_base_that_determines_its_start(tmp_path):
    path = edited(QV, tmp_path / "a", {"init_lora_weights": "pissa"})
    model = base().clone()
    model.slots["encoder.0.attn.q.weight"].base.data[...] = numpy.eye(24, 16)
    with pytest.raises(ValueError, match="singular values 3 and 4 of encoder.0.attn.q.weight are both 1; expected"):
        minipeft.load(model, path)
    model.slots["encoder.0.attn.q.weight"].base.data[...] = 0
    with pytest.raises(ValueError, match="encoder.0.attn.q.weight has rank"):
        minipeft.load(model, path)
    assert not model.attachments


@pytest.mark.parametrize("folder, fields, match", [
    ("lora_embedding", {"init_lora_weights": "pissa"}, "'pissa' on an embedding table"),
    ("dora", {"init_lora_weights": "pissa"}, "use_dora is true and init_lora_weights pissa"),
    ("dora", {"target_modules": ["q", "v", "shared"]}, "use_dora is true on a table as well")])
def test_what_peft_mixes_and_we_do_not_have_is_refused(folder, fields, match, tmp_path):
    refused(edited(f"adapters/{folder}", tmp_path / "a", fields), match)


# ---- writing


def changed_lora(method, model, seed=0):
    """The method attached, with other numbers than it starts from."""
    rng = numpy.random.default_rng(seed)
    attachment = attach(model, method, rng, "a")
    for p in attachment.parameters.values():
        p.data = p.data + 0.3 * rng.standard_normal(p.shape)
    return attachment


METHODS = {
    "plain": LoRA(2, 6, 0.2), "ranks": LoRA(2, 6, rank_pattern={"encoder": 3}, alpha_pattern={r"\.v\.": 5}),
    "rslora": LoRA(3, 5, scaling="alpha/sqrt(r)"),
    "a fixed s": LoRA(3, 0.5, scaling="alpha", rank_pattern={"cross": 2}),
    "a table": LoRA(2, 3, where="embedding"), "both": LoRA(2, 3, where=["embedding", "q"]),
    "pissa": LoRA(3, 5, init="pissa", rank_pattern={"encoder": 2}, alpha_pattern={r"\.v\.": -4}),
    "pissa of rslora": LoRA(3, 5, init="pissa", scaling="alpha/sqrt(r)"),
    "pissa of a fixed s": LoRA(3, 0.5, init="pissa", scaling="alpha", rank_pattern={"cross": 2}),
    "pissa of a table": LoRA(2, 3, init="pissa", where="embedding"),
    "dora": DoRA(2, 6, scaling="alpha", rank_pattern={"encoder": 3}), "dora of a table": DoRA(
        2, 3, where="embedding", norm="input"), "some layers": LoRA(2, 3, where=r"encoder\.1.*(wi|\.o)"),
    "everything": LoRA(1, 3, where=r"(attn|cross|ff)\.\w+\.weight|embedding|head")}


@pytest.mark.filterwarnings("ignore:.*stored for 'shared'")
@pytest.mark.parametrize("name", METHODS)
def test_what_is_attached_here_is_written_and_read_again_with_the_same_outputs(name, tmp_path):
    _, g, model = golden(QV)
    attachment = changed_lora(METHODS[name], model)
    expected = logits(model, g)
    config, tensors = written(attachment, tmp_path / "a")
    again = minipeft.load(model.clone(), tmp_path / "a", name="again")
    with again.model.attachments["a"].off():
        assert close(logits(again.model, g), expected, 1e-12)
    assert set(to_peft(attachment, attachment.tensors)) == set(tensors)
    r = config["r"] * (2 if config["rank_pattern"] == {} else 1)
    assert config["init_lora_weights"] is True and r >= (4 if METHODS[name].init == "pissa" else 1)


@pytest.mark.filterwarnings("ignore:.*stored for 'shared'")
def test_our_pissa_is_written_as_one_product_on_the_base_as_it_is(tmp_path):
    """s (B A - B0 A0) = s [B, -B0] [A; A0]; its gradients stand where A and B stand."""
    attachment = changed_lora(LoRA(3, 6, init="pissa", where="head|embedding"), base().clone())
    config, tensors = written(attachment, tmp_path / "a")
    assert config["r"] == 6 and config["lora_alpha"] == 12 and config["use_rslora"] is False
    arrays, head, shared = attachment.tensors, "base_model.model.lm_head", "base_model.model.shared.lora_embedding"
    A, B, A0, B0 = (arrays[f"head.weight.{leaf}"] for leaf in ("A", "B", "A0", "B0"))
    assert numpy.array_equal(tensors[f"{head}.lora_A.weight"], numpy.concatenate([A, A0]))
    assert numpy.array_equal(tensors[f"{head}.lora_B.weight"], numpy.concatenate([B, -B0], axis=1))
    A, B, A0, B0 = (arrays[f"embedding.weight.{leaf}"] for leaf in ("A", "B", "A0", "B0"))
    assert numpy.array_equal(tensors[f"{shared}_A"], numpy.concatenate([B, -B0], axis=1).T)
    assert numpy.array_equal(tensors[f"{shared}_B"], numpy.concatenate([A, A0]).T)
    gradient = to_peft(attachment, {name: p.data + 1 for name, p in attachment.parameters.items()}, gradients=True)
    expected = numpy.pad(arrays["head.weight.B"] + 1, ((0, 0), (0, 3)))
    assert numpy.array_equal(gradient[f"{head}.lora_B.weight"], expected)


@pytest.mark.parametrize("method, match", [
    (LoRA(2, 3, where="head", enable=(True,)), "enable is"),
    (DoRA(2, 3, where="embedding"), "norm is 'output', and embedding.weight is embedding; PEFT has norm='input' there"),
    (DoRA(2, 3, norm="input"), "is linear; PEFT has norm='output' there")])
def test_what_peft_cannot_hold_is_refused_before_anything_is_written(method, match, tmp_path):
    attachment = attach(base().clone(), method, numpy.random.default_rng(0))
    with pytest.raises(ValueError, match=match):
        save(attachment, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_model_that_hugging_face_does_not_have_is_refused(tmp_path):
    model = minipeft.Transformer(minipeft.TransformerConfig(vocab_size=7, d_model=8, num_heads=2, d_ff=4, num_layers=1),
                                 numpy.random.default_rng(0))
    attachment = attach(model, LoRA(2), numpy.random.default_rng(0))
    with pytest.raises(ValueError, match="Transformer is no model of Hugging Face's"):
        save(attachment, tmp_path / "a")
    with pytest.raises(ValueError, match="Transformer is no model of Hugging Face's"):
        minipeft.load(model, FIXTURES / QV)


def test_the_fields_that_decide_what_is_computed_are_never_taken_from_the_file_that_was_read():
    codec = CODECS["LORA"]
    assert not codec.used & (set(codec.defaults) | codec.harmless | set(codec.neutral))
    assert set(codec.neutral) <= set(codec.defaults) | {"bias"}


@pytest.mark.parametrize("dora", [False, True])
def test_a_rank_beyond_the_sizes_of_the_weights_is_loaded_and_written_as_peft_has_it(dora, tmp_path):
    """17 > min(24, 16). In the wild there is a T5 adapter of rank 1000."""
    r, rng = 17, numpy.random.default_rng(3)

    def wide(tensors):
        made = {k: rng.standard_normal((r, a.shape[1]) if "lora_A" in k else (a.shape[0], r)).astype("f4")
                for k, a in tensors.items() if "magnitude" not in k}
        return {**tensors, **made}

    folder = edited("adapters/dora" if dora else QV, tmp_path / "a", {"r": r, "rank_pattern": {}}, wide)
    attachment = minipeft.load(base().clone(), folder)
    assert attachment.method.any_rank and attachment.method.rank == r
    check_written(attachment, folder, tmp_path / "b")
    piece = next(iter(attachment.at.values()))
    own = attachment.tensors
    name = next(iter(attachment.places))
    assert own[f"{name}.A"].shape == (r, 16) and piece.A.data is own[f"{name}.A"]
    with pytest.raises(ValueError, match="rank 17 exceeds 16"):
        minipeft.attach(base().clone(), LoRA(r), rng)
    with pytest.raises(ValueError, match="any_rank is True; expected False where init is 'orthogonal'"):
        LoRA(r, init="orthogonal", any_rank=True)
    pissa = minipeft.attach(base().clone(), LoRA(9, 3, init="pissa"), rng)
    save(pissa, tmp_path / "d")
    assert minipeft.load(base().clone(), tmp_path / "d").method.any_rank, "two products of rank 9 are one of rank 18"
    adapter = minipeft.attach(base().clone(), LoRA(r, any_rank=True), rng)
    adapter.save(tmp_path / "c")
    assert minipeft.load(base().clone(), tmp_path / "c").method.any_rank
