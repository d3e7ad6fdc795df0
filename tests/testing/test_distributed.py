import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from laser_dist.errors import UserError
from laser_dist.testing import RankFailed, assert_close_relative, run_distributed


def all_reduce(rank, world_size, vectors):
    vector = vectors[rank].clone()
    torch.distributed.all_reduce(vector)
    return vector


def environment(rank, world_size):
    assert not torch.distributed.is_initialized()
    return rank, world_size, os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"], torch.get_num_threads()


def one_rank_fails(rank, world_size, how):
    if rank == 1:
        print("about to fail", flush=True)
        if how == "raise":
            raise UserError("rank one has had enough")
        if how == "exit":
            os._exit(7)
        os.abort()
    torch.distributed.barrier()  # would wait for its timeout of half an hour


def hang(rank, world_size):
    if rank == 1:
        sleep_here()


def sleep_here():
    time.sleep(600)


def test_ranks_meet_in_a_collective_and_return_tensors():
    vectors = [torch.arange(3.0), torch.ones(3)]
    for result in run_distributed(all_reduce, 2, vectors, init=True):
        assert torch.equal(result, torch.tensor([1.0, 2.0, 3.0]))


def test_nothing_but_the_environment_is_set_unless_asked():
    assert run_distributed(environment, 2) == [(0, 2, "0", "2", 1), (1, 2, "1", "2", 1)]


@pytest.mark.parametrize(
    "how, told",
    [("raise", "rank one has had enough"), ("exit", "exited with code 7"), ("abort", "killed by SIGABRT")],
)
def test_failure_names_its_rank_and_ends_the_others_at_once(how, told):
    began = time.monotonic()
    with pytest.raises(RankFailed, match=told) as failure:
        run_distributed(one_rank_fails, 2, how, init=True)
    assert time.monotonic() - began < 60
    assert failure.value.rank == 1
    # What it printed last; and the traceback, or the crash's stack, where there is one.
    assert "about to fail" in str(failure.value)
    assert how == "exit" or "one_rank_fails" in str(failure.value)
    assert isinstance(failure.value.__cause__, UserError if how == "raise" else type(None))


def test_a_hang_ends_at_the_timeout_and_shows_where():
    with pytest.raises(RankFailed, match="sleep_here") as failure:
        run_distributed(hang, 2, timeout=8)
    assert failure.value.rank == 1


def test_assert_close_relative_judges_by_the_largest_magnitude():
    expected = torch.tensor([100.0, 1e-9])
    assert_close_relative(expected + 1e-5, expected, 1e-6)
    with pytest.raises(AssertionError, match="loss: largest difference"):
        assert_close_relative(expected + 1e-3, expected, 1e-6, "loss")
    with pytest.raises(AssertionError, match="nan"):
        assert_close_relative(expected * float("nan"), expected, 1e-6)
    with pytest.raises(AssertionError, match="shape"):
        assert_close_relative(expected[:1], expected, 1e-6)


def test_a_script_without_main_guard_does_not_start_itself_for_ever(tmp_path: Path) -> None:
    """Each rank loads the caller's file; a call at its top level once filled a machine with processes."""
    script = tmp_path / "script.py"
    script.write_text(
        "from laser_dist.testing import run_distributed\n"
        "def fn(rank, world_size):\n    return rank\n"
        "run_distributed(fn, 2)\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "if __name__" in result.stderr
