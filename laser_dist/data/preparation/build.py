"""Building a set of shards: sources are read in order, rows converted in parallel, judged and written one by one.

The result depends on the rows and the settings only. A shard never mixes sources, and with each shard goes all that an
interrupted run needs to continue behind it: the position in the sources, and what the counts have grown by.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from laser_dist.data.preparation.convert import Converted, Defect, Record, Rules, Task, convert
from laser_dist.data.preparation.dev import DevCollection
from laser_dist.data.preparation.lengths import Lengths
from laser_dist.data.preparation.parallel import ordered_map
from laser_dist.data.preparation.partial import SEEN, SKIPPED, PartialSet
from laser_dist.data.preparation.select import DUPLICATE_ID, DUPLICATE_QUERY, NO_RATIONALE, Selection
from laser_dist.data.sources.read import SHOWN, Origin
from laser_dist.errors import UserError

_REMEDIES = {
    DUPLICATE_ID: "give every row its own, or leave repetitions out with --duplicates drop",
    DUPLICATE_QUERY: "leave repetitions out with --duplicate-queries drop, or keep them with keep",
    NO_RATIONALE: "add it, leave such rows out with --missing-rationale drop, or keep them for contrastive training "
    "with --missing-rationale keep",
}


@dataclass(frozen=True)
class Plan:
    """What is to be built from what."""

    origins: list[Origin]
    rules: list[Rules]  # of each origin
    shard_examples: int = 1000
    limit: int | None = None  # examples, those of the dev split included
    on_error: Literal["stop", "skip"] = "stop"
    max_skipped: int = 100
    workers: int = 1

    @property
    def sizes(self) -> list[int]:
        """Bytes of each source; 0 where they are not known."""
        return [sum(file.stat().st_size for file in origin.files) for origin in self.origins]

    def converted(self, source: int = 0, row: int = 0) -> Iterator[Converted]:
        """All rows from this one on. A UserError of a source comes behind the rows that were read before it."""
        broken: list[UserError] = []

        def tasks() -> Iterator[Task]:
            try:
                for index in range(source, len(self.origins)):
                    for chunk in self.origins[index].chunks(row if index == source else 0):
                        yield Task(index, chunk, self.rules[index])
            except UserError as error:
                broken.append(error)

        yield from ordered_map(convert, tasks(), workers=self.workers)
        if broken:
            raise broken[0]


@dataclass
class Totals:
    """Counts and lengths, which add up over shards."""

    counts: Counter[str] = field(default_factory=Counter)
    lengths: Lengths = field(default_factory=Lengths)

    def merge(self, other: "Totals") -> None:
        self.counts.update(other.counts)
        self.lengths.merge(other.lengths)

    def to_json(self) -> dict[str, Any]:
        return {"counts": self.counts, "lengths": self.lengths.to_json()}

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> "Totals":
        return cls(Counter(table["counts"]), Lengths.from_json(table["lengths"]))

    def named(self, prefix: str) -> dict[str, int]:
        """What is counted under "PREFIX NAME", by name, sorted."""
        return {k.removeprefix(f"{prefix} "): n for k, n in sorted(self.counts.items()) if k.startswith(f"{prefix} ")}


class Builder:
    """Fills a PartialSet according to a plan, going on where its entries end."""

    def __init__(self, plan: Plan, partial: PartialSet, selection: Selection) -> None:
        self.plan, self.partial, self.selection = plan, partial, selection
        self.totals, self._news = Totals(), Totals()
        self._texts: list[bytes] = []
        self._skipped: list[bytes] = []
        self._defects: list[str] = []
        self._without: list[str] = []  # where the rows lack a rationale
        self._repeated: dict[str, str] = {}  # where a query id was found again -> the id
        self._next = (0, 0)
        for entry in partial.entries:
            self.totals.merge(Totals.from_json(entry["totals"]))
            self._next = tuple(entry["next"])
        partial.entries.clear()
        selection.recall(partial.read(SEEN))
        self.dev = DevCollection(partial.read("dev/corpus.jsonl"))

    @property
    def rows_are_bad(self) -> bool:
        """Whether rows were refused: nothing that is written can be used then."""
        return bool(self._defects or self._without)

    @property
    def kept(self) -> int:
        """Examples so far, those of the dev split included."""
        return sum(part.counts["examples"] + part.counts["dev"] for part in (self.totals, self._news))

    def run(self, tick: Callable[[int, Converted], object]) -> None:
        """Read and write everything; `tick(kept, converted)` after every chunk. Raises UserError and OSError."""
        source, row = self._next
        try:
            for converted in self.plan.converted(source, row):
                if converted.source != source:
                    self._flush(converted.source, 0, source)
                    source, row = converted.source, 0
                if self._take_all(converted, row):
                    break
                row += converted.rows
                tick(self.kept, converted)
        except UserError as error:
            if not self.rows_are_bad:
                raise
            self._defects.append(str(error))
        if self.rows_are_bad:
            raise UserError("\n".join(self._complaints()))
        self._flush(len(self.plan.origins), 0, source)
        self._require_something()

    def _take_all(self, converted: Converted, row: int) -> bool:
        """Take the outcomes of a chunk; whether the limit is reached."""
        for outcome in converted.outcomes:
            self._news.counts[f"rows {converted.source}"] += 1
            self._take(outcome, converted)
            if len(self._texts) == self.plan.shard_examples:
                self._flush(converted.source, row + outcome.number - converted.first + 1, converted.source)
            if self.kept == self.plan.limit:
                return True
        return False

    def _take(self, outcome: Record | Defect, converted: Converted) -> None:
        counts = self._news.counts
        if isinstance(outcome, Defect):
            if outcome.dropped:
                counts[f"dropped {outcome.dropped}"] += 1
            else:
                self._fail(outcome.reason, converted.file, outcome.number)
            return
        verdict = self.selection.judge(outcome)
        if verdict.kind == "error":
            self._refuse(verdict.reason, outcome, converted)
        elif verdict.kind == "drop":
            counts[f"dropped {verdict.reason}"] += 1
        elif self.rows_are_bad:
            return  # nothing more is written
        elif verdict.kind == "dev":
            reason = self.dev.add(outcome.text)
            if reason:
                self._fail(f"{converted.file}:{outcome.number}: {reason}", converted.file, outcome.number)
            else:
                counts["dev"] += 1
        else:
            self._texts.append(outcome.text)
            counts["examples"] += 1
            counts[f"examples {converted.source}"] += 1
            counts["without rationale"] += not outcome.has_rationale
            counts["negatives contradictory"] += outcome.contradictions
            self._news.lengths.add(outcome.measured)

    def _refuse(self, reason: str, record: Record, converted: Converted) -> None:
        where = f"{converted.file}:{record.number}"
        if self.plan.on_error == "skip":
            self._fail(f"{where}: {reason}", converted.file, record.number)
        elif reason == NO_RATIONALE:
            self._without.append(where) if len(self._without) < SHOWN else None
            self._news.counts["error no rationale"] += 1
        elif reason == DUPLICATE_ID:
            self._repeated[where] = record.query_id
            self._fail(where, converted.file, record.number)
        else:
            self._fail(f"{where}: this query was asked before: {_REMEDIES[reason]}", converted.file, record.number)

    def _fail(self, reason: str, file: str, number: int) -> None:
        if self.plan.on_error == "stop":
            self._defects.append(reason)
            if len(self._defects) == SHOWN:
                raise UserError("(stopped here; there may be more)")
            return
        line = json.dumps({"file": file, "row": number, "reason": reason}, ensure_ascii=False)
        self._skipped.append(line.encode() + b"\n")
        self._news.counts["skipped"] += 1
        total = self.totals.counts["skipped"] + self._news.counts["skipped"]
        if total > self.plan.max_skipped:
            report = self.partial.out.with_name(f"{self.partial.out.name}.{SKIPPED}")
            report.write_bytes(self.partial.read(SKIPPED) + b"".join(self._skipped))
            self._defects.append(
                f"{total} rows are bad, more than --max-skipped {self.plan.max_skipped}; the last: {reason}; "
                f"all of them are listed in {report}"
            )
            raise UserError("nothing was written")

    def _require_something(self) -> None:
        if not self.totals.counts["examples"]:
            self._defects.append(f"no example to write to {self.partial.out}: no row, or every row was left out")
        elif self.selection.dev_below and not self.totals.counts["dev"]:
            self._defects.append("no query fell into the dev split: raise --dev-share, or say --dev-queries N")
        if self._defects:
            raise UserError(self._defects[0])

    def _complaints(self) -> list[str]:
        places = self._first_places()
        complaints = [
            f'{where}: "query_id" {query_id!r} was already used at {places[query_id]}: {_REMEDIES[DUPLICATE_ID]}'
            for where, query_id in self._repeated.items()
        ]
        complaints += [line for line in self._defects if line not in self._repeated]
        if self._without:
            number = self.totals.counts["error no rationale"] + self._news.counts["error no rationale"]
            remedy = _REMEDIES[NO_RATIONALE].replace("add it", "add them")
            complaints.append(f"{number} row(s) have no rationale, the first is {self._without[0]}: {remedy}")
        return complaints

    def _first_places(self) -> dict[str, str]:
        """Where the repeated ids occur first; found by reading again, as remembering all places would take room."""
        places: dict[str, str] = {}
        if ids := set(self._repeated.values()):
            for converted in self.plan.converted():
                for outcome in converted.outcomes:
                    if isinstance(outcome, Record) and outcome.query_id in ids:
                        places.setdefault(outcome.query_id, f"{converted.file}:{outcome.number}")
                if len(places) == len(ids):
                    break
        return places

    def _flush(self, source: int, row: int, written: int) -> None:
        """Commit what is gathered, all of it from the source `written`; the next row to read is (source, row)."""
        if self.rows_are_bad or not self._news.counts:
            return
        appended = {SEEN: self.selection.take_news(), SKIPPED: b"".join(self._skipped), **self.dev.take_news()}
        self.partial.commit(
            self._texts,
            {name: content for name, content in appended.items() if content},
            source=written,
            examples=self.totals.counts["examples"],
            next=[source, row],
            totals=self._news.to_json(),
        )
        self.totals.merge(self._news)
        self._news = Totals()
        self._texts, self._skipped = [], []
