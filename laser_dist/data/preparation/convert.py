"""From the rows of a chunk to what goes into a shard: the part of `prepare` that runs in its worker processes."""

import hashlib
import json
import unicodedata
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from laser_dist.data.preparation.lengths import Measured, measure, texts_of
from laser_dist.data.schema import Example, encode_example, parse_example
from laser_dist.data.sources.beir import Beir
from laser_dist.data.sources.chunks import Chunk
from laser_dist.data.sources.layouts import RowForm
from laser_dist.data.sources.read import Origin
from laser_dist.errors import UserError


@dataclass(frozen=True)
class Rules:
    """How rows are read and judged, each by itself."""

    form: RowForm = RowForm()
    max_characters: int = 200_000
    too_long: Literal["error", "drop"] = "error"
    contradictions: Literal["error", "drop"] = "error"
    tokenizer: str | None = None


class Record(NamedTuple):
    """A row that may become an example of a shard or of the dev split."""

    number: int
    query_id: str
    id_key: int  # of the query id
    query_key: int  # of the normalised query: equal for repetitions of a query
    has_rationale: bool
    text: bytes  # the example as JSON
    measured: Measured
    contradictions: int  # negatives left out because they are positives too


class Defect(NamedTuple):
    """A row that cannot be used, or that the rules leave out."""

    number: int
    reason: str
    dropped: str | None = None  # what the rules call it; None: an error


class Task(NamedTuple):
    """A chunk of one of the sources."""

    source: int
    chunk: Chunk
    rules: Rules


class Converted(NamedTuple):
    """The rows of a chunk, in order; blank lines have no outcome."""

    source: int
    file: str
    first: int
    rows: int
    share: float
    outcomes: list[Record | Defect]


def convert(task: Task) -> Converted:
    """Decode, rename, check and measure every row of a chunk."""
    source, chunk, rules = task
    outcomes = [_outcome(f"{chunk.file}:{number}", number, row, rules) for number, row in chunk.decoded()]
    if rules.tokenizer:
        _add_tokens(outcomes, rules.tokenizer)
    return Converted(source, chunk.file, chunk.first, len(chunk), chunk.share, outcomes)


def query_key(query: str) -> int:
    """An unsigned 64-bit key that queries share if they differ in case, blank space or Unicode form only."""
    return query_id_key(" ".join(unicodedata.normalize("NFKC", query).casefold().split()))


def _outcome(where: str, number: int, row: Any, rules: Rules) -> Record | Defect:
    if isinstance(row, UserError):
        return Defect(number, str(row))
    try:
        example, contradictions = _parse(rules.form.apply(row), where, rules)
    except UserError as error:
        return Defect(number, str(error))
    for field, text in texts_of(example):
        if len(text) > rules.max_characters:
            reason = (
                f"{where}: a {field} has {len(text):,} characters, more than --max-characters {rules.max_characters}"
            )
            dropped = "too long" if rules.too_long == "drop" else None
            return Defect(number, f"{reason}: shorten it, or leave such rows out with --too-long drop", dropped)
    return Record(
        number,
        example.query_id,
        query_id_key(example.query_id),
        query_key(example.query),
        bool(example.rationale),
        encode_example(example),
        measure(example),
        contradictions,
    )


def _parse(row: Any, where: str, rules: Rules) -> tuple[Example, int]:
    """An example, and how many contradictory negatives were left out."""
    drop = rules.contradictions == "drop"
    try:
        return parse_example(row, where), 0
    except UserError:
        if not drop:
            raise
    example = parse_example(row, where, drop_contradictions=True)
    given = next(row[name] for name in ("negatives", "negative_passages", "neg") if row.get(name) is not None)
    return example, len(given) - len(example.negatives)


def _add_tokens(outcomes: list[Record | Defect], tokenizer: str) -> None:
    records = [(i, outcome) for i, outcome in enumerate(outcomes) if isinstance(outcome, Record)]
    texts = [texts_of(parse_example(json.loads(record.text), "")) for _, record in records]
    flat = [text for row in texts for _, text in row]
    if not flat:
        return
    counts = iter(map(len, load_tokenizer(tokenizer)(flat, add_special_tokens=False, verbose=False)["input_ids"]))
    for (i, record), row in zip(records, texts, strict=True):
        tokens = [(f"{field} tokens", next(counts)) for field, _ in row]
        outcomes[i] = record._replace(measured=record.measured + tokens)


@lru_cache(maxsize=1)
def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {name} cannot be loaded: {error}") from error


def detect_form(form: RowForm, origin: Origin) -> RowForm:
    """The form of a source's rows, decided by its first chunk: the first row that has any; some may be defective.

    Rows of a BEIR folder come in our fields. Raises UserError, about the first row, if none has a known form.
    """
    if isinstance(origin, Beir):
        return RowForm("beir")
    for chunk in origin.chunks():
        defects: list[UserError] = []
        for number, row in chunk.decoded():
            if isinstance(row, UserError):
                continue
            try:
                return form.detect(row, f"{chunk.file}:{number}")
            except UserError as error:
                defects.append(error)
        if defects:
            raise defects[0]
    return replace(form, layout="passages")


def query_id_key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") or 1
