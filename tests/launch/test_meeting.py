"""What is wrong on one host only is told to all ranks within seconds."""

import time

import pytest

from laser_dist.errors import UserError
from laser_dist.launch.meeting import meet, together
from laser_dist.testing import run_distributed


def outcome(rank: int, world_size: int, wrong: list[int], early: bool) -> tuple[str, float]:
    """What this rank hears if `wrong` ranks find their files bad, before or while they prepare; and after how long."""

    def prepare() -> str:
        if rank in wrong:
            raise UserError("data.train = 'shards': shard-000003.tar is missing")
        return "ready"

    began = time.monotonic()
    try:
        if early:
            together(prepare)
            heard = meet(lambda: "ready", 500)[1]
        else:
            heard = meet(prepare, 500)[1]
    except UserError as error:
        heard = str(error)
    return heard, time.monotonic() - began


@pytest.mark.parametrize(("wrong", "early", "where"), [([1], False, " (rank 1 only)"), ([0, 1], True, "")])
def test_one_ranks_error_is_everybodys(wrong: list[int], early: bool, where: str) -> None:
    """Missing shards on one host once let the others wait for it until the timeout, of ten minutes."""
    heard = run_distributed(outcome, 2, wrong, early, timeout=100)
    for message, seconds in heard:
        assert message == f"data.train = 'shards': shard-000003.tar is missing{where}" and seconds < 60


def test_a_process_alone_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def wrong() -> None:
        raise UserError("bad")

    for call in (lambda: together(wrong), lambda: meet(wrong, 500)):
        with pytest.raises(UserError, match="^bad$"):
            call()
