"""Greedy decoding: with a cache and without one the same, and it ends when every row has ended."""
from __future__ import annotations

from typing import Any, Callable

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from minipeft import T5, T5Config, Tensor, Transformer, TransformerConfig
from minipeft.engine import tensor

VOCAB = 23
SIZES: dict[str, Any] = dict(vocab_size=VOCAB, d_model=12, num_heads=3, d_ff=20, num_layers=2, num_decoder_layers=3)
T5_SIZES: dict[str, Any] = dict(SIZES, d_kv=5, relative_attention_num_buckets=8, relative_attention_max_distance=16)
IDS_OF: dict[str, int] = dict(pad_token_id=3, eos_token_id=2, decoder_start_token_id=5)


def t5_v10(seed: int = 0, dtype: str = "float64", **fields: Any) -> T5:
    return T5(T5Config(**{**T5_SIZES, **fields}), np.random.default_rng(seed), dtype)


def t5_v11(seed: int = 0, dtype: str = "float64", **fields: Any) -> T5:
    return t5_v10(seed, dtype, feed_forward_proj="gated-gelu", tie_word_embeddings=False, scale_decoder_outputs=False,
                  **fields)


def post_ln(seed: int = 0, dtype: str = "float64", **fields: Any) -> Transformer:
    return Transformer(TransformerConfig(**{**SIZES, **fields}), np.random.default_rng(seed), dtype)


def pre_ln(seed: int = 0, dtype: str = "float64", **fields: Any) -> Transformer:
    return post_ln(seed, dtype, pre_norm=True, final_norm=True, activation="gelu", positions="learned", max_length=16,
                   tie_embeddings=False, **fields)


MODELS: dict[str, Callable[..., Any]] = {"t5 v1.0": t5_v10, "t5 v1.1": t5_v11, "post-LN": post_ln, "pre-LN": pre_ln}
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
any_model = st.sampled_from(sorted(MODELS)).map(lambda name: MODELS[name])


def sources(seed: int = 0, rows: int = 3, time: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """ids and a mask: row 0 full, the others padded on the left or on the right."""
    rng = np.random.default_rng(seed)
    ids, mask = rng.integers(6, VOCAB, (rows, time)), np.ones((rows, time), int)
    for row in range(1, rows):
        pads = int(rng.integers(1, time))
        mask[row, slice(None, pads) if row % 2 else slice(time - pads, None)] = 0
    return ids, mask


# ------------------------------------------------------------------------------------------------- cached = not cached

def uncached(model: Any, ids: np.ndarray, mask: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return model(ids, targets, mask).data


def cached(model: Any, ids: np.ndarray, mask: np.ndarray, targets: np.ndarray, steps: list[int]) -> np.ndarray:
    """The logits of `targets`, fed `steps` tokens at a time."""
    memory, mask = model.encoder(model.embed(ids), mask.astype(bool))
    cache, parts, start = model.new_cache(targets.shape[1], memory.shape[1]), [], 0
    for step in steps:
        hidden, _ = model.decoder(model.embed(targets[:, start:start + step]), None, memory, mask, cache=cache)
        parts.append(model.logits(hidden).data)
        start += step
    return np.concatenate(parts, axis=1)


UNIT = 2.0**-30  # roundings of this size, in float64, move the logits in proportion: the response to them is linear


def rounding_error_of(model: Any, run: Callable[[], np.ndarray], seed: int) -> np.ndarray:
    """How far roundings of relative size 1 can move each logit, to first order.

    Every op of the float64 model gets, at every element, an error of random sign and of the largest size that its
    arithmetic allows: n u M, n the additions behind an element, M the op with every operand replaced by its absolute
    value (Higham, Accuracy and Stability of Numerical Algorithms, ch. 3). Of 16 such runs the largest change of each
    logit, times 8, and a hundredth of the row's largest where the signs happened to cancel."""
    rng, c = np.random.default_rng(seed), model.config
    scale = 1.0 if isinstance(model, T5) else (c.d_model // c.num_heads) ** -0.5

    def heads(x: np.ndarray) -> np.ndarray:
        return np.abs(x).reshape(*x.shape[:2], c.num_heads, -1).swapaxes(1, 2)

    def size(name: str, arrays: list, out: np.ndarray) -> Any:
        if name in ("embedding", "reshape", "transpose", "index", "key_first", "toeplitz"):
            return 0.0  # nothing is computed
        if name in ("add", "mul", "relu"):
            return np.where(np.abs(out) < 1e300, np.abs(out), 0)  # a masked score stays one
        if name == "linear":
            return arrays[0].shape[-1] * (np.abs(arrays[0]) @ np.abs(arrays[1]).T)
        if name in ("gelu", "gelu_tanh", "silu"):
            return 10 * np.abs(arrays[0])  # x times a function of x in [0, 1], from a few operations
        if name in ("rms_norm", "layer_norm"):
            x, w = np.abs(arrays[0]), np.abs(arrays[1])
            deviation = arrays[0] - (arrays[0].mean(axis=-1, keepdims=True) if name == "layer_norm" else 0)
            spread = np.sqrt((deviation ** 2).mean(axis=-1, keepdims=True) + 1e-6)
            return (x.shape[-1] + 5) * ((x + x.mean(axis=-1, keepdims=True)) / spread * w + np.abs(out))
        assert name == "attention", f"no error is known for {name}"
        q, k, v, bias, *_ = arrays
        bias = np.zeros(()) if bias is None else np.where(bias < -1e300, 0, np.abs(bias))
        n = q.shape[-1] // c.num_heads + k.shape[1] + 8
        scores = (heads(q) @ heads(k).swapaxes(-1, -2) * scale + bias).max(axis=-1, keepdims=True)
        # an error e of all scores changes each probability by at most 2 e times itself
        mixed = 2 * n * (scores + 1) * heads(v).max(axis=2, keepdims=True)
        return mixed.swapaxes(1, 2).reshape(out.shape)

    def observe(forward: Any, inputs: tuple, out: np.ndarray, vjps: Any, node: Any) -> None:
        name = forward.__name__
        error = size(name, [tensor.array_of(x) for x in inputs], out)
        if np.ndim(error):
            out += UNIT * error * rng.choice([-1.0, 1.0], out.shape)

    exact, largest = run(), 0.0
    token = tensor._observer.set(observe)
    try:
        for _ in range(16):
            largest = np.maximum(largest, np.abs(run() - exact) / UNIT)
    finally:
        tensor._observer.reset(token)
    return 8 * largest + largest.max(axis=-1, keepdims=True) / 100


@settings(max_examples=24)  # each runs a model some 20 times
@given(any_model, st.integers(0, 2**32), st.sampled_from([[1] * 6, [2, 1, 3], [6], [5, 1]]))
def test_cached_logits_are_the_uncached_ones_within_the_rounding_of_both(build, seed, steps):
    model, (ids, mask) = build(seed), sources(seed)
    targets = np.random.default_rng(seed).integers(0, VOCAB, (3, 6))
    # both paths make the same sums, up to terms that are exactly 0, in some order: one bound for each
    bound = 2 * rounding_error_of(model, lambda: uncached(model, ids, mask, targets), seed)
    single = type(model)(model.config, None, "float32")
    # the same weights for both: rounded to float32 first
    single.load_state(model.state())
    model.load_state(single.state())
    for m, unit in ((model, 2.0**-53), (single, 2.0**-24)):
        difference = np.abs(cached(m, ids, mask, targets, steps) - uncached(m, ids, mask, targets))
        assert (difference <= unit * bound).all()
    largest = np.abs(uncached(model, ids, mask, targets)).max()
    assert 2.0**-53 * bound.max() < 1e-9 * largest, "the bound says something: errors in a cache are far larger"


@given(any_model, st.integers(0, 2**32), st.integers(1, 8))
def test_the_ids_are_the_same_with_and_without_a_cache(build, seed, tokens):
    model, (ids, mask) = build(seed), sources(seed)
    with_cache = model.generate(ids, mask, tokens)
    assert np.array_equal(with_cache, model.generate(ids, mask, tokens, use_cache=False))


@given(any_model, st.integers(0, 2**32))
def test_generated_ids_are_the_argmax_of_the_model_itself(build, seed):
    model, (ids, mask) = build(seed, eos_token_id=VOCAB - 1), sources(seed)
    found = model.generate(ids, mask, 5)
    logits = model(ids, found[:, :-1], mask).data
    for row in range(3):
        for t in range(found.shape[1] - 1):
            assert found[row, t + 1] == logits[row, t].argmax()
            if found[row, t + 1] == VOCAB - 1:
                break


@settings(max_examples=40)  # four generations each
@given(any_model, st.integers(0, 2**32))
def test_each_row_generates_what_it_generates_alone(build, seed):
    model, (ids, mask) = build(seed), sources(seed)
    together = model.generate(ids, mask, 6)
    for row in range(3):
        alone = model.generate(ids[row:row + 1], mask[row:row + 1], 6)[0]
        assert np.array_equal(together[row, :len(alone)], alone)
        assert (together[row, len(alone):] == 0).all(), "pad"


@every_model
def test_with_a_cache_the_memory_is_projected_once_and_each_token_once(build):
    model, (ids, mask) = build(eos_token_id=VOCAB - 1), sources()
    used = {name: 0 for name in model.base_parameters}
    names = {id(p): name for name, p in model.base_parameters.items()}
    rows: dict[str, int] = {}

    def observe(forward: Any, inputs: tuple, *_: Any) -> None:
        name = forward.__name__
        if name == "linear" and id(inputs[1]) in names:
            used[names[id(inputs[1])]] += 1
            rows[names[id(inputs[1])]] = rows.get(names[id(inputs[1])], 0) + tensor.array_of(inputs[0]).shape[1]

    model.logits = scripted(model, [[7, 8, 9, 10]] * 3)
    token = tensor._observer.set(observe)
    try:
        assert model.generate(ids, mask, 4).shape == (3, 5)
    finally:
        tensor._observer.reset(token)
    for i in range(3):
        assert used[f"decoder.{i}.cross.k.weight"] == used[f"decoder.{i}.cross.v.weight"] == 1
        assert rows[f"decoder.{i}.cross.k.weight"] == 7
        for part in ("attn.q", "attn.k", "attn.v", "cross.q", "ff.wo"):
            assert used[f"decoder.{i}.{part}.weight"] == rows[f"decoder.{i}.{part}.weight"] == 4
    assert rows["encoder.0.attn.q.weight"] == 7 and used["encoder.0.attn.q.weight"] == 1


# ------------------------------------------------------------------------------------------------------------ stopping

def scripted(model: Any, script: list[list[int]]) -> Callable[[Tensor], Tensor]:
    """A head that says `script` [batch][step], whatever the hidden states are, and counts its steps."""
    def logits(hidden: Tensor) -> Tensor:
        assert hidden.shape[:2] == (len(script), 1), "the head reads the last position alone"
        said = np.zeros((len(script), 1, VOCAB))
        for row, words in enumerate(script):
            said[row, 0, words[logits.steps]] = 1.0  # type: ignore[attr-defined]
        logits.steps += 1  # type: ignore[attr-defined]
        return Tensor(said)

    logits.steps = 0  # type: ignore[attr-defined]
    return logits


@every_model
@pytest.mark.parametrize("use_cache", [True, False])
def test_it_stops_when_every_row_has_finished_and_pads_the_finished_ones(build, use_cache):
    model, (ids, mask) = build(**IDS_OF), sources()
    model.logits = scripted(model, [[7, 8, 2, 9, 9, 9], [2, 9, 9, 9, 9, 9], [7, 2, 9, 2, 9, 9]])
    found = model.generate(ids, mask, 6, use_cache=use_cache)
    assert found.tolist() == [[5, 7, 8, 2], [5, 2, 3, 3], [5, 7, 2, 3]]
    assert model.logits.steps == 3, "not one step more"


@every_model
def test_it_stops_at_max_new_tokens_when_a_row_goes_on(build):
    model, (ids, mask) = build(**IDS_OF), sources()
    model.logits = scripted(model, [[2] + [9] * 5, [9] * 6, [9, 9, 2, 9, 9, 9]])
    found = model.generate(ids, mask, 4)
    assert found.tolist() == [[5, 2, 3, 3, 3], [5, 9, 9, 9, 9], [5, 9, 9, 2, 3]] and model.logits.steps == 4


@every_model
def test_a_row_whose_answer_contains_pad_or_start_goes_on(build):
    model, (ids, mask) = build(**IDS_OF), sources(rows=1)
    model.logits = scripted(model, [[3, 5, 3, 2]])
    assert model.generate(ids, mask, 9).tolist() == [[5, 3, 5, 3, 2]]


@every_model
@pytest.mark.parametrize("use_cache", [True, False])
def test_no_token_and_one_token(build, use_cache):
    model, (ids, mask) = build(**IDS_OF), sources()
    none = model.generate(ids, mask, 0, use_cache=use_cache)
    assert none.tolist() == [[5], [5], [5]]
    one = model.generate(ids, mask, 1, use_cache=use_cache)
    expected = model(ids, none, mask).data[:, 0].argmax(axis=-1)
    assert one.tolist() == [[5, token] for token in expected]
    with pytest.raises(ValueError, match="max_new_tokens is -1; expected an integer >= 0"):
        model.generate(ids, mask, -1)


@every_model
def test_the_result_is_an_integer_array_with_start_in_column_0_and_20_tokens_at_most_by_default(build):
    model = build(**IDS_OF) if build is not pre_ln else post_ln(**IDS_OF, positions="learned", max_length=20)
    ids, mask = sources()
    model.logits = scripted(model, [[9] * 30] * 3)
    found = model.generate(ids, mask)
    assert type(found) is np.ndarray and found.dtype == np.int64 and found.shape == (3, 21)
    assert (found[:, 0] == 5).all() and (found[:, 1:] == 9).all()


@every_model
def test_without_a_mask_pad_tokens_of_the_input_are_padding(build):
    model, (ids, mask) = build(**IDS_OF), sources()
    padded = np.where(mask, ids, 3)
    assert np.array_equal(model.generate(padded, None, 6), model.generate(ids, mask, 6))
    seen: list = []
    model.encoder, real = (lambda x, mask, **options: seen.append(mask) or real(x, mask, **options)), model.encoder
    model.generate(padded, None, 1)
    model.generate(padded, np.ones_like(padded), 1)
    assert np.array_equal(seen[0], mask == 1) and seen[1].all(), "a mask that is given is taken as it is"


@every_model
def test_a_row_of_padding_alone_generates_something_and_disturbs_no_other(build):
    model, (ids, mask) = build(**IDS_OF), sources()
    expected, gone = model.generate(ids, mask, 5), mask.copy()
    gone[1] = 0
    found = model.generate(ids, gone, 5)
    assert ((0 <= found) & (found < VOCAB)).all()
    for row in (0, 2):
        both = min(found.shape[1], expected.shape[1])
        assert np.array_equal(found[row, :both], expected[row, :both])


def test_learned_positions_end_a_generation_that_is_too_long_with_an_error():
    model, (ids, mask) = pre_ln(eos_token_id=VOCAB - 1), sources()
    model.logits = scripted(model, [[9] * 30] * 3)
    assert model.generate(ids, mask, 16).shape == (3, 17)
    model.logits = scripted(model, [[9] * 30] * 3)
    with pytest.raises(ValueError, match="position 16; the table of learned positions ends at 15"):
        model.generate(ids, mask, 17)


def test_t5_generates_the_same_from_inputs_padded_on_either_side():
    model, ids = t5_v11(**IDS_OF), sources(rows=3)[0]
    pad = np.full((3, 4), 3)
    plain = model.generate(ids, None, 8)
    assert np.array_equal(model.generate(np.concatenate([pad, ids], axis=1), None, 8), plain)
    assert np.array_equal(model.generate(np.concatenate([ids, pad], axis=1), None, 8), plain)


@every_model
def test_generation_watches_nothing_and_leaves_the_model_as_it_was(build):
    model, (ids, mask) = build(), sources()
    before = {name: array.tobytes() for name, array in model.state().items()}
    first = model.generate(ids, mask, 5)
    assert np.array_equal(model.generate(ids, mask, 5), first)
    assert {name: array.tobytes() for name, array in model.state().items()} == before
