"""Where the time of a step goes, and the peak of memory."""

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from laser_dist.observability.spans import span
from laser_dist.watch import pulse


class StepClock:
    """Adds up seconds per phase; on a GPU each phase ends with a synchronisation, or its work would be booked later.

    A phase inside another is booked once, on the inner one. Phases are spans of a trace, too, and what other ranks see
    of this one; an error leaves them in the phase where it came up.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = 0.0  # seconds of the phases inside the current one

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer, self._inner = self._inner, 0.0
        start = time.perf_counter()
        with span(name), pulse.phase(name):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        self.seconds[name] += seconds - self._inner
        self._inner = outer + seconds

    def reset(self) -> dict[str, float]:
        """Seconds per phase since the last reset."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
