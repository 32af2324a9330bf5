"""The ledger sees an array end with its last view, and finds the peak of a span of events."""
from minipeft.tools.hollow.ledger import TEMPORARY, Ledger, Memory
from minipeft.tools.hollow.namespace import Hollow


def test_memory_is_freed_with_the_last_view_of_it():
    ledger = Ledger()
    a = Hollow(ledger).empty((10, 4), "float32")
    view = a[2:].T
    del a
    assert ledger.alive == {0} and ledger.events == [0]
    del view
    assert ledger.alive == set() and ledger.events == [0, ~0] and ledger.sizes == [160]


def test_the_peak_is_the_most_that_lives_at_once_by_purpose():
    ledger = Ledger()
    a, b = Memory(ledger, 100), Memory(ledger, 10)
    ledger.purpose[a.number] = "weights"
    del b
    c = Memory(ledger, 7)
    del a
    end = len(ledger.events)
    assert ledger.peak(0, end) == {"weights": 100, TEMPORARY: 10}
    assert ledger.peak(end - 2, end) == {"weights": 100, TEMPORARY: 7}   # from the third allocation on
    assert ledger.peak(0, end, without=[0]) == {TEMPORARY: 10}
    assert ledger.peak(0, 0) == {} and c.size == 7


def test_a_span_begins_with_what_is_alive_then():
    ledger = Ledger()
    kept = Memory(ledger, 5)
    start = len(ledger.events)
    assert ledger.peak(start, start) == {TEMPORARY: 5} and kept.size == 5
