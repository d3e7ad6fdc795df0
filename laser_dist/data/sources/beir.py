"""A BEIR folder as a source of training rows: corpus.jsonl, queries.jsonl and the training judgements.

The judgements are qrels/train.tsv, as BEIR has it, or train_qrels.tsv beside the other files. A score above 0 makes a
passage a positive, a score of 0 a negative. Queries without a positive are no training rows; a query may bring its
"rationale" and "instruction". In memory are the judgements and where their passages lie, not the corpus.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser_dist.data.schema import NAMES, decode_row
from laser_dist.data.sources.chunks import Chunk, grouped
from laser_dist.data.sources.layouts import RowForm
from laser_dist.data.sources.read import Files, hash_files
from laser_dist.errors import UserError

_QRELS = ("qrels/train.tsv", "train_qrels.tsv")


def is_beir(path: Path) -> bool:
    """Whether a folder has all that a training source in BEIR's layout needs."""
    return all((path / name).is_file() for name in ("corpus.jsonl", "queries.jsonl")) and _qrels(path) is not None


def _qrels(path: Path) -> Path | None:
    return next((path / name for name in _QRELS if (path / name).is_file()), None)


@dataclass(frozen=True)
class Beir:
    """A BEIR folder; see the module."""

    name: str
    path: Path
    form: RowForm

    @property
    def files(self) -> list[Path]:
        qrels = _qrels(self.path)
        files = [self.path / "corpus.jsonl", self.path / "queries.jsonl"]
        if qrels is None or not all(file.is_file() for file in files):
            raise UserError(
                f"source {self.name}: the layout beir needs corpus.jsonl, queries.jsonl and {' or '.join(_QRELS)}"
            )
        return [*files, qrels]

    def chunks(self, skip: int = 0) -> Iterator[Chunk]:
        from laser_dist.retrieval.collection import read_qrels

        corpus, queries, qrels = self.files
        judged = read_qrels(qrels)
        offsets = self._offsets(corpus, {passage for grades in judged.values() for passage in grades})
        asked = {query for query, grades in judged.items() if any(grade > 0 for grade in grades.values())}
        found: set[str] = set()
        unreadable = skip > 0
        with corpus.open("rb") as file:
            for chunk in Files(str(queries), (queries,)).chunks(skip):
                rows: list[Any] = []
                for number, row in chunk.decoded():
                    unreadable = unreadable or not isinstance(row, dict)
                    rows += [b"\n"] * (number - chunk.first - len(rows))  # blank lines: numbers stay the file's
                    query_id = self._get(row, "query_id", "id", "_id") if isinstance(row, dict) else None
                    if isinstance(row, dict) and str(query_id) not in asked:
                        rows.append(b"\n")
                        continue
                    rows.append(self._row(row, str(query_id), judged, offsets, file) if isinstance(row, dict) else row)
                    found.add(str(query_id))
                for first, part in grouped(rows, chunk.first):
                    yield Chunk(chunk.file, first, part, chunk.share)
        if (missing := sorted(asked - found)) and not unreadable:
            some = ", ".join(missing[:3])
            raise UserError(f"{qrels}: {len(missing)} queries with a positive are not in {queries}: {some}")

    def _row(self, query: dict, query_id: str, judged: dict, offsets: dict[str, int], corpus: Any) -> dict[str, Any]:
        passages: dict[str, list[dict]] = {"positives": [], "negatives": []}
        for passage_id, grade in judged[query_id].items():
            corpus.seek(offsets[passage_id])
            passage = decode_row(corpus.readline(), f"{self.path / 'corpus.jsonl'}: {passage_id}")
            text, title = self._get(passage, "text"), self._get(passage, "title")
            content = {"text": text, "title": title} if text else {"text": title}
            passages["positives" if grade > 0 else "negatives"].append({"id": passage_id, **content})
        row = {"query_id": query_id, "query": self._get(query, "query", "text"), **passages}
        return row | {field: self._get(query, *NAMES[field]) for field in ("rationale", "instruction")}

    def _offsets(self, corpus: Path, wanted: set[str]) -> dict[str, int]:
        """Where the line of each judged passage begins. Raises UserError if one is missing or occurs twice."""
        offsets: dict[str, int] = {}
        position = 0
        with corpus.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{corpus}:{number}"
                row = decode_row(line.removeprefix(b"\xef\xbb\xbf"), where) if line.strip() else None
                passage_id = str(self._get(row, "id", "_id")) if isinstance(row, dict) else None
                if passage_id in wanted:
                    if passage_id in offsets:
                        raise UserError(f'{where}: id "{passage_id}" was used on an earlier line: ids must be unique')
                    offsets[passage_id] = position
                position += len(line)
        if missing := sorted(wanted - offsets.keys()):
            raise UserError(
                f"{corpus} lacks {len(missing)} judged passages: {', '.join(missing[:3])}; "
                "use corpus and judgements of one collection"
            )
        return offsets

    def _get(self, row: dict, *names: str) -> Any:
        """The value under the first of these names that is there; --fields may rename the first."""
        names = (self.form.fields[names[0]],) if names[0] in self.form.fields else names
        return next((row[name] for name in names if row.get(name) is not None), None)

    def identity(self) -> dict[str, str]:
        return {"sha256": hash_files(self.files)}

    def licence(self) -> str:
        return Files(self.name, (self.path / "README.md",)).licence()
