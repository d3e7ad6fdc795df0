"""All ranks take their next micro-batch together: what goes wrong on one ends all, instead of leaving them to wait."""

from collections.abc import Iterator

from laser_dist.data.streaming.loader import TrainingBatch
from laser_dist.data.streaming.quarantine import Quarantine
from laser_dist.distributed.collectives import gather_objects, gather_table
from laser_dist.errors import UserError
from laser_dist.observability.clock import StepClock


def next_together(
    batches: Iterator[TrainingBatch], quarantine: Quarantine, clock: StepClock
) -> tuple[TrainingBatch, int]:
    """This rank's next micro-batch, and in how many chunks all ranks run theirs.

    A UserError of one rank's data is raised on all; what had to be skipped goes into `quarantine` on all.
    """
    loaded, problem = None, None
    try:
        loaded = next(batches)
    except UserError as error:
        problem = str(error)
    defects = loaded.defects if loaded else ()
    counts = {"defects": len(defects), "chunks": loaded.chunks if loaded else 0}
    with clock.phase("wait"):
        table = gather_table({"failed": float(problem is not None), **{k: float(v) for k, v in counts.items()}})
    if any(row["failed"] for row in table):
        raise UserError(next(text for text in gather_objects(problem) if text))
    if any(row["defects"] for row in table):
        for rank, found in enumerate(gather_objects(defects)):  # all of them on all ranks, which so stop together
            quarantine.add(found, rank=rank)
    assert loaded is not None
    return loaded, int(max(row["chunks"] for row in table))
