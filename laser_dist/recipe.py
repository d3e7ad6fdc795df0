"""Recipes: a RunConfig from TOML files plus `--section.field value` flags, and back to TOML.

Nothing is guessed: an unknown key, a wrong kind of value or a section that is none is a UserError that names file, key
and remedy.
"""

import dataclasses
import difflib
import itertools
import json
import tomllib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from laser_dist.config import RunConfig
from laser_dist.errors import UserError, suggest
from laser_dist.reading import read_file
from laser_dist.renamed import rename_flags, rename_keys

_LARGEST_RECIPE = 2**20  # bytes; the longest one here has 2,000


def load_config(arguments: Sequence[str], prog: str = "laser-dist train") -> RunConfig:
    """`[RECIPE.toml ...] [--section.field value ...]` -> a validated RunConfig; UserError names key, value and remedy.

    Of several recipes a later one's values replace an earlier one's: a base, and what a method changes.
    """
    import tyro  # here, because `laser-dist --help` must not pay for it

    words = list(arguments)
    recipes = [Path(word) for word in itertools.takewhile(lambda word: not word.startswith("-"), words)]
    flags = words[len(recipes) :]
    if not recipes and (later := [word for word in flags if word.endswith(".toml")]):
        raise UserError(f"the recipe stands first: {prog} {later[0]} --section.field value ...")
    defaults = read_recipe(*recipes) if recipes else RunConfig()
    flags = rename_flags(flags)
    config = tyro.cli(RunConfig, args=flags, default=defaults, prog=f"{prog} RECIPE.toml", description=TRAIN_HELP)
    config.validate()
    return config


TRAIN_HELP = """Train a retriever from a TOML recipe; every value of the recipe is also a flag.

Examples:
  laser-dist train launchers/recipes/quickstart.toml --output runs/mine
  laser-dist train recipe.toml --output runs/k6 --thinking.steps 6 --optimizer.learning-rate 5e-5
  laser-dist train recipe.toml --output runs/k6 --resume
  laser-dist train recipe.toml launchers/recipes/methods/gircse.toml --output runs/gircse
  deepspeed --num_gpus 8 --module laser_dist.train recipe.toml --output runs/eight
"""


def read_recipe(path: Path, *others: Path) -> RunConfig:
    """A TOML recipe as a RunConfig (not yet validated as a whole); the `others`' values replace its own."""
    tables = [read_table(recipe) for recipe in (path, *others)]
    return recipe_of(merged(*tables), " + ".join(map(str, (path, *others))))


def recipe_of(table: dict[str, Any], source: str) -> RunConfig:
    """A recipe's values as a RunConfig (not yet validated as a whole); UserErrors begin with `source`."""
    return _from_table(RunConfig, table, source, "")


def merged(first: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """Nested tables as one; later values replace earlier ones, key by key."""
    table = dict(first)
    for other in others:
        for key, value in other.items():
            both = isinstance(value, dict) and isinstance(table.get(key), dict)
            table[key] = merged(table[key], value) if both else value
    return table


def read_table(path: Path) -> dict[str, Any]:
    """A TOML file's content. UserError where there is none."""
    try:
        # Editors on Windows put a mark first.
        return rename_keys(tomllib.loads(read_file(path, _LARGEST_RECIPE).decode("utf-8-sig")), str(path))
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist; ready ones are in launchers/recipes/") from None
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read ({error.strerror}): give a TOML file") from None
    except ValueError as error:  # also: no UTF-8, and numbers of thousands of digits
        raise UserError(f"recipe {path} is not valid TOML: {error}") from None
    except RecursionError:
        raise UserError(f"recipe {path} is not valid TOML: it is nested too deeply") from None


def _from_table(cls: type, table: dict[str, Any], source: str, prefix: str) -> Any:
    known = get_type_hints(cls)
    values = {}
    for key, value in table.items():
        name = prefix + key
        if key not in known:
            raise UserError(f'{source}: unknown key "{name}".{_suggest_key(cls, key)}')
        if dataclasses.is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise UserError(f"{source}: {name} is a section: write [{name}] above its keys")
            values[key] = _from_table(known[key], value, source, name + ".")
        else:
            values[key] = _coerce(known[key], value, source, name)
    return cls(**values)


def section_from_table(cls: type, table: Any, section: str, **given: Any) -> Any:
    """A section of a recipe, `cls`, from a table of values that came another way; `given` are taken as they are.

    Null stands for a value that is not set. Raises UserError as for a recipe.
    """
    if not isinstance(table, dict):
        raise UserError(f"{section} must be an object, got {type(table).__name__}")
    known = {key: value for key, value in table.items() if value is not None}
    read = _from_table(cls, known, section or "its values", f"{section}." if section else "")
    return dataclasses.replace(read, **given)


def _suggest_key(cls: type, key: str) -> str:
    """The nearest key of the same section, else of any section."""
    if near := suggest(key, get_type_hints(cls)):
        return near
    sections = {name: kind for name, kind in get_type_hints(RunConfig).items() if dataclasses.is_dataclass(kind)}
    homes = {field: name for name, kind in sections.items() for field in get_type_hints(kind)}
    nearest = difflib.get_close_matches(key, homes, n=1, cutoff=0.75)
    return f' Did you mean "{homes[nearest[0]]}.{nearest[0]}"?' if nearest else ""


def _coerce(kind: Any, value: Any, source: str, name: str) -> Any:
    """TOML value -> field value; integers serve as floats, arrays as tuples, nothing else is converted."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _coerce(next(a for a in arguments if a is not type(None)), value, source, name)
    if origin is Literal:
        if value in arguments:
            return value
        raise UserError(f"{source}: {name} = {value!r}: must be one of {', '.join(map(repr, arguments))}")
    if origin is tuple and isinstance(value, list):
        variadic = len(arguments) == 2 and arguments[1] is Ellipsis
        if variadic or len(value) == len(arguments):
            kinds = [arguments[0]] * len(value) if variadic else arguments
            return tuple(_coerce(k, v, source, name) for k, v in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {key: _coerce(arguments[1], item, source, name) for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    expected = getattr(kind, "__name__", str(kind))
    raise UserError(f"{source}: {name} = {value!r}: expected {expected}, got {type(value).__name__}")


def to_toml(config: RunConfig) -> str:
    """The resolved config as TOML, readable by `read_recipe`; unset values are left out."""
    lines, sections = [], []
    for key, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            body = [f"{k} = {_toml_value(v)}" for k, v in value.items() if v is not None]
            sections += ["", f"[{key}]", *body]
        elif value is not None:
            lines.append(f"{key} = {_toml_value(value)}")
    return "\n".join(lines + sections) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{json.dumps(k, ensure_ascii=False)} = {_toml_value(v)}" for k, v in value.items()) + "}"
        )
    # JSON's booleans, strings and numbers are TOML's too.
    return json.dumps(value, ensure_ascii=False)
