"""A retrieval task on its way to disk: facts, questions in three splits, and what reads the authors' rows."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from laser_dist.data.mining import mine
from laser_dist.data.sources.read import read_source
from laser_dist.errors import UserError
from laser_dist.reading import LARGEST_RESULTS, read_json

SPLITS = ("train", "dev", "test")
Kind = TypeVar("Kind")


@dataclass
class Facts:
    """Passages, each text once. Two texts are the same if their letters and digits are, but for case: the authors
    write "the Earth's axis; pole" in one file and "the earth 's axis / pole" in another.
    """

    texts: dict[str, str] = field(default_factory=dict)
    """id -> text, in the order they were added"""
    _ids: dict[str, str] = field(default_factory=dict)
    _numbered: int = 0

    def add(self, text: str, new_id: str) -> str:
        """The id of a text: of what is there already, or else `new_id`."""
        found = self._ids.setdefault(" ".join(re.findall(r"[a-z0-9]+", text.lower())), new_id)
        if found == new_id:
            self.texts[new_id] = " ".join(text.split())
        return found

    def number(self, text: str, prefix: str) -> str:
        """`add` of a text that has no id of its own: new ones are counted, from 0."""
        new_id = f"{prefix}{self._numbered}"
        found = self.add(text, new_id)
        self._numbered += found == new_id
        return found


@dataclass(frozen=True)
class Question:
    """A query, its written reasoning in segments, and the ids of the facts that answer it."""

    id: str
    text: str
    rationale: list[str]
    facts: list[str]


@dataclass
class Task:
    """Facts, and the questions of each split; a question's id stands once, where it was first."""

    facts: Facts = field(default_factory=Facts)
    splits: dict[str, list[Question]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    _seen: set[str] = field(default_factory=set)

    def add(self, split: str, question: Question) -> None:
        if question.id not in self._seen:
            self._seen.add(question.id)
            self.splits[split].append(question)

    def write(self, folder: Path, negatives: int) -> None:
        """corpus.jsonl, queries and qrels of dev and test, and train.jsonl with mined negatives."""
        _write(folder / "corpus.jsonl", ({"id": name, "text": text} for name, text in self.facts.texts.items()))
        for split, prefix in (("dev", "dev_"), ("test", "")):
            questions = self.splits[split]
            _write(
                folder / f"{prefix}queries.jsonl",
                ({"id": q.id, "text": q.text, "rationale": "\n\n".join(q.rationale)} for q in questions),
            )
            judged = (f"{q.id}\t{fact}\t1\n" for q in questions for fact in q.facts)
            (folder / f"{prefix}qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged), "utf-8")
        rows = folder / "rows.jsonl"
        _write(rows, map(self._row, self.splits["train"]))
        with (folder / "mining.txt").open("w", encoding="utf-8") as said, redirect_stdout(said):
            mine.main(
                f"--method bm25 --pick top --ranks 1 200 --negatives {negatives}".split()
                + [
                    "--source",
                    str(rows),
                    "--corpus",
                    str(folder / "corpus.jsonl"),
                    "--out",
                    str(folder / "train.jsonl"),
                ]
            )
        rows.unlink()

    def _row(self, question: Question) -> dict[str, Any]:
        return {
            "query_id": question.id,
            "query": question.text,
            "rationale": "\n\n".join(question.rationale),
            "positives": [{"id": fact, "text": self.facts.texts[fact]} for fact in question.facts],
        }


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a JSON list or of JSON lines. Raises UserError for a file that is neither, or is not there."""
    values = (row for _, row in read_source(str(path))) if path.suffix == ".jsonl" else _list(path)
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise UserError(f"{path}: question {number}: expected an object, got {type(value).__name__}")
        yield f"{path}: question {number}", value


def _list(path: Path) -> list[Any]:
    try:
        values = read_json(path, LARGEST_RESULTS)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give --source the folder that holds the authors' files") from None
    except ValueError as error:
        raise UserError(f"{path}: no JSON as the authors publish it: {error}") from None
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a list of questions, got {type(values).__name__}")
    return values


def value_of(where: str, row: dict[str, Any], name: str, kind: type[Kind]) -> Kind:
    """row[name], of the type that the authors' files have there. Raises UserError, which says `where`."""
    value = row.get(name)
    if not isinstance(value, kind) or not value:
        got = "it is missing or empty" if not value else f"it is {type(value).__name__}"
        raise UserError(f"{where}: {name}: expected {kind.__name__}, but {got}: is this the authors' own file?")
    return value
