"""Reading ahead in a background thread."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")


def one_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items; while one is in use, a thread gets the next. What it raises is raised here, in its place."""
    ready: queue.SimpleQueue[tuple[str, T | BaseException | None]] = queue.SimpleQueue()
    wanted = threading.Semaphore(1)  # one more than those in use
    closed = threading.Event()

    def work() -> None:
        while True:
            wanted.acquire()
            if closed.is_set():
                return
            try:
                ready.put(("item", next(items)))
            except StopIteration:
                return ready.put(("end", None))
            except BaseException as error:
                return ready.put(("error", error))

    # A daemon: a process that ends does not wait for a server that stalls.
    threading.Thread(target=work, name="read-ahead", daemon=True).start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value  # type: ignore[misc]
            wanted.release()
            yield value  # type: ignore[misc]
    finally:
        closed.set()
        wanted.release()
