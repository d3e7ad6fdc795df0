"""Where things lie in the folder of a run (known to training, serving and the quickstart; imports nothing heavy)."""

from pathlib import Path

from laser_dist.errors import UserError


def existing_folder(path: Path) -> Path:
    """The folder, or the nearest one above it that exists (which may be a file: nothing can be made below it)."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def checkpoints_of(run: Path) -> Path:
    return run / "checkpoints"


def latest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run. UserError if it has none."""
    pointer = checkpoints_of(run) / "latest"
    if not pointer.is_file():
        raise UserError(f"{run} holds no finished checkpoint ({pointer} does not exist)")
    return pointer.parent / pointer.read_text().strip()
