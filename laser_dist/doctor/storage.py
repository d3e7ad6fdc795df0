"""Disks: room, and whether files become whole and durable there as checkpoints need it."""

import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from laser_dist.doctor.finding import GIB, Context, Finding, failed, ok, warning
from laser_dist.files import replacing, sync_folder
from laser_dist.run_folder import existing_folder

_SLOW = 2.0
"""Seconds for 1 MiB on disk and a rename; a local disk takes some milliseconds."""


def disk(context: Context) -> Finding:
    """Room where a run would write; with a recipe, for its checkpoints."""
    folder = existing_folder(context.output)
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free at {folder}"
    if context.recipe is not None:
        from laser_dist.launch.facts import checkpoint_bytes

        one = checkpoint_bytes(context.recipe)
        all_of_them = one * (context.recipe.checkpoint.keep + 2)
        found += f", a checkpoint takes about {one / GIB:.1f} GiB" if one > 0.05 * GIB else ""
        if free < one:
            return failed(found, "free some, or choose another --output: the first checkpoint would not fit")
        if free < all_of_them:
            remedy = (
                f"checkpoint.keep = {context.recipe.checkpoint.keep} asks for {all_of_them / GIB:.1f} GiB: free some"
            )
            return warning(found, f"{remedy}, or lower it")
    if free < GIB:
        return failed(found, "free some, or choose another folder with --output")
    return warning(found, "free some: checkpoints of larger models take more") if free < 10 * GIB else ok(found)


def durable_files(context: Context) -> Finding:
    """Write, fsync, rename, fsync of the folder, read back: what completes a checkpoint."""
    content = os.urandom(2**20)
    began = time.monotonic()
    try:
        with probe_file(context.output) as path:
            with replacing(path) as temporary:
                temporary.write_bytes(content)
            sync_folder(path.parent)
            same = path.read_bytes() == content
    except OSError as error:
        return failed(
            f"{context.output}: {error.strerror or error}",
            "checkpoints need a folder that can be written, synced and renamed in: choose another --output",
        )
    seconds = time.monotonic() - began
    if not same:
        return failed(
            f"{context.output}: read back other bytes than were written", "do not train on this disk: replace it"
        )
    found = f"{context.output}: 1 MiB written, synced and renamed in {seconds * 1e3:.0f} ms"
    if seconds > _SLOW:
        return warning(found, "saving will take long: use another disk, or checkpoint.asynchronous = true")
    return ok(found)


def temporary_files(_: Context) -> Finding:
    try:
        folder = Path(tempfile.gettempdir())
        with probe_file(folder) as path:
            path.write_bytes(b"x")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return failed(
            f"no folder for temporary files: {error.strerror or error}", "export TMPDIR=/a/folder/to/write/in"
        )
    if free < GIB:
        return warning(f"{folder}: {free / GIB:.2f} GiB free", "export TMPDIR=/a/larger/disk")
    return ok(f"{folder}: {free / GIB:.1f} GiB free")


def shard_cache(context: Context) -> Finding:
    """Where shards from https:// and s3:// are kept: processes share it by locks."""
    from laser_dist.data.streaming.store import default_cache

    data = context.recipe.data if context.recipe else None
    cache = Path(data.cache) if data and data.cache else default_cache()
    remote = data is not None and any("://" in place for place in data.sources)
    worse = failed if remote else warning
    folder = existing_folder(cache)
    remedy = (
        f"choose another folder: data.cache in the recipe{'' if remote else ' (only shards from addresses need it)'}"
    )
    try:
        with probe_file(folder) as path, path.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return worse(f"{cache}: no file can be locked there ({error.strerror or error})", remedy)
    free = shutil.disk_usage(folder).free
    wanted = (data.cache_gib if data else 50.0) * GIB
    if remote and free < wanted:
        return warning(f"{cache}: {free / GIB:.1f} GiB free", f"data.cache_gib = {wanted / GIB:g} is more: lower it")
    return ok(f"{cache}: can be locked, {free / GIB:.1f} GiB free")


def hub_cache(_: Context) -> Finding:
    """Where models and data sets from the hub are kept."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()
    folder = existing_folder(cache)
    free = shutil.disk_usage(folder).free
    offline = " (offline: HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "ON") else ""
    if not os.access(folder, os.W_OK):
        return warning(f"{cache} cannot be written to", "models by hub id cannot be kept: export HF_HOME=/a/folder")
    if free < 5 * GIB:
        return warning(
            f"{cache}: {free / GIB:.1f} GiB free", "models by hub id need more: export HF_HOME=/a/larger/disk"
        )
    return ok(f"{cache}: {free / GIB:.1f} GiB free{offline}")


@contextmanager
def probe_file(folder: Path) -> Iterator[Path]:
    """A name in `folder`, or in the nearest folder above it that exists, that is gone afterwards. Raises OSError."""
    path = existing_folder(folder) / f".laser-dist-doctor-{uuid.uuid4().hex}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
