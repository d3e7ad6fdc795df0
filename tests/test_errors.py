"""Errors a user can mend."""

import pytest

from laser_dist.errors import UserError, require


def test_missing_packages_are_named_with_the_extra_that_has_them_and_a_way_without():
    require("this", "json", "pytest", extra="x")
    with pytest.raises(UserError) as raised:
        require("--plot", "json", "no_such_one", "nor_this", extra="plots", instead="leave --plot out")
    assert str(raised.value) == (
        "--plot needs no_such_one and nor_this: pip install 'laser-dist[plots]', or leave --plot out"
    )
