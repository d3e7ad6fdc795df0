"""What was damaged and left out, with `data.on_error = "skip"`: counted, reported, and limited."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from laser_dist.errors import UserError
from laser_dist.reading import decode_json


@dataclass(frozen=True)
class Defect:
    """A shard or one member of it that cannot be used."""

    shard: str  # path or address
    member: str | None  # None: the whole shard
    reason: str
    examples: int  # how many are lost with it


class Quarantine:
    """The distinct defects met so far, as lines of a JSONL report if there is a file for it.

    Raises UserError as soon as they hold more than `max_skipped` (a share) of all `examples`.
    """

    def __init__(self, examples: int, max_skipped: float, report: Path | None = None) -> None:
        self.examples, self.max_skipped, self.report = examples, max_skipped, report
        self._known: dict[tuple[str, str | None], Defect] = {}
        self._new: list[Defect] = []

    @property
    def shards(self) -> int:
        return sum(defect.member is None for defect in self._known.values())

    @property
    def rows(self) -> int:
        """Examples left out one by one, those of whole shards not counted."""
        return len(self._known) - self.shards

    @property
    def lost(self) -> int:
        """Examples left out, those of whole shards included."""
        return sum(defect.examples for defect in self._known.values())

    def add(self, defects: Iterable[Defect], rank: int = 0) -> None:
        """Count and report what is new. UserError: too much is damaged."""
        new = {(d.shard, d.member): d for d in defects if (d.shard, d.member) not in self._known}
        self._known |= new
        self._new += new.values()
        if self.report and new:
            stamp = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "rank": rank}
            with self.report.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(d) | stamp, ensure_ascii=False) + "\n" for d in new.values())
        if new and self.lost > self.max_skipped * self.examples:
            last = list(new.values())[-1]
            raise UserError(
                f"{self.lost:,} of {self.examples:,} training examples are damaged ({self.shards} shards, {self.rows} "
                f"rows), more than data.max_skipped = {self.max_skipped:g} allows. The last: {last.shard}"
                f"{f' member {last.member}' if last.member else ''}: {last.reason}. Mend or replace the shards; "
                "quarantine.jsonl in the run's folder lists them"
            )

    def take_new(self) -> tuple[Defect, ...]:
        """The defects added since the last call."""
        new, self._new = self._new, []
        return tuple(new)

    def recall(self, lines: Iterable[str]) -> None:
        """Take over the defects that an earlier part of the run reported; a line cut off by a crash is none."""
        for line in lines:
            try:
                row = decode_json(line)
                defect = Defect(row["shard"], row["member"], row["reason"], int(row["examples"]))
            except (ValueError, KeyError, TypeError, OverflowError):
                continue
            self._known[defect.shard, defect.member] = defect
