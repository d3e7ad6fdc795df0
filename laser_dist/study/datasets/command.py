"""`laser-dist dataset`: a folder that studies read, from the files of a dataset's authors."""

import importlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from laser_dist.errors import UserError
from laser_dist.files import rename_over, write_json

COUNTS = "counts.json"
HELP = """Make a retrieval task of a dataset's own files: corpus, training rows with BM25 negatives, dev and test.

Download and unpack first: entailmentbank from https://allenai.org/data/entailmentbank, strategyqa from
https://allenai.org/data/strategyqa.

Examples:
  laser-dist dataset entailmentbank --source entailment_trees_emnlp2021_data_v3 --out datasets/entailmentbank
  laser-dist dataset strategyqa --source strategyqa_dataset --out datasets/strategyqa_facts
"""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Which dataset, from where to where."""

    name: Annotated[Literal["entailmentbank", "strategyqa"], tyro.conf.Positional]
    """Whose files --source holds."""
    source: Path
    """Folder with the authors' files, unpacked."""
    out: Path
    """Folder to write; it appears only when everything is in it."""
    negatives: int = 8
    """BM25's best passages that are no positives, per question."""
    overwrite: bool = False
    """Replace --out."""


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code. Raises UserError for files that are not as published."""
    config = tyro.cli(DatasetConfig, args=arguments, prog="laser-dist dataset", description=HELP)
    _check_target(config.out, config.overwrite)
    if config.negatives < 1:
        raise UserError(f"--negatives {config.negatives}: must be at least 1")
    task = importlib.import_module(f"laser_dist.study.datasets.{config.name}").read(config.source)
    for split, questions in task.splits.items():
        if not questions:
            raise UserError(f"{config.source}: no {split} question in it: is it complete?")
    counts = {split: len(questions) for split, questions in task.splits.items()} | {"corpus": len(task.facts.texts)}
    staging = config.out.with_name(f".{config.out.name}.unfinished")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    task.write(staging, config.negatives)
    write_json(staging / COUNTS, counts)
    rename_over(staging, config.out)
    print(f"{config.out}: {counts['corpus']:,} passages; " + ", ".join(f"{counts[s]:,} {s}" for s in task.splits))
    return 0


def _check_target(out: Path, overwrite: bool) -> None:
    """UserError unless `out` is new, or a folder of ours that may be replaced."""
    if out.exists() and not overwrite:
        raise UserError(f"--out {out} exists: choose another name, or replace it with --overwrite")
    if out.exists() and not (out / COUNTS).is_file():
        raise UserError(f"--out {out} was not made by this command, and --overwrite does not delete that: move it away")
