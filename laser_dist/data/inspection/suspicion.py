"""Rows worth a look before training on them. Each rule needs one row only, is cheap, and says what it looks for.

A rule is a sign, not a verdict: a rationale about HTML holds tags. What needs all rows is in `survey`.
"""

import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from laser_dist.data.annotation.rationales import quotes
from laser_dist.data.schema import Example

_FEWEST_LETTERS = 3
_MOST_CHARACTERS = 50_000  # more than ten times what a row of 1024 tokens holds
_LONG_ENOUGH = 400  # characters; below, compression says little about repetition
_MOST_COMPRESSIBLE = 0.15  # prose needs 0.35 to 0.55 of its bytes, a sentence in a loop less than 0.1
_QUERY_CHARACTERS = 20  # shorter queries ("What is DNA?") occur in passages by chance
_SCRIPT_SHARE = 0.3

# UTF-8 that was read as Latin-1 or Windows-1252: "Ã©" for "é", "â€™" for an apostrophe.
_MOJIBAKE = re.compile("\u00c3[\u0080-\u00bf]|\u00c2[\u00a0-\u00bf]|\u00e2\u20ac|\u00e2\u0080[\u0080-\u00bf]")
_HTML = re.compile(
    r"</?(?:a|b|br|div|em|h[1-6]|i|img|li|ol|p|pre|script|span|strong|style|sub|sup|table|td|th|tr|ul)\b[^<>]{0,200}>"
    r"|&(?:amp|lt|gt|quot|nbsp|#\d{1,6}|#x[0-9a-f]{1,6});",
    re.IGNORECASE,
)
_NOT_LATIN = re.compile(r"[^\W\d_\u0000-\u024f]")
_LETTER = re.compile(r"[^\W\d_]")


@dataclass(frozen=True)
class Rule:
    """One sign of trouble; `holds` says whether an example shows it."""

    name: str
    statement: str
    holds: Callable[[Example], bool]


def rules(special_tokens: Iterable[str] = ()) -> tuple[Rule, ...]:
    """All rules; `special_tokens` are the strings that the tokenizer turns into control tokens."""
    control = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) or r"(?!)")
    found = _anywhere
    return (
        Rule("no rationale", "the rationale is empty, so only a contrastive objective can use the row", _no_rationale),
        Rule("short rationale", "the rationale has fewer characters than the query", _short_rationale),
        Rule("rationale is the query", "both are equal, but for case and blank space", _rationale_is_query),
        Rule("leak", "the rationale holds a whole positive of eight words or more, verbatim", _leak),
        Rule(
            "query in a positive", f"a positive holds the whole query ({_QUERY_CHARACTERS} characters or more)", _echo
        ),
        Rule("almost empty", f"a text has fewer than {_FEWEST_LETTERS} letters or digits", _any_text(_almost_empty)),
        Rule("very long", f"a text has more than {_MOST_CHARACTERS:,} characters", _any_text(_very_long)),
        Rule(
            "repetition", f"query or rationale compresses below {_MOST_COMPRESSIBLE:.0%}, as a loop does", _repetitive
        ),
        Rule("other script", "query and rationale are written in different scripts", _other_script),
        Rule("replacement character", "a text holds U+FFFD: it was decoded wrongly", _any_text(_has_replacement)),
        Rule("mojibake", "a text looks like UTF-8 that was read as Latin-1", _any_text(found(_MOJIBAKE))),
        Rule("HTML", "a text holds HTML tags or entities", _any_text(found(_HTML))),
        Rule("control token", "a text holds a special token of this tokenizer, as text", _any_text(found(control))),
    )


def texts_of(example: Example) -> Iterator[str]:
    """Every text of an example."""
    yield example.query
    yield example.rationale
    for passage in (*example.positives, *example.negatives):
        yield passage.title
        yield passage.text


def _any_text(holds: Callable[[str], bool]) -> Callable[[Example], bool]:
    return lambda example: any(text and holds(text) for text in texts_of(example))


def _anywhere(pattern: re.Pattern[str]) -> Callable[[str], bool]:
    return lambda text: pattern.search(text) is not None


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _no_rationale(example: Example) -> bool:
    return not example.rationale.strip()


def _short_rationale(example: Example) -> bool:
    return 0 < len(example.rationale.strip()) < len(example.query.strip())


def _rationale_is_query(example: Example) -> bool:
    return _plain(example.rationale) == _plain(example.query)


def _leak(example: Example) -> bool:
    return quotes(example.rationale, example.positives)


def _echo(example: Example) -> bool:
    query = _plain(example.query)
    return len(query) >= _QUERY_CHARACTERS and any(query in _plain(p.text) for p in example.positives)


def _almost_empty(text: str) -> bool:
    return len(text) < 100 and sum(map(str.isalnum, text)) < _FEWEST_LETTERS


def _very_long(text: str) -> bool:
    return len(text) > _MOST_CHARACTERS


def _repetitive(example: Example) -> bool:
    for text in (example.query, example.rationale):
        raw = text.encode()
        if len(raw) >= _LONG_ENOUGH and len(zlib.compress(raw, 1)) < _MOST_COMPRESSIBLE * len(raw):
            return True
    return False


def _other_script(example: Example) -> bool:
    if example.query.isascii() and example.rationale.isascii():
        return False
    query, rationale = map(_share_not_latin, (example.query, example.rationale))
    return bool(example.rationale) and abs(query - rationale) > _SCRIPT_SHARE


def _share_not_latin(text: str) -> float:
    return len(_NOT_LATIN.findall(text)) / max(1, len(_LETTER.findall(text)))


def _has_replacement(text: str) -> bool:
    return "\ufffd" in text
