import threading
import time

import pytest

from laser_dist.data.streaming.ahead import one_ahead


def test_the_items_and_their_order_are_kept():
    assert list(one_ahead(iter(range(100)))) == list(range(100))
    assert list(one_ahead(iter(()))) == []


def test_exactly_one_item_is_fetched_ahead():
    made = []

    def items():
        for i in range(10):
            made.append(i)
            yield i

    ahead = one_ahead(items())
    assert made == []  # nothing before it is asked for
    next(ahead)
    deadline = time.monotonic() + 5
    while len(made) < 2:
        assert time.monotonic() < deadline, "the second item was not fetched while the first is in use"
        time.sleep(0.001)
    time.sleep(0.05)
    assert made == [0, 1]
    ahead.close()


def test_an_error_comes_in_its_place():
    def items():
        yield 1
        yield 2
        raise ValueError("third")

    ahead = one_ahead(items())
    assert (next(ahead), next(ahead)) == (1, 2)
    with pytest.raises(ValueError, match="third"):
        next(ahead)


def test_closing_ends_the_thread():
    before = threading.active_count()
    ahead = one_ahead(iter(range(5)))
    next(ahead)
    ahead.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before:
        assert time.monotonic() < deadline, "the thread goes on"
        time.sleep(0.001)
