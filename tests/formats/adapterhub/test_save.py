"""What is written for AdapterHub: whatever it can hold, in a form that means the same; everything else is refused."""
from __future__ import annotations

import json
import re

import numpy
import pytest

import minipeft
from minipeft import IA3, T5, Bottleneck, DoRA, LoRA, PrefixTuning, PromptTuning, Union
from minipeft.formats import adapterhub
from tests.methods.golden import FIXTURES
from tests.models_under_test import Case

RNG = numpy.random.default_rng
MODELS = {name: T5.from_pretrained(FIXTURES / "t5" / name) for name in ("v11", "deep")}  # gated, 2 + 2; relu, 2 + 3


def trained(model, method, name="x-1"):
    """An attachment as after training."""
    attachment, rng = minipeft.attach(model, method, RNG(0), name), RNG(1)
    for p in attachment.parameters.values():
        p.data = (p.data + 0.3 * rng.standard_normal(p.shape)).astype(p.dtype)
    return attachment


def outputs(model):
    ids = numpy.array([[5, 6, 7, 9, 1, 0], [3, 4, 8, 1, 0, 0]])
    return model(ids, numpy.array([[0, 8, 9, 12], [0, 4, 5, 1]]), ids != 0).data


# (a method, on which model, fields that are written)
WRITTEN = {
    "houlsby": (Bottleneck("houlsby", size=3, cross=True, activation="gelu"), "deep",
                {"mh_adapter": True, "cross_adapter": True, "output_adapter": True, "original_ln_before": False,
                 "reduction_factor": 4, "non_linearity": "gelu", "scaling": 1.0, "leave_out": []}),
    "pfeiffer": (Bottleneck("pfeiffer", size=5, activation="gelu_tanh", stacks="decoder"), "deep",
                 {"mh_adapter": False, "original_ln_before": True, "reduction_factor": 2.4,
                  "non_linearity": "gelu_pytorch_tanh", "leave_out": [0, 1], "init_weights": "mam_adapter"}),
    "parallel": (Bottleneck("parallel", size=24, scale=2.5, init="bert"), "deep",
                 {"is_parallel": True, "scaling": 2.5, "reduction_factor": 0.5, "init_weights": "bert"}),
    "some layers": (Bottleneck("double_seq_bn", 2, where=["encoder.1", "decoder.2.(attn|ff)"]), "deep",
                    {"leave_out": [0, 2, 3], "cross_adapter": False}),
    "LoRA": (LoRA(2, 7), "v11", {"alpha": 7, "r": 2, "attn_matrices": ["q", "v"], "leave_out": [],
                                 "intermediate_lora": False}),
    "LoRA beside attention": (LoRA(3, 0.1, 0.2, where=[r"wi_1\.weight$", "wo"]), "v11",
                              {"alpha": 0.1, "selfattn_lora": False, "intermediate_lora": True, "output_lora": True,
                               "dropout": 0.2}),
    "LoRA with its own scale": (LoRA(3, 2, where=["k"], scaling="alpha"), "deep", {"alpha": 6, "attn_matrices": ["k"]}),
    "LoRA by the root of r": (LoRA(4, 2, where=["q"], scaling="alpha/sqrt(r)"), "deep", {"alpha": 4}),
    "DoRA": (DoRA(2, 2), "v11", {"alpha": 2, "use_dora": True, "composition_mode": "add"}),
    "(IA)^3": (IA3("before"), "deep", {"composition_mode": "scale", "r": 1, "alpha": 1, "intermediate_lora": True,
                                       "attn_matrices": ["k", "v"]}),
    "(IA)^3 of a gated model": (IA3("before", ["q", "wi_1"]), "v11", {"attn_matrices": ["q"], "leave_out": []}),
    "a union": (Union(IA3("before", ["k"]), Bottleneck("houlsby", 3), LoRA(2, 4, where=["wo"])), "deep",
                {"architecture": "union"}),
    "a prefix": (PrefixTuning(3, bias="adapterhub"), "deep", {"flat": True, "prefix_length": 3}),
    "a prefix in the decoder": (PrefixTuning(2, ("decoder", "cross"), "adapterhub", mlp=6), "deep",
                                {"flat": False, "bottleneck_size": 6, "encoder_prefix": False, "cross_prefix": True})}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_written_says_and_means_the_same(case, tmp_path):
    method, name, fields = WRITTEN[case]
    model = MODELS[name].clone()
    attachment = trained(model, method)
    adapterhub.save(attachment, tmp_path / "a", "t5-small")
    outer = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert {field: outer["config"].get(field) for field in fields} == fields
    assert (outer["name"], outer["model_name"], outer["hidden_size"]) == ("x-1", "t5-small", model.config.d_model)
    before = outputs(model)
    attachment.remove()
    again = adapterhub.load(model, tmp_path / "a", as_adapterhub=True)
    assert abs(outputs(model) - before).max() <= 2e-6 * abs(before).max() and again.name == "a"
    adapterhub.save(again, tmp_path / "b")
    for file in ("adapter_config.json", "adapter.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("d, m", [(12, 5), (12, 7), (12, 11), (512, 48), (768, 47), (768, 767), (12, 24), (5, 49)])
def test_the_factor_that_is_written_gives_the_size_by_adapterhubs_rounding(d, m):
    assert max(1, int(d // adapterhub.bottleneck._factor(d, m))) == m


REFUSED = {
    "the norm": (Bottleneck("parallel", input="norm", size=2), "input is 'norm'; AdapterHub's parallel adapter read"),
    "a single site": (Bottleneck("houlsby", size=2, where="decoder.0.(attn|ff)|decoder.1.ff"),
                      "same places in each layer .*has none at decoder.1.attn.out"),
    "a rank for each place": (LoRA(2, 4, rank_pattern={"encoder": 3}), "have 2 pairs of rank and scale; AdapterHub"),
    "an alpha for each place": (LoRA(2, 4, alpha_pattern={r"\.k\.": 3}, where=["k", "v"]), "2 pairs of rank and scale"),
    "o": (LoRA(2, where=["q", "o"]), "AdapterHub has nothing at encoder.0.attn.o.weight"),
    "the gated matrix": (LoRA(2, where=["wi_0"]), "AdapterHub has nothing at encoder.0.ff.wi_0.weight"),
    "the table": (LoRA(2, where=["embedding"]), "AdapterHub has nothing at embedding.weight"),
    "q in self-attention alone": (LoRA(2, where=r"\.attn\.q\.weight"), "has none at decoder.0.cross.q.weight"),
    "PiSSA": (LoRA(2, init="pissa"), "init is 'pissa', which AdapterHub does not have"),
    "parts of a matrix": (LoRA(2, where=["v"], enable=(True, False)), r"enable is \(True, False\)"),
    "DoRA with another scale": (DoRA(2, 4), "alpha is 4, r 2 and norm 'output'; AdapterHub has DoRA with alpha = r"),
    "DoRA by columns": (DoRA(2, 2, norm="input"), "norm 'input'; AdapterHub has DoRA with alpha = r and norm 'output'"),
    "(IA)^3 of the paper": (IA3(), "its factors scale what .*ff.wo.weight reads"),
    "a prefix of the paper": (PrefixTuning(2), "it has bias 'none' and 6 places; AdapterHub's prefixes have the bias"),
    "a prefix in the encoder alone": (PrefixTuning(2, "encoder", "adapterhub"), "stand in every self-attention of the"),
    "a prefix in one layer": (PrefixTuning(2, bias="adapterhub", where=r"decoder\.1\.attn\.keys"), "1 places"),
    "a union at some places": (Union(LoRA(2, 4), Bottleneck("houlsby", 3), where=r"attn\.(q|out)"),
                               "where is .*, and AdapterHub's unions have the places of all of their parts"),
    "a union with a prompt": (Union(LoRA(2), PromptTuning(2)), "nothing like PromptTuning"),
    "a prompt": (PromptTuning(2), "cannot be written for AdapterHub, which has nothing like PromptTuning")}


@pytest.mark.parametrize("case", REFUSED)
def test_what_adapterhub_cannot_hold_is_refused_and_nothing_is_written(case, tmp_path):
    method, message = REFUSED[case]
    attachment = minipeft.attach(MODELS["v11"].clone(), method, RNG(0))
    for call in (lambda: adapterhub.save(attachment, tmp_path / "a"),
                 lambda: adapterhub.to_adapterhub(attachment, attachment.tensors)):
        with pytest.raises(ValueError, match=message):
            call()
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_a_full_folder_and_a_removed_attachment_are_refused(tmp_path):
    attachment = minipeft.attach(MODELS["v11"].clone(), LoRA(2), RNG(0))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(ValueError, match="full is not an empty folder"):
        adapterhub.save(attachment, tmp_path / "full")
    name = next(iter(attachment.parameters))
    attachment.parameters[name].data[0] = numpy.inf
    with pytest.raises(ValueError, match=f"{re.escape(name.replace('@lora', ''))} holds NaN or infinity: .* is not "):
        adapterhub.save(attachment, tmp_path / "a")
    attachment.remove()
    with pytest.raises(ValueError, match="'lora' was removed from its model"):
        adapterhub.save(attachment, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_link_to_an_empty_folder_stays_and_the_folder_is_filled(tmp_path):
    attachment = minipeft.attach(MODELS["v11"].clone(), LoRA(2), RNG(0))
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    adapterhub.save(attachment, tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"] and (tmp_path / "link").is_symlink()
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"adapter_config.json", "adapter.safetensors"}


def test_a_model_that_is_no_t5_is_refused(tmp_path):
    model = Case(("pre-LN", "q and v"), 1, 1, "float32", 0).model()
    with pytest.raises(ValueError, match="'lora' is on a Transformer, and for AdapterHub"):
        adapterhub.save(minipeft.attach(model, LoRA(1), RNG(0)), tmp_path / "a")


def test_arrays_have_the_names_of_the_attachment_and_its_shapes(tmp_path):
    attachment = minipeft.attach(MODELS["v11"].clone(), LoRA(2), RNG(0), "mine")
    name = "encoder.0.attn.q.weight@mine.A"
    found = adapterhub.to_adapterhub(attachment, {name: attachment.parameters[name].data})
    assert list(found) == ["encoder.block.0.layer.0.SelfAttention.q.loras.mine.lora_A"]
    with pytest.raises(ValueError, match="'encoder.0.attn.q.A' is no array of Attachment"):
        adapterhub.to_adapterhub(attachment, {"encoder.0.attn.q.A": 1})
    with pytest.raises(ValueError, match=r"has shape \[2\]; expected \[2, 16\]"):
        adapterhub.to_adapterhub(attachment, {name: numpy.ones(2)})


def test_a_lora_of_adapterhubs_can_be_written_for_peft_and_the_other_way_round(tmp_path):
    model = MODELS["v11"].clone()
    lora = trained(model, LoRA(2, 6, where=["q", "k"]))
    before = outputs(model)
    adapterhub.save(lora, tmp_path / "a")
    lora.remove()
    minipeft.formats.peft.save(minipeft.load(model, tmp_path / "a"), tmp_path / "b")
    model.attachments["a"].remove()
    again = minipeft.load(model, tmp_path / "b")
    assert outputs(model).tobytes() == before.tobytes()
    adapterhub.save(again, tmp_path / "c")
    a, c = (minipeft.files.read_tensors(tmp_path / folder / "adapter.safetensors")[0] for folder in "ac")
    assert all(numpy.array_equal(c[key.replace("x-1", "b")], array) for key, array in a.items()) and len(a) == len(c)
