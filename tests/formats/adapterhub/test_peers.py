"""The real library, where it is installed: what it writes is read here, and what is written here it reads."""
from __future__ import annotations

import logging

import numpy
import pytest

import minipeft
from minipeft import IA3, Bottleneck, DoRA, LoRA, PrefixTuning, Union
from minipeft.formats import adapterhub
from tests.formats.adapterhub.test_save import outputs, trained

IDS, DECODER = [[5, 6, 7, 9, 1, 0], [3, 4, 8, 1, 0, 0]], [[0, 8, 9, 12], [0, 4, 5, 1]]
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries warn of each other
CLOSE = 2e-6  # the softmax of theirs is in float32


@pytest.fixture(scope="module")
def peer():
    """adapters, torch and transformers, without what they log."""
    adapters = pytest.importorskip("adapters")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    logging.disable(logging.WARNING)
    yield adapters, torch, transformers
    logging.disable(logging.NOTSET)


@pytest.fixture
def folder(request, peer, tmp_path):
    """A tiny random T5 of transformers': gated without ties, or relu with them."""
    _, torch, transformers = peer
    torch.manual_seed(0)
    more = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if request.param == "gated" else {}
    config = transformers.T5Config(
        d_model=12, num_layers=2, num_decoder_layers=3, num_heads=3, d_kv=5, d_ff=20, vocab_size=30, dropout_rate=0,
        relative_attention_num_buckets=8, relative_attention_max_distance=16, decoder_start_token_id=0, **more)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


def of_theirs(peer, folder):
    model = peer[2].T5ForConditionalGeneration.from_pretrained(folder).eval()
    peer[0].init(model)
    return model


def their_outputs(peer, model):
    ids = peer[1].tensor(IDS)
    with peer[1].no_grad():
        return model.double()(input_ids=ids, attention_mask=(ids != 0).long(),
                              decoder_input_ids=peer[1].tensor(DECODER)).logits.numpy()


def on_both(cases, *gated):
    """All cases on the relu model, and those named `gated` on the other one, too."""
    return [(case, "relu") for case in cases] + [(case, "gated") for case in gated]


CONFIGS = {
    "seq_bn": lambda a: a.SeqBnConfig(reduction_factor=5), "par_bn": lambda a: a.ParBnConfig(),
    "double_seq_bn": lambda a: a.DoubleSeqBnConfig(reduction_factor=4, leave_out=[1, 3], cross_adapter=True),
    "lora": lambda a: a.LoRAConfig(r=2, alpha=6, intermediate_lora=True, output_lora=True, attn_matrices=["q", "k"]),
    "dora": lambda a: a.LoRAConfig(r=2, alpha=2, use_dora=True), "ia3": lambda a: a.IA3Config(),
    "prefix": lambda a: a.PrefixTuningConfig(prefix_length=3, bottleneck_size=7),
    "union": lambda a: a.ConfigUnion(a.LoRAConfig(r=2), a.ParBnConfig(), a.PrefixTuningConfig(flat=True)),
    "flat prefix": lambda a: a.PrefixTuningConfig(flat=True, prefix_length=3)}


@pytest.mark.parametrize("config, folder", on_both(CONFIGS, "lora", "ia3"), indirect=["folder"])
def test_what_adapterhub_writes_is_read(config, peer, folder, tmp_path):
    _, torch, _ = peer
    model = of_theirs(peer, folder)
    model.add_adapter("a", config=CONFIGS[config](peer[0]))
    model.set_active_adapters("a")
    for name, p in model.named_parameters():
        if any(part in name for part in (".adapters.", ".loras.", "prefix_tunings")):
            p.data += 0.3 * torch.randn_like(p)
    if "prefix" in config or config == "union":  # whose arrays share memory, which its own safetensors writer refuses
        model.save_adapter(str(tmp_path / "a"), "a")
        safetensors = pytest.importorskip("safetensors.torch")
        for pickled, target in (("pytorch_adapter.bin", "adapter"), ("pytorch_model_head.bin", "model_head")):
            arrays = torch.load(tmp_path / "a" / pickled, weights_only=True)
            safetensors.save_file({k: v.clone() for k, v in arrays.items()}, tmp_path / "a" / f"{target}.safetensors")
    else:
        model.save_adapter(str(tmp_path / "a"), "a", use_safetensors=True)
    ours = minipeft.T5.from_pretrained(folder, "float64")
    adapterhub.load(ours, tmp_path / "a", as_adapterhub=True)
    expected = their_outputs(peer, model)
    assert abs(outputs(ours) - expected).max() <= CLOSE * abs(expected).max()


METHODS = {
    "houlsby": Bottleneck("houlsby", size=3, cross=True, activation="gelu"), "LoRA": LoRA(2, 7),
    "pfeiffer": Bottleneck("pfeiffer", size=5, activation="gelu_tanh", stacks="decoder"),
    "parallel": Bottleneck("parallel", size=20, scale=2.5), "LoRA of wo": LoRA(3, 2, where=["wo"], scaling="alpha"),
    "union": Union(LoRA(2, 4), Bottleneck("par_bn", size=3), PrefixTuning(2, "decoder", "adapterhub")),
    "DoRA": DoRA(2, 2), "(IA)^3": IA3("before"), "prefix": PrefixTuning(3, bias="adapterhub"),
    "computed prefix": PrefixTuning(2, ("decoder", "cross"), "adapterhub", mlp=6)}


@pytest.mark.parametrize("method, folder", on_both(METHODS, "parallel", "(IA)^3"), indirect=["folder"])
def test_what_is_written_here_adapterhub_reads(method, peer, folder, tmp_path):
    ours = minipeft.T5.from_pretrained(folder, "float64")
    attachment = trained(ours, METHODS[method])
    adapterhub.save(attachment, tmp_path / "a")
    model, found = of_theirs(peer, folder).double(), {}
    model.set_active_adapters(model.load_adapter(str(tmp_path / "a"), use_safetensors=True, loading_info=found))
    expected = their_outputs(peer, model)
    assert found == {"missing_keys": [], "unexpected_keys": []}
    assert abs(outputs(ours) - expected).max() <= CLOSE * abs(expected).max()


@pytest.mark.parametrize("folder", ["relu", "gated"], indirect=True)
def test_without_an_adapter_both_models_are_the_same(peer, folder):
    """So the tests above compare adapters and nothing else."""
    expected = their_outputs(peer, of_theirs(peer, folder))
    found = outputs(minipeft.T5.from_pretrained(folder, "float64"))
    assert abs(found - expected).max() <= CLOSE * abs(expected).max() and numpy.isfinite(expected).all()
