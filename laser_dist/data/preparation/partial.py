"""A set of shards while it grows: a hidden folder beside the final one, which is kept when the work is interrupted.

`.NAME.partial` has what will be published, `.NAME.state` what is needed to continue. A commit writes one shard and
appends to the other files, puts all of it on disk, and only then adds a line to the journal; what the journal does not
know is cut off when the work is taken up again.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from laser_dist.data.manifest import MANIFEST, Manifest, Shard, encode_manifest
from laser_dist.errors import UserError
from laser_dist.files import sha256, sync_folder

SKIPPED = "skipped.jsonl"  # rows left out, and why
SEEN = "seen"  # in the state folder; all other appended files are published


class PartialSet:
    """The folder in which a set grows. One process at a time; close it, or publish it.

    `header` says what is being made: a folder with another one is thrown away. `shards` are the finished ones, and
    `entries` what earlier processes noted with each.
    Raises UserError if `out` is occupied or another process is at work.
    """

    def __init__(self, out: Path, header: dict[str, Any], *, overwrite: bool = False) -> None:
        self.out = Path(out).absolute()
        check_target(self.out, overwrite)
        self.folder, self.state = (self.out.with_name(f".{self.out.name}.{kind}") for kind in ("partial", "state"))
        self.state.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        self.header: dict[str, Any] = {}
        self.entries: list[dict[str, Any]] = []
        self.shards: list[Shard] = []
        known = self._read_journal()
        self.stale = known and any(self.header.get(name) != value for name, value in header.items())
        if self.stale or not known:
            self.header, self.entries, self.shards = header, [], []
            self.discard(keep_state=True)
            self.folder.mkdir()
        self._journal = (self.state / "journal.jsonl").open("ab")
        self._files: dict[str, IO[bytes]] = {}
        self._cut(self.entries[-1]["sizes"] if self.entries else {})

    def begin(self, **header: Any) -> None:
        """Note what else the header needs, before the first commit."""
        self.header |= header
        self._append_line(self.header)

    def commit(
        self, texts: Sequence[bytes], appended: Mapping[str, bytes], *, source: int, examples: int, **entry: Any
    ) -> None:
        """Put a shard of these examples (none: no shard) and what is to be appended on disk, then note `entry`.

        `examples` is the number of examples in earlier shards. Raises OSError; nothing has changed then.
        """
        path = self.folder / f"shard-{len(self.shards):06d}.tar"
        shard = None
        try:
            if texts:
                shard = replace(write_shard(path, texts, examples), source=source)
            for name, content in appended.items():
                self._append(name, content)
            sizes = {name: file.tell() for name, file in self._files.items()}
            self._append_line(
                {"shard": shard and {**vars(shard), "offsets": list(shard.offsets)}, "sizes": sizes, **entry}
            )
        except OSError:
            path.unlink(missing_ok=True)
            raise
        self.shards += [shard] if shard else []

    def read(self, name: str) -> bytes:
        """What has been appended under this name."""
        path = self._path(name)
        return path.read_bytes() if path.exists() else b""

    def publish(self, manifest: Manifest) -> None:
        """Make the folder whole and give it its name. Raises OSError."""
        write_durably(self.folder / MANIFEST, encode_manifest(manifest))
        self.close()
        publish(self.folder, self.out)
        shutil.rmtree(self.state, ignore_errors=True)

    def discard(self, *, keep_state: bool = False) -> None:
        """Throw away what was made so far."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self.state.iterdir() if self.state.is_dir() else ():
            if path.name != "lock":
                path.unlink()
        if not keep_state:
            self.close()
            shutil.rmtree(self.state, ignore_errors=True)

    def close(self) -> None:
        for file in (self._journal, self._lock, *self._files.values()):
            try:
                file.close()
            except OSError:  # what a full disk did not take is not needed
                pass

    def _path(self, name: str) -> Path:
        return (self.state if name == SEEN else self.folder) / name

    def _locked(self) -> IO[bytes]:
        lock = (self.state / "lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise UserError(f"another process is writing {self.out}: wait for it, or choose another --out") from None
        return lock

    def _read_journal(self) -> bool:
        """Take over what is whole of an earlier process's work; whether there was any."""
        path, size = self.state / "journal.jsonl", 0
        with path.open("ab+") as file:
            file.seek(0)
            for line in file:
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except (ValueError, RecursionError):
                    entry = None
                if not isinstance(entry, dict) or (self.header and not self._take(entry)):
                    break
                self.header = self.header or entry
                size += len(line)
            file.truncate(size)
        return size > 0 and self.folder.is_dir()

    def _take(self, entry: dict[str, Any]) -> bool:
        """Note the entry and its shard, unless something of it is missing."""
        values = entry.pop("shard")
        if values and _sha256(self.folder / values["name"]) != values["sha256"]:
            return False
        for name, size in entry["sizes"].items():
            if not self._path(name).is_file() or self._path(name).stat().st_size < size:
                return False
        self.entries.append(entry)
        self.shards += [Shard(**values | {"offsets": array("q", values["offsets"])})] if values else []
        return True

    def _cut(self, sizes: dict[str, int]) -> None:
        """Bring all files to what the journal knows."""
        known = {self._path(name) for name in (*sizes, *(shard.name for shard in self.shards))}
        for path in (self._path(SEEN), *self.folder.rglob("*")):
            if path.is_file() and path not in known:
                path.unlink()
        for name, size in sizes.items():
            os.truncate(self._path(name), size)
            self._files[name] = self._path(name).open("ab")

    def _append(self, name: str, content: bytes) -> None:
        if name not in self._files:
            self._path(name).parent.mkdir(exist_ok=True)
            self._files[name] = self._path(name).open("ab")
        if content:
            _write_synced(self._files[name], content)

    def _append_line(self, value: dict[str, Any]) -> None:
        _write_synced(self._journal, json.dumps(value).encode() + b"\n")


def check_target(out: Path, overwrite: bool) -> None:
    """UserError unless `out` is free, or holds shards that may be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file: give a folder")
    if any(out.iterdir()):
        if not overwrite:
            raise UserError(f"{out} is not empty: choose another folder, or replace it with --overwrite")
        ours = (MANIFEST, SKIPPED, "dev")
        foreign = [path.name for path in out.iterdir() if path.name not in ours and not path.match("shard-*.tar")]
        if foreign or not (out / MANIFEST).is_file():
            what = f"holds {min(foreign)}" if foreign else "holds no shards but other files"
            raise UserError(f"{out} {what}, which --overwrite would delete: move it away yourself")


def publish(partial: Path, out: Path) -> None:
    """Give a whole folder its final name; what was there before goes when that is done."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    for folder in (*(path for path in partial.iterdir() if path.is_dir()), partial):
        sync_folder(folder)
    if out.is_dir() and any(out.iterdir()):
        out.rename(old)
    partial.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_shard(path: Path, texts: Sequence[bytes], first: int) -> Shard:
    """A tar file of these JSON texts; `first` is the index of the first, from which members get their names."""
    buffer, offsets = io.BytesIO(), array("q", [0])
    from webdataset.writer import TarWriter  # which imports torch

    with TarWriter(buffer, encoder=False, mtime=0, user="", group="") as writer:
        for index, text in enumerate(texts, first):
            writer.write({"__key__": f"{index:09d}", "json": text})
            offsets.append(writer.tarstream.offset)
    content = buffer.getvalue()
    write_durably(path, content)
    return Shard(path.name, len(texts), len(content), hashlib.sha256(content).hexdigest(), offsets=offsets)


def write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        _write_synced(file, content)


def _write_synced(file: IO[bytes], content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    try:
        return sha256(path)
    except OSError:
        return ""
