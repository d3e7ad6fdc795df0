"""Reading a study file, checked as a whole before anything runs."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from laser_dist.config import RunConfig
from laser_dist.errors import UserError, suggest
from laser_dist.recipe import merged, read_table
from laser_dist.retrieval.metrics import METRICS
from laser_dist.study.cells import BM25, UNTRAINED
from laser_dist.study.definition import OWN, Dataset, Method, Rewriting, Study, Test, flat

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SECTIONS = tuple(name for name, kind in get_type_hints(RunConfig).items() if is_dataclass(kind))
_WHOLE = ("datasets", "methods", "tests", "grid")


def read_study(path: Path) -> Study:
    """A study file, and the one it `extends`. UserError: what is wrong in it, where, and how to mend it."""
    table = _tables(path)
    sections: dict[str, Any] = {"base": table.pop("base", {}), "grid": table.pop("grid", {})}
    for name, kind in (("datasets", Dataset), ("methods", Method), ("tests", Test)):
        rows = table.pop(name, {})
        sections[name] = {key: _read(kind, key, row, f"{path}: [{name}.{key}]") for key, row in rows.items()}
    sections["rewriting"] = _read(Rewriting, None, table.pop("rewriting", {}), f"{path}: [rewriting]")
    study: Study = _read(Study, None, {"name": path.stem, **table}, str(path), file=path, **sections)
    _check(study)
    return study


def _tables(path: Path) -> dict[str, Any]:
    """The file's content over that of the file it extends, if it does."""
    if not path.is_file():
        raise UserError(f"{path}: this study does not exist; ready ones are in launchers/studies/")
    table = read_table(path)
    for name in ("base", "datasets", "methods", "tests", "grid"):
        if not isinstance(table.get(name, {}), dict):
            raise UserError(f"{path}: {name} = {table[name]!r}: is a table: write [{name}...] above its keys")
    extended = table.pop("extends", None)
    if extended is None:
        return table
    if not isinstance(extended, str):
        raise UserError(f"{path}: extends = {extended!r}: give the name of another study file")
    # What is compared, asked and chosen is this file's own where it says so; all else is the other's, key by key.
    own = {"name", *(key for key in _WHOLE if key in table)}
    return merged({key: value for key, value in _tables(path.parent / extended).items() if key not in own}, table)


def _read(kind: type, name: str | None, table: object, where: str, **given: Any) -> Any:
    if not isinstance(table, dict):
        raise UserError(f"{where}: is a table: write [{where.rpartition('[')[2]} above its keys")
    hidden = {"overrides", "file"} | ({"name"} if kind is not Study else set())
    known = {f.name: f.type for f in fields(kind) if f.name not in hidden}
    values = dict(given) | ({"name": name} if name is not None else {})
    overrides = {key: value for key, value in table.items() if kind is Method and key in _SECTIONS}
    for key, value in table.items():
        if key in overrides:
            continue
        if key not in known:
            names = [*known, *(_SECTIONS if kind is Method else ())]
            raise UserError(f"{where}: unknown key {key!r}.{suggest(key, names)}")
        values[key] = _checked(known[key], value, f"{where}: {key} = {value!r}")
    return kind(**values, **({"overrides": overrides} if kind is Method else {}))


def _checked(kind: Any, value: Any, what: str) -> Any:
    choices = get_args(kind)
    if choices and all(isinstance(choice, str) for choice in choices):
        if value not in choices:
            raise UserError(f"{what}: must be one of {', '.join(choices)}.{suggest(str(value), choices)}")
        return value
    plain = getattr(kind, "__origin__", None) or next((c for c in choices if c is not type(None)), kind)
    if type(value) is not plain or (plain is list and {type(v) for v in value} - set(choices) - {Any}):
        wanted = kind.__name__ if isinstance(kind, type) and not choices else str(kind)
        raise UserError(f"{what}: expected {wanted}, got {type(value).__name__}")
    return value


def _check(study: Study) -> None:
    where = study.file
    for what in ("datasets", "methods"):
        if not getattr(study, what):
            raise UserError(f"{where}: has no [{what}.NAME]: give at least one")
    for name in (*study.datasets, *study.methods, *study.tests, study.name):
        if not _NAME.fullmatch(name):
            raise UserError(f"{where}: the name {name!r} becomes a folder: use letters, digits, . _ and -")
    if taken := {BM25, UNTRAINED} & study.methods.keys():
        raise UserError(f"{where}: [methods.{taken.pop()}]: this baseline is always there: take another name")
    if not study.seeds or len(set(study.seeds)) < len(study.seeds) or any(type(s) is not int for s in study.seeds):
        raise UserError(f"{where}: seeds = {study.seeds}: give different whole numbers, at least one")
    fewer = study.ablation_seeds
    if fewer and fewer != [seed for seed in study.seeds if seed in {study.seeds[0], *fewer}]:
        raise UserError(
            f"{where}: ablation_seeds = {fewer}: give some of seeds = {study.seeds}, in their order and with the first"
        )
    if study.metric not in METRICS:
        raise UserError(f"{where}: metric = {study.metric!r}: must be one of {', '.join(METRICS)}")
    named = [("baseline", study.baseline), ("reference", study.reference)]
    for method in study.methods.values():
        named += [(f"[methods.{method.name}] {key}", getattr(method, key)) for key in ("point_of", "teacher")]
    for test in study.tests.values():
        named += [(f"[tests.{test.name}] methods", name) for name in test.methods]
    for key, name in named:
        if name and name not in study.methods:
            raise UserError(f"{where}: {key} = {name!r}: there is no such method.{suggest(name, study.methods)}")
    _check_tests(study)
    study.ordered()
    _check_points(study)


def _check_tests(study: Study) -> None:
    for test in study.tests.values():
        place = f"{study.file}: [tests.{test.name}]"
        if test.name == OWN.name:
            raise UserError(f"{place}: is there already, as trained: take another name")
        if test.view == "explicit" and (test.rationale == "none" or test.steps is not None):
            raise UserError(f'{place}: view = "explicit" reads a rationale and takes no steps: "oracle" or "generated"')
        if test.steps is not None and test.steps < 1:
            raise UserError(f"{place}: steps = {test.steps}: must be at least 1")


def _check_points(study: Study) -> None:
    """Every recipe of every point is complete and in range, and choosing costs every method the same."""
    for grid, place in (
        (study.grid, "[grid]"),
        *((m.grid, f"[methods.{m.name}.grid]") for m in study.methods.values()),
    ):
        for key, values in flat(grid).items():
            if not isinstance(values, list) or not values:
                raise UserError(f"{study.file}: {place} {key!r} = {values!r}: give a list of values")
    counts = {m.name: len(study.points(m)) for m in study.methods.values() if not m.point_of}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"{study.file}: methods must choose among equally many points, for the same budget: {listed}")
    for method in study.methods.values():
        for point in study.points(method):
            if study.config(method, point).train.max_steps is None:
                raise UserError(f"{study.file}: [base.train] max_steps: give one, the same budget for every method")
