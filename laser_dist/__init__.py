"""laser_dist: distributed training of dense retrievers that think in continuous tokens (LaSER)."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LaserEncoder", "__version__"]

if TYPE_CHECKING:
    from laser_dist.retrieval.encoder import LaserEncoder


def __getattr__(name: str) -> Any:
    # Lazy, so that `laser-dist --help` does not import torch.
    if name == "LaserEncoder":
        from laser_dist.retrieval.encoder import LaserEncoder

        return LaserEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
