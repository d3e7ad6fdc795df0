"""One row of training data: what is accepted, and what a defect is called.

Three namings are read: this project's own, that of LaSER-Training (`reasoning_query`, `prompt`, `positive_passages`,
`negative_passages`), and that of FlagEmbedding, in which BGE-Reasoner's and ReasonEmbed's data are published (`prompt`,
`pos` and `neg`, which are lists of plain texts; ReasonEmbed adds `reasoning_query`).
"""

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from laser_dist.errors import UserError, suggest
from laser_dist.reading import decode_json


@dataclass(frozen=True)
class Passage:
    """A text that can be retrieved."""

    id: str
    text: str
    title: str = ""


@dataclass(frozen=True)
class Example:
    """One training triple: a query, its written rationale, its positives and hard negatives."""

    query_id: str
    query: str
    rationale: str
    positives: tuple[Passage, ...]
    negatives: tuple[Passage, ...] = ()
    instruction: str | None = None


# Every field under its names, in the order above. FlagEmbedding's come from its fine-tuning guide, ReasonEmbed's from
# what its training code reads (ReasonEmbed/training/custom_dataset.py in VectorSpaceLab/agentic-search).
NAMES = {
    "query_id": ("query_id",),
    "query": ("query",),
    "rationale": ("rationale", "reasoning_query"),
    "instruction": ("instruction", "prompt"),
    "positives": ("positives", "positive_passages", "pos"),
    "negatives": ("negatives", "negative_passages", "neg"),
    "id": ("id", "docid"),
    "text": ("text",),
    "title": ("title",),
}
_KNOWN = {name for names in NAMES.values() for name in names}
_PASSAGE_FORM = 'write it as {"id": "...", "text": "..."}'


def parse_example(row: object, where: str, *, drop_contradictions: bool = False) -> Example:
    """A decoded JSON row as an Example. `where` is file:line; it opens the message of every UserError.

    A missing rationale becomes "" (whether that may be is decided when shards are written), a missing id is derived.
    A negative that is also a positive is an error, or left out with `drop_contradictions`.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, got {_kind(row)}: write one {{...}} per line")
    query = _text(row, "query", where, required=True)
    positives = _passages(row, "positives", where)
    if not positives:
        raise UserError(f'{where}: "positives" is empty: give at least one passage that answers the query')
    negatives = _passages(row, "negatives", where)
    if drop_contradictions:
        negatives = tuple(negative for negative in negatives if not _contradiction(positives, negative))
    _refuse_contradictions(positives, negatives, where)
    return Example(
        # The positives take part: a query asked twice with other answers is two examples, not a repetition.
        query_id=_id(row, "query_id", where) or _derived("q", query, *(p.id for p in positives)),
        query=query,
        rationale=_text(row, "rationale", where),
        positives=positives,
        negatives=negatives,
        instruction=_text(row, "instruction", where) or None,
    )


def example_to_row(example: Example) -> dict[str, Any]:
    """The inverse of `parse_example`, in this project's field names; empty optional fields are left out."""
    row: dict[str, Any] = {"query_id": example.query_id, "query": example.query, "rationale": example.rationale}
    if example.instruction is not None:
        row["instruction"] = example.instruction
    for field in ("positives", "negatives"):
        passages = getattr(example, field)
        row[field] = [{"id": p.id, "text": p.text} | ({"title": p.title} if p.title else {}) for p in passages]
    return row


def decode_example(raw: bytes, where: str) -> Example:
    """The JSON text of one row as an Example; UserError if it is not valid UTF-8 or JSON, or has a defect."""
    return parse_example(decode_row(raw, where), where)


def encode_example(example: Example) -> bytes:
    """The JSON text of an example as shards hold it; the inverse of `decode_example`."""
    return json.dumps(example_to_row(example), ensure_ascii=False, separators=(",", ":")).encode()


def decode_row(raw: bytes, where: str) -> Any:
    """The JSON value in `raw`; UserError names `where` and what is wrong with it."""
    try:
        return decode_json(raw)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8: save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno}): one object per line") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}: mend or remove the row") from None


def passage_key(passage_id: str) -> int:
    """A signed 64-bit key of an id, the same on every machine; never 0, which may serve as "no passage"."""
    return int.from_bytes(hashlib.blake2b(passage_id.encode(), digest_size=8).digest(), "big", signed=True) or 1


def content_key(passage: Passage) -> int:
    """The key of what a passage says: equal for copies under other ids, or in other case, width or spacing.

    Not of its id: two sets may call different passages "1", and one may hold a passage under two ids.
    """
    return passage_key(" ".join(unicodedata.normalize("NFKC", f"{passage.title}\n{passage.text}").casefold().split()))


def _passages(row: dict, field: str, where: str) -> tuple[Passage, ...]:
    value, name = _lookup(row, field)
    if value is None:
        if field == "positives":
            raise UserError(f'{where}: "{name}" is missing: give at least one passage.{_near(name, row)}')
        # A list under nearly the right name is a typing error, and would otherwise be lost without a word.
        lists = {key: item for key, item in row.items() if isinstance(item, list)}
        if near := _near(name, lists):
            raise UserError(f'{where}: "{name}" is missing, which is allowed, but:{near} Rename it')
        return ()
    if not isinstance(value, list | tuple):
        raise UserError(f'{where}: "{name}" must be a list of passages, got {_kind(value)}: {_PASSAGE_FORM}')
    return tuple(_passage(item, f"{where}: {name}[{i}]") for i, item in enumerate(value))


def _passage(item: object, where: str) -> Passage:
    if isinstance(item, str):
        item = {"text": item}
    if not isinstance(item, dict):
        raise UserError(f"{where}: a passage must be an object, got {_kind(item)}: {_PASSAGE_FORM}")
    text = _text(item, "text", where, required=True)
    title = _text(item, "title", where)
    return Passage(id=_id(item, "id", where) or _derived("p", title, text), text=text, title=title)


def _text(row: dict, field: str, where: str, required: bool = False) -> str:
    """The string under any name of `field`, unchanged; blank or missing is "" unless required."""
    value, name = _lookup(row, field)
    if value is None and required:
        raise UserError(f'{where}: "{name}" is missing: every row needs it.{_near(name, row)}')
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f'{where}: "{name}" must be a string, got {_kind(value)}: put it in quotes')
    if not value.strip():
        if required:
            raise UserError(f'{where}: "{name}" is empty: fill it in or remove the row')
        return ""
    return _encodable(value, name, where)


def _encodable(value: str, name: str, where: str) -> str:
    # JSON may hold half of a surrogate pair (\ud83d), which no tokenizer and no file takes: better to say it here.
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f'{where}: "{name}" holds half of a surrogate pair at character {error.start + 1}: remove or repair it'
        ) from None
    # NULs come from broken conversions (UTF-16 read as bytes, binary files), and end the text in many a C library.
    if "\0" in value:
        raise UserError(f'{where}: "{name}" holds a NUL at character {value.index(chr(0)) + 1}: remove or repair it')
    return value


def _id(row: dict, field: str, where: str) -> str | None:
    """The id as a string (integers are accepted), None when missing or blank."""
    value, name = _lookup(row, field)
    if type(value) is int:
        return str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise UserError(f'{where}: "{name}" must be a string, got {_kind(value)}: put it in quotes')
    # Ids become cells of tab-separated qrels, whose readers strip them.
    if value != value.strip() or any(character in value for character in "\t\r\n"):
        raise UserError(f'{where}: "{name}" {value!r} holds a tab or line break, or a blank at either end: remove it')
    return _encodable(value, name, where)


def _lookup(row: dict, field: str) -> tuple[Any, str]:
    """Value of the first name that is there and not null, and that name (the field's own when there is none)."""
    present = [name for name in NAMES[field] if row.get(name) is not None]
    return (row[present[0]], present[0]) if present else (None, field)


def _near(name: str, row: dict) -> str:
    return suggest(name, [key for key in row if isinstance(key, str) and key not in _KNOWN])


def _refuse_contradictions(positives: Sequence[Passage], negatives: Sequence[Passage], where: str) -> None:
    for i, negative in enumerate(negatives):
        if same := _contradiction(positives, negative):
            raise UserError(
                f'{where}: negatives[{i}] (id "{negative.id}") is also a positive: same {same}. '
                "Training would pull and push one passage: remove it from the negatives"
            )


def _contradiction(positives: Sequence[Passage], negative: Passage) -> str | None:
    """What a negative has in common with a positive: its id, its text, or nothing."""
    if any(negative.id == positive.id for positive in positives):
        return "id"
    return "text" if any(negative.text == positive.text for positive in positives) else None


def _derived(kind: str, *parts: str) -> str:
    return f"{kind}-{hashlib.blake2b(json.dumps(parts).encode(), digest_size=10).hexdigest()}"


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
