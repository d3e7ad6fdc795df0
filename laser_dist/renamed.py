"""Names of the configuration that were given up: for one minor version they still work, with a warning."""

import os
import sys
from typing import Any, NamedTuple

from laser_dist import __version__
from laser_dist.errors import UserError


class Renamed(NamedTuple):
    """What became of a key."""

    to: str
    """The key that means the same."""
    until: str
    """The version that no longer knows the old name."""


# Old dotted key -> new one. A value keeps its type and meaning, or the entry does not belong here.
RENAMED = {
    "logging.profile_steps": Renamed("profile.active", until="0.2"),
}


def rename_keys(table: dict[str, Any], source: str) -> dict[str, Any]:
    """A recipe's table with old keys under their new names. UserError if both stand there, or the old one is over."""
    table = {key: dict(value) if isinstance(value, dict) else value for key, value in table.items()}
    for old, (new, until) in RENAMED.items():
        section, _, name = old.rpartition(".")
        home = table.get(section, {}) if section else table
        if not isinstance(home, dict) or name not in home:
            continue
        value = home.pop(name)
        _check(old, new, until, source)
        new_section, _, new_name = new.rpartition(".")
        target = table.setdefault(new_section, {}) if new_section else table
        if not isinstance(target, dict):
            continue  # refused when sections are read
        if new_name in target:
            raise UserError(f"{source}: {old} and {new} are the same key, before and after it was renamed: keep {new}")
        target[new_name] = value
    return table


def rename_flags(arguments: list[str]) -> list[str]:
    """The same for flags: `--section.old-name value`, `--section.old_name=value`, `--section.no-old-name`."""
    renamed = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        section, dot, name = flag.removeprefix("--").replace("-", "_").rpartition(".")
        plain = name.removeprefix("no_")
        if flag.startswith("--") and (found := RENAMED.get(section + dot + plain)):
            _check(section + dot + plain, found.to, found.until, flag)
            section, dot, new = found.to.rpartition(".")
            flag = f"--{section}{dot}{'no-' * (name != plain)}{new}".replace("_", "-")
        renamed.append(flag + equals + value)
    return renamed


def _check(old: str, new: str, until: str, source: str) -> None:
    if _numbers(__version__) >= _numbers(until):
        raise UserError(f"{source}: {old} was renamed: write {new}")
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {source}: {old} is now {new}; the old name works until laser_dist {until}", file=sys.stderr)


def _numbers(version: str) -> tuple[int, ...]:
    """1.10.0rc1 -> (1, 10)."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:2])
