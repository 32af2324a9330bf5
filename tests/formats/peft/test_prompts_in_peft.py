"""Prompts and prefixes of the real peft, loaded here, and ours, loaded there: where peft is installed."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before its libraries are loaded: saving would ask the hub for the base
peft = pytest.importorskip("peft")
torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

import minipeft  # noqa: E402
from minipeft import PrefixTuning, PromptTuning, T5  # noqa: E402
from minipeft.formats.peft import save, to_peft  # noqa: E402
from tests.formats.peft.prompt_folders import KEY, RNG, TASK, t5  # noqa: E402

IDS = numpy.array([[5, 6, 7, 9, 11, 1], [3, 4, 8, 1, 0, 0], [0, 0, 3, 2, 9, 1]])  # padded on either side
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 0).astype(int),
         "labels": numpy.array([[8, 9, 12, 1], [4, 5, 1, -100], [7, 1, -100, -100]])}
WIDE = {"d_kv": 5, "tie_word_embeddings": False}


def prompt(p: int, n: int | None = None) -> Any:
    return peft.PromptTuningConfig(num_virtual_tokens=p, num_transformer_submodules=n, **TASK)


def encoder(p: int, kind: str) -> Any:
    return peft.PromptEncoderConfig(num_virtual_tokens=p, encoder_hidden_size=7, encoder_reparameterization_type=kind,
                                    **TASK)


def prefix(p: int, **fields: Any) -> Any:
    return peft.PrefixTuningConfig(num_virtual_tokens=p, **TASK, **fields)


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """sizes of a T5 -> (our model, a function that makes the same model of transformers), from one folder."""
    def make(*sizes: int, **fields: Any) -> tuple[T5, Any]:
        made = t5(*sizes, **fields)
        for i, p in enumerate(made.base_parameters.values()):  # so that attention decides, with large position tables
            p.data = (p.data + 0.3 * RNG(i).standard_normal(p.shape)).astype("float32")
        made.save_pretrained(tmp_path / "base", "float32")
        return T5.from_pretrained(tmp_path / "base"), lambda: transformers.T5ForConditionalGeneration.from_pretrained(
            tmp_path / "base").eval()
    return make


def theirs(model: Any) -> tuple[numpy.ndarray, Any]:
    """(logits, loss)."""
    found = model.eval()(**{name: torch.tensor(array) for name, array in BATCH.items()})
    return found.logits.detach().numpy(), found.loss


def ours(model: T5) -> numpy.ndarray:
    return model(IDS, model.shift_right(BATCH["labels"]), BATCH["attention_mask"]).data


def close(found: numpy.ndarray, wanted: numpy.ndarray) -> bool:
    """Both are float32."""
    return bool(abs(found - wanted).max() <= 2e-5 * abs(wanted).max())


@pytest.mark.parametrize("sizes, fields, config", [
    ((2, 3), {}, lambda: prompt(1)), ((1, 1), WIDE, lambda: prompt(3, 1)), ((3, 1), WIDE, lambda: prompt(2, 3)),
    ((2, 2), {}, lambda: encoder(1, "MLP")), ((3, 2), WIDE, lambda: encoder(3, "LSTM")),
    ((1, 1), {}, lambda: prefix(1)), ((2, 2), {}, lambda: prefix(3)),
    ((3, 3), {"tie_word_embeddings": False}, lambda: prefix(2)),
    ((4, 4), {}, lambda: prefix(1)), ((4, 3), {}, lambda: prefix(2, prefix_projection=True, encoder_hidden_size=6)),
    ((4, 2), {}, lambda: prefix(2)), ((3, 2), WIDE, lambda: prefix(2, token_dim=15)),
    ((2, 4), {}, lambda: prefix(2, num_layers=4)), ((2, 3), WIDE, lambda: prefix(1, num_layers=3, token_dim=15)),
    ((2, 2), {}, lambda: prefix(1, num_layers=4))], ids=range(15))
def test_a_prompt_of_peft_gives_its_logits_and_gradients_here_and_comes_back_to_it(
        saved, sizes, fields, config, tmp_path):
    model, base = saved(*sizes, **fields)
    torch.manual_seed(0)
    trained = peft.get_peft_model(base(), config())
    with torch.no_grad():
        for p in trained.prompt_encoder.parameters():
            p.normal_()
    trained.save_pretrained(tmp_path / "a")
    other = peft.PeftModel.from_pretrained(base(), tmp_path / "a")
    rows = other.prompt_encoder["default"].embedding.weight.requires_grad_(True)
    wanted, loss = theirs(other)
    loss.backward()
    before = ours(model)
    attachment = minipeft.load(model, tmp_path / "a", as_peft=True)
    assert close(ours(model), wanted) and not close(before, wanted)
    _, grads = minipeft.value_and_grad(lambda: model.loss(**BATCH), attachment.parameters)
    assert close(to_peft(attachment, grads)[KEY], rows.grad.numpy())
    save(attachment, tmp_path / "b")
    again, _ = theirs(peft.PeftModel.from_pretrained(base(), tmp_path / "b"))
    assert numpy.array_equal(again, wanted)


@pytest.mark.parametrize("sizes, fields, method", [
    ((2, 3), {}, PromptTuning(3, "random")), ((1, 1), WIDE, PromptTuning(1, "random")),
    *[((layers, depth), fields, PrefixTuning(2, "decoder", "earlier", slices=shared))
      for layers, depth, fields, shared in (
          (2, 2, {}, "peft"), (2, 2, WIDE, "own"), (4, 4, {}, "own"), (3, 3, WIDE, "own"), (1, 1, {}, "own"),
          (4, 3, WIDE, "peft"), (1, 4, {}, "own"), (2, 4, WIDE, 4), (4, 2, {}, "own"))]], ids=repr)
def test_a_prompt_made_here_has_the_same_logits_in_peft(saved, sizes, fields, method, tmp_path):
    model, base = saved(*sizes, **fields)
    before = ours(model)
    attachment = minipeft.attach(model, method, RNG(0), "a")
    for i, p in enumerate(attachment.parameters.values()):
        p.data = RNG(i).standard_normal(p.shape).astype(p.dtype)
    save(attachment, tmp_path / "a")
    found, _ = theirs(peft.PeftModel.from_pretrained(base(), tmp_path / "a"))
    assert close(found, ours(model)) and not close(found, before)


@pytest.mark.parametrize("fields", [{}, {"num_layers": 3}], ids=["tied", "own"])
def test_generation_here_is_that_of_the_forward_of_peft_under_a_prefix(saved, fields, tmp_path):
    """PEFT's own generation counts the positions of the tokens from 0, as if there were no prefix (0.21.2)."""
    model, base = saved(2, 2)
    torch.manual_seed(1)
    trained = peft.get_peft_model(base(), prefix(3, **fields)).eval()
    trained.save_pretrained(tmp_path / "a")
    minipeft.load(model, tmp_path / "a", as_peft=True)
    ids = torch.zeros((3, 1), dtype=torch.long)
    for _ in range(5):
        found = trained(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(BATCH["attention_mask"]),
                        decoder_input_ids=ids)
        ids = torch.cat([ids, found.logits[:, -1].argmax(-1)[:, None]], 1)
    assert model.generate(IDS, BATCH["attention_mask"], 5).tolist() == ids.tolist()
