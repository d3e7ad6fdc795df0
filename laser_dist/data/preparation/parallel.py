"""A function over many items in several processes: results in order, memory bounded, no process left behind."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from laser_dist.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


class WorkerKilled(UserError):
    """A worker process died from outside; what was finished before stays good."""


def ordered_map(function: Callable[[T], R], items: Iterable[T], *, workers: int, ready: int = 2) -> Iterator[R]:
    """function(item) of every item, in order; `workers` processes have `ready` items each under way or waiting.

    With one worker it runs in this process. UserErrors come out as they are; a process that dies is one, too.
    """
    if workers == 1:
        yield from map(function, items)
        return
    # fork: workers start at once and share what is imported. Python starts no thread before the pool does.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_the_parent)
    pending: deque[Future[Any]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > workers * ready:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise WorkerKilled("a worker process was killed, most likely for lack of memory: use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers itself
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in workers only"

    def watch() -> None:
        # A worker waits on a pipe that its siblings hold open too: a killed parent would go unnoticed for ever.
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
