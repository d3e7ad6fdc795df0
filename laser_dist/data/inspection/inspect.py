"""`laser-dist inspect SHARDS`: what the trainer will see of a training set, and what is odd about it."""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laser_dist.config import RunConfig, TextConfig, ThinkingConfig
from laser_dist.errors import UserError, require
from laser_dist.model.embedded import CACHED_BACKBONE
from laser_dist.recipe import read_recipe

if TYPE_CHECKING:
    from laser_dist.data.inspection.survey import Survey
    from laser_dist.data.manifest import Manifest
    from laser_dist.data.schema import Example

HELP = """Show training examples as the trainer sees them, and measure the whole set: lengths in tokens, truncation,
segments, repetitions, suspicious rows.

SHARDS is a folder written by `laser-dist prepare`, or its address. Each shard is read once; tokenising takes most of
the time, so --sample is much faster on large sets.

Examples:
  laser-dist inspect shards/ --recipe recipe.toml
  laser-dist inspect shards/ --model Qwen/Qwen3-0.6B --sample 20000 --out inspection/
  laser-dist inspect shards/ --model Qwen/Qwen3-0.6B --example q17
  laser-dist inspect shards/ --recipe recipe.toml --json --fail-on-suspicious 0.02 > inspection.json
"""
EXIT_SUSPICIOUS = 1
_CHUNK = 250  # examples tokenised in one call: enough for all cores, and the bar moves


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What is read and what is shown. `text` and `thinking` come from the recipe, if one is given."""

    model: str = ""
    """Hub id or folder whose tokenizer is used; unset: the recipe's, or the backbone that quickstart has cached."""
    recipe: Path | None = None
    """Recipe of the run: its templates, limits and latent steps are used."""
    show: int = 1
    """Examples to show, spread evenly over the set."""
    example: str | None = None
    """Show the example with this query_id, and nothing else."""
    sample: int | None = None
    """Measure this many examples, drawn at random (always the same ones), instead of all."""
    out: Path | None = None
    """Folder to write: report.json, charts (PNG), TensorBoard files."""
    overwrite: bool = False
    """Replace a report that is already in the folder."""
    json: bool = False
    """Print the report as JSON, and nothing else."""
    fail_on_suspicious: float | None = None
    """Exit with 1 if a larger share of the rows than this is suspicious."""
    text: TextConfig = field(default_factory=TextConfig)
    thinking: ThinkingConfig = field(default_factory=ThinkingConfig)

    def validate(self) -> None:
        """Raises UserError for values that do not fit, alone or together."""
        if self.show < 0:
            raise UserError(f"--show {self.show}: must be 0 or more")
        if self.sample is not None and self.sample < 1:
            raise UserError(f"--sample {self.sample}: must be at least 1")
        if self.fail_on_suspicious is not None and not 0 <= self.fail_on_suspicious <= 1:
            raise UserError(f"--fail-on-suspicious {self.fail_on_suspicious}: is a share of the rows, from 0 to 1")
        if self.example is not None and (self.out or self.sample or self.fail_on_suspicious is not None):
            raise UserError(
                "--example shows one example and measures nothing: leave out, sample and fail-on-suspicious"
            )
        if self.text.max_explicit_tokens < self.text.max_query_tokens + 2:
            raise UserError("text.max_explicit_tokens must exceed text.max_query_tokens by at least 2")
        if not self.model and not (CACHED_BACKBONE / "config.json").is_file():
            raise UserError("give the model whose tokenizer is used: --model NAME_OR_FOLDER, or --recipe FILE")


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code. Raises UserError for damaged shards, bad values and occupied folders."""
    import tyro  # here and below: --help must not wait for torch

    arguments = list(arguments)
    shards = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    recipe = _recipe(arguments)
    config = tyro.cli(
        InspectConfig,
        args=arguments,
        default=InspectConfig(model=recipe.model.name, text=recipe.text, thinking=recipe.thinking),
        prog="laser-dist inspect SHARDS",
        description=HELP,
    )
    if shards is None:
        raise UserError("give the folder of shards first: laser-dist inspect SHARDS; see laser-dist inspect --help")
    config.validate()
    return _inspect(shards, config, recipe)


def _recipe(arguments: list[str]) -> RunConfig:
    """The recipe that --recipe names: read first, because flags override it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", nargs="?")
    known, _ = parser.parse_known_args(arguments)
    return read_recipe(Path(known.recipe)) if known.recipe else RunConfig()


def _inspect(shards: str, config: InspectConfig, recipe: RunConfig) -> int:
    from laser_dist.data.shards import load_manifest

    manifest = load_manifest(shards)  # before what imports torch
    from laser_dist.data.inspection.findings import JsonPrinter, Printer, plain
    from laser_dist.data.inspection.show import shown_rows
    from laser_dist.data.inspection.survey import Survey
    from laser_dist.data.inspection.suspicion import rules
    from laser_dist.data.text import TextFormat
    from laser_dist.model.backbone import load_tokenizer
    from laser_dist.observability.console import quiet_libraries

    quiet_libraries()
    if config.out is not None:
        require("--out draws charts, which", "matplotlib", extra="plots", instead="leave --out out")
        _check_target(config.out, config.overwrite)
    tokenizer = load_tokenizer(replace(recipe.model, name=config.model or str(CACHED_BACKBONE)))
    text = TextFormat(tokenizer, config.text, steps=config.thinking.steps)
    with_rationale = recipe.objective.needs_rationale
    if with_rationale:
        text.require_eos()
    printer = JsonPrinter() if config.json else Printer()
    if config.example is not None:
        example = _find(shards, manifest, config.example)
        printer.show(example, shown_rows(example, text, config.thinking, with_rationale=with_rationale))
        printer.finish()
        return 0
    survey = Survey(text, rules(tokenizer.all_special_tokens), with_rationale=with_rationale)
    examples = _measure(shards, manifest, survey, config)
    report = _report(shards, manifest, survey, config)
    shown = [(e, shown_rows(e, text, config.thinking, with_rationale=with_rationale)) for e in examples]
    for example, rows in shown:
        printer.show(example, rows)
    printer.finish(report)
    if config.out is not None:
        _write(config.out, survey, report, [plain(example, rows) for example, rows in shown])
        print(f"wrote {config.out}; charts also with: tensorboard --logdir {config.out}", file=sys.stderr)
    return _verdict(report["suspicious"]["share"], config.fail_on_suspicious)


def _measure(shards: str, manifest: "Manifest", survey: "Survey", config: InspectConfig) -> list["Example"]:
    """Give the survey all examples, or the sample; returns those to show."""
    import numpy as np

    rows = np.arange(manifest.examples)
    if config.sample is not None and config.sample < manifest.examples:
        rows = np.sort(np.random.default_rng(0).choice(manifest.examples, config.sample, replace=False))
    to_show = set(rows[np.linspace(0, len(rows) - 1, min(config.show, len(rows))).astype(int)].tolist())
    shown = []
    with _progress(len(rows)) as advance:
        for numbers, examples in _chunks(shards, manifest, rows):
            survey.add(examples)
            shown += [e for number, e in zip(numbers, examples, strict=True) if number in to_show]
            advance(len(examples))
    return shown


def _chunks(shards: str, manifest: "Manifest", rows: Any) -> Iterator[tuple[list[int], list["Example"]]]:
    """The examples with these numbers (ascending), at most _CHUNK at a time, reading each shard once."""
    import numpy as np

    from laser_dist.data.schema import decode_example
    from laser_dist.data.shards import read_shard

    first = 0
    for shard in manifest.shards:
        begin, end = np.searchsorted(rows, [first, first + shard.examples])
        if begin < end:
            texts = read_shard(shards, shard)
            for start in range(begin, end, _CHUNK):
                numbers = rows[start : min(start + _CHUNK, end)].tolist()
                place = f"{str(shards).rstrip('/')}/{shard.name}"
                yield numbers, [decode_example(texts[n - first], f"{place}:{n - first + 1}") for n in numbers]
        first += shard.examples


def _find(shards: str, manifest: "Manifest", query_id: str) -> "Example":
    import numpy as np

    with _progress(manifest.examples) as advance:
        for _, examples in _chunks(shards, manifest, np.arange(manifest.examples)):
            for example in examples:
                if example.query_id == query_id:
                    return example
            advance(len(examples))
    raise UserError(
        f'no example of {shards} has the query_id "{query_id}": ids are those of the source that was prepared'
    )


def _report(shards: str, manifest: "Manifest", survey: "Survey", config: InspectConfig) -> dict[str, Any]:
    import transformers

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "shards": shards,
        "examples": manifest.examples,
        "tokenizer": config.model or str(CACHED_BACKBONE),
        "transformers": transformers.__version__,
        "text": asdict(config.text),
        "thinking": asdict(config.thinking),
        **survey.summary(),
    }


def _check_target(out: Path, overwrite: bool) -> None:
    from laser_dist.data.inspection.report import FILES

    if out.is_file():
        raise UserError(f"--out {out}: is a file: give a folder")
    present = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if present and not overwrite:
        raise UserError(f"--out {out}: is not empty: choose another folder, or replace the report with --overwrite")
    if others := sorted(present - set(FILES)):
        raise UserError(f"--out {out}: holds {others[0]}, which is no part of a report: choose another folder")


def _write(out: Path, survey: "Survey", report: dict[str, Any], examples: list[str]) -> None:
    """The report's folder, which appears as a whole."""
    from laser_dist.data.inspection.report import write_report

    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_report(partial, survey, report, examples)
        if out.is_dir():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _verdict(share: float, allowed: float | None) -> int:
    if allowed is None or share <= allowed:
        return 0
    print(f"{share:.2%} of the rows are suspicious, more than the {allowed:.2%} allowed", file=sys.stderr)
    return EXIT_SUSPICIOUS


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of examples done; a bar on stderr if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("inspecting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda done: progress.advance(task, done)
