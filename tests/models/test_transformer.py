"""The Transformer of 2017: its equations recomputed by hand, its sizes, its own files."""
from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from minipeft import T5, T5Config, Transformer, TransformerConfig, report
from minipeft.files import STORAGE, read_tensors, write_tensors
from minipeft.nn.positions import Sinusoidal

SMALL: dict[str, Any] = dict(vocab_size=23, d_model=12, num_heads=3, d_ff=20, num_layers=2, num_decoder_layers=3)
PRE: dict[str, Any] = dict(pre_norm=True, final_norm=True, activation="gelu", positions="learned", max_length=16,
                           tie_embeddings=False)
VARIANTS: dict[str, dict[str, Any]] = {"post-LN": {}, "pre-LN": PRE, "learned": dict(positions="learned"),
                                       "untied": dict(tie_embeddings=False, label_smoothing=0.1)}
every_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())


def built(seed: int = 0, dtype: str = "float64", **fields: Any) -> Transformer:
    return Transformer(TransformerConfig(**{**SMALL, **fields}), np.random.default_rng(seed), dtype)


def ids_of(seed: int = 0, rows: int = 3, time: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 23, (rows, time))


# ----------------------------------------------------------------------------------------------------------- equations

def layer_norm(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    mean = x.mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(axis=-1, keepdims=True) + 1e-5) * w + b


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


class ByHand:
    """The model recomputed for one row at a time, head by head, position by position, from its arrays alone."""

    def __init__(self, model: Transformer):
        # norms and biases start as ones and zeros, which would hide a use in the wrong place
        rng = np.random.default_rng(99)
        for name, p in model.base_parameters.items():
            p.data = p.data + rng.uniform(-0.3, 0.3, p.shape)
        self.w, self.c = model.state(), model.config

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.w[name + ".weight"].T + self.w[name + ".bias"]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return layer_norm(x, self.w[name + ".weight"], self.w[name + ".bias"])

    def attention(self, name: str, x: np.ndarray, memory: np.ndarray, causal: bool) -> np.ndarray:
        d_k = self.c.d_model // self.c.num_heads
        q, k, v = self.linear(name + ".q", x), self.linear(name + ".k", memory), self.linear(name + ".v", memory)
        out = np.empty_like(q)
        for head in range(self.c.num_heads):
            part = slice(head * d_k, (head + 1) * d_k)
            for t in range(len(x)):
                seen = slice(0, t + 1 if causal else None)
                e = np.exp(k[seen, part] @ q[t, part] / math.sqrt(d_k))
                out[t, part] = e / e.sum() @ v[seen, part]
        return self.linear(name + ".o", out)

    def feed_forward(self, name: str, x: np.ndarray) -> np.ndarray:
        h = self.linear(name + ".wi", x)
        return self.linear(name + ".wo", np.maximum(h, 0) if self.c.activation == "relu" else gelu(h))

    def sublayer(self, name: str, x: np.ndarray, f: Any) -> np.ndarray:
        return x + f(self.norm(name, x)) if self.c.pre_norm else self.norm(name, x + f(x))

    def stack(self, name: str, layers: int, ids: np.ndarray, memory: np.ndarray | None) -> np.ndarray:
        x = self.w["embedding.weight"][ids] * math.sqrt(self.c.d_model)
        for t in range(len(ids)):
            for n in range(self.c.d_model):
                angle = t / 10000 ** (2 * (n // 2) / self.c.d_model)
                sinus = math.cos(angle) if n % 2 else math.sin(angle)
                x[t, n] += sinus if self.c.positions == "sinusoidal" else self.w[f"{name}.position.weight"][t, n]
        for i in range(layers):
            at, causal = f"{name}.{i}", memory is not None
            x = self.sublayer(at + ".attn_norm", x, lambda n: self.attention(at + ".attn", n, n, causal))
            if memory is not None:
                x = self.sublayer(at + ".cross_norm", x, lambda n: self.attention(at + ".cross", n, memory, False))
            x = self.sublayer(at + ".ff_norm", x, lambda n: self.feed_forward(at + ".ff", n))
        return self.norm(name + ".norm", x) if self.c.final_norm else x

    def logits(self, ids: np.ndarray, targets: np.ndarray) -> np.ndarray:
        memory = self.stack("encoder", self.c.num_layers, ids, None)
        hidden = self.stack("decoder", self.c.num_decoder_layers, targets, memory)
        return hidden @ self.w["embedding.weight" if self.c.tie_embeddings else "head.weight"].T


@pytest.mark.parametrize("fields", [*VARIANTS.values(), dict(final_norm=True), dict(pre_norm=True, num_heads=1)],
                         ids=[*VARIANTS, "final norm", "pre-LN without"])
def test_the_model_is_its_equations(fields):
    model = built(**fields)
    hand, ids, targets = ByHand(model), ids_of(), ids_of(1, time=5)
    found = model(ids, targets).data
    for row in range(3):
        expected = hand.logits(ids[row], targets[row])
        # the same sums in another order: 1e-12, as for a whole float64 model everywhere here
        assert np.abs(found[row] - expected).max() <= 1e-12 * np.abs(expected).max()


@given(st.integers(1, 9), st.integers(0, 3000), st.integers(1, 20))
def test_sinusoidal_positions_are_the_formula_from_any_start(d_model, start, time):
    table = Sinusoidal(d_model, "float64").embed(np.arange(start, start + time))
    assert table.shape == (time, d_model)
    for p in range(time):
        for n in range(d_model):
            angle = (start + p) / 10000 ** (2 * (n // 2) / d_model)
            # sin and cos are right to a rounding or two, but the angle, up to 3020, may be off by some of its own
            assert abs(table[p, n] - (math.cos(angle) if n % 2 else math.sin(angle))) <= 4 * 2.0**-53 * max(1, angle)


def test_sinusoidal_positions_are_no_parameter_and_have_the_model_s_dtype():
    assert not any("position" in name for name in built().base_parameters)
    assert Sinusoidal(6, "float32").embed(np.arange(3)).dtype == np.float32


def test_a_position_beyond_the_learned_table_is_refused_before_it_wraps():
    model = built(**PRE)
    assert model(ids_of(time=16), ids_of(time=16)).shape == (3, 16, 23)
    for ids, targets in ((ids_of(time=17), ids_of()), (ids_of(), ids_of(time=17))):
        with pytest.raises(ValueError, match=r"position 16; the table .* ends at 15 \(config.max_length\)"):
            model(ids, targets)


def test_first_values_are_xavier_and_normal_with_zero_biases():
    model = built(d_model=96, d_ff=200, vocab_size=400, dtype="float32")
    for name, array in model.state().items():
        if name.endswith("bias"):
            assert (array == 0).all()
        elif "norm" in name:
            assert (array == 1).all()
        elif name == "embedding.weight":
            # 38,400 draws: within 5 standard deviations, std / sqrt(2 n), of 96 ** -0.5
            assert abs(array.std(dtype=float) * 96 ** 0.5 - 1) < 5 / math.sqrt(2 * array.size)
        else:
            bound = math.sqrt(6 / sum(array.shape))
            assert np.abs(array).max() <= np.float32(bound)
            # n uniform draws: none beyond 0.99 of the bound has probability 0.99 ** 9216 = 1e-40
            assert np.abs(array).max() > 0.99 * bound
            assert abs(array.mean(dtype=float)) < 5 * bound / math.sqrt(array.size)


# -------------------------------------------------------------------------------------------------------------- counts

@pytest.mark.parametrize("fields, body, total", [
    ({}, 44_138_496, 63_082_496),
    (dict(d_model=1024, d_ff=4096, num_heads=16, dropout_rate=0.3), 176_357_376, 214_245_376)], ids=["base", "big"])
def test_the_paper_s_models_have_the_known_number_of_parameters(fields, body, total):
    model = Transformer(TransformerConfig(37000, **fields), None)
    counts = {name: p.data.size for name, p in model.base_parameters.items()}
    assert sum(counts.values()) == total and total - counts["embedding.weight"] == body


def test_base_is_the_paper_s_base_model():
    c = Transformer.base().config
    assert (c.num_layers, c.num_decoder_layers, c.d_model, c.d_ff, c.num_heads) == (6, 6, 512, 2048, 8)
    assert (c.dropout_rate, c.label_smoothing, c.activation, c.positions) == (0.1, 0.1, "relu", "sinusoidal")
    assert c.tie_embeddings and not c.pre_norm and not c.final_norm
    small = Transformer.base(vocab_size=10)
    assert sum(p.data.size for p in small.base_parameters.values()) == 44_138_496 + 10 * 512


def test_the_report_counts_base_by_component_and_prints_the_example():
    r = report(Transformer.base())
    assert r.components == {"attention": 18_874_368, "feed-forward": 25_165_824, "embedding": 37000 * 512,
                            "norm": (6 * 2 + 6 * 3) * 2 * 512, "position": 0, "head": 0,
                            "bias": (6 + 12) * 4 * 512 + 12 * (2048 + 512)}
    assert sum(r.components.values()) == r.all == r.trainable == 63_082_496 and r.percent == 100
    assert (r.weight_bytes, r.training_bytes) == (4 * r.all, 12 * r.all)
    text = str(r)
    # a head's 512 x 64 with rank 8: 8 (512 + 64) = 4,608 for 32,768; a whole 512 x 512: 8,192 for 262,144
    assert re.search(r"512 x 64: 4,608 for 32,768, 85\.94 % fewer", text)
    assert re.search(r"512 x 512: 8,192 for 262,144, 96\.88 % fewer", text)
    assert 1 - 4608 / 32768 == 0.859375 and 1 - 8192 / 262144 == 0.96875
    assert text.startswith("trainable model parameters: 63082496\nall model parameters: 63082496\n"
                           "percentage of trainable model parameters: 100.00%\n")
    assert re.search(r"attention +18,874,368 +29\.9 %", text) and "position" not in text and "head " not in text


def test_the_report_counts_what_is_asked_for():
    model = built(**PRE)
    params = {name: p for name, p in model.base_parameters.items() if name.endswith("bias")}
    r = report(model, params)
    assert r.trainable == sum(p.data.size for p in params.values()) and r.training_bytes == 3 * 8 * r.trainable
    assert r.all == sum(p.data.size for p in model.base_parameters.values()) == sum(r.components.values())
    assert r.components["position"] == 2 * 16 * 12 and r.components["embedding"] == r.components["head"] == 23 * 12
    assert r.components["norm"] == (2 * 2 + 3 * 3 + 2) * 2 * 12 and 0 < r.percent < 100


# --------------------------------------------------------------------------------------------------------------- files

@every_variant
@pytest.mark.parametrize("storage", [None, *STORAGE])
def test_a_saved_model_is_loaded_as_it_was_rounded_once(tmp_path, fields, storage):
    model = built(**fields)
    model.save_pretrained(tmp_path / "new" / "folder", storage)
    wide = Transformer.from_pretrained(tmp_path / "new" / "folder", "float64")
    narrow = Transformer.from_pretrained(str(tmp_path / "new" / "folder"))
    assert wide.config == narrow.config == model.config and wide.label_smoothing == model.label_smoothing
    unit = {None: 0, "float64": 0, "float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}[storage]
    for name, array in model.state().items():
        assert (wide.state()[name].dtype, narrow.state()[name].dtype) == (np.float64, np.float32)
        # half a unit in the last place; float16 is subnormal below 2^-14, and then its spacing is 2^-24
        assert (np.abs(wide.state()[name] - array) <= np.maximum(unit * np.abs(array), 2**-25 * (unit > 0))).all()
        assert np.array_equal(narrow.state()[name], wide.state()[name].astype(np.float32))
    if unit == 0:
        assert np.array_equal(wide(ids_of(), ids_of()).data, model(ids_of(), ids_of()).data)
    metadata = read_tensors(tmp_path / "new" / "folder" / "model.safetensors")[1]
    assert metadata == {"format": "minipeft", "config_sha256": model.config.digest()}


def saved(path: Any, config: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None) -> None:
    """A folder with some config entries and tensors changed; None leaves them out."""
    built().save_pretrained(path)
    values, (arrays, _) = json.loads((path / "config.json").read_text()), read_tensors(path / "model.safetensors")
    values |= config or {}
    arrays |= tensors or {}
    (path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    write_tensors(path / "model.safetensors", {k: v for k, v in arrays.items() if v is not None})


@pytest.mark.parametrize("message, tensors", [
    ("1 missing: decoder.2.cross.k.bias", {"decoder.2.cross.k.bias": None}),
    ("1 unexpected: head.weight", {"head.weight": np.zeros((23, 12))}),
    ("1 unexpected: encoder.position.weight", {"encoder.position.weight": np.zeros((512, 12))}),
    (r"1 missing: decoder.2.cross.k.bias; 1 unexpected: more", {"decoder.2.cross.k.bias": None, "more": np.zeros(1)}),
    (r"encoder.0.ff.wi.weight has shape \[12, 20\]; expected \[20, 12\]",
     {"encoder.0.ff.wi.weight": np.zeros((12, 20))}),
    (r"encoder.0.ff.wi.bias has shape \[\]; expected \[20\]", {"encoder.0.ff.wi.bias": np.zeros(())}),
    ("encoder.0.ff.wi.bias has dtype int32", {"encoder.0.ff.wi.bias": np.zeros(20, np.int32)})])
def test_missing_extra_and_misshapen_tensors_are_named(tmp_path, message, tensors):
    saved(tmp_path, tensors=tensors)
    with pytest.raises(ValueError, match=message):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("message, config", [
    ("vocab_size is '23'; expected an integer >= 1", {"vocab_size": "23"}),
    ("missing vocab_size", {"vocab_size": None}), ("unknown heads, more", {"heads": 3, "more": 1}),
    ("missing vocab_size; unknown heads", {"vocab_size": None, "heads": 3}),
    ("vocab_size is 23.0", {"vocab_size": 23.0}), ("vocab_size is True", {"vocab_size": True}),
    ("num_heads is 5; expected a divisor of d_model 12", {"num_heads": 5}), ("d_model is 0", {"d_model": 0}),
    ("pre_norm is 1; expected true or false", {"pre_norm": 1}), ("pre_norm is 'no'", {"pre_norm": "no"}),
    ("activation is 'tanh'; expected one of relu, gelu", {"activation": "tanh"}),
    ("activation is 3", {"activation": 3}), ("dropout_rate is -1", {"dropout_rate": -1}),
    ("positions is 'rotary'; expected 'sinusoidal' or 'learned'", {"positions": "rotary"}),
    (r"dropout_rate is 1; expected a number in \[0, 1\)", {"dropout_rate": 1}),
    ("label_smoothing is 1.5", {"label_smoothing": 1.5}), ("label_smoothing is '0'", {"label_smoothing": "0"}),
    ("layer_norm_eps is nan", {"layer_norm_eps": math.nan}), ("layer_norm_eps is inf", {"layer_norm_eps": math.inf}),
    ("pad_token_id is 23; expected an id below vocab_size 23", {"pad_token_id": 23}),
    ("eos_token_id is -1; expected an integer >= 0", {"eos_token_id": -1}), ("max_length is 0", {"max_length": 0}),
    ("model_type is not 'minipeft-transformer'", {"model_type": None}),
    ("model_type is not 'minipeft-transformer'; for T5 use T5.from_pretrained", {"model_type": "t5"})],
    ids=lambda x: x if isinstance(x, str) else "")
def test_a_config_field_that_is_wrong_missing_or_unknown_is_named(tmp_path, message, config):
    saved(tmp_path, config)
    with pytest.raises(ValueError, match=message):
        Transformer.from_pretrained(tmp_path)


def test_each_model_refuses_the_other_s_folder(tmp_path):
    built().save_pretrained(tmp_path / "ours")
    T5(T5Config(23, 12, 5, 3, 20, 1, 1), None).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="model_type is 'minipeft-transformer'; expected 't5'"):
        T5.from_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="for T5 use T5.from_pretrained"):
        Transformer.from_pretrained(tmp_path / "t5")


def test_a_folder_that_lacks_a_file_or_has_a_damaged_one_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        Transformer.from_pretrained(tmp_path)
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole + b"\0", whole[:200]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors"):
            Transformer.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        Transformer.from_pretrained(tmp_path)
    file.write_bytes(whole)
    for text in ("", "[]", "{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json"):
            Transformer.from_pretrained(tmp_path)
