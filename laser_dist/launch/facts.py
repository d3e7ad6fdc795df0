"""What one rank knows of its host before training: what must be alike everywhere, and what must be there."""

import hashlib
import importlib.util
import json
import math
import platform
import shutil
import socket
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from laser_dist.config import ModelConfig, RunConfig
from laser_dist.data.streaming.sets import TrainingData
from laser_dist.reading import decode_json
from laser_dist.run_folder import existing_folder

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "safetensors",
    "triton",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)
LARGEST_HEADER = 100_000_000
"""Bytes; safetensors itself reads no longer ones."""
ADAM_BYTES = 16
"""Bytes of a checkpoint per trained parameter: at most 4 of weights in model/, 4 of master weights, 8 of Adam's."""
CLOCK_TOLERANCE = 5.0
"""Seconds; more confuse time stamps of shared files and the order of log lines."""


@dataclass
class Facts:
    """One rank's view."""

    host: str
    alike: dict[str, str] = field(default_factory=dict)
    """What must be the same on all ranks."""
    problems: list[str] = field(default_factory=list)
    """What this rank cannot do."""
    device: str = "cpu"
    free_bytes: int = 0
    """Free space where the output folder is or will be."""


def collect(config: RunConfig, ds_config: dict[str, Any], data: TrainingData, device: Any) -> Facts:
    """Never raises for what may be wrong with a host: a rank that cannot see something still takes part."""
    facts = Facts(socket.gethostname())
    facts.alike = {"python": platform.python_version(), **versions()}
    facts.alike["code of laser_dist and laser_kernels"] = _code()
    facts.alike["recipe"] = _digest(json.dumps([asdict(config), ds_config], sort_keys=True, default=str).encode())
    facts.alike["shards (data.train, data.mix)"] = _digest(json.dumps(data.fingerprint()).encode())
    facts.alike[f"model {config.model.name}"] = _guarded(facts, "model.name", lambda: model_files(config.model))
    for part in data.sets:
        _guarded(facts, "data", lambda part=part: _read_shards(part))
    if device.type == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(device)
        facts.device = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        facts.alike["GPU"] = properties.name
        facts.alike["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    facts.free_bytes = shutil.disk_usage(existing_folder(Path(config.output))).free
    return facts


def versions() -> dict[str, str]:
    """Versions of the packages that decide numbers or talk to other ranks."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def model_files(config: ModelConfig) -> str:
    """Identity of the weights without reading them: sizes and small files of a folder, or the hub's commit."""
    folder = Path(config.name)
    if folder.is_dir():
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            content = path.read_bytes() if path.suffix == ".json" else b""
            digest.update(f"{path.name} {path.stat().st_size} {_digest(content)}\n".encode())
        return digest.hexdigest()[:12]
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(config.name, "config.json", revision=config.revision)
    return Path(cached).parent.name[:12] if isinstance(cached, str) else "not in the cache"


def parameters(config: ModelConfig) -> int | None:
    """Parameters in a model folder's safetensors, from their headers; None where the files do not say."""
    folder = Path(config.name)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    total = 0
    for path in files:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER:
                return None
            try:
                header = decode_json(file.read(length))
                total += sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
            except (ValueError, KeyError, TypeError, AttributeError):  # loading says what is wrong with it
                return None
    return total or None


def checkpoint_bytes(config: RunConfig) -> float:
    """About what one checkpoint takes; 0 where it is small (LoRA) or not known (hub models, truncated ones)."""
    if config.model.lora_rank or config.model.layers:
        return 0.0
    return float(ADAM_BYTES * (parameters(config.model) or 0))


def _guarded(facts: Facts, what: str, read: Any) -> str:
    try:
        return read() or ""
    except OSError as error:
        facts.problems.append(f"{what}: {error.filename or ''}: {error.strerror or error}")
        return "cannot be read"


def _read_shards(part: Any) -> None:
    """Every shard is there, and the first can be read; addresses were asked for their manifest already."""
    sizes = [part.store.size(shard.name) for shard in part.shards]
    if sizes[0] is not None:
        with open(part.store.locate(part.shards[0].name), "rb") as file:
            file.read(512)


def _code() -> str:
    digest = hashlib.sha256()
    for package in ("laser_dist", "laser_kernels"):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(root).rglob("*.py")):
                digest.update(f"{package}/{path.relative_to(root)} {_digest(path.read_bytes())}\n".encode())
    return digest.hexdigest()[:12]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
