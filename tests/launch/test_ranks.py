import os

import pytest

from laser_dist.errors import UserError
from laser_dist.launch.ranks import adopt_ranks

MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    def set_only(**values: str) -> None:
        for name in list(os.environ):
            if name.startswith(("SLURM_", "OMPI_", "PMI_", "MASTER_")) or name.endswith(("RANK", "WORLD_SIZE")):
                monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # adopted ones go again after the test
            if name not in values:
                monkeypatch.setenv(name, "")
                del os.environ[name]

    return set_only


def ranks() -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def test_srun_and_open_mpi_ranks_are_adopted(environment) -> None:
    environment(SLURM_PROCID="5", SLURM_LOCALID="1", SLURM_STEP_NUM_TASKS="8", **MASTER)
    adopt_ranks()
    assert ranks() == ("5", "1", "8")
    environment(OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_SIZE="4", **MASTER)
    adopt_ranks()
    assert ranks() == ("3", "1", "4")


def test_a_batch_script_is_no_rank(environment) -> None:
    """Slurm sets SLURM_PROCID=0 and SLURM_NTASKS there too: adopted, it would wait for ranks that nobody starts."""
    environment(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="8", **MASTER)
    adopt_ranks()
    assert ranks() == (None, None, None)


def test_another_launchers_ranks_stay(environment) -> None:
    environment(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2", RANK="7", LOCAL_RANK="3", WORLD_SIZE="16")
    adopt_ranks()
    assert ranks() == ("7", "3", "16")


def test_ranks_without_a_meeting_point_are_refused(environment) -> None:
    environment(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2", MASTER_ADDR="10.0.0.1")
    with pytest.raises(UserError, match="MASTER_PORT"):
        adopt_ranks()
