"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere; rank 0 only."""

import os
import sys
import warnings
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def quiet_libraries() -> None:
    """Keep what libraries say about themselves off the console; call it before they are imported."""
    import torch
    from transformers.utils import logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or every process warns that it found no GPU
    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        logging.disable_progress_bar()
    # DeepSpeed still calls collectives by the names that torch 2.13 deprecates: a screenful at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # PEFT still uses names that transformers 5.23 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*gradient_checkpointing")


class TrainingProgress:
    """Shows step, loss and speed; `say` prints a line without tearing the bar."""

    def __init__(self, total_steps: int, start_step: int, *, enabled: bool):
        self.enabled = enabled
        self.total_steps = total_steps
        self.console = Console(stderr=True, highlight=False)
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (enabled and self.console.is_terminal),
        )
        self.task = self.progress.add_task("training", total=total_steps, completed=start_step, status="")

    def update(self, step: int, values: dict[str, float]) -> None:
        status = f"loss {values['loss/total']:.3f} · {values['speed/tokens_per_second']:.0f} tokens/s"
        self.progress.update(self.task, completed=step, status=status)
        if self.progress.disable:
            rank = values["train/positive_mean_rank"]
            self.say(f"step {step}/{self.total_steps} · {status} · positive's mean rank {rank:.1f}")

    def say(self, line: str) -> None:
        if self.enabled:
            self.progress.console.print(line, soft_wrap=True)

    def __enter__(self) -> "TrainingProgress":
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
