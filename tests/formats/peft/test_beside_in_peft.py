"""Saved modules and rows of tables of the real peft, loaded here, and ours, loaded there: where peft is installed."""
from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before its libraries are loaded: saving would ask the hub for the base
peft = pytest.importorskip("peft")
torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

import minipeft  # noqa: E402
from minipeft import T5  # noqa: E402
from minipeft.formats.peft import save  # noqa: E402
from minipeft.formats.peft.files import Source  # noqa: E402
from minipeft.laws.models import batch_for  # noqa: E402
from tests.formats.peft.test_beside import TABLE, WRITTEN, attached, t5  # noqa: E402
from tests.methods.golden import close  # noqa: E402

BATCH = batch_for(13, 0)
FLOAT32 = 3e-6  # of the largest logit, over a model of two blocks


def base(tied: bool, tmp_path: Path) -> Path:
    t5(tied, "float32").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def theirs(folder: Path) -> Any:
    return transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()


def their_logits(model: Any) -> numpy.ndarray:
    with torch.no_grad():
        return model(**{name: torch.tensor(array) for name, array in BATCH.items()}).logits.numpy()


def our_logits(model: T5) -> numpy.ndarray:
    return model(BATCH["input_ids"], model.shift_right(BATCH["labels"]), BATCH["attention_mask"]).data


@pytest.mark.parametrize("name", WRITTEN)
def test_what_we_write_gives_the_same_logits_there(name, tmp_path):
    tied, parts, *_ = WRITTEN[name]
    folder = base(tied, tmp_path)
    model = T5.from_pretrained(folder)
    save(attached(model, *parts), tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True` and a tied layer")
        found = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "a")
    assert close(our_logits(model), their_logits(found), FLOAT32)
    if name != "tied, table":  # there their merge loses the scale of the logits
        assert close(our_logits(model), their_logits(found.merge_and_unload()), FLOAT32)


OTHERS = {  # methods of theirs with a new head beside them, and ours
    "IA3": lambda **f: peft.IA3Config(**f), "LN_TUNING": lambda **f: peft.LNTuningConfig(**f),
    "VERA": lambda **f: peft.VeraConfig(r=2, target_modules=["q"], **f),
    "OFT": lambda **f: peft.OFTConfig(oft_block_size=4, r=0, target_modules=["q"], **f),
    "SHIRA": lambda **f: peft.ShiraConfig(r=2, target_modules=["q"], **f),
    "PROMPT_TUNING": lambda **f: prompt(peft.PromptTuningConfig(num_virtual_tokens=3), **f),
    "P_TUNING": lambda **f: prompt(peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=7), **f)}


def prompt(config: Any, **fields: Any) -> Any:
    """Their classes of prompts take the fields that they share with others afterwards."""
    for field, value in fields.items():
        setattr(config, field, value)
    return config


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_head_beside_another_method_acts_here_and_there_and_is_written_back(name, tmp_path):
    folder = base(False, tmp_path)
    made = peft.get_peft_model(theirs(folder), OTHERS[name](task_type="SEQ_2_SEQ_LM", modules_to_save=["lm_head"]))
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    made.eval().save_pretrained(tmp_path / "a")
    model = T5.from_pretrained(folder)
    found = minipeft.load(model, tmp_path / "a")
    assert list(found.method.parts[1].places(model)) == ["head.weight"]
    again = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "a")  # a prompt's network is not in the file
    assert close(our_logits(model), their_logits(again), FLOAT32)
    save(found, tmp_path / "b")
    written = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "b")
    assert close(their_logits(written), their_logits(again), 1e-7)


THEIRS = {"head": dict(modules_to_save=["lm_head"]), "rows": dict(trainable_token_indices=[9, 3]),
          "rows of a head": dict(trainable_token_indices={"lm_head": [9, 3]}),
          "tied rows": dict(trainable_token_indices=[9, 3], ensure_weight_tying=True),
          "attention": dict(modules_to_save=["SelfAttention"], target_modules=["wi", "k"]),
          "o": dict(modules_to_save=["o", "norm"]), "biases": dict(bias="all"),
          "lora on a head": dict(target_modules=["q", "lm_head"])}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_they_write_gives_the_same_logits_here(name, tied, tmp_path):
    folder = base(tied, tmp_path)
    made = peft.get_peft_model(theirs(folder), peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=2, lora_alpha=3, **{"target_modules": ["q"], **THEIRS[name]}))
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    made.eval().save_pretrained(tmp_path / "a")
    model = T5.from_pretrained(folder)
    if tied and "head" in name:
        with pytest.raises(ValueError, match="on this model lm_head has the weight of shared"):
            minipeft.load(model, tmp_path / "a")
        return
    minipeft.load(model, tmp_path / "a")
    wanted = their_logits(made if tied or name not in ("rows", "tied rows") else made.merge_and_unload())
    assert close(our_logits(model), wanted, FLOAT32)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_gives_what_is_saved_for_shared_to_no_use_of_it(tied, tmp_path):
    """The reason for our warning, and for writing "embed_tokens"."""
    folder = base(tied, tmp_path)
    model = T5.from_pretrained(folder)
    attachment = attached(model, TABLE["whole"])
    attachment.source = Source({"peft_type": "LORA", "modules_to_save": ["shared"]})
    save(attachment, tmp_path / "a")
    save(attached(T5.from_pretrained(folder)), tmp_path / "lora")
    found, plain = (their_logits(peft.PeftModel.from_pretrained(theirs(folder), tmp_path / at)) for at in ("a", "lora"))
    assert close(plain, found, FLOAT32) and not close(our_logits(model), found, 1e-2)
