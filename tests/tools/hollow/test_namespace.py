"""The library itself runs in the namespace, and every allocation of a step is in the ledger."""
import gc

import numpy
import pytest

import minipeft
from minipeft.backend import to_device, to_host, xp
from minipeft.engine import ops
from minipeft.tools.hollow.array import HollowArray
from minipeft.tools.hollow.ledger import Ledger
from minipeft.tools.hollow.namespace import Hollow


@pytest.fixture
def ledger():
    found = Ledger()
    with minipeft.use(Hollow(found)):
        yield found


def test_arrays_of_the_host_come_in_by_their_shape(ledger):
    moved = to_device(numpy.ones((2, 3), "float32"))
    assert isinstance(moved, HollowArray) and moved.nbytes == 24 and to_device(moved) is moved
    assert to_host(moved).shape == (2, 3)


def test_a_frozen_product_keeps_neither_its_input_nor_its_output(ledger):
    """The books of one LoRA layer, by hand: x of [5, 7], W of [3, 7], r = 2."""
    W, A, B = (minipeft.Parameter(xp.empty(shape, "float32")) for shape in ((3, 7), (2, 7), (3, 2)))
    x = xp.empty((5, 7), "float32")
    before = set(ledger.alive)
    _, gradients = minipeft.value_and_grad(lambda: ops.sum(ops.low_rank_linear(
        ops.linear(x, W), x, A, B, scale=2)), {"A": A, "B": B}, training=False)
    gc.collect()
    assert {name: g.shape for name, g in gradients.items()} == {"A": (2, 7), "B": (3, 2)}
    left = sum(ledger.sizes[n] for n in ledger.alive - before)
    assert left == 4 * (2 * 7 + 3 * 2)                       # the gradients, and nothing else


def test_every_piece_of_a_step_is_freed_after_it(ledger):
    model = minipeft.T5(minipeft.T5Config(vocab_size=11, d_model=6, d_kv=3, num_heads=2, d_ff=10, num_layers=2,
                                          num_decoder_layers=2, relative_attention_num_buckets=4,
                                          relative_attention_max_distance=8), None)
    before = set(ledger.alive)
    ids = numpy.ones((2, 5), "int64")
    gradients = minipeft.value_and_grad(lambda: model.loss(ids, ids), minipeft.select(model, ".*"), training=False)[1]
    del gradients
    gc.collect()
    assert ledger.alive == before
