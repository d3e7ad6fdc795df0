"""Is nothing run that comes with data? Tried with files that would leave a trace if it were."""

import hashlib
import io
import tarfile
import tempfile
from pathlib import Path

from laser_dist.doctor.finding import Context, Finding, failed, ok, skipped, warning
from laser_dist.doctor.loopback import hostile_pickle

_STOP = "stop using this installation: run launchers/setup.sh anew"


def shards(_: Context) -> Finding:
    """A shard with a pickle in it, given to the reader that training uses."""
    from laser_dist.data.manifest import Shard
    from laser_dist.data.shards import read_members
    from laser_dist.errors import UserError

    with tempfile.TemporaryDirectory(prefix="laser-dist-doctor-") as name:
        canary, file = Path(name) / "canary", Path(name) / "hostile.tar"
        content = hostile_pickle(canary)
        with tarfile.open(file, "w") as tar:
            for member in ("0.json", "0.pyd"):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        try:
            read_members(name, Shard(file.name, 1, file.stat().st_size, digest))
        except UserError:
            refused = True
        else:
            refused = False
        if canary.exists():
            return failed("a pickle in a shard was run", _STOP)
    return ok("a pickle in a shard is refused") if refused else failed("a pickle in a shard was read", _STOP)


def checkpoints(context: Context) -> Finding:
    """A checkpoint file with a pickle that runs code, given to the loader (tried in the loopback)."""
    result = context.facts.get("pickle")
    if result is None:
        return skipped("the loopback did not get that far")
    return (
        ok("a pickle in a checkpoint is refused")
        if result == "refused"
        else failed(f"a pickle in a checkpoint was {result}", _STOP)
    )


def remote_code(context: Context) -> Finding:
    if context.recipe is None:
        return ok("model.trust_remote_code is off unless a recipe turns it on")
    if context.recipe.model.trust_remote_code:
        return warning(
            f"model.trust_remote_code is on: code that comes with {context.recipe.model.name} will run",
            "read that code, and pin it with model.revision = a commit",
        )
    return ok("no code that comes with the model is run")
