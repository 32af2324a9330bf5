"""What AdapterHub's folders may say: fields and tensors that are refused by name, and old files."""
from __future__ import annotations

import re
import warnings

import numpy
import pytest

import minipeft
from minipeft.formats import adapterhub
from tests.formats.adapterhub.folders import FOLDERS, base, copied, inner, without
from tests.models_under_test import Case

SAME = "expected those of par_bn, seq_bn or double_seq_bn"


def refused(path, message, model, error=ValueError, load=minipeft.load, **options):
    """Loading raises, names the folder, and leaves nothing on the model."""
    with pytest.raises(error, match=message) as caught:
        load(model, path, **options)
    assert str(path) in str(caught.value) and not model.attachments and not model.plugged


LORA = ("alpha", "attn_matrices", "composition_mode", "dropout", "init_weights", "intermediate_lora", "leave_out",
        "output_lora", "r", "selfattn_lora", "use_dora", "use_gating")
FIELDS = {
    **{f"{field} {value}": ("seq_bn", inner(**{field: value}), f"{field} is {value!r}, which changes")
       for field, value in {"ln_before": True, "ln_after": True, "use_gating": True, "phm_layer": True,
                            "inv_adapter": "nice", "stochastic_depth": 0.1}.items()},
    "a learned scale": ("par_bn", inner(scaling="learned"), "scaling is 'learned'; expected a finite number"),
    "a scale for each channel": ("par_bn", inner(scaling="channel"), "scaling is 'channel'"),
    "a scale of 0": ("par_bn", inner(scaling=0.0), "scaling is 0.0; .* switch the adapter off"),
    "an activation": ("seq_bn", inner(non_linearity="tanh"), "non_linearity is 'tanh'; expected one of relu, gelu"),
    "x is lost": ("seq_bn", inner(original_ln_after=False), SAME),
    "x is there twice": ("seq_bn", inner(residual_before_ln=False), SAME),
    "F alone": ("double_seq_bn", inner(original_ln_after=False), SAME),
    "x is lost beside": ("par_bn", inner(original_ln_after=False), SAME),
    "AdapterHub itself fails": ("seq_bn", inner(residual_before_ln="post_add"), "residual_before_ln 'post_add'"),
    "half a boolean": ("seq_bn", inner(is_parallel=1), "is_parallel 1"),
    "sizes by layer": ("seq_bn", inner(reduction_factor={"0": 4, "default": 2}), "layers 0 and 3 different sizes"),
    "sizes for some layers": ("seq_bn", inner(reduction_factor={"0": 4}), "reduction_factor is .*; expected a number"),
    "no reduction": ("seq_bn", inner(reduction_factor=0), "reduction_factor is 0; expected a number > 0"),
    "a huge size": ("seq_bn", inner(reduction_factor=1e-300), "reduction_factor is 1e-300"),
    "another size": ("seq_bn", inner(reduction_factor=8), r"adapter_down.0.weight has shape \[4, 16\]; expected \[2, "),
    "nowhere": ("seq_bn", inner(output_adapter=False), "chooses no place of this model"),
    "all layers left out": ("seq_bn", inner(leave_out=[0, 1, 2, 3]), "chooses no place of this model"),
    "half of the layers left out": ("seq_bn", inner(leave_out=[0, 3]), r"Not expected: .*\(8 in all\). Missing: none"),
    "more places than tensors": ("seq_bn", inner(mh_adapter=True), r"Missing: 'decoder.block.0.layer.0.adapters.a."),
    "a layer without a number": ("seq_bn", inner(leave_out=["0"]), r"leave_out is \['0'\]; expected a list of int"),
    "switches are booleans": ("seq_bn", inner(mh_adapter="no"), "mh_adapter is 'no'; expected true or false"),
    "a new field": ("seq_bn", inner(new_scale=2), "new_scale is 2, a field of a bottleneck adapter that"),
    "a new switch": ("seq_bn", inner(new=True), "new is True, a field of a bottleneck adapter that"),
    **{f"{field} is missing": (folder, without(field), f"{field} is missing; expected it in a file of")
       for folder, field in (("seq_bn", "original_ln_before"), ("seq_bn", "residual_before_ln"), ("par_bn", "scaling"),
                             ("par_bn", "is_parallel"), ("lora", "alpha"), ("lora", "r"))},
    "a union of nothing": ("lora", inner(architecture="union", configs=[], **dict.fromkeys(LORA)),
                           r"configs is \[\]; expected a list of configurations"),
    "a part that is none": ("lora", inner(architecture="union", configs=["seq_bn"], **dict.fromkeys(LORA)),
                            r"configs is \['seq_bn'\]; expected a list of config"),
    "a union in a union": ("lora", inner(architecture="union", configs=[{"architecture": "union"}],
                                         **dict.fromkeys(LORA)), "a union is a part of a union"),
    "a field beside a union": ("lora", inner(architecture="union", configs=[{}]), "alpha is 6, a field of a union"),
    "a field of a part": ("lora", lambda outer: outer.update(config={
        "architecture": "union", "configs": [{**outer["config"], "use_gating": True}]}), "use_gating is True, which"),
    "a prefix in a union": ("union", inner(), "it has a prefix, and in AdapterHub's T5 .*as_adapterhub=True"),
    "two parts at one place": ("lora", lambda outer: outer.update(config={
        "architecture": "union", "configs": [outer["config"]] * 2}), "both choose encoder.0.attn.q.weight"),
    "another method": ("lora", inner(architecture="reft"), "architecture is 'reft' and .*; expected no architecture"),
    "another composition": ("lora", inner(composition_mode="mul"), "composition_mode 'mul'; expected"),
    **{f"{field} of a LoRA": ("lora", inner(**{field: value}), f"{field} is {value!r}, which changes what LoRA")
       for field, value in {"use_gating": True, "vera_d": 0.1, "vera_b": 0.0}.items()},
    "alpha 0": ("lora", inner(alpha=0), "alpha is 0; expected a finite number other than 0"),
    "alpha as text": ("lora", inner(alpha="6"), "alpha is '6'"),
    "a rank of 0": ("lora", inner(r=0), "r is 0; expected an integer >= 1"),
    "another rank": ("lora", inner(r=1), r"lora_A has shape \[2, 16\]; expected \[1, 16\]"),
    "letters": ("lora", inner(attn_matrices="qk"), "attn_matrices is 'qk'; expected a list of some of q, k and v"),
    "all is dropped": ("lora", inner(dropout=1.0), r"dropout is 1.0; expected a number in \[0, 1\)"),
    "no DoRA": ("dora", inner(alpha=6), "alpha is 6 and r is 3: AdapterHub's DoRA then divides by the length of anoth"),
    "lengths without DoRA": ("dora", inner(use_dora=False), r"Not expected: .*loras.a.m.weight.* \(8 in all\)"),
    "factors of factors": ("ia3", inner(alpha=2), "alpha is 2; expected 1 where composition_mode is 'scale'"),
    "factors of two": ("ia3", inner(r=2), "r is 2; expected 1"),
    "factors of the output": ("ia3", inner(output_lora=True), "output_lora is True; expected False"),
    "factors as LoRA": ("ia3", inner(composition_mode="add"), r"Missing: .*lora_A.* \(21 in all\)"),
    "a configuration by its name": ("seq_bn", lambda outer: outer.update(config="seq_bn"), "config is 'seq_bn'; exp"),
    "no name": ("seq_bn", lambda outer: outer.pop("name"), "name is None; expected the name of the adapter"),
    "a dotted name": ("seq_bn", lambda outer: outer.update(name="a.b"), "name is 'a.b'; .*without a dot"),
    "another name": ("seq_bn", lambda outer: outer.update(name="b"), r"Missing: 'decoder.block.0.layer.2.adapters.b"),
    "another family": ("seq_bn", lambda outer: outer.update(model_type="bert"), "model_type is 'bert'; expected 't5'"),
    "another width": ("seq_bn", lambda outer: outer.update(hidden_size=32), "hidden_size is 32; expected 16, the d_m"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_field_that_cannot_be_honored_is_refused_by_its_name_and_value(case, tmp_path):
    folder, change, message = FIELDS[case]
    refused(copied(folder, tmp_path / "a", change), message, base(folder))


PREFIXES = {
    "it is not asked for": ("prefix_flat", inner(), "moves all tokens P positions away .*as_adapterhub=True", {}),
    "layers left out": ("prefix_flat", inner(leave_out=[1]), r"leave_out is \[1\], which changes", None),
    "gates": ("prefix_flat", inner(use_gating=True), "use_gating is True", None),
    "a length that is none": ("prefix_flat", inner(prefix_length=0), "prefix_length is 0; expected an integer", None),
    "a huge length": ("prefix_flat", inner(prefix_length=10 ** 15), "prefix_length is 1000000000000000, and no tensor",
                      None),
    "another length": ("prefix_flat", inner(prefix_length=3), r"has shape \[120\]; expected \[180\]", None),
    "flat or not": ("prefix_mlp", inner(flat=None), "flat is null; expected it", None),
    "another activation": ("prefix_mlp", inner(non_linearity="relu"), "non_linearity 'relu'; expected an integer >= 1",
                           None),
    "a network without a size": ("prefix_mlp", inner(bottleneck_size=None), "bottleneck_size is None", None)}


@pytest.mark.parametrize("case", PREFIXES)
def test_a_prefix_is_loaded_as_in_adapterhub_if_that_is_asked_for_and_if_its_numbers_can_be_had(case, tmp_path):
    folder, change, message, options = PREFIXES[case]
    refused(copied(folder, tmp_path / "a", change), message, base(folder), load=adapterhub.load,
            **({"as_adapterhub": True} if options is None else options))


def test_fields_that_change_no_output_are_left_alone_and_written_back(tmp_path):
    model, said = base("seq_bn"), {"dropout": 0.3, "init_weights": "uniform", "phm_dim": 9, "a_note": "of ours",
                                   "reduction_factor": {"default": 4, "7": 2}, "non_linearity": "ReLU"}
    path = copied("seq_bn", tmp_path / "a", lambda outer: (inner(**said)(outer), outer.update(type="text_task")))
    attachment = minipeft.load(model, path)
    written = adapterhub.files.written_config(attachment)
    assert {field: written["config"][field] for field in said} == said and written["type"] == "text_task"
    attachment.remove()


def test_a_seq_bn_without_the_second_residual_is_the_same_function(tmp_path):
    """As in AdapterPlus: x + F is the residual of the adapter, and nothing is added after it."""
    model = base("seq_bn")
    one = minipeft.load(model, FOLDERS["seq_bn"])
    same = copied("seq_bn", tmp_path / "a", inner(original_ln_after=False, residual_before_ln=False))
    assert minipeft.load(model, same).method == one.method
    for attachment in list(model.attachments.values()):
        attachment.remove()


# ---- old files


@pytest.mark.parametrize("said, meant", [("gelu", "gelu_new"), ("gelu_orig", "gelu"), ("swish", "swish")])
def test_without_a_version_the_activations_have_their_old_names(said, meant, tmp_path):
    model = base("seq_bn")
    old = copied("seq_bn", tmp_path / "a", lambda outer: (outer.pop("version"), inner(non_linearity=said)(outer)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attachment = minipeft.load(model, old)
    assert attachment.method.activation == meant and len(caught) == (said != meant)
    assert adapterhub.files.written_config(attachment)["config"]["non_linearity"] == meant
    attachment.remove()


@pytest.mark.parametrize("version, alpha", [
    ("adapters.1.0.1", 2), ("adapters.0.2.2", 2), ("adapters.1.1.0.dev0", 2), ("adapters.1.1.0rc1", 2),
    ("adapters.1.1.0", 6), ("adapters.1.10.0", 6), ("adapters.2.0.0", 6), ("3.2.1", 6), (None, 6), (7, 6)])
def test_before_version_1_1_the_alpha_of_a_lora_did_nothing(version, alpha, tmp_path):
    model, path = base("lora"), copied("lora", tmp_path / "a", lambda outer: outer.update(version=version))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attachment = minipeft.load(model, path)
    assert attachment.method.alpha == alpha and len(caught) == (alpha == 2)
    attachment.remove()


# ---- tensors


KEY = "encoder.block.0.layer.1.adapters.a.adapter_down.0.weight"
TENSORS = {
    "a transposed matrix": (lambda t: t.update({KEY: t[KEY].T}), r"down.0.weight has shape \[16, 4\]; expected"),
    "a row too few": (lambda t: t.update({KEY: t[KEY][:3]}), r"has shape \[3, 16\]; expected \[4, 16\]"),
    "nothing in it": (lambda t: t.update({KEY: t[KEY][:0]}), r"has shape \[0, 16\], no number at all"),
    "NaN": (lambda t: t.update({KEY: t[KEY] * numpy.nan}), f"{KEY} holds NaN or infinity"),
    "one too few": (lambda t: t.pop(KEY), f"Missing: '{KEY}' \\(1 in all\\)"),
    "one too many": (lambda t: t.update({"encoder.x": t[KEY]}), r"expected: 'encoder.x' \(1 in all\). Missing: none"),
    "none at all": (lambda t: t.clear(), "holds no tensor at all"),
    "integers": (lambda t: t.update({KEY: t[KEY].astype("int32")}), "has dtype int32; expected floating point")}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_refused(case, tmp_path):
    change, message = TENSORS[case]
    refused(copied("seq_bn", tmp_path / "a", tensors=change), message, base("seq_bn"))


def test_copies_of_one_prefix_that_differ_are_refused(tmp_path):
    key = "decoder.block.1.layer.0.SelfAttention.prefix_tuning.pool.prefix_tunings.a.cross_prefix.control_trans"
    path = copied("prefix_flat", tmp_path / "a", tensors=lambda t: t.update({key: t[key] + 1}))
    refused(path, "differ; expected the same array twice", base("prefix_flat"), load=adapterhub.load,
            as_adapterhub=True)


@pytest.mark.parametrize("prefix, warns", [("transformer.", 0), ("_orig_mod.", 1)])
def test_the_keys_of_another_class_of_model_and_those_of_a_compiled_one_are_read(prefix, warns, tmp_path):
    def renamed(tensors):
        for key in list(tensors):
            tensors[prefix + key] = tensors.pop(key)
    model = base("seq_bn")
    one = minipeft.load(model, FOLDERS["seq_bn"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other = minipeft.load(model, copied("seq_bn", tmp_path / "a", tensors=renamed))
    assert len(caught) == warns and all("were stripped" in str(w.message) or "were read" in str(w.message)
                                        for w in caught)
    assert {k: v.tobytes() for k, v in other.tensors.items()} == {k: v.tobytes() for k, v in one.tensors.items()}
    for attachment in list(model.attachments.values()):
        attachment.remove()


def test_a_pickle_is_not_opened_and_what_converts_it_is_said(tmp_path):
    path = copied("seq_bn", tmp_path / "a")
    (path / "adapter.safetensors").rename(path / "pytorch_adapter.bin")
    refused(path, re.escape("pytorch_adapter.bin is a pickle") + ".*v.clone.*'adapter.safetensors'", base("seq_bn"))
    (path / "pytorch_adapter.bin").unlink()
    refused(path, "holds no adapter.safetensors", base("seq_bn"), FileNotFoundError)
    (path / "adapter.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(path, "is a Git LFS pointer", base("seq_bn"))
    (path / "adapter_config.json").write_text("{")
    refused(path, "not valid JSON", base("seq_bn"))


def test_a_model_that_is_no_t5_is_refused():
    refused(FOLDERS["seq_bn"], "for T5 alone, and this is a Transformer",
            Case(("pre-LN", "q and v"), 1, 1, "float32", 0).model())
