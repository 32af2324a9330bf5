"""What we write is loaded by the real peft with equal logits, and what it writes by us.

Where peft is not installed, the golden folders stand in for it."""
import functools

import numpy
import pytest

import minipeft
from minipeft import T5, DoRA, LoRA
from minipeft.formats.peft import save
from tests.formats.golden import golden, logits
from tests.formats.peft.test_lora import METHODS, QV, changed_lora
from tests.methods.golden import FIXTURES, close

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE = 5e-6  # of the largest logit, in float32
WRITTEN = {**METHODS, "all linear": LoRA(1, 3, where=r"(attn|cross|ff)\.\w+\.weight"), "v10": LoRA(2, 3, init="pissa"),
           "dora of rslora": DoRA(2, 5, scaling="alpha/sqrt(r)", where=r"\.wo\."),
           "many places": LoRA(1, 3, where=r"(encoder.*\.(q|k|v|o|wi_.|wo)|decoder.1.*\.(q|k|wi_.|wo))\.weight")}
READ = {
    "q, v": {"target_modules": ["q", "v"], "r": 3, "lora_alpha": 5}, "pissa": {
        "target_modules": ["q", "wi_0"], "r": 4, "init_lora_weights": "pissa", "use_rslora": True},
    "all-linear": {"target_modules": "all-linear", "r": 2, "exclude_modules": ["o"], "lora_alpha": 3},
    "fan_in_fan_out": {"target_modules": ["q"], "r": 2, "fan_in_fan_out": True},
    "patterns": {"target_modules": r"(?!encoder).*\.(q|wo)", "use_dora": True, "rank_pattern": {"q": 4, "wo": 2},
                 "alpha_pattern": {"^decoder.*": 7}},
    "layers": {"target_modules": ["q", "k"], "layers_to_transform": [1], "init_lora_weights": "orthogonal", "r": 2}}


@functools.cache
def libraries():
    torch = pytest.importorskip("torch")
    return torch, pytest.importorskip("transformers"), pytest.importorskip("peft")


def theirs(name):
    return libraries()[1].T5ForConditionalGeneration.from_pretrained(FIXTURES / "t5" / name)


def their_logits(model, g):
    torch = libraries()[0]
    with torch.no_grad():
        return model.eval()(**{key: torch.tensor(g[key]) for key in (
            "input_ids", "attention_mask", "decoder_input_ids")}).logits.numpy()


@pytest.mark.parametrize("name", WRITTEN)
def test_the_real_peft_computes_with_our_directory_what_we_compute(name, tmp_path):
    base = "v10" if name == "v10" else "v11"
    g, model = golden(f"{QV}_tied" if name == "v10" else QV)[1], T5.from_pretrained(FIXTURES / "t5" / base)
    attachment = changed_lora(WRITTEN[name], model)
    save(attachment, tmp_path / "a")
    loaded = libraries()[2].PeftModel.from_pretrained(theirs(base), tmp_path / "a")
    if "embedding.weight" in attachment.places:  # which its forward ignores
        loaded = loaded.merge_and_unload()
    assert close(their_logits(loaded, g), logits(model, g), CLOSE)
    with attachment.off():
        assert not close(their_logits(loaded, g), logits(model, g), 1e-2), "the adapter does something"


@pytest.mark.parametrize("name", READ)
def test_we_compute_with_a_directory_of_the_real_peft_what_it_computes(name, tmp_path):
    torch, _, peft = libraries()
    g, model = golden(QV)[1], T5.from_pretrained(FIXTURES / "t5" / "v11")
    made = peft.get_peft_model(theirs("v11"), peft.LoraConfig(task_type="SEQ_2_SEQ_LM", **READ[name]))
    with torch.no_grad():
        for key, p in made.named_parameters():
            if "lora_" in key:
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(key)))
    made.save_pretrained(tmp_path / "a")
    minipeft.load(model, tmp_path / "a")
    assert close(logits(model, g), their_logits(made, g), CLOSE)
    save(model.attachments["a"], tmp_path / "b")
    again = peft.PeftModel.from_pretrained(theirs("v11"), tmp_path / "b")
    assert numpy.array_equal(their_logits(again, g), their_logits(made, g)), "written back, it is the same file"
