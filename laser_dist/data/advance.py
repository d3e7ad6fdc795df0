"""How far long work is: a bar on a terminal, a line a minute elsewhere, as in the log of a batch job."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SECONDS_PER_LINE = 60.0


@contextmanager
def progress_bar(name: str, total: int, done: int) -> Iterator[Callable[[], None]]:
    """A function to call after each piece of work; what it shows goes to stderr."""
    from rich.console import Console
    from rich.progress import Progress

    terminal, said = sys.stderr.isatty(), time.monotonic()
    with Progress(console=Console(stderr=True), transient=True, disable=not terminal) as progress:
        task = progress.add_task(name, total=total, completed=done)

        def advance() -> None:
            nonlocal done, said
            done += 1
            progress.advance(task)
            if not terminal and time.monotonic() - said > _SECONDS_PER_LINE:
                said = time.monotonic()
                print(f"{name}: {done:,} of {total:,}", file=sys.stderr, flush=True)

        yield advance
