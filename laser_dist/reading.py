"""Files that may be anybody's: read up to a limit, their JSON without surprises.

What is too large, no plain file, too deeply nested, ambiguous or no number is refused before it costs memory or time.
Errors are OSError and ValueError, as of `open` and `json.loads`: whoever handles those handles these.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

LARGEST_JSON = 16 * 2**20  # bytes of a file that describes something: a manifest, a card, results
LARGEST_RESULTS = 64 * 2**20  # the same for results that have values for every query
LONGEST_ROW = 8 * 2**20  # bytes of a line; what is longer is no text to train on, and tokenising it stalls a step
_MOST_PARTS = 1_000_000  # lists and objects: an empty one takes 2 bytes on disk, and 60 to 70 in memory


def read_file(path: str | Path, limit: int = LARGEST_JSON) -> bytes:
    """The content of a plain file of at most `limit` bytes. Raises OSError, also for pipes and devices."""
    # Without waiting: a named pipe has no end, and opening it would wait for somebody to write.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no plain file", str(path))
        content = file.read(status.st_size + 1) if status.st_size <= limit else b""
    if (size := max(status.st_size, len(content))) > limit:
        raise OSError(errno.EFBIG, f"{size:,} bytes, but at most {limit:,} are read", str(path))
    return content


def decode_json(raw: bytes | str) -> Any:
    """The JSON value in `raw`. Raises ValueError, also for what Python lets pass: NaN, a key twice in an object."""
    text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
    if text.count("[") + text.count("{") > _MOST_PARTS:
        raise ValueError(f"holds more than {_MOST_PARTS:,} lists and objects")
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        # Python's own words for it advise how to lift the limit, which exists because reading takes quadratic time.
        raise ValueError("holds a number of more than 4300 digits" if "digits" in str(error) else str(error)) from None


def read_json(path: str | Path, limit: int = LARGEST_JSON) -> Any:
    """The JSON value of a file; see `read_file` and `decode_json`."""
    return decode_json(read_file(path, limit))


def read_object(path: str | Path, limit: int = LARGEST_JSON) -> dict[str, Any]:
    """`read_json` of what must be an object; ValueError for anything else."""
    value = read_json(path, limit)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value


def is_file_name(name: object) -> bool:
    """Whether it names a file of the folder it is looked up in, whatever that is."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\0"} & set(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in table if keys.count(key) > 1)
        raise ValueError(f"{twice!r} appears twice in one object")
    return table


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number)
