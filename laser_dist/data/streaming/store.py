"""Where shards lie: a folder, or a web or object store whose shards are copied to a local cache as a whole.

Nothing from a store is used before its sha256 is the manifest's. The cache is shared by all processes of a machine:
a lock lets one of them fetch a shard, the others read its copy. Credentials come from the environment only.
"""

import errno
import fcntl
import hashlib
import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from laser_dist.data.manifest import Shard
from laser_dist.data.streaming.redirects import Redirected, guarded
from laser_dist.errors import UserError, require
from laser_dist.reading import read_file
from laser_dist.redaction import check_address

if TYPE_CHECKING:
    from fsspec.callbacks import Callback

_SLOWEST = 1024  # bytes/s; a transfer that crawls below it for a whole time-out is a stall
LONGEST_PAUSE = 20.0  # seconds between two attempts
_ABANDONED = 24 * 3600  # seconds after which a temporary file in the cache belongs to no living process
_TRY_LATER = (408, 425, 429)  # of HTTP's client errors, those that are worth another attempt


class CacheError(UserError):
    """This machine's cache cannot be used: no fault of the shards, and not mended by skipping them."""


class Store(Protocol):
    """The files of one folder of shards."""

    def locate(self, name: str) -> str:
        """Path or address of a file, as messages name it."""

    def size(self, name: str) -> int | None:
        """Bytes of a file, None if asking would cost a request. Raises FileNotFoundError."""

    def read(self, name: str, limit: int) -> bytes:
        """A file of at most `limit` bytes, whatever is in it. Raises OSError (a folder) or UserError (an address)."""

    def read_verified(self, shard: Shard) -> bytes:
        """A shard that has the size and the hash that the manifest says. Raises UserError."""


def is_remote(place: str | Path) -> bool:
    return "://" in str(place)


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "laser_dist" / "shards"


@dataclass(frozen=True)
class RemoteOptions:
    """How a remote store is asked, and where its shards are kept."""

    cache: Path = field(default_factory=default_cache)
    cache_bytes: int = 50 * 2**30  # least recently used copies go first
    timeout: float = 30.0  # seconds without an answer or a byte
    attempts: int = 5


def open_store(place: "str | Path | Store", options: RemoteOptions | None = None) -> Store:
    """The store at a folder or an address; a store comes back as it is."""
    if isinstance(place, LocalStore | RemoteStore):
        return place
    return (
        RemoteStore(str(place), options or RemoteOptions()) if is_remote(str(place)) else LocalStore(Path(str(place)))
    )


@dataclass(frozen=True)
class LocalStore:
    """A folder; its files are read where they are."""

    folder: Path

    def locate(self, name: str) -> str:
        return str(self.folder / name)

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def read(self, name: str, limit: int) -> bytes:
        return read_file(self.folder / name, limit)

    def read_verified(self, shard: Shard) -> bytes:
        path = self.folder / shard.name
        again = "copy it again, or write the folder again with `laser-dist prepare --overwrite`"
        try:
            content = read_file(path, shard.bytes)
        except OSError as error:
            kind = "is damaged" if error.errno == errno.EFBIG else "cannot be read"
            raise UserError(f"shard {path} {kind} ({error.strerror}): {again}") from None
        if not _matches(content, shard.sha256):
            raise UserError(f"shard {path} is damaged: its sha256 differs from the manifest's; {again}")
        return content


@dataclass(frozen=True)
class RemoteStore:
    """A folder behind http(s):// or s3://."""

    url: str
    options: RemoteOptions

    def __post_init__(self) -> None:
        check_address(self.url)

    def locate(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"

    def size(self, name: str) -> None:
        return None

    def read(self, name: str, limit: int) -> bytes:
        with self._cache_errors():
            self.options.cache.mkdir(parents=True, exist_ok=True)
            return self._download(name, self.options.cache / f".{name}.{os.getpid()}.{time.monotonic_ns()}.tmp", limit)

    def read_verified(self, shard: Shard) -> bytes:
        sha256 = shard.sha256
        copy = self.options.cache / f"{sha256}.tar"
        with self._cache_errors():
            if (content := _read_copy(copy, sha256)) is not None:
                return content
            asked, failure = time.time(), self._lock_path(sha256).with_suffix(".failed")
            with _locked(self._lock_path(sha256)):
                if (content := _read_copy(copy, sha256)) is not None:
                    return content
                # Who waited for a process that failed fails with it: else each would take as long, one after the other.
                if failure.is_file() and failure.stat().st_mtime >= asked:
                    raise UserError(failure.read_text(encoding="utf-8"))
                temporary = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
                try:
                    content = self._download(shard.name, temporary, shard.bytes, sha256)
                    temporary.replace(copy)  # not synced to disk first: a copy is verified whenever it is read
                except UserError as error:
                    failure.write_text(str(error), encoding="utf-8")
                    raise
                finally:
                    temporary.unlink(missing_ok=True)
            _touch(copy)
            self._evict(copy)
        return content

    def _download(self, name: str, temporary: Path, limit: int, sha256: str = "") -> bytes:
        """The content of a file by way of `temporary`, after as many attempts as needed and allowed.

        An answer of more than `limit` bytes is cut off: a server may send without end.
        """
        url, options = self.locate(name), self.options
        for attempt in range(1, options.attempts + 1):
            temporary.touch()  # a cache that cannot be written is no fault of the server
            try:
                self._filesystem().get_file(url, str(temporary), callback=_watch(options.timeout, limit))
                content = temporary.read_bytes()
                if not sha256 or _matches(content, sha256):
                    return content
                cause, lasting = "its sha256 differs from the manifest's", False
            except UserError:  # a package is missing: no attempt will bring it
                raise
            except Exception as error:  # HTTP and S3 clients raise many kinds, most of them no OSError
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                cause, lasting = _cause(error, options.timeout)
            finally:
                if not sha256:
                    temporary.unlink(missing_ok=True)
            if lasting:
                break
            if attempt < options.attempts:
                time.sleep(min(LONGEST_PAUSE, 0.25 * 2**attempt) * random.uniform(0.5, 1))
        raise UserError(
            f"{url} cannot be fetched: {cause} (attempt {attempt} of {options.attempts}). "
            "Check the address, the network and the credentials in the environment, or upload the file again; "
            "data.timeout and data.attempts say how patient the reader is"
        )

    def _filesystem(self) -> Any:
        import fsspec  # here, because the command line must not pay for it

        seconds, protocol = self.options.timeout, urlsplit(self.url).scheme
        if protocol == "s3":
            require("reading shards from s3://", "s3fs", extra="remote")
            limits = {"connect_timeout": seconds, "read_timeout": seconds, "retries": {"max_attempts": 0}}
            filesystem = fsspec.filesystem("s3", config_kwargs=limits)
            filesystem.retries = 1  # attempts are counted here
            return filesystem
        require("reading shards from http(s)://", "aiohttp", extra="remote")
        from aiohttp import ClientTimeout

        limits = {"timeout": ClientTimeout(total=None, connect=seconds, sock_connect=seconds, sock_read=seconds)}
        return fsspec.filesystem("http", client_kwargs={**limits, **guarded(), "trust_env": True})  # ~/.netrc, proxies

    def _lock_path(self, sha256: str) -> Path:
        return self.options.cache / "locks" / sha256[:2] / sha256

    def _evict(self, keep: Path) -> None:
        """Remove the least recently used copies beyond the limit, and what killed processes left."""
        copies, total = [], 0
        for path in self.options.cache.iterdir():
            with suppress(FileNotFoundError):  # another process evicts as well
                status = path.stat()
                if path.suffix == ".tmp" and time.time() - status.st_mtime > _ABANDONED:
                    path.unlink()
                elif path.suffix == ".tar":
                    total += status.st_size
                    copies.append((status.st_mtime_ns, path, status.st_size))
        for _, path, size in sorted(copies):
            if total <= self.options.cache_bytes:
                break
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size

    @contextmanager
    def _cache_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"the cache {self.options.cache} cannot be used ({error.strerror or error}): free some space, lower "
                "data.cache_gib, or choose another folder with --data.cache"
            ) from None


def _read_copy(path: Path, sha256: str) -> bytes | None:
    """The content of a cached shard; None if there is none, or if it rotted on this disk."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    if not _matches(content, sha256):
        path.unlink(missing_ok=True)
        return None
    _touch(path)
    return content


def _touch(path: Path) -> None:
    """Make a copy the last to be evicted; the system's own time stamps are too coarse to tell which is."""
    with suppress(FileNotFoundError):
        os.utime(path, ns=(time.time_ns(), time.time_ns()))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # freed by the system when the process ends, however it ends
        yield


class _TooLarge(Exception):
    """A server sends more than the file has."""


def _watch(timeout: float, limit: int) -> "Callback":
    """Stops a transfer that trickles (the clients' own time-outs start again with every byte), or does not end."""
    from fsspec.callbacks import Callback

    class Watch(Callback):
        """Raises TimeoutError after a time-out's worth of crawling, _TooLarge beyond `limit` bytes."""

        total = 0

        since, received = math.inf, 0  # from the first byte on: connecting has a time-out of its own

        def relative_update(self, inc: int = 1) -> None:
            self.received += inc
            self.total += inc
            if self.total > limit:
                raise _TooLarge
            now = time.monotonic()
            self.since = min(self.since, now)
            if now - self.since > timeout:
                if self.received < timeout * _SLOWEST:
                    raise TimeoutError
                self.since, self.received = now, 0

    return Watch()


def _cause(error: Exception, timeout: float) -> tuple[str, bool]:
    """What went wrong, in words that repeat no secret, and whether another attempt is pointless."""
    status = getattr(error, "status", None)
    if isinstance(error, _TooLarge):
        return "more bytes come than it may have", False
    if isinstance(error, Redirected):
        return str(error), True
    if isinstance(error, FileNotFoundError):
        return "it does not exist", True
    if isinstance(error, PermissionError) or status in (401, 403):
        return "access is denied", True
    if status:
        return f"the server answered {status}", 400 <= status < 500 and status not in _TRY_LATER
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return f"nothing, or next to nothing, came for {timeout:g} s", False
    return f"{type(error).__name__}{f': {text}' if (text := getattr(error, 'strerror', None)) else ''}", False


def _matches(content: bytes, sha256: str) -> bool:
    return hashlib.sha256(content).hexdigest() == sha256
