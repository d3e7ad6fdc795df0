"""What may stand in logs and files: no key, token or password, no query of a presigned address, no terminal command."""

import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from laser_dist.errors import UserError

HIDDEN = "[hidden]"
_SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_KEY|KEY)(_ID)?$", re.I)
_LEAST = 8  # characters; shorter values ("true", "1") are no secrets, and hiding them would garble messages
_SURE = 16  # characters; shorter ones may be in a path by chance, which is no reason to refuse it
# How the keys of some services begin, whoever passes them.
_KEY = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|sk-[\w-]{32,}|(AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_\w{30,}|xox[abp]-[\w-]{10,})"
)
# Also as pathlib leaves them, with one slash.
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*://|(?:https?|s3):/)([^\s/@'\"<>]*@)?([^\s?#'\"<>]*)([?#][^\s'\"<>]*)?", re.I)
_PERSON = re.compile(r"\b[\w.%+-]+:[^\s/@:'\"<>]{3,}@(?=[\w\[])")
_PARAMETER = re.compile(
    r"\b(X-Amz-[A-Za-z-]+|X-Goog-[A-Za-z-]+|AWSAccessKeyId|Signature|sig|token|access_token|api_?key|password)"
    r"=([^\s&'\"<>]+)",
    re.I,
)


def hide(text: str) -> str:
    """The text without secrets of the environment, what looks like a key, and passwords and queries of addresses."""
    for name, value in _secrets().items():
        text = text.replace(value, f"[{name}]")
    text = _ADDRESS.sub(_without_secret, _KEY.sub(HIDDEN, text))
    return _PARAMETER.sub(rf"\1={HIDDEN}", _PERSON.sub(f"{HIDDEN}@", text))


def shown(text: object) -> str:
    """`hide`, and nothing that a terminal would obey or that reorders a line; names and texts may be anybody's."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in hide(str(text))
    )


def find_secret(text: str) -> str | None:
    """What kind of secret a value holds, in words that do not repeat it; None if it holds none."""
    for name, value in _secrets().items():
        if len(value) >= _SURE and value in text:
            return f"the value of the environment variable {name}"
    if _KEY.search(text):
        return "what looks like an access key"
    return "a password or a query" if any(m[2] or m[4] for m in _ADDRESS.finditer(text)) else None


def check_address(url: str) -> None:
    """UserError unless shards are read from addresses like `url`, and it may stand in configs and logs."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https"):
            _ = parts.port  # raises
    except ValueError as error:  # an address in brackets that is none, a port that is no number
        raise UserError(f"an address of shards is no address ({error}): write it as https://host/folder") from None
    if parts.scheme not in ("http", "https", "s3"):
        raise UserError(f"{parts.scheme}://...: shards are read from folders, http(s):// and s3:// only")
    if parts.username is not None or parts.query or parts.fragment:
        raise UserError(
            f"{parts.scheme}://{parts.hostname or ''}{parts.path} comes with a password, a query or a fragment, which "
            "configs and logs would show: leave it out; credentials are read from ~/.netrc (HTTP) or from AWS_*, "
            "~/.aws and FSSPEC_S3_* (S3)"
        )


class _Hiding:
    """A stream that gets its text by way of `hide`; all else about it is its own."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(hide(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def hiding() -> Iterator[None]:
    """Inside, sys.stderr shows no secret, whoever writes: messages and warnings of libraries go there.

    Not sys.stdout, which carries rows and results as they are.
    """
    stream, sys.stderr = sys.stderr, _Hiding(sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stderr = stream


def print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For sys.excepthook: a traceback quotes values, and what a server or a library said."""
    print(shown("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)


def _secrets() -> dict[str, str]:
    """Environment variable -> its value, longest first: one may hold another."""
    found = {name: value for name, value in os.environ.items() if len(value) >= _LEAST and _SECRET_NAME.search(name)}
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _without_secret(match: re.Match[str]) -> str:
    scheme, person, place, rest = match.groups()
    return scheme + (f"{HIDDEN}@" if person else "") + place + (f"{rest[0]}{HIDDEN}" if rest else "")
