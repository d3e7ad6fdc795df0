"""Checkpoints that are complete or absent.

checkpoints/step-000020/
  model/           the retriever as a plain Hugging Face folder (adapters only, for LoRA), ready for export and serving
  deepspeed/       sharded parameters and optimizer state
  rng_*.safetensors, trainer.json, manifest.json (size and SHA-256 of every file)
checkpoints/latest, checkpoints/best   name the newest and the best one

1. All ranks write into a hidden staging folder. 2. After a barrier they sync and hash what is there, each a share, in a
thread; with `checkpoint.asynchronous` training goes on meanwhile. 3. Rank 0 writes the manifest and renames the folder.
4. Only then `latest` moves. A crash anywhere leaves the earlier checkpoints and nothing that looks complete.

A disk that is full, or fails, on any rank ends the run on all of them with a UserError: going on would train for hours
and keep nothing. What was written of the checkpoint is removed; those before it are as they were.
"""

import contextlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from laser_dist.config import CheckpointConfig
from laser_dist.distributed.collectives import gather_objects, rank, world_size
from laser_dist.distributed.disk import checkpoint_bytes, require_space
from laser_dist.distributed.engine import Engine
from laser_dist.distributed.manifest import STATE, Sealing, recorded_bytes, verify, write_manifest
from laser_dist.distributed.pickles import safe_load
from laser_dist.distributed.retention import checkpoints_in, remove, remove_leftovers, superfluous
from laser_dist.distributed.rng import restore_rng, rng_state
from laser_dist.distributed.together import Together
from laser_dist.distributed.universal import TAG, load_converted
from laser_dist.distributed.weights import save_model
from laser_dist.errors import UserError
from laser_dist.files import rename_over, replacing, sync_folder, write_json
from laser_dist.identity import Settings, require_same
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
    settings: Settings | None = None
    """The parts themselves, key by key; None in checkpoints that have the hash only."""


class CheckpointStore:
    """The checkpoints of one run. All ranks call every method, in the same order."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.folder = folder
        self.config = config
        self.sealing: Sealing | None = None
        self.damaged: set[str] = set()
        """Names of checkpoints that `newest_complete` has found damaged."""

    def save(
        self,
        engine: Engine,
        state: TrainerState,
        tokenizer: PreTrainedTokenizerBase,
        card: RetrieverCard,
        *,
        best: bool = False,
    ) -> None:
        """Write a checkpoint of `state.step`, which `publish` completes; an earlier one must be published before.

        UserError on all ranks if one of them could not write its part.
        """
        assert self.sealing is None, "publish the checkpoint before"
        self.final, self.best = self.folder / f"step-{state.step:06d}", best
        staging = self.folder / f".{self.final.name}.partial"
        writes = Together()
        if rank() == 0:
            writes.run(self._make_room, staging, checkpoint_bytes(engine))
        self._give_up_if(writes.problem(), staging)
        save_model(engine, staging / "model", self.config.max_shard_gb, writes)
        if rank() == 0:
            writes.run(tokenizer.save_pretrained, staging / "model")
            writes.run(card.save, staging / "model")
            writes.run(write_json, staging / STATE, asdict(state))
        _save_states(engine, staging, writes)
        writes.run(save_file, rng_state(engine.device), staging / f"rng_{rank():05d}.safetensors")
        self._give_up_if(writes.problem(), staging)
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
        self._give_up_if(next((problem for _, problem in everyone if problem), None), staging)
        names = Together()
        if rank() == 0:
            names.run(self._complete, staging, {name: entry for found, _ in everyone for name, entry in found.items()})
        self._give_up_if(names.problem(), staging)
        self.damaged.discard(self.final.name)
        return self.final

    def prune(self) -> None:
        """Remove what `retention` says may go; for rank 0."""
        protected = (self._pointed("best"), self._pointed("latest"))
        for old in superfluous(self.folder, self.config.keep, protected, self.damaged):
            if problem := remove(old):
                print(f"checkpoints: {problem}", flush=True)

    def steps(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        return checkpoints_in(self.folder)

    def best_metric(self) -> float | None:
        """The best checkpoint's metric as rank 0 reads it: files may look different elsewhere, and ranks must agree."""
        metric = None
        best = self._pointed("best") if rank() == 0 else None
        if best and best not in self.damaged and verify(self.folder / best, hashes=False) is None:
            with contextlib.suppress(UserError):  # a damaged best checkpoint is none
                metric = read_state(self.folder / best).metric
        return gather_objects(metric)[0]

    def newest_complete(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose files all match their manifest, and why newer ones were skipped."""
        skipped: list[str] = []
        for candidate in gather_objects(self.steps()[::-1])[0]:  # rank 0's: files may look different elsewhere
            defects = [defect for defect in gather_objects(verify(candidate, rank(), world_size())) if defect]
            if not defects:
                self._name_latest(candidate)
                return candidate, skipped
            skipped.append(f"{candidate}: {defects[0]}")
            self.damaged.add(candidate.name)
        return None, skipped

    def to_resume(self) -> Path | None:
        """The checkpoint to go on from, None if there is none yet; says which it passed over.

        UserError if there are some, and all are damaged: to begin again would write over them.
        """
        checkpoint, skipped = self.newest_complete()
        for reason in skipped if rank() == 0 else ():
            print(f"skipped an incomplete checkpoint: {reason}", flush=True)
        if checkpoint is None and skipped:
            raise UserError(f"no checkpoint is complete ({skipped[0]}): bring one back, or remove {self.folder}")
        return checkpoint

    def load(
        self, engine: Engine, checkpoint: Path, fingerprint: str, seed: int, settings: Settings | None = None
    ) -> TrainerState:
        """Restore parameters, optimizer and RNG; UserError names what differs if the run was another one.

        A rank that the checkpoint does not know draws from a generator seeded with (seed, step, rank).
        """
        reads = Together()
        state = reads.run(read_state, checkpoint)
        if problem := reads.problem():
            raise UserError(problem)
        assert state is not None
        require_same(str(checkpoint), (state.fingerprint, state.settings), (fingerprint, settings))
        engine.ds.checkpoint_engine.load = safe_load  # DeepSpeed itself would unpickle anything
        # ZeRO-0 has whole states on each rank, so that the number of ranks says nothing.
        same_ranks = state.world_size == world_size() or state.stage == 0
        if state.stage == engine.stage and same_ranks:
            frozen = any(not p.requires_grad for p in engine.module.parameters())
            path, _ = engine.ds.load_checkpoint(str(checkpoint), tag=TAG, load_module_strict=not frozen)
            if path is None:
                raise UserError(f"{checkpoint}/{TAG} cannot be loaded; remove {checkpoint} to use the one before it")
        else:
            load_converted(engine, checkpoint, state.world_size, state.stage)
        restore_rng(checkpoint / f"rng_{rank():05d}.safetensors", engine.device, (seed, state.step, rank()))
        return state

    def _name_latest(self, checkpoint: Path) -> None:
        """After a crash between two names, or damage, `latest` may name another one, which serving would take."""
        names = Together()
        if rank() == 0 and self._pointed("latest") != checkpoint.name:
            names.run(_point, self.folder / "latest", checkpoint.name)
        if problem := names.problem():
            raise UserError(f"{self.folder}/latest cannot be written: {problem}; mend the storage")

    def _make_room(self, staging: Path, estimate: int) -> None:
        """The empty staging folder, where a checkpoint as large as the one before it finds room."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        before = next((found for path in self.steps()[::-1] if (found := recorded_bytes(path))), None)
        require_space(self.folder, before or estimate, "a checkpoint")
        staging.mkdir()

    def _complete(self, staging: Path, found: dict[str, dict[str, Any]]) -> None:
        write_manifest(staging, found)
        sync_folder(staging)
        rename_over(staging, self.final)
        _point(self.folder / "latest", self.final.name)
        if self.best:
            _point(self.folder / "best", self.final.name)
        sync_folder(self.folder)  # pointers first: after a power loss none names what is gone
        self.prune()

    def _give_up_if(self, problem: str | None, staging: Path) -> None:
        """UserError on all ranks if there is a `problem`; what was written is gone then."""
        if problem is None:
            return
        story = ""
        if rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
            whole = [path for path in self.steps() if path.name not in self.damaged and not verify(path, hashes=False)]
            story = f"the checkpoint before it is good ({whole[-1].name})" if whole else "there is none before it"
            if self.final in whole:  # it was renamed, and then a pointer could not be written
                story = "yet its files are whole"
        story = gather_objects(story)[0]  # so that none ends before rank 0 has tidied up
        raise UserError(
            f"{self.final} cannot be saved: {problem}; {story}. Make room or mend the storage, and go on with --resume"
        )

    def _require_shared(self, staging: Path) -> None:
        """On folders that are not shared, rank 0 would hash and publish a checkpoint without the others' files."""
        missing = [r for r in range(world_size()) if not (staging / f"rng_{r:05d}.safetensors").is_file()]
        if missing := gather_objects(missing)[0]:
            shutil.rmtree(staging, ignore_errors=True)
            raise UserError(
                f"{self.folder}: rank 0 does not see what ranks {missing} wrote: the output folder must be "
                "shared by all nodes; choose one on shared storage with --output"
            )

    def _pointed(self, name: str) -> str | None:
        path = self.folder / name
        return pointed(path) if path.is_file() else None


def read_state(checkpoint: Path) -> TrainerState:
    try:
        state = TrainerState(**read_object(checkpoint / STATE))
        counts = [state.step, state.world_size, state.stage, state.position or 0]
        if not all(type(count) is int and count >= 0 for count in counts) or not isinstance(state.fingerprint, str):
            raise ValueError("its values are of the wrong kind")
        return state
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint} is not a checkpoint of laser_dist: {STATE}: {error}") from error


def _save_states(engine: Engine, staging: Path, writes: Together) -> None:
    """Parameters and optimizer states, each rank its part. DeepSpeed's barriers are passed whatever fails to write."""
    frozen = any(not p.requires_grad for p in engine.module.parameters())
    save, copy_scripts = engine.ds.checkpoint_engine.save, engine.ds._copy_recovery_script
    engine.ds.checkpoint_engine.save = lambda state_dict, path: writes.run(save, state_dict, path)
    engine.ds._copy_recovery_script = lambda save_path: writes.run(copy_scripts, save_path)
    try:
        engine.ds.save_checkpoint(str(staging), tag=TAG, save_latest=False, exclude_frozen_parameters=frozen)
    finally:
        engine.ds.checkpoint_engine.save, engine.ds._copy_recovery_script = save, copy_scripts


def _point(pointer: Path, name: str) -> None:
    with replacing(pointer) as temporary:
        temporary.write_text(name + "\n")
