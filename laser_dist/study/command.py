"""`laser-dist study`: a study file -> trained and measured cells -> one report."""

import os
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from laser_dist.errors import UserError, require, suggest
from laser_dist.study.definition import Study
from laser_dist.study.reading import read_study

if TYPE_CHECKING:
    from rich.console import Console

    from laser_dist.study.cells import Workspace

HELP = """Compare methods fairly: same data, backbone and budget, several seeds, one report.

Each cell (method, dataset, seed, point of the grid) is a training run in a process of its own, which is then measured
on dev and, unless it lost the choice on dev, on test. The same command again keeps what is finished, goes on with what
was interrupted and tries again what failed. The report can be made at any time.

Examples:
  laser-dist study launchers/studies/tiny.toml --out runs/studies/tiny
  laser-dist study launchers/studies/entailmentbank.toml --data datasets/ --dry-run
  laser-dist study launchers/studies/entailmentbank.toml --data datasets/ --jobs 2
  laser-dist study my.toml --data datasets/ --list
  laser-dist study my.toml --data datasets/ --only entailmentbank/laser
  laser-dist study my.toml --data datasets/ --slurm
  laser-dist study my.toml --report-only --store my-runs.tar.gz
"""
EXIT_FAILED = 1
EXIT_STOPPED = 75


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `laser-dist study`."""

    study: Annotated[Path, tyro.conf.Positional]
    """The study file (TOML); laser_dist/study/README.md says what it holds."""
    out: Path | None = None
    """Folder for cells and report; unset: runs/studies/NAME."""
    data: Path = Path(".")
    """Folder that the datasets' paths are relative to."""
    model: str = ""
    """Backbone where the study names none: hub id or folder; unset: the quickstart's SmolLM2-135M."""
    jobs: int = 1
    """Cells side by side; they share this machine's cores."""
    only: tuple[str, ...] = ()
    """Run these parts only: DATASET/METHOD; bm25 and untrained are methods here, too."""
    list: bool = False
    """Show the cells and how far they are; run nothing."""
    dry_run: bool = False
    """Show how many cells there are to run, and how long the ones that ran took; run nothing."""
    report_only: bool = False
    """Make the report of the runs that are there; run nothing."""
    store: Path | None = None
    """Pack all that the report is made of into this .tar.gz. Unpacked into --out, it is enough for --report-only."""
    slurm: bool = False
    """Write job arrays into the folder instead of running anything."""


def main(argv: list[str]) -> int:
    """Run the command; 0: all cells are finished, 1: some failed, 75: stopped by a signal, to be run again."""
    args = tyro.cli(Arguments, args=argv, prog="laser-dist study", description=HELP)
    study = read_study(args.study)
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be at least 1")
    if args.store and (args.list or args.dry_run or args.slurm):
        raise UserError(f"--store {args.store}: packs what a report is made of: not with --list, --dry-run or --slurm")
    groups = _groups(study, args.only)
    from laser_dist.study.store import store

    require("a study's report", "matplotlib", extra="plots")
    workspace = _workspace(study, args)

    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if args.slurm:
        return _slurm(study, groups, args, console)
    if args.list or args.dry_run:
        from laser_dist.study.collect import Results
        from laser_dist.study.show import show_cells, show_estimate

        (show_cells if args.list else show_estimate)(Results(workspace), console)
        return 0
    stopped = "" if args.report_only else _run(workspace, groups, args.jobs, console)
    status = _report(workspace, console, stopped)
    if args.store:
        store(workspace.out, args.store)
        console.print(f"stored      {args.store}")
    return status


def _groups(study: Study, only: tuple[str, ...]) -> list[tuple[str, str]]:
    """(dataset, method) in the order of their needs. UserError for a part that does not exist."""
    names = ["bm25", "untrained", *(method.name for method in study.ordered())]
    known = {f"{dataset}/{name}": (dataset, name) for dataset in study.datasets for name in names}
    for part in only:
        if part not in known:
            raise UserError(f"--only {part}: there is no such DATASET/METHOD.{suggest(part, known)}")
    return [group for part, group in known.items() if not only or part in only]


def _workspace(study: Study, args: Arguments) -> "Workspace":
    """Data prepared, every recipe checked with its paths: what is wrong is said before anything trains."""
    from laser_dist.model.embedded import embedded_backbone
    from laser_dist.study.cells import Workspace
    from laser_dist.study.data import find, prepare_dataset
    from laser_dist.study.store import note, noted

    out = args.out or Path("runs/studies") / study.name
    if args.report_only and (known := noted(study, out)):
        return known
    for dataset in study.datasets.values():
        find(dataset, args.data)
    needs_model = not study.base.get("model", {}).get("name") and not args.model
    model = str(embedded_backbone(Path(".cache/laser_dist"))) if needs_model else args.model
    data = {
        name: prepare_dataset(dataset, args.data, out / "data" / name, study.curve_passages)
        for name, dataset in study.datasets.items()
    }
    workspace = Workspace(study, out, data, model)
    for name in study.datasets:
        for method in study.methods.values():
            for point in study.points(method):
                workspace.cell(name, method, point, study.seeds[0]).config.validate()
    note(workspace)
    return workspace


def _run(workspace: "Workspace", groups: list[tuple[str, str]], jobs: int, console: "Console") -> str:
    """Why it stopped early, or ""."""
    from laser_dist.study.running import Runner, Stopped
    from laser_dist.study.show import Progress

    with Progress(workspace, console) as progress:
        runner = Runner(workspace, progress.say, jobs)
        numbers = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send before they end a job
        before = [signal.signal(number, lambda *_: runner.stop()) for number in numbers]
        try:
            runner.run(groups)
        except Stopped as stopped:
            return str(stopped)
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
    return ""


def _report(workspace: "Workspace", console: "Console", stopped: str) -> int:
    from laser_dist.study.collect import Results
    from laser_dist.study.report import write_report
    from laser_dist.study.show import show_results

    results = Results(workspace)
    file = write_report(results, workspace.out / "report")
    show_results(results, console)
    console.print(f"report      {file}\ncurves      tensorboard --logdir {workspace.out}")
    if stopped:
        console.print(stopped)
        return EXIT_STOPPED
    return EXIT_FAILED if results.counts()["failed"] else 0


def _slurm(study: Study, groups: list[tuple[str, str]], args: Arguments, console: "Console") -> int:
    from laser_dist.study.slurm import write_arrays

    out = args.out or Path("runs/studies") / study.name
    command = [sys.executable, "-m", "laser_dist.cli", "study", str(args.study.resolve()), "--out", str(out.resolve())]
    command += ["--data", str(args.data.resolve())] + (["--model", args.model] if args.model else [])
    scripts = write_arrays(study, groups, ["env", f"--chdir={os.getcwd()}", *command], out.resolve())
    for script in scripts:
        console.print(f"sbatch {shlex.quote(str(script))}")
    console.print(f"afterwards: {shlex.join([*command[2:], '--report-only'])}")
    return 0
