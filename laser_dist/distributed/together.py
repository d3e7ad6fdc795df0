"""What fails on one rank ends all of them alike: none is left in a collective, waiting for one that has gone."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from laser_dist.distributed.collectives import gather_objects

P = ParamSpec("P")
T = TypeVar("T")


class Together:
    """Work that may fail on this rank alone, between collectives that all ranks take part in.

    `run` does a piece of it and notes what goes wrong instead of raising, `problem` tells all ranks.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What `work` returns; None where it failed, or something before it did. Nothing in it may be a collective."""
        if self.error is None:
            try:
                return work(*args, **kwargs)
            except Exception as error:  # whatever it is: the others wait for this rank
                self.error = error
        return None

    def problem(self) -> str | None:
        """What failed on the first rank where something did, the same on all ranks. A collective, and so a barrier."""
        own = None if self.error is None else str(self.error) or type(self.error).__name__
        everyone = gather_objects(own)
        return next((f"rank {r}: {text}" for r, text in enumerate(everyone) if text is not None), None)
