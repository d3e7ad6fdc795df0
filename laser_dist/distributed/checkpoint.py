"""Checkpoints that are complete or absent.

checkpoints/step-000020/
  model/           the retriever as a plain Hugging Face folder (adapters only, for LoRA), ready for export and serving
  deepspeed/       sharded parameters and optimizer state
  rng_*.safetensors, trainer.json, manifest.json (size and SHA-256 of every file)
checkpoints/latest, checkpoints/best   name the newest and the best one

1. All ranks write into a hidden staging folder. 2. After a barrier they sync and hash what is there, each a share, in a
thread; with `checkpoint.asynchronous` training goes on meanwhile. 3. Rank 0 writes the manifest and renames the folder.
4. Only then `latest` moves. A crash anywhere leaves the earlier checkpoints and nothing that looks complete.
"""

import contextlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from laser_dist.config import CheckpointConfig
from laser_dist.distributed.collectives import barrier, gather_objects, rank, world_size
from laser_dist.distributed.engine import Engine
from laser_dist.distributed.manifest import Sealing, verify, write_manifest
from laser_dist.distributed.pickles import safe_load
from laser_dist.distributed.universal import load_converted
from laser_dist.distributed.weights import save_model
from laser_dist.errors import UserError
from laser_dist.files import replacing, sync_folder
from laser_dist.reading import read_object
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.run_folder import pointed


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
        self.sealing: Sealing | None = None

    def save(
        self,
        engine: Engine,
        state: TrainerState,
        tokenizer: PreTrainedTokenizerBase,
        card: RetrieverCard,
        *,
        best: bool = False,
    ) -> None:
        """Write a checkpoint of `state.step`, which `publish` completes; an earlier one must be published before."""
        assert self.sealing is None, "publish the checkpoint before"
        self.final, self.best = self.folder / f"step-{state.step:06d}", best
        staging = self.folder / f".{self.final.name}.partial"
        if rank() == 0:
            for stale in self.folder.glob(".step-*.*"):  # of a save or a conversion that was killed
                shutil.rmtree(stale)
            staging.mkdir(parents=True)
        barrier()
        save_model(engine, staging / "model", self.config.max_shard_gb)
        if rank() == 0:
            tokenizer.save_pretrained(staging / "model")
            card.save(staging / "model")
            (staging / "trainer.json").write_text(json.dumps(asdict(state)) + "\n")
        frozen = any(not p.requires_grad for p in engine.module.parameters())
        engine.ds.save_checkpoint(str(staging), tag="deepspeed", save_latest=False, exclude_frozen_parameters=frozen)
        save_file(_rng_state(engine.device), staging / f"rng_{rank():05d}.safetensors")
        barrier()
        self._require_shared(staging)
        self.sealing = Sealing(staging, rank(), world_size())

    @property
    def sealed(self) -> bool:
        """Whether this rank has nothing left to do for a checkpoint that is not published."""
        return self.sealing is None or self.sealing.done

    def publish(self) -> Path | None:
        """Complete what `save` wrote, waiting where a rank is not `sealed`: then `latest` and maybe `best` point at it.

        Returns its folder, None if there is nothing to publish. UserError on all ranks if one could not write.
        """
        if self.sealing is None:
            return None
        everyone = gather_objects(self.sealing.wait())
        staging, self.sealing = self.sealing.folder, None
        if problems := [problem for _, problem in everyone if problem]:
            raise UserError(f"{staging} cannot be put on disk ({problems[0]}); the checkpoint before it is good")
        if rank() == 0:
            write_manifest(staging, {name: entry for found, _ in everyone for name, entry in found.items()})
            _rename_over(staging, self.final)
            _point(self.folder / "latest", self.final.name)
            if self.best:
                _point(self.folder / "best", self.final.name)
            self.prune()
        barrier()
        return self.final

    def prune(self) -> None:
        """Remove all but the newest `keep` checkpoints and the best one; for rank 0."""
        protected = {self._pointed("best"), self._pointed("latest")}
        for old in self.steps()[: -self.config.keep]:
            if old.name not in protected:
                shutil.rmtree(old)

    def steps(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        named = (path for path in self.folder.glob("step-*") if path.name[5:].isdecimal())
        return sorted(named, key=lambda folder: int(folder.name[5:]))

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
        for candidate in gather_objects(self.steps()[::-1])[0]:  # rank 0's: files may look different elsewhere
            defects = [defect for defect in gather_objects(verify(candidate, rank(), world_size())) if defect]
            if not defects:
                return candidate, skipped
            skipped.append(f"{candidate}: {defects[0]}")
        return None, skipped

    def load(self, engine: Engine, checkpoint: Path, fingerprint: str, seed: int) -> TrainerState:
        """Restore parameters, optimizer and RNG; UserError if the run was another one.

        A rank that the checkpoint does not know draws from a generator seeded with (seed, step, rank).
        """
        state = read_state(checkpoint)
        if state.fingerprint != fingerprint:
            raise UserError(
                f"{checkpoint} belongs to another configuration (model, thinking, text, data, objective, optimizer or "
                "batch differ); compare config.toml in the run's folder, or choose another --output"
            )
        engine.ds.checkpoint_engine.load = safe_load  # DeepSpeed itself would unpickle anything
        # ZeRO-0 has whole states on each rank, so that the number of ranks says nothing.
        same_ranks = state.world_size == world_size() or state.stage == 0
        if state.stage == engine.stage and same_ranks:
            frozen = any(not p.requires_grad for p in engine.module.parameters())
            path, _ = engine.ds.load_checkpoint(str(checkpoint), tag="deepspeed", load_module_strict=not frozen)
            if path is None:
                raise UserError(
                    f"{checkpoint}/deepspeed cannot be loaded; remove {checkpoint} to use the one before it"
                )
        else:
            load_converted(engine, checkpoint, state.world_size, state.stage)
        _restore_rng(checkpoint / f"rng_{rank():05d}.safetensors", engine.device, (seed, state.step, rank()))
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
        return pointed(path) if path.is_file() else None


def read_state(checkpoint: Path) -> TrainerState:
    try:
        state = TrainerState(**read_object(checkpoint / "trainer.json"))
        counts = [state.step, state.world_size, state.stage, state.position or 0]
        if not all(type(count) is int and count >= 0 for count in counts) or not isinstance(state.fingerprint, str):
            raise ValueError("its values are of the wrong kind")
        return state
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint} is not a checkpoint of laser_dist: trainer.json: {error}") from error


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_rng(path: Path, device: torch.device, otherwise: tuple[int, int, int]) -> None:
    if not path.is_file():
        torch.manual_seed(int(np.random.SeedSequence(otherwise).generate_state(1, np.uint64)[0]))
        return
    try:
        state = load_file(path)
        torch.set_rng_state(state["cpu"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], device)
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{path} is no generator's state ({error}); remove the checkpoint to use the one before"
        ) from error


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
