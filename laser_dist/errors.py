"""Errors a user can mend: one message that says where, what is wrong and how to mend it, shown without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The input, the configuration or the environment is wrong; the message names the place and the remedy."""


def suggest(name: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' for the known name nearest to `name`, or ''."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{near[0]}"?' if near else ""
