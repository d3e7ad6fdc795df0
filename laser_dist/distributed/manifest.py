"""manifest.json: size and SHA-256 of every file of a checkpoint, taken when it is on disk. Ranks share the work."""

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

from laser_dist.files import write_json
from laser_dist.reading import read_object

FILE = "manifest.json"


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
                self.found[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        except OSError as error:
            self.problem = str(error)


def write_manifest(folder: Path, found: dict[str, dict[str, Any]]) -> None:
    write_json(folder / FILE, {"files": dict(sorted(found.items()))})


def verify(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """None if every file of this share has the size and hash that the manifest says, else the first defect."""
    try:
        files = read_object(checkpoint / FILE)["files"]
        if outside := [name for name in files if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts]:
            raise ValueError(f"{outside[0]!r} does not lie in the folder")
        if not all(type(e["bytes"]) is int and isinstance(e["sha256"], str) for e in files.values()):
            raise ValueError("an entry is no size and hash")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{FILE} is missing or broken ({error})"
    by_size = sorted(files.items(), key=lambda item: (item[1]["bytes"], item[0]))
    for name, expected in by_size[part::parts]:
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            return f"{name} is missing or has the wrong size"
        if _sha256(path) != expected["sha256"]:
            return f"{name} was altered (hash differs)"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
