"""`laser-dist prepare`: sources -> checked shards, or `--check`: a folder of shards -> every hash and every row."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from laser_dist.errors import UserError

if TYPE_CHECKING:
    from laser_dist.batch import Example
    from laser_dist.data.shards import Manifest

HELP = """Turn examples into checked WebDataset shards for `laser-dist train`.

Examples:
  laser-dist prepare --source train.jsonl --out shards/
  laser-dist prepare --source a.jsonl b.parquet --missing-rationale drop --out shards/ --overwrite
  laser-dist prepare --check shards/
"""
_SHOWN = 5  # defects named before giving up: enough to mend several at once, few enough to read


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What is read, what is refused, and where the shards go."""

    source: tuple[tuple[str, ...], ...] = ()
    """JSONL or Parquet files, a saved dataset folder, or a hub id; one or several."""
    out: Path | None = None
    """Folder to write; it appears only when everything is in it."""
    missing_rationale: Literal["error", "drop", "keep"] = "error"
    """Rows without a rationale: stop, leave them out, or keep them (for purely contrastive training)."""
    duplicates: Literal["error", "drop"] = "error"
    """Rows whose query_id was seen before: stop, or leave them out."""
    shard_examples: int = 1000
    """Examples per shard."""
    limit: int | None = None
    """Stop after this many examples."""
    overwrite: bool = False
    """Replace shards that are already in the folder."""
    check: Path | None = None
    """Write nothing; verify every hash and row of this folder."""

    @property
    def sources(self) -> list[str]:
        return [name for group in self.source for name in group]

    def validate(self) -> None:
        """Raises UserError for values that do not fit, alone or together."""
        if self.check is not None:
            if self.sources or self.out:
                raise UserError("--check verifies a folder and writes nothing: give it without --source and --out")
            return
        if not self.sources or self.out is None:
            raise UserError("give --source FILE and --out FOLDER (or --check FOLDER); see laser-dist prepare --help")
        for name in ("shard_examples", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")


@dataclass
class Tally:
    """Character and segment counts of what was kept, and what was left out and why."""

    sums: Counter = field(default_factory=Counter)
    dropped: dict[str, int] = field(default_factory=dict)

    def add(self, example: "Example") -> None:
        from laser_dist.data.text import segment_last_characters

        self.sums["examples"] += 1
        self.sums["query"] += len(example.query)
        self.sums["positives"] += len(example.positives)
        self.sums["positive"] += sum(len(p.text) for p in example.positives)
        if example.rationale:
            self.sums["rationales"] += 1
            self.sums["rationale"] += len(example.rationale)
            self.sums["segments"] += len(segment_last_characters(example.rationale))

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def mean(self, what: str, per: str) -> float:
        return self.sums[what] / max(1, self.sums[per])


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code. Raises UserError for bad rows, bad values and occupied folders."""
    import tyro  # this and the modules below are imported late: --help must not wait for torch

    prog = "laser-dist prepare"
    config = tyro.cli(PrepareConfig, args=arguments, prog=prog, description=HELP, config=(tyro.conf.UseAppendAction,))
    config.validate()
    if config.check:
        return _check(config.check)
    assert config.out is not None, "validate() requires it"
    return _prepare(config, config.out)


def _prepare(config: PrepareConfig, out: Path) -> int:
    from laser_dist.data.shards import write_shards

    tally = Tally()
    with _progress("reading") as tick:
        manifest = write_shards(
            tick(_examples(config, tally)),
            out,
            source=", ".join(config.sources),
            shard_examples=config.shard_examples,
            overwrite=config.overwrite,
            dropped=tally.dropped,
        )
    print(_summary(out, manifest, tally))
    return 0


def _examples(config: PrepareConfig, tally: Tally) -> Iterator["Example"]:
    """The examples to write. After a defect nothing more is yielded, but up to 5 are collected into one UserError."""
    from laser_dist.data.schema import parse_example

    defects: list[str] = []
    unreasoned: list[str] = []
    seen: dict[str, str] = {}
    for where, row in _rows(config.sources, defects):
        try:
            example = parse_example(row, where)
            if not _is_new(example.query_id, where, seen, config.duplicates):
                tally.drop("duplicate query_id")
                continue
        except UserError as error:
            defects.append(str(error))
            if len(defects) == _SHOWN:
                break
            continue
        if not example.rationale and config.missing_rationale != "keep":
            unreasoned.append(where)
            tally.drop("no rationale")
        elif not defects:
            tally.add(example)
            yield example
            if tally.sums["examples"] == config.limit:
                break
    if unreasoned and config.missing_rationale == "error":
        defects.append(
            f"{len(unreasoned)} row(s) have no rationale, the first is {unreasoned[0]}: add them, leave such rows out "
            "with --missing-rationale drop, or keep them for contrastive training with --missing-rationale keep"
        )
    if defects:
        more = "\n(stopped here; there may be more)" if len(defects) >= _SHOWN else ""
        raise UserError("\n".join(defects) + more)


def _rows(sources: Iterable[str], defects: list[str]) -> Iterator[tuple[str, Any]]:
    """All rows of all sources; a source that breaks off ends the reading and becomes a defect like any other."""
    from laser_dist.data.sources import read_source

    try:
        for source in sources:
            yield from read_source(source)
    except UserError as error:
        defects.append(str(error))


def _is_new(query_id: str, where: str, seen: dict[str, str], duplicates: str) -> bool:
    first = seen.setdefault(query_id, where)
    if first != where and duplicates == "error":
        raise UserError(
            f'{where}: "query_id" {query_id!r} was already used at {first}: give every row its own, '
            "or leave repetitions out with --duplicates drop"
        )
    return first == where


def _check(folder: Path) -> int:
    from laser_dist.data.schema import decode_example
    from laser_dist.data.shards import load_manifest, read_shard

    manifest, defects = load_manifest(folder), []
    with _progress("checking") as tick:
        for shard in tick(manifest.shards):
            try:
                for number, text in enumerate(read_shard(folder, shard), 1):
                    decode_example(text, f"{folder / shard.name}:{number}")
            except UserError as error:
                defects.append(str(error))
    if defects:
        raise UserError("\n".join(defects[:_SHOWN]) + f"\n{len(defects)} of {len(manifest.shards)} shards are damaged")
    print(f"{folder}: {manifest.examples:,} examples in {len(manifest.shards)} shards, all as written")
    return 0


def _summary(out: Path, manifest: "Manifest", tally: Tally) -> str:
    lines = [f"{out}: {manifest.examples:,} examples in {len(manifest.shards)} shards, {manifest.bytes / 1e6:.1f} MB"]
    lines += [f"left out: {count:,} ({reason})" for reason, count in manifest.dropped.items()]
    if manifest.without_rationale:
        lines.append(f"without rationale: {manifest.without_rationale:,} (use only with a contrastive objective)")
    query, rationale, positive, segments = (
        tally.mean(what, per)
        for what, per in (
            ("query", "examples"),
            ("rationale", "rationales"),
            ("positive", "positives"),
            ("segments", "rationales"),
        )
    )
    lines.append(f"mean characters: query {query:.0f}, rationale {rationale:.0f}, positive {positive:.0f}")
    lines.append(f"mean segments per rationale: {segments:.1f}")
    return "\n".join(lines)


@contextmanager
def _progress(verb: str) -> Iterator[Any]:
    """A function that counts what passes through it, shown on stderr if that is a terminal."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    disabled = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=disabled) as progress:
        yield lambda items: progress.track(items, description=verb)
