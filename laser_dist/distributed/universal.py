"""A checkpoint of another number of ranks or another ZeRO stage, through DeepSpeed's universal format.

1. Rank 0 converts beside the checkpoint, into a hidden folder: for each trained parameter its float32 weights, exp_avg
   and exp_avg_sq as whole tensors.
2. Every rank reads its part of each. 3. The folder goes, also after a failure.

DeepSpeed 0.19 converts stages 1 to 3, and loads what was converted from the stage it runs with: what the stages' files
differ in is made equal here. Learning rates, weight decay and betas are not taken from the files but stay as the
recipe has them: ZeRO-3 would give all parameter groups those of the first.
"""

import contextlib
import io
import re
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal

from laser_dist.distributed.collectives import barrier, gather_objects, rank, world_size
from laser_dist.distributed.engine import Engine
from laser_dist.distributed.pickles import check_archive, safe_load, safe_pickles
from laser_dist.errors import UserError

TAG = "deepspeed"
STATES = ("fp32", "exp_avg", "exp_avg_sq")
# The names that DeepSpeed looks for: stages 1 and 2, and stage 3.
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def load_converted(engine: Engine, checkpoint: Path, ranks: int, stage: int) -> None:
    """Restore parameters and optimizer from a checkpoint of `ranks` ranks with ZeRO-`stage`. All ranks call it."""
    if 0 in (stage, engine.stage):
        raise UserError(
            f"{checkpoint} was written with ZeRO-{stage} and this run has ZeRO-{engine.stage}: ZeRO-0 keeps its states "
            f"in another form and cannot be exchanged with the others: resume with ZeRO-{stage}"
            + ("" if stage == 0 else " or another of 1 to 3")
        )
    story = f"converting the checkpoint of {ranks} ranks, ZeRO-{stage}, for {world_size()} ranks, ZeRO-{engine.stage}"
    with _converted(engine, checkpoint, story) as folder, safe_pickles():
        engine.load_universal(folder, TAG)


@contextlib.contextmanager
def _converted(engine: Engine, checkpoint: Path, story: str) -> Iterator[Path]:
    """The folder with the converted checkpoint, on all ranks; it is gone afterwards."""
    folder = checkpoint.with_name(f".{checkpoint.name}.universal")
    problem: str | None = None
    try:
        if rank() == 0:
            try:
                began = time.monotonic()
                print(story, flush=True)
                _convert(checkpoint / TAG, folder / TAG, len(engine.ds.optimizer.param_groups))
                print(f"{story}: {time.monotonic() - began:.0f} s", flush=True)
            except Exception as error:  # the others wait for this rank, whatever happened
                problem = f"{checkpoint} cannot be converted: {error}"
        if problem := gather_objects(problem)[0]:
            raise UserError(problem)
        yield folder
        barrier()
    finally:
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _convert(source: Path, target: Path, groups: int) -> None:
    """Write the universal form of `source` to `target`, for an optimizer of `groups` parameter groups of any stage."""
    shutil.rmtree(target.parent, ignore_errors=True)
    files = sorted(source.glob("*_optim_states.pt"))
    needed = 2 * sum(path.stat().st_size for path in files)  # slices, then what is merged from them
    if (free := shutil.disk_usage(source).free) < needed:
        raise UserError(f"it takes {needed / 1e9:.1f} GB beside the checkpoint, and {free / 1e9:.1f} GB are free")
    _check_names(source)
    target.mkdir(parents=True)
    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        # In this process, where `safe_pickles` holds, and without a fork of a process that has threads.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with safe_pickles(), contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(arguments)
    model_states = min(target.glob("*_model_states.pt"))
    _make_stages_alike(target / "zero", groups)
    described = safe_load(str(model_states), map_location="cpu")
    for path in target.glob("*_model_states.pt"):
        path.unlink()
    described |= {"module": {}, "optimizer": None}  # the weights are in `zero`
    for name in MODEL_STATES:
        torch.save(described, target / name)


def _check_names(source: Path) -> None:
    """UserError for parameters whose names lead out of the folder: the converter writes a folder for each."""
    for path in sorted(source.glob("*.pt")):
        check_archive(path)
        names: set[Any] = set()
        for table in _tables(safe_load(str(path), map_location="meta")):
            names |= table.keys()
        if bad := [name for name in names if not isinstance(name, str) or not re.fullmatch(r"\w[\w.]*", name)]:
            raise UserError(f"{path} is refused: {str(bad[0])[:60]!r} is no parameter's name")


def _tables(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Where DeepSpeed's files of any stage name parameters."""
    optimizer = state.get("optimizer_state_dict") or {}
    for found in (state.get("module"), state.get("param_shapes"), optimizer.get("param_slice_mappings")):
        yield from (found if isinstance(found, list) else [found] if isinstance(found, dict) else [])


def _make_stages_alike(zero: Path, groups: int) -> None:
    """Stage 3 writes bare tensors and keeps the step in one place; stages 1 and 2 write dicts, each with its step."""
    common: dict[str, Any] = safe_load(str(zero / "optimizer_state.pt"), map_location="cpu")
    for first in sorted(zero.rglob("exp_avg.pt")):  # none: a second name of a tied weight
        for path in (first.with_name(f"{name}.pt") for name in STATES):
            value = safe_load(str(path), map_location="cpu")
            if isinstance(value, torch.Tensor):
                torch.save({"param": value}, path)
        step = first.with_name("step.pt")
        if not step.is_file():
            torch.save(common["optimizer_state_dict"]["state"][0]["step"], step)
    steps = {float(safe_load(str(path))) for path in zero.rglob("step.pt")}
    if len(steps) != 1:
        raise UserError(f"its parameters were updated {sorted(steps)} times, not all equally often")
    unsaid: list[dict[str, Any]] = [{} for _ in range(groups)]
    state = {0: {"step": torch.tensor(steps.pop())}}
    kept = {"param_groups": unsaid, "optimizer_state_dict": {"state": state, "param_groups": unsaid}}
    torch.save(kept | {"ds_version": deepspeed.__version__}, zero / "optimizer_state.pt")
