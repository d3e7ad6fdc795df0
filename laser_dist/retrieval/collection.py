"""Test collections on disk, in BEIR's layout: corpus.jsonl, queries.jsonl, qrels.tsv.

Everything is checked while it is read, because a defect found after an hour of encoding, or never, costs more than
a strict reader: every complaint is a UserError with file, line, field and remedy.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laser_dist.errors import UserError
from laser_dist.reading import LONGEST_ROW, decode_json

_LARGEST_GRADE = 1_000_000  # trec_eval reads 64-bit integers, and adds them up

Qrels = dict[str, dict[str, int]]
"""query id -> passage id -> grade; a grade above 0 means relevant."""


@dataclass(frozen=True)
class Corpus:
    """Passages in file order, column by column; a passage without a title has the title ""."""

    ids: list[str]
    texts: list[str]
    titles: list[str]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Queries:
    """Queries in file order, column by column; instruction and rationale are None where the file has none."""

    ids: list[str]
    texts: list[str]
    instructions: list[str | None]
    rationales: list[str | None]

    def __len__(self) -> int:
        return len(self.ids)


def iter_passages(path: str | Path) -> Iterator[tuple[str, str, str]]:
    """(id, text, title) of a corpus.jsonl's passages one by one: `{"id" or "_id", "text", "title"?}` per line.

    A passage with a title only has the title as its text; one with neither is an error, as it could only rank by
    accident.
    Raises UserError at the first defect, and at the end if there was no passage at all.
    """
    for where, row, passage_id in _rows(path):
        yield passage_id, *passage_of(where, row)


def passage_of(where: str, row: Mapping[str, Any]) -> tuple[str, str]:
    """(text, title) of one row. Raises UserError, which says `where`."""
    text, title = _text(where, row, "text") or "", _text(where, row, "title") or ""
    if not (text.strip() or title.strip()):
        raise UserError(f"{where}: text is missing or empty: give a text (or a title), or remove the line")
    return (text, title) if text.strip() else (title, "")


def read_corpus(path: str | Path) -> Corpus:
    """A whole corpus.jsonl in memory; see `iter_passages` for the rows and the errors."""
    ids, texts, titles = zip(*iter_passages(path), strict=True)
    return Corpus(list(ids), list(texts), list(titles))


def read_queries(path: str | Path) -> Queries:
    """A queries.jsonl: `{"id" or "_id", "text", "instruction"?, "rationale"?}` per line. Raises UserError."""
    queries = Queries([], [], [], [])
    for where, row, query_id in _rows(path):
        text, instruction = query_of(where, row)
        queries.ids.append(query_id)
        queries.texts.append(text)
        queries.instructions.append(instruction)
        queries.rationales.append(_text(where, row, "rationale"))
    return queries


def query_of(where: str, row: Mapping[str, Any]) -> tuple[str, str | None]:
    """(text, instruction) of one row. Raises UserError, which says `where`."""
    text = _text(where, row, "text")
    if not (text and text.strip()):
        raise UserError(f"{where}: text is missing or empty: give the query's text, or remove the line")
    return text, _text(where, row, "instruction")


def read_qrels(path: str | Path) -> Qrels:
    """Relevance judgements: `query-id corpus-id score` with or without this header, or TREC's `query 0 passage grade`.

    Columns are separated by tabs, or by any blank space in a file line without a tab. Raises UserError.
    """
    path = Path(path)
    qrels: Qrels = {}
    header_allowed = True
    for where, line in _lines(path):
        columns = [c.strip() for c in (line.split("\t") if "\t" in line else line.split())]
        if len(columns) not in (3, 4) or not all(columns):
            raise UserError(f"{where}: {len(columns)} columns: write query-id, corpus-id, score, separated by tabs")
        query, passage, grade = columns[0], columns[-2], columns[-1]
        is_header = header_allowed and grade.lower() in ("score", "relevance", "rel", "grade", "label")
        header_allowed = False
        if is_header:
            continue
        try:
            value = int(grade)
        except ValueError:
            raise UserError(
                f"{where}: score {grade[:40]!r} is not a whole number: write 1 for relevant, 0 for not"
            ) from None
        if abs(value) > _LARGEST_GRADE:
            raise UserError(f"{where}: score {value} is beyond {_LARGEST_GRADE}: write 1 for relevant, 0 for not")
        if qrels.setdefault(query, {}).setdefault(passage, value) != value:
            raise UserError(f"{where}: score of {query!r}, {passage!r} contradicts an earlier line: keep one of them")
    if not qrels:
        raise UserError(f"{path}: no judgement in the file: write query-id, corpus-id, score, separated by tabs")
    return qrels


def read_collection(corpus: str | Path, queries: str | Path, qrels: str | Path) -> tuple[Corpus, Queries, Qrels]:
    """The three files, read and checked against each other.

    Raises UserError also where a judgement names an unknown query or passage: such a passage can never be found, so
    the metrics would be too low without a word.
    """
    # Smallest files first: their mistakes are then reported without waiting for the corpus.
    loaded_qrels, loaded_queries = read_qrels(qrels), read_queries(queries)
    _check_known(f"{qrels}: query-id", loaded_qrels, set(loaded_queries.ids), queries)
    loaded_corpus = read_corpus(corpus)
    judged = {passage: None for grades in loaded_qrels.values() for passage in grades}
    _check_known(f"{qrels}: corpus-id", judged, set(loaded_corpus.ids), corpus)
    return loaded_corpus, loaded_queries, loaded_qrels


def collection_files(folder: str | Path, split: str = "test") -> tuple[Path, Path, Path]:
    """Corpus, queries and qrels of a folder in BEIR's layout: (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv).

    SPLIT_queries.jsonl and SPLIT_qrels.tsv are taken where they exist, and, for the split test, qrels.tsv. Raises
    UserError that says what is missing, and which splits there are.
    """
    folder = Path(folder)
    corpus = folder / "corpus.jsonl"
    queries = _first_file(folder / f"{split}_queries.jsonl", folder / "queries.jsonl")
    names = [f"qrels/{split}.tsv", f"{split}_qrels.tsv"] + ["qrels.tsv"] * (split == "test")
    qrels = _first_file(*(folder / name for name in names))
    if not corpus.is_file() or queries is None:
        raise UserError(f"{folder}: holds no corpus.jsonl and queries.jsonl: give a folder in BEIR's layout")
    if qrels is None:
        found = {path.stem for path in folder.glob("qrels/*.tsv")}
        found |= {path.stem.removesuffix("_qrels") for path in folder.glob("*_qrels.tsv")}
        found |= {"test"} if (folder / "qrels.tsv").is_file() else set()
        known = f"; --split can be {', '.join(sorted(found))}" if found else ""
        raise UserError(f"{folder}: no judgements of the split {split!r} ({' or '.join(names)}){known}")
    return corpus, queries, qrels


def keep_judged(queries: Queries, qrels: Mapping[str, Mapping[str, int]]) -> tuple[Queries, Qrels]:
    """Only the queries with at least one relevant passage, and their judgements; the others cannot score above 0.

    Raises UserError if none is left.
    """
    kept = [row for row, query in enumerate(queries.ids) if any(g > 0 for g in qrels.get(query, {}).values())]
    if not kept:
        raise UserError("none of the queries has a relevant passage (score above 0) in the qrels: do the files match?")
    columns = (queries.ids, queries.texts, queries.instructions, queries.rationales)
    selected = Queries(*([column[row] for row in kept] for column in columns))
    return selected, {query: dict(qrels[query]) for query in selected.ids}


def _first_file(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file:line", text) of every line that is not blank."""
    for number, (_, raw) in enumerate(raw_lines(path), start=1):
        if line := decode_line(f"{path}:{number}", raw, first=number == 1):
            yield f"{path}:{number}", line


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of every line. Raises UserError, also for a line that no text is as long as."""
    try:
        with path.open("rb") as file:
            offset = 0
            for number, raw in enumerate(iter(lambda: file.readline(LONGEST_ROW + 1), b""), start=1):
                if len(raw) > LONGEST_ROW:
                    raise UserError(f"{path}:{number}: the line is longer than {LONGEST_ROW >> 20} MiB: shorten it")
                yield offset, raw
                offset += len(raw)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check the path") from None


def _rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """("file:line", row, id) of every line of a JSONL file; ids are unique and there is at least one."""
    seen: set[str] = set()
    for where, line in _lines(Path(path)):
        row, row_id = parse_row(where, line)
        if row_id in seen:
            raise UserError(f"{where}: id {row_id!r} was used on an earlier line: ids must be unique")
        seen.add(row_id)
        yield where, row, row_id
    if not seen:
        raise UserError(f'{path}: the file is empty: write one object with "id" and "text" per line')


def decode_line(where: str, raw: bytes, *, first: bool) -> str:
    """A line of a text file without its end, "" if it is blank; the `first` may begin with a byte order mark."""
    try:
        line = raw.decode("utf-8-sig" if first else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason}): save the file as UTF-8") from None
    return line if line.strip() else ""


def parse_row(where: str, line: str) -> tuple[dict[str, Any], str]:
    """A line of JSONL as (row, id). Raises UserError, which says `where`."""
    try:
        row = decode_json(line)
        if "\\u" in line:  # half of a surrogate pair, which no tokenizer and no file takes
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}): write one JSON object per line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}: write one JSON object per line")
    row_id = row.get("id", row.get("_id"))
    # Numbers are taken as the text that the qrels hold; true and false are numbers in Python, but no ids.
    row_id = str(row_id) if type(row_id) is int else row_id
    if not isinstance(row_id, str) or not row_id.strip():
        raise UserError(f'{where}: id is missing, empty or not text: give every line a unique "id"')
    return row, row_id


def _text(where: str, row: Mapping[str, Any], field: str) -> str | None:
    value = row.get(field)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: {field} is a {type(value).__name__}: write it as text")
    return value


def _check_known(what: str, named: Mapping[str, object], known: set[str], source: str | Path) -> None:
    if unknown := [name for name in named if name not in known]:
        listed = ", ".join(map(repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
        raise UserError(f"{what}: {len(unknown)} not in {source}: {listed}; use files of one collection and split")
