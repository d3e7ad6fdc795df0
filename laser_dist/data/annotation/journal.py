"""An append-only record of finished work: one JSON object per line, found again by its key; a kill loses nothing."""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from laser_dist.errors import UserError
from laser_dist.reading import LONGEST_ROW, decode_json

_SYNC_SECONDS = 1.0


class Journal:
    """Records of a file that only grows. Offsets are in memory, records are not.

    One process at a time: a second one gets a UserError. A last line that was cut off by a kill is removed.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered, so that what a full disk did not take cannot be written later, behind something else.
        self._file = path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(f"{path} is in use by another run: wait for it, or write to another --out") from None
        self._reader = path.open("rb")
        self._offsets: dict[str, int] = {}
        self._synced = time.monotonic()
        self._recover()

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def get(self, key: str) -> dict[str, Any] | None:
        """The newest record with this key."""
        if key not in self._offsets:
            return None
        self._reader.seek(self._offsets[key])
        return json.loads(self._reader.readline())

    def records(self) -> Iterator[dict[str, Any]]:
        """All records in the order they were written, also those that a newer one with the same key replaced."""
        self._reader.seek(0)
        while line := self._reader.readline():
            yield json.loads(line)

    def append(self, key: str, record: dict[str, Any]) -> None:
        """Write a record. It outlives a kill at once, and a power loss a second later."""
        offset = self._file.seek(0, os.SEEK_END)
        line = json.dumps({"key": key, **record}, ensure_ascii=False).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(offset)
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); what it holds is kept") from error
        self._offsets[key] = offset
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def _recover(self) -> None:
        offset = 0
        for number, line in enumerate(self._reader, 1):
            if not line.endswith(b"\n"):
                self._file.truncate(offset)
                break
            try:
                if len(line) > LONGEST_ROW:
                    raise ValueError
                self._offsets[decode_json(line)["key"]] = offset
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self.path}:{number}: damaged: remove this line, its row is then asked again"
                ) from None
            offset += len(line)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            os.fsync(self._file.fileno())
            if not self.path.stat().st_size:
                self.path.unlink()
        finally:
            self._file.close()
            self._reader.close()
