"""Batches: padding and masks, epochs, the cursor, what is refused."""
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft import Batches, batch_of
from minipeft.train.data import IGNORE, label_tokens, pad
from tests.train import tiny

ids = st.lists(st.integers(0, 50), min_size=1, max_size=6)
pair_lists = st.lists(st.tuples(ids, ids), min_size=1, max_size=9)


def test_shorter_rows_are_padded_on_the_right() -> None:
    batch = batch_of([([5, 6, 7], [8]), ([9], [3, 4])], pad_token_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[8, -100], [3, 4]]
    assert all(array.dtype == numpy.int64 for array in batch.values())


@given(pairs=pair_lists, pad_token_id=st.integers(0, 50))
def test_a_batch_holds_its_pairs_and_nothing_else(pairs: list, pad_token_id: int) -> None:
    batch = batch_of(pairs, pad_token_id)
    for i, (source, target) in enumerate(pairs):
        n = int(batch["attention_mask"][i].sum())
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)
        assert batch["input_ids"][i, :n].tolist() == source and set(batch["input_ids"][i, n:]) <= {pad_token_id}
        assert [t for t in batch["labels"][i].tolist() if t != IGNORE] == target
    assert label_tokens(batch) == sum(len(target) for _, target in pairs)
    assert batch["labels"].shape[1] == max(len(target) for _, target in pairs)


def test_labels_of_minus_100_do_not_count() -> None:
    assert label_tokens({"labels": [[-100, 4, -100], [5, -100, -100]]}) == 2


@given(count=st.integers(1, 20), size=st.integers(1, 25), seed=st.integers(0, 10 ** 6), epochs=st.integers(1, 4))
def test_every_epoch_is_a_permutation_of_the_pairs_with_only_its_last_batch_short(
        count: int, size: int, seed: int, epochs: int) -> None:
    stream = Batches([([i + 1], [i + 1]) for i in range(count)], size, seed)
    for epoch in range(epochs):
        rows: list[int] = []
        while len(rows) < count:
            assert stream.state() == {"epoch": epoch, "position": len(rows)}
            batch = stream.next()
            rows += batch["input_ids"][:, 0].tolist()
            assert len(batch["labels"]) == min(size, count - (len(rows) - len(batch["labels"])))
        assert sorted(rows) == list(range(1, count + 1))
    assert stream.state() == {"epoch": epochs, "position": 0}


@given(count=st.integers(1, 12), size=st.integers(1, 13), seed=st.integers(0, 99), before=st.integers(0, 15),
       elsewhere=st.integers(0, 5))
def test_a_stream_continued_from_a_cursor_gives_the_batches_that_were_due(
        count: int, size: int, seed: int, before: int, elsewhere: int) -> None:
    pairs = tiny.pairs(count)
    stream, other = Batches(pairs, size, seed), Batches(pairs, size, seed)
    for _ in range(before):
        stream.next()
    for _ in range(elsewhere):
        other.next()  # a stream that has been used may be moved, too
    other.load_state(stream.state())
    for _ in range(5):
        assert all(numpy.array_equal(a, b) for a, b in zip(stream.next().values(), other.next().values(), strict=True))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    def order(stream: Batches) -> list:
        return stream.next()["input_ids"][:, 0].tolist()

    pairs = [([i], [i]) for i in range(30)]
    one, again, other = Batches(pairs, 30, 1), Batches(pairs, 30, 1), Batches(pairs, 30, 2)
    first, second = order(one), order(one)
    assert first == order(again) and first != second and first != order(other) and first != sorted(first)


@pytest.mark.parametrize("cursor", [{"epoch": 0, "position": 3}, {"epoch": 0, "position": 12},
                                    {"epoch": -1, "position": 0}, {"epoch": 0, "position": -4}])
def test_a_cursor_that_the_stream_never_reaches_is_refused_and_the_stream_stays(cursor: dict) -> None:
    stream = tiny.batches()
    stream.next()
    with pytest.raises(ValueError, match="10 pairs in batches of 4"):
        stream.load_state(cursor)
    assert stream.state() == {"epoch": 0, "position": 4}


def test_two_streams_are_described_alike_only_if_they_give_the_same_batches() -> None:
    base = Batches([([1, 2], [3])], 1).describe()
    assert base == Batches([(numpy.array([1, 2]), (3,))], 1).describe()
    others = [Batches([([1, 2], [4])], 1), Batches([([1], [2, 3])], 1), Batches([([1, 2], [3])], 2),
              Batches([([1, 2], [3])], 1, seed=1), Batches([([1, 2], [3])], 1, pad_token_id=1),
              Batches([([1, 2], [3])] * 2, 1)]
    assert all(base != other.describe() for other in others)


@pytest.mark.parametrize("pairs, message", [([], "no pairs"), ([([1], [1]), ([], [1])], "pair 1 has an empty source"),
                                            ([([1], [1]), ([2], [1]), ([1], [])], "pair 2 has an empty target"),
                                            ([([1], [1]), ([1.5], [1])], r"row 1 holds float64 \[1\]"),
                                            ([([float("nan")], [1])], "row 0 holds float64"),
                                            ([([[1, 2]], [1])], r"row 0 holds int64 \[1, 2\]"),
                                            ([(["a"], [1])], "row 0 holds <U1")])
def test_bad_pairs_are_named(pairs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_of(pairs)


def test_an_empty_source_is_found_before_training_by_its_index_in_the_data() -> None:
    with pytest.raises(ValueError, match="pair 7 has an empty source"):
        Batches([([1], [1])] * 7 + [([], [1])], batch_size=2)


@pytest.mark.parametrize("pairs, size, seed", [([], 4, 0), ([([1], [1])], 0, 0), ([([1], [1])], 1, -1)])
def test_a_stream_of_nothing_is_refused(pairs: list, size: int, seed: int) -> None:
    with pytest.raises(ValueError, match=f"{len(pairs)} pairs in batches of {size}, seed {seed}"):
        Batches(pairs, size, seed)


def test_rows_of_one_length_are_not_padded_and_no_rows_give_an_empty_array() -> None:
    assert pad([[1, 2], [3, 4]], 0).tolist() == [[1, 2], [3, 4]]
    assert pad([], 0).shape == (0, 0)


def test_a_causal_batch_has_the_prompt_before_the_completion_and_labels_on_the_completion_alone():
    batch = batch_of([([5, 6], [7]), ([8], [9, 10, 11])], 3, causal=True)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 3], [8, 9, 10, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100], [-100, 9, 10, 11]]


def test_a_stream_of_causal_batches_is_another_stream_than_one_of_pairs():
    pairs = [([5, 6], [7]), ([8], [9, 10])]
    causal = Batches(pairs, 2, causal=True)
    assert causal.next()["input_ids"].shape == causal.next()["labels"].shape == (2, 3)
    assert causal.describe() != Batches(pairs, 2).describe() and "causal" not in Batches(pairs, 2).describe()
    with pytest.raises(TypeError, match="causal"):
        Batches(pairs, 2, causal=1)  # type: ignore[arg-type]
