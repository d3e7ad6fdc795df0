"""`laser-dist doctor`: every check, in parallel where they do not wait for each other, and what they found."""

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from laser_dist.doctor import decoding, machine, network, run, software, storage
from laser_dist.doctor.finding import Context, Finding, failed
from laser_dist.errors import UserError

HELP = """Check this machine before a run: versions, GPUs, memory, limits, disks, clock, ports, an all-reduce of two
real processes, and that nothing is run that comes with data. With a recipe also its model, shards, DeepSpeed config,
dev set and output folder. What is wrong comes with its remedy. Exit code 1 if a check failed.

Examples:
  laser-dist doctor
  laser-dist doctor launchers/recipes/qwen3-0.6b.toml --data shards/ --output runs/first
  laser-dist doctor --json > doctor.json                  # to paste into a report: it names folders, no secrets
"""

Check = Callable[[Context], Finding]
CHECKS: dict[str, Check] = {
    "python": software.python,
    "torch": software.torch,
    "deepspeed": software.deepspeed,
    "transformers": software.transformers,
    "packages": software.packages,
    "compiler": software.compiler,
    "environment": software.environment,
    "exported secrets": software.exported_secrets,
    "memory": machine.memory,
    "shared memory": machine.shared_memory,
    "open files": machine.open_files,
    "processes": machine.processes,
    "processors": machine.processors,
    "clock": machine.clock,
    "disk": storage.disk,
    "durable files": storage.durable_files,
    "temporary files": storage.temporary_files,
    "shard cache": storage.shard_cache,
    "hub cache": storage.hub_cache,
    "host name": network.host_name,
    "port": network.port,
    "several hosts": network.several_hosts,
    "gloo": network.gloo,
    "GPU": software.gpu,
    "NCCL": network.nccl,
    "Triton": software.triton,
    "locked memory": machine.locked_memory,
    "kernels": software.kernels,
    "shards run nothing": decoding.shards,
    "checkpoints run nothing": decoding.checkpoints,
    "remote code": decoding.remote_code,
    "recipe": run.recipe,
    "model": run.model,
    "shards": run.shards,
    "rationales": run.rationales,
    "DeepSpeed config": run.ds_config,
    "dev set": run.dev_files,
    "output": run.output,
}
AFTER_GLOO = ("GPU", "NCCL", "Triton", "locked memory", "kernels", "checkpoints run nothing")
"""Checks that need what the loopback's ranks saw."""
_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "red"), "skipped": ("–", "dim")}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `laser-dist doctor`."""

    recipe: Annotated[Path | None, tyro.conf.Positional] = None
    """A recipe, whose model, shards, DeepSpeed config and dev set are checked as well."""
    data: str | None = None
    """Folder or address of the shards, as --data.train of training."""
    output: Path | None = None
    """Where the run would write; unset: the recipe's output, or this folder."""
    port: int | None = None
    """Where ranks would meet; unset: MASTER_PORT, or 29500."""
    json: bool = False
    """Print JSON."""


def main(argv: list[str]) -> int:
    """Run the command; 1 if a check failed."""
    args = tyro.cli(Arguments, args=argv, prog="laser-dist doctor", description=HELP)
    began = time.monotonic()
    findings = examine(context_of(args))
    seconds = time.monotonic() - began
    if args.json:
        import json

        print(json.dumps(as_json(findings, seconds), indent=2, ensure_ascii=False))
    else:
        show(findings, seconds)
    return int(any(finding.status == "failed" for finding in findings.values()))


def context_of(args: Arguments) -> Context:
    """What is to be checked. UserError for a recipe that does not exist; one that is wrong is a finding."""
    config, problem = None, ""
    if args.recipe is not None:
        from laser_dist.recipe import read_recipe

        if not args.recipe.exists():
            raise UserError(f"recipe {args.recipe} does not exist; ready ones are in launchers/recipes/")
        try:
            config = read_recipe(args.recipe)
        except UserError as error:
            problem = str(error)
    if config is not None and args.data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=args.data, mix={}))
    output = args.output or (Path(config.output) if config and config.output else Path.cwd())
    port = args.port or _port_of(os.environ.get("MASTER_PORT", ""))
    return Context(output, port, config, problem, str(args.recipe or ""))


def _port_of(text: str) -> int:
    return int(text) if text.isdigit() and 0 < int(text) < 65536 else 29500


def examine(context: Context, names: tuple[str, ...] = tuple(CHECKS)) -> dict[str, Finding]:
    """The findings of these checks, in their order. A check that itself goes wrong is a failed one."""
    found: dict[str, Finding] = {}
    for wave in ([n for n in names if n not in AFTER_GLOO], [n for n in names if n in AFTER_GLOO]):
        # The loopback takes longest, and most of the others wait for a disk or a server.
        wave.sort(key=lambda name: name != "gloo")
        with ThreadPoolExecutor(max_workers=8) as pool:
            found |= dict(zip(wave, pool.map(lambda name: _checked(name, context), wave), strict=True))
    return {name: found[name] for name in names}


def _checked(name: str, context: Context) -> Finding:
    try:
        return CHECKS[name](context)
    except Exception as error:
        said = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return failed(
            f"the check itself failed: {said}", "run launchers/setup.sh anew; if that does not help, report it"
        )


def as_json(findings: dict[str, Finding], seconds: float) -> dict[str, Any]:
    """Plain values."""
    from laser_dist import __version__

    return {
        "laser_dist": __version__,
        "seconds": round(seconds, 2),
        "failed": sum(finding.status == "failed" for finding in findings.values()),
        "checks": {name: dataclasses.asdict(finding) for name, finding in findings.items()},
    }


def show(findings: dict[str, Finding], seconds: float) -> None:
    """A line for each check, and its remedy below."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    width = max(map(len, findings))
    for name, finding in findings.items():
        mark, colour = _MARKS[finding.status]
        console.print(Text(f"{mark} {name:<{width}}  ", style=colour).append(finding.found, style="default"))
        if finding.remedy:
            console.print(Text(f"  {'':<{width}}  -> {finding.remedy}", style=colour))
    counts = {status: sum(f.status == status for f in findings.values()) for status in _MARKS}
    console.print(
        f"{len(findings)} checks in {seconds:.1f} s: {counts['ok']} ok, {counts['warning']} warnings, "
        f"{counts['failed']} failed, {counts['skipped']} skipped"
    )
