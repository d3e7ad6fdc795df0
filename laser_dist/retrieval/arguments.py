"""What LaserEncoder accepts as texts and what goes with them; each complaint is a UserError that names the place."""

from collections.abc import Iterator, Sequence
from typing import Any

from laser_dist.errors import UserError


def check_texts(name: str, texts: Sequence[str]) -> None:
    """UserError unless `texts` is a list of texts that are not empty."""
    if isinstance(texts, str):
        raise UserError(f"{name}: expected a list of strings, got one string; wrap it in a list")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{name}[{i}] = {text!r}: expected a text that is not empty")


def per_text(name: str, values: Sequence[str | None] | None, texts: Sequence[str]) -> Sequence[str | None]:
    """One value per text; None for each where none are given. Raises UserError."""
    if isinstance(values, str) or (values is not None and len(values) != len(texts)):
        found = "one string" if isinstance(values, str) else len(values)
        raise UserError(f"{name}: expected a list of {len(texts)}, one for each text, got {found}")
    return [None] * len(texts) if values is None else values


def at_least_one(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{name} = {value!r}: must be a whole number of at least 1")
    return value


def slices(values: list[Any], size: int) -> Iterator[list[Any]]:
    return (values[i : i + size] for i in range(0, len(values), size))
