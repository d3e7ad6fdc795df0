"""`laser-dist prepare`: sources -> checked shards, or `--check`: a folder of shards -> everything it claims."""

import errno
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from laser_dist import __version__
from laser_dist.data.preparation.console import Bar, length_table, waiting
from laser_dist.errors import UserError

if TYPE_CHECKING:
    from laser_dist.data.manifest import Manifest
    from laser_dist.data.preparation.build import Totals
    from laser_dist.data.preparation.partial import PartialSet

HELP = """Turn examples into checked WebDataset shards for `laser-dist train`.

Examples:
  laser-dist prepare --source train.jsonl --out shards/
  laser-dist prepare --source a.jsonl b.parquet --missing-rationale drop --dev-share 0.02 --out shards/ --overwrite
  laser-dist prepare --source org/name --fields query=question rationale=cot --licence cc-by-4.0 --out shards/
  laser-dist prepare --source fever/ --missing-rationale keep --out shards/        (a BEIR folder)
  laser-dist prepare --source big.jsonl.zst --on-error skip --duplicates drop --tokenizer Qwen/Qwen3-0.6B --out shards/
  laser-dist prepare --check shards/

An interrupted command continues where it was when it is given again.
"""
Groups = tuple[tuple[str, ...], ...]
_NOT_CONTENT = "source out overwrite check workers weight licence max_skipped".split()


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What is read, what is refused, and where the shards go."""

    source: Groups = ()
    """JSONL (also .gz, .zst) or Parquet files or folders of them, a saved dataset, a BEIR folder, or a hub id."""
    out: Path | None = None
    """Folder to write; it appears only when everything is in it."""
    layout: Literal["auto", "passages", "triplets", "beir"] = "auto"
    """How rows look; auto: decided by each source's first row. See laser_dist/data/sources/layouts.py."""
    fields: Groups = ()
    """OURS=THEIRS ...: fields with other names, for example query=question rationale=cot text=contents."""
    weight: tuple[tuple[float, ...], ...] = ()
    """One per source: its share in training relative to the others; noted in the manifest."""
    licence: Groups = ()
    """One per source, or one for all; unset: what a dataset's card says."""
    missing_rationale: Literal["error", "drop", "keep"] = "error"
    """Rows without a rationale: stop, leave them out, or keep them (for purely contrastive training)."""
    duplicates: Literal["error", "drop"] = "error"
    """Rows whose query_id was seen before: stop, or leave them out."""
    duplicate_queries: Literal["error", "drop", "keep"] = "keep"
    """Rows whose query was seen before, but for case, blank space and Unicode form: stop, leave out, or keep."""
    contradictions: Literal["error", "drop"] = "error"
    """Negatives that are positives of the same row: stop, or leave these negatives out."""
    max_characters: int = 200_000
    """Longest query, rationale or passage."""
    too_long: Literal["error", "drop"] = "error"
    """Rows with a longer text: stop, or leave them out."""
    on_error: Literal["stop", "skip"] = "stop"
    """Rows that are wrong: name the first of them and stop, or list them in skipped.jsonl and go on."""
    max_skipped: int = 100
    """With --on-error skip: stop when more rows than this are wrong."""
    dev_share: float = 0.0
    """Share of the queries that is held out, as a collection for `laser-dist evaluate` in OUT/dev."""
    dev_queries: int | None = None
    """Number of queries that is held out instead; takes a second reading."""
    tokenizer: str | None = None
    """Model whose tokens are counted in the length statistics, too."""
    shard_examples: int = 1000
    """Examples per shard."""
    limit: int | None = None
    """Stop after this many examples."""
    workers: int | None = None
    """Processes that parse and check rows; unset: one per core, at most 8. The result is the same for any number."""
    overwrite: bool = False
    """Replace shards that are already in the folder."""
    check: Path | None = None
    """Write nothing; verify everything this folder's manifest claims. Exit code 1 if anything is wrong."""

    @property
    def sources(self) -> list[str]:
        return [name for group in self.source for name in group]

    @property
    def processes(self) -> int:
        return self.workers or min(8, len(os.sched_getaffinity(0)))

    def per_source(self, name: str, default: Any) -> list[Any]:
        """The values of `weight` or `licence`, one per source. UserError if they are not as many."""
        values = [value for group in getattr(self, name) for value in group] or [default]
        if len(values) == 1:
            values *= len(self.sources)
        if len(values) != len(self.sources):
            raise UserError(f"--{name}: {len(values)} values for {len(self.sources)} sources: give one for each")
        return values

    def validate(self) -> None:
        """Raises UserError for values that do not fit, alone or together."""
        for name in ("shard_examples", "limit", "workers", "dev_queries", "max_characters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.check is not None:
            if self.sources or self.out:
                raise UserError("--check verifies a folder and writes nothing: give it without --source and --out")
            return
        if not self.sources or self.out is None:
            raise UserError("give --source FILE and --out FOLDER (or --check FOLDER); see laser-dist prepare --help")
        if repeated := [name for name in self.sources if self.sources.count(name) > 1]:
            raise UserError(
                f"--source {repeated[0]} is given twice: give it once, with a --weight of 2 if that is meant"
            )
        if not 0 <= self.dev_share < 1:
            raise UserError(f"--dev-share {self.dev_share}: must be at least 0 and below 1")
        if self.dev_share and self.dev_queries:
            raise UserError("--dev-share and --dev-queries say the same in two ways: give one of them")
        if self.max_skipped < 0:
            raise UserError(f"--max-skipped {self.max_skipped}: must be at least 0")
        if not all(0 < weight < float("inf") for weight in self.per_source("weight", 1.0)):
            raise UserError("--weight: every weight must be above 0; leave a source out instead")
        self.per_source("licence", "")

    def settings(self) -> dict[str, Any]:
        """What decides which bytes are written, sources aside."""
        content = {name: value for name, value in asdict(self).items() if name not in _NOT_CONTENT}
        return content | {"fields": [pair for group in self.fields for pair in group]}


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code. Raises UserError for bad rows, bad values and occupied folders."""
    import tyro  # this and the modules below are imported late: --help must not wait for torch

    prog = "laser-dist prepare"
    config = tyro.cli(PrepareConfig, args=arguments, prog=prog, description=HELP, config=(tyro.conf.UseAppendAction,))
    config.validate()
    if config.check:
        from laser_dist.data.preparation.check import check_folder

        return check_folder(config.check, config.processes)
    assert config.out is not None, "validate() requires it"
    return _prepare(config, config.out)


def _prepare(config: PrepareConfig, out: Path) -> int:
    from laser_dist.data.preparation.assemble import find_dev_below, make_manifest, make_plan, make_selection
    from laser_dist.data.preparation.build import Builder
    from laser_dist.data.preparation.partial import PartialSet, check_target

    check_target(out.absolute(), config.overwrite)
    plan = make_plan(config)
    with waiting("hashing the sources"):
        identities = [origin.identity() for origin in plan.origins]
    header = {"version": __version__, "settings": config.settings(), "sources": [config.sources, identities]}
    try:
        partial = PartialSet(out, header, overwrite=config.overwrite)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    _say_where_it_starts(partial)
    builder, bar = None, Bar("preparing", plan.sizes)
    try:
        if "dev_below" not in partial.header:
            partial.begin(dev_below=find_dev_below(config, plan))
        builder = Builder(plan, partial, make_selection(config, partial.header["dev_below"]))
        with bar:
            builder.run(bar.update)
        manifest = make_manifest(config, plan, builder, identities)
        partial.publish(manifest)
    except BaseException as error:
        if not partial.shards or (builder and builder.rows_are_bad):
            partial.discard()
        else:
            partial.close()
            print(f"kept: {len(partial.shards)} finished shards; the same command continues", file=sys.stderr)
        if isinstance(error, OSError):
            raise UserError(_not_written(error, partial, bar.share)) from error
        raise
    print(_summary(out, manifest, builder.totals, builder.selection.repeated_queries))
    return 0


def _say_where_it_starts(partial: "PartialSet") -> None:
    if partial.stale:
        print("the sources or settings are not those of the interrupted run: starting over", file=sys.stderr)
    elif partial.shards:
        done = sum(shard.examples for shard in partial.shards)
        print(
            f"continuing an interrupted run behind {done:,} examples in {len(partial.shards)} shards", file=sys.stderr
        )


def _not_written(error: OSError, partial: "PartialSet", share: float) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"cannot write shards to {partial.out}: {error}"
    written = sum(shard.bytes for shard in partial.shards)
    need = f"about {written * (1 / share - 1) / 1e6:,.0f} MB more" if share and written else "more room"
    kept = f" (delete {partial.folder} and {partial.state} to give up what is written)" if written else ""
    return (
        f"no space left on the disk of {partial.out}: {written / 1e6:,.0f} MB are written and {need} needed. "
        f"Free some and give the same command again{kept}"
    )


def _summary(out: Path, manifest: "Manifest", totals: "Totals", repeated_queries: int) -> str:
    lines = [f"{out}: {manifest.examples:,} examples in {len(manifest.shards)} shards, {manifest.bytes / 1e6:.1f} MB"]
    if manifest.dev:
        lines.append(f"{out / 'dev'}: {manifest.dev.queries:,} held-out queries, {manifest.dev.passages:,} passages")
    lines += [f"left out: {count:,} ({reason})" for reason, count in manifest.dropped.items()]
    if contradictory := totals.counts["negatives contradictory"]:
        lines.append(f"left out: {contradictory:,} negatives that are positives of the same row")
    if repeated_queries:
        lines.append(f"queries asked before: {repeated_queries:,} ({manifest.settings['duplicate_queries']})")
    if manifest.without_rationale:
        lines.append(f"without rationale: {manifest.without_rationale:,} (use only with a contrastive objective)")
    if not all(source.licence for source in manifest.sources):
        lines.append("licence: unknown for some sources; note it with --licence")
    return "\n".join([*lines, "", length_table(manifest.lengths)])
