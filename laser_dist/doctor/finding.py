"""What a check says, and what all checks are told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from laser_dist.config import RunConfig

Status = Literal["ok", "warning", "failed", "skipped"]
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    status: Status
    found: str
    remedy: str = ""
    """What to do; for every warning and failure, and nothing else."""


def ok(found: str) -> Finding:
    return Finding("ok", found)


def warning(found: str, remedy: str) -> Finding:
    return Finding("warning", found, remedy)


def failed(found: str, remedy: str) -> Finding:
    return Finding("failed", found, remedy)


def skipped(why: str) -> Finding:
    return Finding("skipped", why)


@dataclass
class Context:
    """What is checked: this machine, and a run on it if there is a recipe."""

    output: Path
    """Where a run would write."""
    port: int = 29500
    """Where ranks would meet."""
    recipe: "RunConfig | None" = None
    """None without a recipe, or if it cannot be read."""
    recipe_problem: str = ""
    recipe_name: str = ""
    facts: dict[str, object] = field(default_factory=dict)
    """What the loopback's rank 0 reported, for the checks of the GPU: torch is imported there once."""
