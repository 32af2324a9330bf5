"""Which buffers are alive when: births, deaths, what was there before, and the most at once."""
from __future__ import annotations

import numpy

from minipeft.engine.buffers import Buffers, owners
from minipeft.engine.tensor import Tensor


def array(n: int) -> numpy.ndarray:
    return numpy.zeros(n, numpy.uint8)


def test_views_of_one_array_are_its_buffer_and_a_copy_is_another():
    buffers, x = Buffers(), array(12)
    numbers = buffers.see([x, x[3:5], x.reshape(3, 4).T, numpy.broadcast_to(x[:1], (9,)), x.copy()])
    assert len(set(numbers)) == 2 and sorted({buffers.bytes[n] for n in numbers}) == [12]
    assert buffers.see(x) == buffers.see(x[::2]) and buffers.see(x)[0] in numbers


def test_arrays_are_found_in_containers_tensors_and_closures_each_once():
    x, y = array(3), array(4)

    def vjp(g):
        return g * y if later else x

    assert {id(a) for a in owners([{"a": (x,)}, Tensor(y), vjp, None, 2.0])} == {id(x), id(y)}
    assert len(list(owners([x, x[1:], [x]]))) == 1
    later = False


def test_a_circle_of_containers_is_walked_once():
    ring: list = [array(2)]
    ring.append(ring)
    assert len(list(owners(ring))) == 1


def test_seeing_an_array_keeps_it_no_longer_alive_and_its_end_is_noted_at_its_place():
    buffers, x = Buffers(), array(5)
    buffers.at = "here"
    number, = buffers.see(x)
    assert list(buffers.alive.values()) == [number]
    del x
    assert not buffers.alive
    buffers.at = "there"
    y = array(4)
    buffers.see(y, made=True)
    assert buffers.peak(set()) == (5, "here")  # 4 at the end: they were never alive together


def test_the_peak_is_the_most_alive_at_once_without_what_was_there_before():
    buffers, weight = Buffers(), array(100)
    buffers.at = 0
    buffers.see(weight)
    x = array(10)
    buffers.see(x)
    buffers.at = 1
    unseen = buffers.born(7)
    del x
    buffers.died(unseen)
    buffers.died(None)
    buffers.at = 2
    y = array(9)
    buffers.see(y, made=True)
    before = buffers.before()
    assert before == set(buffers.see(weight))
    assert buffers.peak(before) == (17, 1)
    assert buffers.peak(set()) == (117, 1)


def test_a_number_is_not_used_again_when_another_array_takes_the_place_in_memory():
    buffers = Buffers()
    numbers = []
    for _ in range(50):
        x = array(8)
        numbers += buffers.see(x)
        del x
    assert numbers == list(range(50)) and buffers.peak(set()) == (8, None)
