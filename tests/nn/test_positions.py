"""The bias that every attention of a stack adds lies in memory as the scores do: laid out once, whatever it is of."""
from __future__ import annotations

import numpy as np

from minipeft import T5, T5Config
from minipeft.nn import blocks


def test_the_bias_of_a_stack_lies_key_first_with_and_without_a_mask(monkeypatch):
    """Added with the heads innermost, as the lookup leaves it, it would cost as much as the product of Q and K."""
    seen = []
    real = blocks.Block.__call__

    def spy(self, x, bias, *rest):
        seen.append(bias.data)
        return real(self, x, bias, *rest)

    monkeypatch.setattr(blocks.Block, "__call__", spy)
    model = T5(T5Config(vocab_size=9, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1, num_decoder_layers=1),
               np.random.default_rng(0))
    ids, mask = np.full((3, 5), 2), np.ones((3, 5), dtype=int)
    mask[1, 3:] = 0
    model(ids, ids[:, :4])
    model(ids, ids[:, :4], mask, mask[:, :4])
    assert [bias.shape for bias in seen] == [(1, 2, 5, 5), (1, 2, 4, 4), (3, 2, 5, 5), (3, 2, 4, 4)]
    assert all(bias.transpose(0, 3, 1, 2).flags.c_contiguous for bias in seen)
