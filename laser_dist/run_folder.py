"""Where things lie in the folder of a run (known to training, serving and the quickstart; imports nothing heavy)."""

import re
from pathlib import Path

from laser_dist.errors import UserError
from laser_dist.reading import read_file


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
    return pointer.parent / pointed(pointer)


def pointed(pointer: Path) -> str:
    """The checkpoint that `latest` or `best` names. UserError unless that is the name of one beside it."""
    try:
        name = read_file(pointer, 4096).decode("utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"{pointer} cannot be read ({error}): write the name of a checkpoint into it") from None
    if not re.fullmatch(r"step-\d{1,18}", name):
        raise UserError(f"{pointer} names {name[:40]!r}, which is no checkpoint: write one's name into it")
    return name
