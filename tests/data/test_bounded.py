"""What came with a model is computed in a copy of the process, within bounds, and leaves the process as it was."""

import os
import resource

from laser_dist.data.bounded import bounded


def test_what_is_made_comes_back():
    assert bounded(lambda: "ü" * 1000) == "ü" * 1000 and bounded(str) == ""


def test_what_fails_hangs_or_grows_is_none():
    def forever() -> str:
        while True:
            pass

    def fail() -> str:
        raise ValueError

    assert bounded(fail) is bounded(forever) is bounded(lambda: "x" * 10**10) is None
    assert bounded(lambda: "x" * 2**25) is None  # more than is read


def test_the_process_stays_as_it_was():
    before = (os.getpid(), resource.getrlimit(resource.RLIMIT_AS), resource.getrlimit(resource.RLIMIT_CPU))
    variable = []
    assert bounded(lambda: variable.append(1) or "made") == "made"
    assert before == (os.getpid(), resource.getrlimit(resource.RLIMIT_AS), resource.getrlimit(resource.RLIMIT_CPU))
    assert not variable
