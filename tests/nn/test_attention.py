"""The keys and values that decoding keeps."""
import numpy
import pytest

from minipeft.engine.tensor import Tensor
from minipeft.nn.attention import KeyValues


def test_a_cache_that_is_full_refuses_more_and_keeps_what_it_has():
    cache = KeyValues(2)
    for i in range(2):
        cache.extend(Tensor(numpy.full((1, 1, 3), i)), Tensor(numpy.full((1, 1, 3), -i)))
    with pytest.raises(ValueError, match="3 keys and values; expected at most the capacity of the cache, 2"):
        cache.extend(Tensor(numpy.ones((1, 1, 3))), Tensor(numpy.ones((1, 1, 3))))
    k, v = cache.read()
    assert k[0, :, 0].tolist() == [0, 1] and v[0, :, 0].tolist() == [0, -1] and cache.length == 2
