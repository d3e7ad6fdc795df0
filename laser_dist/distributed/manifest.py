"""manifest.json: size and SHA-256 of every file of a checkpoint, taken when it is on disk. Ranks share the work."""

import os
import threading
from pathlib import Path, PurePosixPath
from typing import Any

from laser_dist.files import sha256, sync_folder, write_json
from laser_dist.reading import read_object

FILE = "manifest.json"
STATE = "trainer.json"
"""What every checkpoint holds; a manifest that does not name it is none."""


class Sealing:
    """Puts a rank's share of a folder's files on disk and hashes them, in a thread; nothing may change them meanwhile.

    Ends with the process: what is not sealed is no checkpoint.
    """

    def __init__(self, folder: Path, part: int, parts: int):
        self.folder = folder
        self.found: dict[str, dict[str, Any]] = {}
        self.problem: str | None = None
        self.thread = threading.Thread(target=self._run, args=(part, parts), daemon=True)
        self.thread.start()

    @property
    def done(self) -> bool:
        return not self.thread.is_alive()

    def wait(self) -> tuple[dict[str, dict[str, Any]], str | None]:
        """What the manifest says about this rank's files, and what went wrong."""
        self.thread.join()
        return self.found, self.problem

    def _run(self, part: int, parts: int) -> None:
        try:
            files = (path for path in self.folder.rglob("*") if path.is_file())
            by_size = sorted(files, key=lambda path: (path.stat().st_size, path))  # so that shares are alike
            for path in by_size[part::parts]:
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
                name = str(path.relative_to(self.folder))
                self.found[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
            if part == 0:  # a file whose name is not on disk is lost with the power
                for folder in (self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())):
                    sync_folder(folder)
        except Exception as error:  # a thread that dies without a word would leave files out of the manifest
            self.problem = str(error) or type(error).__name__


def write_manifest(folder: Path, found: dict[str, dict[str, Any]]) -> None:
    write_json(folder / FILE, {"files": dict(sorted(found.items()))})


def recorded_bytes(checkpoint: Path) -> int | None:
    """What a checkpoint's files take by its manifest; None where that is missing or broken."""
    files = _read(checkpoint)
    return None if isinstance(files, str) else sum(entry["bytes"] for entry in files.values())


def verify(checkpoint: Path, part: int = 0, parts: int = 1, *, hashes: bool = True) -> str | None:
    """None if every file of this share has the size and hash that the manifest says, else the first defect.

    Without `hashes` no file is read: damage that leaves sizes alone is not found. A file that the manifest does not
    know is a defect where things are loaded by pattern: of two checkpoints copied into one it may be all that shows.
    """
    files = _read(checkpoint)
    if isinstance(files, str):
        return files
    by_size = sorted(files.items(), key=lambda item: (item[1]["bytes"], item[0]))
    try:
        for name, expected in by_size[part::parts]:
            path = checkpoint / name
            if not path.is_file() or path.stat().st_size != expected["bytes"]:
                return f"{name} is missing or has the wrong size"
            if hashes and sha256(path) != expected["sha256"]:
                return f"{name} was altered (hash differs)"
        if part == 0 and (foreign := sorted(_loaded(checkpoint) - files.keys())):
            return f"{foreign[0]} was not saved with it"
    except OSError as error:
        return f"cannot be read ({error})"
    return None


def _read(checkpoint: Path) -> dict[str, dict[str, Any]] | str:
    """File name -> bytes and sha256, or what is wrong with the manifest."""
    try:
        files = read_object(checkpoint / FILE)["files"]
        found = {name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in files.items()}
        if not all(type(entry["bytes"]) is int and isinstance(entry["sha256"], str) for entry in found.values()):
            raise ValueError("an entry is no size and hash")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{FILE} is missing or broken ({error})"
    paths = {name: PurePosixPath(name) for name in found}
    if outside := [name for name, path in paths.items() if "\0" in name or path.is_absolute() or ".." in path.parts]:
        return f"{FILE} names {outside[0]!r}, which is not in the checkpoint"
    return found if STATE in found else f"{FILE} does not name {STATE}"


def _loaded(checkpoint: Path) -> set[str]:
    """Names of the files that a resumed run may load, hidden ones left out: file systems have some of their own."""
    files = (path for pattern in ("deepspeed/**/*", "model/**/*", "rng_*") for path in checkpoint.glob(pattern))
    return {path.relative_to(checkpoint).as_posix() for path in files if path.is_file() and path.name[0] != "."}
