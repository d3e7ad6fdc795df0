"""Ranks meet: what is wrong on one host only ends all ranks within seconds, instead of leaving them to wait for it.

Recipe, data and evaluation set are read before any process waits for another. A rank that finds them wrong still joins
the process group, once, to say so.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeVar

from laser_dist.errors import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
LAST_WORD = 120.0
"""Seconds that a rank whose start has failed waits for the others, so that they hear of it."""


def meet(prepare: Callable[[], T], timeout: float) -> "tuple[torch.device, T]":
    """What `prepare` returns on this rank, and its device, once all ranks have joined the process group.

    A UserError of one rank's `prepare` is raised on all of them.
    """
    from laser_dist.distributed.engine import init_distributed

    problem: str | None = None
    prepared: list[T] = []
    try:
        prepared.append(prepare())
    except UserError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        problem, timeout = str(error), LAST_WORD
    device = init_distributed(timeout)
    _raise_together(problem)
    return device, prepared[0]


def together(prepare: Callable[[], T]) -> T:
    """What `prepare` returns; for what comes before `meet`. A UserError is told to the ranks that wait there."""
    try:
        return prepare()
    except UserError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _say_last_word(error)
        raise


def _say_last_word(error: UserError) -> None:
    def fail() -> NoReturn:
        raise error

    try:
        meet(fail, LAST_WORD)
    except UserError:
        raise
    except Exception as lost:  # without the others: our own error is what matters
        error.add_note(f"the other ranks could not be told: {lost}")


def _raise_together(problem: str | None) -> None:
    from laser_dist.distributed.collectives import gather_objects

    everyone = gather_objects(problem)
    told = [text for text in everyone if text]
    if told:
        own = [str(r) for r, text in enumerate(everyone) if text]
        ranks = "" if len(own) == len(everyone) else f" (rank{'s' if len(own) > 1 else ''} {', '.join(own)} only)"
        raise UserError(f"{told[0]}{ranks}")
