from hypothesis import given
from hypothesis import strategies as st

from laser_dist.data.preparation.keyset import KeySet


@given(st.lists(st.integers(1, 2**64 - 1) | st.integers(1, 40).map(lambda i: i * 2**50)))
def test_it_is_a_set(keys):
    ours, known = KeySet(), set()
    for key in keys:
        assert ours.add(key) == (key not in known)
        known.add(key)
    assert len(ours) == len(known)


def test_it_grows_and_stays_small():
    keys = KeySet()
    mixed = [(i * 0x9E3779B97F4A7C15) % 2**64 for i in range(1, 100_001)]
    assert all(keys.add(key) for key in mixed) and not any(keys.add(key) for key in mixed)
    assert keys.bytes <= 32 * len(keys)
