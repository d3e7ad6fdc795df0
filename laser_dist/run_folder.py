"""Where things lie in the folder of a run (known to training, serving and the quickstart; imports nothing heavy)."""

from pathlib import Path

from laser_dist.errors import UserError


def checkpoints_of(run: Path) -> Path:
    return run / "checkpoints"


def latest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run. UserError if it has none."""
    pointer = checkpoints_of(run) / "latest"
    if not pointer.is_file():
        raise UserError(f"{run} holds no finished checkpoint ({pointer} does not exist)")
    return pointer.parent / pointer.read_text().strip()
