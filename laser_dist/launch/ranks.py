"""Ranks from launchers that do not speak torch's language: Slurm's srun, Open MPI, and MPI's PMI."""

import os
import socket

from laser_dist.errors import UserError

# For each: rank, rank on this host, number of ranks.
_NAMES = {
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPI": ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
}


def adopt_ranks() -> None:
    """Set RANK, LOCAL_RANK and WORLD_SIZE from the launcher's own names; leaves them alone where RANK is set.

    UserError if MASTER_ADDR and MASTER_PORT are missing, without which several ranks cannot find each other.
    """
    if "RANK" in os.environ:
        return
    for launcher, (rank, local_rank, size) in _NAMES.items():
        if int(os.environ.get(size) or 1) > 1 and rank in os.environ:
            if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
                raise UserError(
                    f"{size} = {os.environ[size]} ({launcher}), but {' and '.join(missing)} not set: export the "
                    "address of rank 0's host and a free port there before the ranks start, as launchers/train.slurm "
                    "does"
                )
            os.environ["RANK"], os.environ["WORLD_SIZE"] = os.environ[rank], os.environ[size]
            os.environ["LOCAL_RANK"] = os.environ.get(local_rank, "0")
            return


def port_is_free(port: int) -> bool:
    """Whether ranks can meet at this port of this host."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: what just ended is no obstacle
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port of this host that nobody listens on, for ranks to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
