"""Positions: the bias of scores comes from one number for each distance, takes no memory, and lies as scores do."""
from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft import T5, T5Config
from minipeft.engine.tensor import array_of
from minipeft.nn import blocks
from minipeft.nn.positions import RelativeBuckets, bucket, positions_of
from tests.by_hand import put
from tests.models_under_test import Case
from tests.strategies import draw_array, seeds


def tiny(heads: int = 2, dtype: str = "float32") -> T5:
    return T5(T5Config(vocab_size=9, d_model=8, d_kv=4, num_heads=heads, d_ff=8, num_layers=2, num_decoder_layers=2),
              np.random.default_rng(0), dtype)


def test_what_a_stack_adds_to_scores_lies_key_first_with_and_without_a_mask(monkeypatch):
    """Added with keys or heads innermost, it would cost as much as the product of Q and K."""
    seen: list[tuple[Any, Any]] = []
    real = blocks.Block.__call__

    def spy(self, x, bias, mask, *rest):
        seen.append((bias.data, array_of(mask)))
        return real(self, x, bias, mask, *rest)

    monkeypatch.setattr(blocks.Block, "__call__", spy)
    model = tiny()
    ids, mask = np.full((3, 5), 2), np.ones((3, 5), dtype=int)
    mask[1, 3:] = 0
    model(ids, ids[:, :4])
    model(ids, ids[:, :4], mask, mask[:, :4])
    shapes = [(bias.shape, None if hidden is None else hidden.shape) for bias, hidden in seen[::2]]
    assert shapes == [((1, 2, 5, 5), None), ((1, 2, 4, 4), (1, 1, 4, 4)),
                      ((1, 2, 5, 5), (3, 1, 1, 5)), ((1, 2, 4, 4), (3, 1, 4, 4))]
    for bias, hidden in seen:
        assert bias.strides[2] == bias.itemsize
        assert hidden is None or hidden.transpose(0, 3, 1, 2).flags.c_contiguous


@given(seeds(), st.integers(1, 12), st.integers(1, 12), st.integers(0, 30), st.booleans())
def test_the_bias_of_a_query_and_a_key_is_the_tables_row_of_the_bucket_of_their_distance(
        seed, queries, keys, start, bidirectional):
    table = draw_array(seed, (8, 3))
    found = RelativeBuckets(table, 20, bidirectional).bias(queries, keys, start).data
    distance = np.arange(keys)[None, :] - np.arange(start, start + queries)[:, None]
    wanted = table[bucket(distance, 8, 20, bidirectional)]                          # [query, key, heads]
    assert found.shape == (1, 3, queries, keys) and np.array_equal(found[0], wanted.transpose(2, 0, 1))
    assert found.strides[2] == -found.strides[3], "a view"


def test_the_bias_is_looked_up_for_each_distance_and_not_for_each_pair(monkeypatch):
    position = RelativeBuckets(draw_array(0, (8, 3)), 20, True)
    asked: list[int] = []
    table = position.weight.table
    monkeypatch.setattr(position.weight, "table", lambda ids: asked.append(ids.size) or table(ids))
    position.bias(50, 70, 20)
    assert asked == [50 + 70 - 1]


@pytest.mark.parametrize("heads, source, target, hidden", [
    (2, 2000, 4, False), (2, 2000, 4, True), (2, 4, 2000, False), (1, 4, 2000, True), (1, 2000, 2000, True)])
def test_a_forward_over_2000_tokens_holds_at_most_two_and_a_half_arrays_of_scores(heads, source, target, hidden):
    model, time = tiny(heads), max(source, target)
    ids, targets = np.full((1, source), 2), np.full((1, target), 3)
    mask, target_mask = np.ones_like(ids), np.ones_like(targets)
    mask[:, -2:], target_mask[:, :2] = 0, 0
    masks = (mask, target_mask) if hidden else (None, None)
    tracemalloc.start()
    try:
        model(ids, targets, *masks)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 2.5 * 4 * heads * time ** 2


def test_rows_that_see_different_position_tables_get_each_its_own_bias():
    """A mixed batch of a selective method on the tables is each row by itself."""
    model = tiny(dtype="float64")
    a = minipeft.attach(model, minipeft.Selective(component="position"), np.random.default_rng(1), "a")
    for i, p in enumerate(a.parameters.values()):
        p.data = draw_array(i, p.shape)
    ids = np.array([[2, 3, 4, 5], [3, 4, 5, 6]])
    found = model(ids, ids, adapter=["a", None]).data
    for row, name in enumerate(["a", ()]):
        alone = model(ids[row:row + 1], ids[row:row + 1], adapter=name).data
        assert abs(found[row] - alone[0]).max() <= 1e-12 * abs(alone).max()
    assert abs(found[1] - model(ids, ids, adapter="a").data[1]).max() > 1e-3


def test_a_memory_piece_sees_positions_and_mask_as_one_bias_and_hands_on_what_computes_the_same():
    model, seen = tiny(dtype="float64"), []
    ids = np.array([[2, 3, 4, 5], [3, 4, 5, 6]])
    mask = np.array([[1, 1, 1, 0], [0, 1, 1, 1]])
    before = model(ids, ids, mask, mask).data
    for stack in (model.encoder, model.decoder):
        put(stack.blocks[0].attn.keys_values, {"probe": lambda k, v, bias: seen.append(array_of(bias)) or (k, v, bias)})
    assert model(ids, ids, mask, mask).data.tobytes() == before.tobytes()
    hidden = mask[:, None, None, :] == 0
    for bias, later in zip(seen, (np.zeros((4, 4), bool), np.triu(np.ones((4, 4), bool), 1)), strict=True):
        assert bias.shape == (2, 2, 4, 4) and np.array_equal(np.isneginf(bias), np.broadcast_to(
            hidden | later, bias.shape))


# ---- padding


def test_positions_start_at_the_first_true_of_each_row_and_a_hole_keeps_its_place():
    mask = np.array([[1, 1, 0, 1, 1], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]], bool)
    assert positions_of(mask, 0, 5).tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 1, 2, 3]]
    assert positions_of(mask[:1], 0, 5).tolist() == positions_of(None, 0, 5).tolist() == [0, 1, 2, 3, 4]
    assert positions_of(None, 7, 3).tolist() == [7, 8, 9]


@pytest.mark.parametrize("family", ["post-LN", "pre-LN"])
def test_a_row_padded_on_the_left_needs_no_longer_table(family):
    """Learned positions end at 11: eight tokens fit, however many columns stand in front of them."""
    model = Case((family, "q and v"), 1, 1, "float64", 0).model()
    ids = np.arange(1, 9)[None]
    padded, mask = np.pad(ids, ((0, 0), (9, 0))), np.pad(np.ones_like(ids), ((0, 0), (9, 0)))
    assert model(padded, ids, mask).shape == (1, 8, 13)
