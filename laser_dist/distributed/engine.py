"""The training engine: DeepSpeed behind the few calls that the trainer needs; only this file and checkpoint.py know it.

forward -> backward (as often as it takes; gradients are averaged over micro-batches and ranks) -> step (clip, update).
"""

import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from laser_dist.batch import PackedBatch, Views
from laser_dist.errors import UserError


class NonFiniteGradient(RuntimeError):
    """The global gradient norm is not a number; no parameter was changed."""


def launched_world_size() -> int:
    """Ranks that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def init_distributed(timeout: float = 600.0) -> torch.device:
    """Join the process group of the launcher (a group of one without a launcher) and return this rank's device.

    `timeout`: seconds that a collective waits for other ranks.
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        # DeepSpeed would compile a shared-memory all-reduce for CPUs at first use: a minute and a half, for nothing.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if "RANK" not in os.environ:
        _refuse_other_launchers()
        os.environ.update(defaults)
    local_rank = int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local_rank)
    try:
        deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False, timeout=timedelta(seconds=timeout))
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {os.environ['MASTER_PORT']} of {socket.gethostname()}, where ranks are to meet, is taken by another "
            "process: end it, or give the launcher another one with --master_port"
        ) from error
    # ZeRO talks in a clone of this group, which would keep torch's own timeout: 30 minutes for gloo.
    distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), groups._clone_world_group())
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def _refuse_other_launchers() -> None:
    """Without RANK every task would believe to be alone, and all would write into the same folder."""
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if int(os.environ.get(name) or 1) > 1:
            raise UserError(
                f"{name} = {os.environ[name]}, but RANK is not set: start with `deepspeed` or `torchrun`, or export "
                "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in each task"
            )


class Engine:
    """A module and its optimizer, sharded as the DeepSpeed config says."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        ds_config: dict[str, Any],
        *,
        reduce_once: bool = False,
    ):
        """`reduce_once`: see `reduction`; of use with ZeRO-2 and 3 only, as the other stages reduce once anyway."""
        self.module = module
        self.stage = ds_config.get("zero_optimization", {}).get("stage", 0)
        if self.stage == 3:
            _register_external_parameters(module)
        self.reduce_once = reduce_once and self.stage >= 2
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        self.ds, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, model_parameters=self.trained, config=ds_config
        )
        self.optimizer = optimizer
        self.judge: Callable[[float], None] | None = None
        # Whatever the stage, all its updates go through this optimizer, when the norm is known and nothing has changed.
        optimizer.register_step_pre_hook(lambda *_: self._consult())

    @property
    def device(self) -> torch.device:
        return self.ds.device

    def __call__(self, batch: PackedBatch) -> Views:
        """Forward on every rank alike.

        DeepSpeed hooks the gradients of a module's outputs to begin its backward; the views returned lie past those
        hooks, so that gradients with respect to them can be looked at without beginning one.
        """
        return Views(*(None if x is None else x.view_as(x) for x in self.ds(batch)))

    @contextmanager
    def reduction(self) -> Iterator[None]:
        """Around all backwards of a step. With `reduce_once` gradients stay whole on each rank until the end of it.

        Otherwise ZeRO-2 and 3 reduce and partition them at each backward: that much more traffic, and no rank ever
        holds more than its part.
        """
        if not self.reduce_once:
            yield
            return
        self.ds.set_gradient_accumulation_boundary(True)
        with self.ds.coalesce_grad_reduction():
            yield

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add a loss's gradient, divided by the number of micro-batches; `last`: the step follows."""
        if not self.reduce_once:
            self.ds.set_gradient_accumulation_boundary(last)
        self.ds.backward(loss)

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.ds.optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self, judge: Callable[[float], None] | None = None) -> float:
        """Update the parameters at the end of an accumulation window; returns the global gradient norm before clipping.

        Raises NonFiniteGradient, on every rank alike, with all parameters as they were. `judge` is called with a finite
        norm before the update: what it raises (on all ranks alike) leaves parameters and optimizer states as they were,
        and the engine good for looking at, not for training on.
        """
        self.judge, groups = judge, self.optimizer.param_groups
        if hasattr(self.ds.optimizer, "_global_grad_norm"):
            try:
                self.ds.step()  # finds a non-finite norm before it updates anything, and skips the update
            finally:
                self.optimizer.param_groups = groups  # DeepSpeed takes the others away while one is updated
            norm = float(self.ds.get_global_grad_norm() or 0.0)
        else:  # ZeRO-0 in float32 is the bare optimizer, which would update with anything
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None]))
            if math.isfinite(norm):
                self._consult(norm)
                self.ds.step()
        if not (math.isfinite(norm) and norm >= 0):
            raise NonFiniteGradient
        return norm

    def _consult(self, norm: float | None = None) -> None:
        """Once per step; DeepSpeed calls the optimizer for each of its groups."""
        judge, self.judge = self.judge, None
        if judge is not None:
            judge(float(self.ds.optimizer._global_grad_norm) if norm is None else norm)

    def replicated(self) -> dict[str, Tensor]:
        """Name -> what every rank holds whole, and alike: all parameters, but under ZeRO-3 the small ones only."""
        named = self.module.lm.named_parameters()
        if self.stage < 3:
            return {name: p.detach() for name, p in named}
        return {name: p.detach() for name, p in named if p.ds_persist and p.numel() == p.ds_numel}

    def masters(self) -> list[tuple[Tensor, Tensor]]:
        """This rank's parts of the parameters, each with the float32 copy that the optimizer updates (ZeRO-1 to 3)."""
        inner = self.ds.optimizer
        if self.stage == 3:
            low, high = inner.fp16_partitioned_groups_flat, inner.fp32_partitioned_groups_flat
        elif hasattr(inner, "parallel_partitioned_bit16_groups"):
            high = inner.single_partition_of_fp32_groups
            groups = zip(inner.parallel_partitioned_bit16_groups, inner.real_dp_process_group, strict=True)
            low = [parts[dist.get_rank(group)] for parts, group in groups]
        else:
            return []
        # Empty or absent: what is offloaded to a disk.
        return [(x, y.detach()) for x, y in zip(low, high, strict=True) if x is not None and x.numel() == y.numel()]

    @contextmanager
    def gathered(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Inside, ZeRO-3's partitioned parameters are whole on every rank (read only). All ranks must enter."""
        partitioned = [p for p in parameters if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
            yield

    def load_universal(self, folder: Path, tag: str) -> None:
        """Restore parameters and optimizer from a checkpoint in DeepSpeed's universal format (see universal.py)."""
        config = self.ds._config
        config.load_universal_checkpoint = True
        try:
            self.ds.load_checkpoint(str(folder), tag=tag)
        finally:
            config.load_universal_checkpoint = False
        # ZeRO-3 gives all its sub-groups one tensor, which each of them would then count up in every step.
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    def full_state_dict(self, *, only_trained: bool = False) -> dict[str, Tensor]:
        """Whole weights on rank 0's CPU (an empty dict elsewhere); tied weights once. All ranks must call it."""
        named = self.module.lm.named_parameters()
        return self.whole([name for name, p in named if p.requires_grad or not only_trained])

    def whole(self, names: list[str]) -> dict[str, Tensor]:
        """These parameters, whole, on rank 0's CPU, gathered one at a time (an empty dict elsewhere).

        Names are the causal LM's own. All ranks must call it.
        """
        state = {}
        for name in names:
            parameter = self.module.lm.get_parameter(name)
            with self.gathered([parameter]):
                if self.ds.global_rank == 0:
                    state[name] = parameter.detach().cpu().clone()
        return state


def _register_external_parameters(module: nn.Module) -> None:
    for child in module.modules():
        for parameter in getattr(child, "external_parameters", list)():
            deepspeed.zero.register_external_parameter(child, parameter)
