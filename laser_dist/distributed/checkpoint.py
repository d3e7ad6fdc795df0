"""Checkpoints that are complete or absent.

checkpoints/step-000020/
  model/           the retriever as a plain Hugging Face folder (adapters only, for LoRA), ready for export and serving
  deepspeed/       sharded parameters and optimizer state
  rng_*.safetensors, trainer.json, manifest.json (size and SHA-256 of every file)
checkpoints/latest, checkpoints/best   name the newest and the best one

1. All ranks write into a hidden staging folder. 2. After a barrier rank 0 writes the manifest and syncs to disk.
3. Rename. 4. Only then `latest` moves. A crash anywhere leaves the earlier checkpoints and nothing that looks complete.
"""

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from laser_dist.config import CheckpointConfig
from laser_dist.distributed.collectives import barrier, gather_objects, rank, world_size
from laser_dist.distributed.engine import Engine
from laser_dist.errors import UserError
from laser_dist.files import replacing, sync_folder
from laser_dist.retrieval.card import RetrieverCard

# What DeepSpeed stores beside tensors (stages 3, and 1 and 2); nothing else is unpickled.
SAFE_GLOBALS = [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]


@dataclass(frozen=True)
class TrainerState:
    """What the trainer needs to go on exactly."""

    step: int
    world_size: int
    stage: int
    fingerprint: str
    """Hash of the parts of the config that must not change on resume."""
    metric: float | None = None
    position: int | None = None
    """Training examples used so far, on all ranks; with it the data goes on whatever the batch size becomes."""


class CheckpointStore:
    """The checkpoints of one run. All ranks call every method, in the same order."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.folder = folder
        self.config = config

    def save(
        self, engine: Engine, state: TrainerState, tokenizer: PreTrainedTokenizerBase, card: RetrieverCard
    ) -> Path:
        """Write a checkpoint of `state.step` and point `latest` at it; returns its folder."""
        final = self.folder / f"step-{state.step:06d}"
        staging = self.folder / f".{final.name}.partial"
        if rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        barrier()
        _save_model(engine, staging / "model", tokenizer, card)
        frozen = any(not p.requires_grad for p in engine.module.parameters())
        engine.ds.save_checkpoint(str(staging), tag="deepspeed", save_latest=False, exclude_frozen_parameters=frozen)
        save_file(_rng_state(engine.device), staging / f"rng_{rank():05d}.safetensors")
        barrier()
        self._require_shared(staging)
        if rank() == 0:
            (staging / "trainer.json").write_text(json.dumps(asdict(state)) + "\n")
            _write_manifest(staging)
            _rename_over(staging, final)
            _point(self.folder / "latest", final.name)
        barrier()
        return final

    def mark_best(self, checkpoint: Path) -> None:
        if rank() == 0:
            _point(self.folder / "best", checkpoint.name)

    def prune(self) -> None:
        """Remove all but the newest `keep` checkpoints and the best one."""
        if rank() != 0:
            return
        protected = {self._pointed("best"), self._pointed("latest")}
        for old in self.steps()[: -self.config.keep]:
            if old.name not in protected:
                shutil.rmtree(old)

    def steps(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        return sorted(self.folder.glob("step-*"), key=lambda folder: int(folder.name.split("-")[1]))

    def best_metric(self) -> float | None:
        """The best checkpoint's metric as rank 0 reads it: files may look different elsewhere, and ranks must agree."""
        metric = None
        if rank() == 0 and (best := self._pointed("best")):
            with contextlib.suppress(UserError):  # a damaged best checkpoint is none
                metric = read_state(self.folder / best).metric
        return gather_objects(metric)[0]

    def newest_complete(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose files all match their manifest, and why newer ones were skipped."""
        skipped: list[str] = []
        chosen = None
        for candidate in self.steps()[::-1] if rank() == 0 else []:
            if not (defect := verify(candidate)):
                chosen = candidate
                break
            skipped.append(f"{candidate}: {defect}")
        # Rank 0 reads and hashes; the others follow its choice.
        return gather_objects(chosen)[0], skipped

    def load(self, engine: Engine, checkpoint: Path, fingerprint: str) -> TrainerState:
        """Restore parameters, optimizer and RNG; UserError if the run was another one."""
        state = read_state(checkpoint)
        if (state.world_size, state.stage) != (world_size(), engine.stage):
            raise UserError(
                f"{checkpoint} was written by {state.world_size} ranks with ZeRO-{state.stage}, this run has "
                f"{world_size()} with ZeRO-{engine.stage}: resume with the same, or start a new run from its model/"
            )
        if state.fingerprint != fingerprint:
            raise UserError(
                f"{checkpoint} belongs to another configuration (model, thinking, text, data, objective, optimizer or "
                "batch differ); compare config.toml in the run's folder, or choose another --output"
            )
        engine.ds.checkpoint_engine.load = _safe_load  # DeepSpeed itself would unpickle anything
        frozen = any(not p.requires_grad for p in engine.module.parameters())
        path, _ = engine.ds.load_checkpoint(str(checkpoint), tag="deepspeed", load_module_strict=not frozen)
        if path is None:
            raise UserError(f"{checkpoint}/deepspeed cannot be loaded; remove {checkpoint} to use the one before it")
        _restore_rng(load_file(checkpoint / f"rng_{rank():05d}.safetensors"), engine.device)
        return state

    def _require_shared(self, staging: Path) -> None:
        """On folders that are not shared, rank 0 would hash and publish a checkpoint without the others' files."""
        missing = [r for r in range(world_size()) if not (staging / f"rng_{r:05d}.safetensors").is_file()]
        if missing := gather_objects(missing)[0]:
            raise UserError(
                f"{self.folder}: rank 0 does not see what ranks {missing} wrote: the output folder must be "
                "shared by all nodes; choose one on shared storage with --output"
            )

    def _pointed(self, name: str) -> str | None:
        path = self.folder / name
        return path.read_text().strip() if path.is_file() else None


def verify(checkpoint: Path) -> str | None:
    """None if every file has the size and hash that the manifest says, else the first defect."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"manifest.json is missing or broken ({error})"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            return f"{name} is missing or has the wrong size"
        if _sha256(path) != expected["sha256"]:
            return f"{name} was altered (hash differs)"
    return None


def read_state(checkpoint: Path) -> TrainerState:
    try:
        return TrainerState(**json.loads((checkpoint / "trainer.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint} is not a checkpoint of laser_dist: trainer.json: {error}") from error


def _save_model(engine: Engine, folder: Path, tokenizer: PreTrainedTokenizerBase, card: RetrieverCard) -> None:
    adapters = hasattr(engine.module.lm, "peft_config")
    weights = engine.full_state_dict(only_trained=adapters)
    if rank() == 0:
        folder.mkdir()
        engine.module.lm.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        card.save(folder)


def _safe_load(path: str, map_location: Any = None) -> Any:
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        return torch.load(path, map_location=map_location, weights_only=True)


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_rng(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    with (folder / "manifest.json").open("w") as stream:
        json.dump({"files": files}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def _rename_over(staging: Path, final: Path) -> None:
    """Give `staging` its name; an older folder of that name goes only when the new one is in place."""
    old = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(staging, final)
    sync_folder(final.parent)  # the name must be on disk before `latest` says it
    shutil.rmtree(old, ignore_errors=True)


def _point(pointer: Path, name: str) -> None:
    with replacing(pointer) as temporary:
        temporary.write_text(name + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
