"""Traces of a few steps, one file per rank and cycle, and their summary in TensorBoard.

    profile/step-000012/rank-0.json.gz     open in https://ui.perfetto.dev
    profile/step-000012/memory-0.pickle    on a GPU: every allocation; open in https://pytorch.org/memory_viz
    profile/step-000012/summary.json       what TensorBoard shows, every rank

TensorBoard's own profiler page is gone (its plugin was withdrawn in 2026), so that the summary is text and images.
"""

import contextlib
import gzip
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, schedule

from laser_dist.config import ProfileConfig
from laser_dist.distributed.collectives import gather_objects, rank
from laser_dist.errors import UserError, require
from laser_dist.files import replacing, write_json
from laser_dist.observability.metrics import MetricsLog
from laser_dist.observability.spans import span, trace_spans
from laser_dist.observability.trace import TraceSummary, summarise


def check_profile(config: ProfileConfig, steps: int) -> None:
    """UserError if the profile asked for cannot be made in a run of so many steps."""
    if not config.active:
        return
    require("profile.active draws charts, which", "matplotlib", extra="plots", instead="set it to 0")
    cycle = config.wait + config.warmup + config.active
    if cycle * config.repeat > steps:
        raise UserError(
            f"profile: {config.repeat} x (wait {config.wait} + warmup {config.warmup} + active {config.active}) is "
            f"{cycle * config.repeat} steps, and the run has {steps}: lower one of them"
        )


class StepProfiler:
    """Traces the steps that the config names; does nothing at all where it names none. All ranks alike."""

    def __init__(
        self,
        config: ProfileConfig,
        output: Path,
        device: torch.device,
        log: MetricsLog,
        say: Callable[[str], None] = print,
    ):
        self.folder = output / "profile"
        self.device, self.log, self.say = device, log, say
        self.profile: profile | None = None
        self.tracing = False
        self.finished = 0  # the last step that was trained
        if config.active:
            # They are saved by then.
            warnings.filterwarnings("ignore", message=".*Profiler clears events at the end of each cycle")
            cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
            self.profile = profile(
                activities=[ProfilerActivity.CPU, *cuda],
                schedule=schedule(wait=config.wait, warmup=config.warmup, active=config.active, repeat=config.repeat),
                on_trace_ready=self._save,
                record_shapes=True,
                profile_memory=True,
            )

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one optimizer step, counted from 1."""
        if self.profile is None:
            yield
            return
        with span("step"):
            yield
        self.finished = number
        self.profile.step()  # saves, at the end of a cycle
        self._trace(self.profile.current_action != ProfilerAction.NONE)

    def _trace(self, on: bool) -> None:
        """Name spans, and record allocations, only in steps that are traced."""
        if on != self.tracing and self.device.type == "cuda":
            torch.cuda.memory._record_memory_history("all" if on else None, max_entries=100_000, clear_history=on)
        self.tracing = on
        trace_spans(on)

    def _save(self, finished: profile) -> None:
        """Write this rank's trace; rank 0 also the summary of all. A collective."""
        folder = self.folder / f"step-{self.finished:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.device.type == "cuda":
            with replacing(folder / f"memory-{rank()}.pickle") as temporary:
                torch.cuda.memory._dump_snapshot(str(temporary))
        with tempfile.TemporaryDirectory() as name:
            plain = Path(name) / "trace.json"
            finished.export_chrome_trace(str(plain))
            summary = summarise(json.loads(plain.read_bytes())["traceEvents"])
            with replacing(folder / f"rank-{rank()}.json.gz") as temporary:
                with plain.open("rb") as source, gzip.open(temporary, "wb", compresslevel=4) as target:
                    shutil.copyfileobj(source, target, 2**20)
        ranks = gather_objects(summary)
        if rank() == 0:
            self._report(folder, ranks)

    def _report(self, folder: Path, ranks: list[TraceSummary]) -> None:
        from laser_dist.observability.profile_report import figures_of, shares_of, table_of

        write_json(folder / "summary.json", {"step": self.finished, "ranks": [asdict(summary) for summary in ranks]})
        self.log.scalars(self.finished, {f"profile/{name}": value for name, value in shares_of(ranks).items()})
        self.log.text(self.finished, "profile", table_of(ranks, folder))
        for name, figure in figures_of(ranks).items():
            self.log.figure(self.finished, f"profile/{name}", figure)
        self.say(f"profile up to step {self.finished}: open {folder}/rank-*.json.gz in https://ui.perfetto.dev")

    def __enter__(self) -> "StepProfiler":
        if self.profile is not None:
            self.profile.start()
            self._trace(self.profile.current_action != ProfilerAction.NONE)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.profile is not None:
            # A cycle that the end of the run cut off is not kept: saving is a collective, and ranks may be gone.
            self.profile.on_trace_ready = None
            self.profile.stop()
            self._trace(False)
