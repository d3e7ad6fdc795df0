"""Names for the stretches of a step in profiler traces; a name costs nothing while no trace is taken."""

import contextlib
from contextlib import AbstractContextManager

from torch.profiler import record_function

PREFIX = "laser/"
_NOTHING = contextlib.nullcontext()
_tracing = False


def trace_spans(on: bool) -> None:
    """Whether `span` writes into the trace from here on."""
    global _tracing
    _tracing = on


def span(name: str) -> AbstractContextManager[object]:
    """`with span("gather"): ...` shows as laser/gather in a trace."""
    return record_function(PREFIX + name) if _tracing else _NOTHING
