"""Which checkpoints there are, and which may go.

What stays: the newest `keep` that look whole (their manifest is there, every file has its size, and no load has found a
wrong hash), the best one, and the one that `latest` names. So damage never counts as a copy: with keep = 2, the least
there is, two checkpoints that were hashed when they were sealed are always left. Bits that rot afterwards are found
when a checkpoint is loaded, not here: hashing all again at each save would read as much as the save writes.
"""

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from laser_dist.distributed.manifest import verify

_NAME = re.compile(r"step-(\d+)")


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first; whatever else lies there is none of ours."""
    found = {path: match for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name)) and path.is_dir()}
    return sorted(found, key=lambda path: int(found[path][1]))


def superfluous(folder: Path, keep: int, protected: Collection[str | None], damaged: Collection[str]) -> list[Path]:
    """Checkpoints, damaged ones too, that are older than the newest `keep` whole ones and not `protected`, by name."""
    found = checkpoints_in(folder)
    whole = [path for path in found if path.name not in damaged and verify(path, hashes=False) is None]
    if len(whole) <= keep:
        return []
    return [path for path in found[: found.index(whole[-keep])] if path.name not in protected]


def remove(checkpoint: Path) -> str | None:
    """Delete a checkpoint, which loses its name first: none is ever half there. What went wrong, if something did.

    The next save tries again what a file system holds on to, as NFS does with files that somebody reads.
    """
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    try:
        os.rename(checkpoint, hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        return f"{checkpoint} could not be deleted, so its room is not free yet: {error}"
    return None


def remove_leftovers(folder: Path) -> None:
    """Delete what killed saves, conversions and deletions have left; as far as it can be."""
    for stale in folder.glob(".step-*.*"):
        shutil.rmtree(stale, ignore_errors=True)
