"""The real bitsandbytes and transformers read what we write, and we read what they write, with the same numbers.

Where they are not installed, the golden folders stand in for them (`test_quantized.py`)."""
import functools

import numpy
import pytest

import minipeft
from minipeft import T5
from minipeft.quant import QuantizedWeight
from tests.methods.golden import close
from tests.models.test_quantized import CLOSE, CONFIG, IDS, t5

pytestmark = pytest.mark.filterwarnings("ignore")
LINEAR = r"(attn|cross)\.\w\.weight|wi_\d"  # what transformers quantizes by default: wo and the head stay
KINDS = [("nf4", True, LINEAR), ("nf4", False, r"(encoder.*attn|cross)\.\w\.weight"), ("fp4", False, LINEAR),
         ("fp4", True, rf"head|{LINEAR}")]


@functools.cache
def libraries():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    return torch, transformers, pytest.importorskip("bitsandbytes")


def their_logits(model):
    torch = libraries()[0]
    ids = torch.tensor(IDS)
    return model.train(False)(input_ids=ids, decoder_input_ids=ids).logits.detach().numpy()


def their_weights(model):
    """{key: dequantized} in float32."""
    torch, _, bnb = libraries()
    found = {}
    for key, p in model.named_parameters():
        if isinstance(p, bnb.nn.Params4bit):
            kept, p.quant_state.dtype = p.quant_state.dtype, torch.float32
            found[key] = bnb.functional.dequantize_4bit(p.data, p.quant_state).numpy()
            p.quant_state.dtype = kept
    return found


def ours(model):
    return {model.to_hf_name(name): slot.base.dense().data for name, slot in model.slots.items()
            if isinstance(slot.base, QuantizedWeight)}


def equal(a, b):
    return a.keys() == b.keys() and len(a) > 0 and all(numpy.array_equal(a[key], b[key]) for key in a)


def loaded(folder, **options):
    torch, transformers, _ = libraries()
    return transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, device_map="cpu",
                                                                   **options)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("kind, double, where", KINDS)
def test_transformers_reads_what_we_write(kind, double, where, dtype, tmp_path):
    libraries()
    model = t5()
    minipeft.quantize(model, kind, where, double=double)
    model.save_pretrained(tmp_path, dtype)
    model, theirs = T5.from_pretrained(tmp_path), loaded(tmp_path)
    assert equal(their_weights(theirs), ours(model))
    assert close(their_logits(theirs), model(IDS, IDS).data, CLOSE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind, double", [("nf4", True), ("nf4", False), ("fp4", True)])
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_we_read_what_transformers_writes(kind, double, dtype, shard, tmp_path):
    torch, transformers, _ = libraries()
    t5().save_pretrained(tmp_path / "plain")
    quantized = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "plain", dtype=getattr(torch, dtype), device_map="cpu",
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.float32))
    quantized.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    weights = their_weights(quantized)
    model = T5.from_pretrained(tmp_path / "theirs")
    assert equal(weights, ours(model)) and CONFIG == model.config
    assert close(their_logits(loaded(tmp_path / "theirs")), model(IDS, IDS).data, CLOSE)
