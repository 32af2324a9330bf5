"""Grouped-query attention is attention with the keys and values repeated; what is added to scores is made once."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.engine import ops
from minipeft.engine.ops import definitions
from minipeft.engine.tensor import Leaf, value_and_grad
from minipeft.nn.causal import apart, bias_together, to_the_right, together, unseen
from tests.engine.ops.test_fused import U, Call, attention_bound
from tests.strategies import draw_array, dtypes, seeds


@st.composite
def grouped(draw: Any, dtype: str) -> tuple[dict[str, Any], Any, int, int]:
    """(q, k, v, bias) of kv_heads heads of keys and values, each for `times` heads of queries."""
    batch, queries, keys = (draw(st.integers(1, 4)) for _ in range(3))
    kv_heads, times, d, seed = (*(draw(st.integers(1, 3)) for _ in range(3)), draw(seeds()))
    wide, narrow = kv_heads * times * d, kv_heads * d
    inputs = {name: draw_array(seed + i, shape, dtype) for i, (name, shape) in enumerate({
        "q": (batch, queries, wide), "k": (batch, keys, narrow), "v": (batch, keys, narrow)}.items())}
    full = (batch, kv_heads * times, queries, keys)
    kind = draw(st.sampled_from(["none", "heads", "one head"]))
    if kind != "none":
        lead = tuple(1 if draw(st.booleans()) else n for n in full[:1])
        shape = (*lead, full[1] if kind == "heads" else 1, draw(st.sampled_from([1, queries])), keys)
        inputs["bias"] = draw_array(seed + 3, shape, dtype)
    return inputs, draw_array(seed + 4, (batch, queries, wide), dtype), kv_heads, times


def repeated(x: Any, kv_heads: int, times: int) -> Any:
    """x [batch, key, kv_heads * d] -> [batch, key, kv_heads * times * d], every head `times` times in a row."""
    batch, keys, width = x.shape
    heads = ops.reshape(x, shape=(batch, keys, kv_heads, 1, width // kv_heads))
    return ops.concat(*[heads] * times, axis=3).reshape(batch, keys, width * times)


@given(st.data(), dtypes())
def test_grouped_queries_attend_as_to_repeated_keys_and_values_in_value_and_all_gradients(data, dtype):
    """Both are the definition of attention up to roundings, and a gradient of k or v sums over `times` heads more."""
    inputs, g, kv_heads, times = data.draw(grouped(dtype))
    scale = 0.5

    def loss(f: Any) -> Any:
        leaves = {name: Leaf(x) for name, x in inputs.items()}
        return value_and_grad(lambda: ops.sum(ops.mul(f(**leaves), g)), leaves)[1], f(**leaves).data

    def ours(q: Any, k: Any, v: Any, bias: Any = None) -> Any:
        mixed = ops.attention(together(q, kv_heads, times), k, v, bias_together(bias, kv_heads, times, q.shape[1]),
                              heads=kv_heads, scale=scale)
        return apart(mixed, kv_heads, times)

    def theirs(q: Any, k: Any, v: Any, bias: Any = None) -> Any:
        return definitions.attention(q, *(repeated(x, kv_heads, times) for x in (k, v)), bias,
                                     heads=kv_heads * times, scale=scale)

    (found, value), (wanted, expected) = loss(ours), loss(theirs)
    wide = {name: x.astype("float64") for name, x in inputs.items()}
    call = Call({**wide, **{n: repeated(wide[n], kv_heads, times).data for n in "kv"}},
                options={"heads": kv_heads * times, "scale": scale})
    allowed = dict(zip(["value", *inputs], attention_bound(call, g.astype("float64"))))
    assert (abs(value - expected) <= 2 * U[dtype] * allowed["value"] + 1e-40).all()
    for name in inputs:
        bound = allowed[name]
        if name in "kv":
            bound = bound.reshape(*bound.shape[:2], kv_heads, times, -1).sum(axis=3).reshape(inputs[name].shape)
        bound = ops.sum(bound).data if name == "bias" else bound  # a broadcast bias sums over heads, rows and queries
        many = times * (1 if name != "bias" else g.size)
        assert (abs(found[name] - wanted[name]) <= 2 * many * U[dtype] * bound + 1e-40).all(), name


@given(st.data(), seeds())
def test_apart_is_the_inverse_of_together_and_heads_that_share_keys_lie_behind_each_other(data, seed):
    kv_heads, times, d = (data.draw(st.integers(1, 3)) for _ in range(3))
    q = draw_array(seed, (2, 4, kv_heads * times * d))
    joined = together(Leaf(q), kv_heads, times)
    assert np.array_equal(apart(joined, kv_heads, times).data, q)
    heads = q.reshape(2, 4, kv_heads, times, d)
    for t in range(times):
        assert np.array_equal(joined.data[:, 4 * t:4 * t + 4], heads[:, :, :, t].reshape(2, 4, -1))


def test_unseen_hides_padding_and_the_future_in_every_head_and_nothing_for_one_query_without_padding():
    mask = np.array([[True] * 5, [False, True, True, True, False]])
    found = unseen(mask, 3, 5, 2, "float32")
    assert found.shape == (2, 1, 6, 5)
    for row in range(2):
        for query in range(6):
            for key in range(5):
                hidden = not mask[row, key] or key > 2 + query % 3
                assert found[row, 0, query, key] == (-np.inf if hidden else 0)
    assert unseen(None, 1, 5, 2, "float32") is None and unseen(np.ones((2, 5), bool), 1, 5, 2, "float32") is None
    assert unseen(None, 3, 5, 2, "float32").shape == (1, 1, 6, 5)


def test_what_is_added_to_scores_lies_key_first_as_scores_do():
    found = unseen(np.array([[True, False, True]]), 3, 3, 2, "float32")
    assert found.transpose(0, 3, 1, 2).flags.c_contiguous


def test_rows_are_moved_until_their_last_token_is_in_the_last_column():
    mask = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]], bool)
    x = np.arange(16.0).reshape(4, 4, 1)
    moved, seen = to_the_right(x, mask)
    assert np.array_equal(seen, np.array([[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]], bool))
    assert moved[0, 2:, 0].tolist() == [0, 1] and moved[1, :, 0].tolist() == [4, 5, 6, 7]
    assert moved[2, 2:, 0].tolist() == [9, 10]


def test_keys_and_values_are_cached_once_for_all_heads_that_share_them():
    config = minipeft.DecoderConfig(vocab_size=9, hidden_size=24, intermediate_size=8, num_hidden_layers=1,
                                    num_attention_heads=6, num_key_value_heads=2, head_dim=4, eos_token_ids=(1,))
    model = minipeft.Decoder(config, np.random.default_rng(0))
    cache = model.new_cache(5)
    model.decoder(model.embed(np.array([[2, 3, 4]])), cache=cache)
    k, v = cache[0].read()
    assert k.shape == v.shape == (1, 3, 2 * 4)


@pytest.mark.parametrize("shape", [(1, 1, 1, 5), (2, 1, 1, 5)])
def test_a_bias_that_all_heads_and_queries_share_is_not_copied(shape):
    bias = np.zeros(shape)
    assert bias_together(bias, 2, 3, 4) is bias
