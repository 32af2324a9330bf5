"""The real PEFT and the zoo: what it writes is read here, and what is written here it reads, with equal logits.

Where PEFT is not installed, golden directories stand for the first half."""
from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest

import minipeft
from minipeft import IA3, OFT, HiRA, LoHa, LoKr, Selective, T5, VeRA
from minipeft.formats.peft import save
from minipeft.laws.models import moved
from tests.methods.golden import FIXTURES, close

FLOAT32 = 1e-3  # of logits up to 30, in which the two libraries round differently
IDS, DECODER = (numpy.random.default_rng(seed).integers(2, 48, (2, n)) for seed, n in ((0, 7), (1, 5)))
MASK = {name: numpy.random.default_rng(2).permutation(256)[:64]
        for name in ("encoder.0.attn.q.weight", "decoder.1.cross.v.weight")}


@pytest.fixture(autouse=True)
def quiet():
    """PEFT and transformers warn of much that is meant so here."""
    pytest.importorskip("peft"), pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def theirs(base: str, adapter: Path | None = None, merged: bool = False) -> numpy.ndarray:
    """The logits of the real library."""
    import peft
    model = hf(base)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
        model = model.merge_and_unload() if merged else model
    return logits_of(model)


def hf(base: str) -> Any:
    import transformers
    return transformers.T5ForConditionalGeneration.from_pretrained(FIXTURES / "t5" / base).eval()


def logits_of(model: Any) -> numpy.ndarray:
    import torch
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS), decoder_input_ids=torch.tensor(DECODER)).logits.double().numpy()


METHODS = {  # {what: (method, whether PEFT applies it only when it merges)}
    "IA3": (IA3(), False), "IA3 before": (IA3("before"), False),
    "IA3 of other inputs": (IA3(where=r"\.(q|o)\.weight|encoder\.0\.ff\.wo\.", inputs=r"\.o\."), False),
    "norms": (Selective(component="norm"), False),
    "whole weights": (Selective(where=[r"^encoder\.[01]\.(attn\.q|ff\.wo)\.", "position"]), False),
    "rows": (Selective(rows=(9, 5, 20, 7)), False), "elements": (Selective(mask=MASK), False),
    "VeRA": (VeRA(5), False), "VeRA of a key": (VeRA(5, key=7, where=["q", "wo"]), False),
    "LoHa": (LoHa(2, 3, rank_pattern={r"\.v\.": 1}, alpha_pattern={"encoder": 7}), False),
    "LoKr": (LoKr(2, 5, ["q", "wo"], factor=4, decompose_both=True), False),
    "LoKr without a scale": (LoKr(30, 5, ["q", "wo"], rank_pattern={"wo": 1}, alpha_pattern={"encoder": 2}), False),
    "HiRA": (HiRA(2), False), "HiRA of the table": (HiRA(2, ["embedding"]), True),
    **{f"OFT {form}": (OFT(4, ["q", "wo"], form == "paper", form, 6), False)
       for form in ("paper", "transposed", "neumann")},
    **{f"OFT {form} of the table": (OFT(4, ["embedding"], cayley=form), True) for form in ("paper", "neumann")},
    "OFT of other sizes": (OFT(4, ["q", "wo"], block_size_pattern={"wo": 6}), False)}


@pytest.mark.parametrize("what", METHODS)
def test_what_is_written_here_the_real_peft_reads_with_equal_logits(what, tmp_path):
    method, merged = METHODS[what]
    model = T5.from_pretrained(FIXTURES / "t5" / "v10", "float64")
    base = model(IDS, DECODER).data
    attachment = minipeft.attach(model, method, numpy.random.default_rng(0), "a")
    moved(attachment, numpy.random.default_rng(1), 0.2)
    save(attachment, tmp_path / "a")
    assert close(theirs("v10", tmp_path / "a", merged), model(IDS, DECODER).data, FLOAT32)
    assert not close(base, model(IDS, DECODER).data, 10 * FLOAT32), "it does something"


CONFIGS = [  # (class in peft, base, fields, whether PEFT applies it only when it merges)
    ("IA3Config", "v11", dict(target_modules=["q", "wi_1", "v"], feedforward_modules=["v", "wi_1"]), False),
    ("IA3Config", "v10", dict(target_modules=r".*\.(q|wo)", feedforward_modules=".*encoder.*wo"), False),
    ("LNTuningConfig", "v10", dict(target_modules=["layer_norm", "k"], exclude_modules=".*encoder.*"), False),
    ("TrainableTokensConfig", "v10", dict(token_indices=[9, 40, 5]), False),
    ("TrainableTokensConfig", "v11", dict(token_indices=[9, 40, 5]), True),
    ("VeraConfig", "v11", dict(r=30, target_modules=["o"], save_projection=False, projection_prng_key=5), False),
    ("LoHaConfig", "v11", dict(r=3, target_modules="all-linear", rank_pattern={"encoder.*q": 1, "o": 2}), False),
    ("LoKrConfig", "v11", dict(r=2, alpha=7, decompose_factor=4, decompose_both=True, target_modules=["o"]), False),
    ("LoKrConfig", "v10", dict(r=2, decompose_factor=5, target_modules=["q"], rank_pattern={"q": 20}), False),
    ("HiraConfig", "v11", dict(r=3, target_modules=["k", "wi_0"], rank_pattern={"k": 1}), False),
    ("HiraConfig", "v11", dict(r=3, target_modules=["shared"]), True),
    ("OFTConfig", "v11", dict(oft_block_size=5, target_modules=["q", "o"]), False),
    ("OFTConfig", "v11", dict(oft_block_size=0, r=3, target_modules=["k", "wo"], block_share=True), False),
    ("OFTConfig", "v10", dict(oft_block_size=8, num_cayley_neumann_terms=3), False),
    ("OFTConfig", "v11", dict(oft_block_size=4, use_cayley_neumann=False, target_modules=["shared"]), True),
    ("ShiraConfig", "v11", dict(r=3, target_modules=["q", "wo"]), False)]


@pytest.mark.parametrize("kind, base, fields, merged", CONFIGS, ids=str)
def test_what_the_real_peft_writes_is_read_here_with_equal_logits_and_written(kind, base, fields, merged, tmp_path):
    import peft
    import torch
    model = peft.get_peft_model(hf(base), getattr(peft, kind)(task_type="SEQ_2_SEQ_LM", **fields))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "theirs")
    ours = T5.from_pretrained(FIXTURES / "t5" / base, "float64")
    attachment = minipeft.load(ours, tmp_path / "theirs")
    expected = theirs(base, tmp_path / "theirs", merged)
    assert close(ours(IDS, DECODER).data, expected, FLOAT32)
    assert not close(theirs(base), expected, 10 * FLOAT32), "it does something"
    save(attachment, tmp_path / "ours")
    assert close(theirs(base, tmp_path / "ours", merged), expected, 1e-6)
