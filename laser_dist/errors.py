"""Errors a user can mend: one message that says where, what is wrong and how to mend it, shown without a traceback."""

import difflib
import importlib.util
from collections.abc import Iterable


class UserError(Exception):
    """The input, the configuration or the environment is wrong; the message names the place and the remedy."""


def require(what: str, *modules: str, extra: str, instead: str = "") -> None:
    """UserError that names the extra to install if modules of it are missing; `what` needs them."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        otherwise = f", or {instead}" if instead else ""
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install 'laser-dist[{extra}]'{otherwise}")


def suggest(name: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' for the known name nearest to `name`, or ''."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{near[0]}"?' if near else ""
