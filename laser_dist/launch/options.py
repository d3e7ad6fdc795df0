"""The arguments of `laser-dist launch`: its own, DeepSpeed's launcher's, and those of training."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from laser_dist.config import RunConfig
from laser_dist.errors import UserError, suggest
from laser_dist.launch.hosts import DEFAULT_HOSTFILE, Hosts, chosen, read_hostfile
from laser_dist.recipe import load_config

HELP = """usage: laser-dist launch [OPTIONS] RECIPE.toml [--section.field value ...]

Train on every process of one host or many, watch it, and start it again when it fails. Options before the recipe:

  --max-restarts N     after a failure, continue from the last complete checkpoint, at most N times (default 0). Never
                       after an error of yours (exit code 2) or a stop by signal (75), nor when two failures in a row
                       brought no new checkpoint
  --backoff SECONDS    pause before the first restart, doubled for each one after it, at most 300 (default 5)
  --skip-poisoned-step when the same step killed the run twice, go on without its examples, and report them in
                       OUTPUT/launch/poisoned.jsonl; without it the run stops and names them
  --takeover           first end what still runs for this output folder, on all hosts

and DeepSpeed's launcher's own, among them:

  --num_gpus N         processes on each host (--num_accelerators N is the same, and also counts CPU processes)
  --hostfile FILE      a line `name slots=8` for each host; .venv, data and output have the same path on all of them
  --include, --exclude host:0,2@other     --num_nodes N     --master_addr, --master_port
  --launcher NAME      pdsh (default), openmpi, slurm, mpich, impi, mvapich; --launcher_args "..." go to it
  --no_ssh --node_rank N --master_addr A  this host's part only; started so on each host, e.g. by a scheduler

SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 make the ranks on all hosts save and stop, with exit code 75; a second one
ends them.

Examples:
  laser-dist launch --num_gpus 8 recipe.toml --output runs/eight --max-restarts 3
  laser-dist launch --hostfile hosts --max-restarts 5 recipe.toml --output /shared/runs/sixteen
  laser-dist launch --num_accelerators 2 launchers/recipes/quickstart.toml --output runs/cpu
"""

_FLAGS = {"--no_local_rank", "--no_ssh", "--no_ssh_check", "--force_multi", "--save_pid", "--bind_cores_to_rank"}
_VALUES = {
    *("--hostfile", "--include", "--exclude", "--num_nodes", "--num_gpus", "--num_accelerators", "--master_port"),
    *("--master_addr", "--node_rank", "--launcher", "--launcher_args", "--enable_each_rank_log", "--bind_core_list"),
    *("--ssh_port", "--venv_script", "--log_level"),
}
_SHORT = {"-H": "--hostfile", "-i": "--include", "-e": "--exclude", "--num_accelerators": "--num_gpus"}
_NUMBERS = {"--num_gpus", "--num_nodes", "--master_port", "--node_rank", "--ssh_port"}
_OUR_FLAGS = {"--takeover", "--skip-poisoned-step"}
_OURS = {"--max-restarts", "--backoff"} | _OUR_FLAGS
DEFAULT_PORT = "29500"
"""DeepSpeed's own."""
LAUNCHERS = ("pdsh", "openmpi", "slurm", "mpich", "impi", "mvapich")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to launch."""

    config: RunConfig
    hosts: Hosts
    launcher: dict[str, str | None] = field(default_factory=dict)
    """Options for DeepSpeed's launcher, None for flags."""
    max_restarts: int = 0
    backoff: float = 5.0
    takeover: bool = False
    skip_poisoned_step: bool = False

    @property
    def output(self) -> Path:
        """Absolute: it marks the run's processes."""
        return Path(self.config.output).absolute()

    @property
    def name(self) -> str:
        """The launcher's."""
        return (self.launcher.get("--launcher") or "pdsh").lower()

    @property
    def alone(self) -> bool:
        """Whether all ranks are on this host, and DeepSpeed's own launcher starts them."""
        return self.name == "pdsh" and not self.hosts.remote and not self.launcher.keys() & {"--no_ssh", "--node_rank"}

    def meeting_point(self) -> dict[str, str]:
        """Where ranks meet, for launchers that do not say it themselves. UserError if nobody said it."""
        address = self.launcher.get("--master_addr") or os.environ.get("MASTER_ADDR")
        if not address:
            raise UserError(f"--launcher {self.name} needs --master_addr: the address of the first host")
        port = self.launcher.get("--master_port") or os.environ.get("MASTER_PORT") or DEFAULT_PORT
        return {"MASTER_ADDR": address, "MASTER_PORT": port}


def parse(arguments: list[str]) -> Job:
    """UserError for whatever can be known to be wrong before a process starts on any host."""
    options, training = _split(arguments)
    for name in _NUMBERS & options.keys():  # DeepSpeed's launcher would complain, after ten seconds, under its own name
        _number(options, name, 0)
    ours = {name: options.pop(name) for name in _OURS & options.keys()}
    job = Job(
        config=load_config(training, prog="laser-dist launch"),
        hosts=_hosts(options),
        launcher=options,
        max_restarts=_number(ours, "--max-restarts", 0),
        backoff=_number(ours, "--backoff", 5),
        takeover="--takeover" in ours,
        skip_poisoned_step="--skip-poisoned-step" in ours,
    )
    if job.name not in LAUNCHERS:
        raise UserError(f"--launcher {job.name}: must be one of {', '.join(LAUNCHERS)}.{suggest(job.name, LAUNCHERS)}")
    if job.max_restarts and "--no_ssh" in options:
        raise UserError("--max-restarts with --no_ssh: each host would restart on its own; let the scheduler restart")
    if job.name != "pdsh":
        job = replace(job, launcher={**job.launcher, "--master_addr": job.meeting_point()["MASTER_ADDR"]})
    job.hosts.require_ssh()
    return job


def _split(arguments: list[str]) -> tuple[dict[str, str | None], list[str]]:
    """Options before the recipe, and the rest. Our own options may stand behind the recipe too."""
    options: dict[str, str | None] = {}
    rest: list[str] = []
    pending = list(arguments)
    while pending:
        name, equals, value = pending.pop(0).partition("=")
        name = _SHORT.get(name, name)
        if rest and name not in _OURS:
            rest.append(name + equals + value)
        elif name in _FLAGS | _OUR_FLAGS:
            options[name] = None
        elif name in _VALUES | _OURS:
            if not equals and not pending:
                raise UserError(f"{name} needs a value")
            options[name] = value if equals else pending.pop(0)
        elif name.startswith("-"):
            raise UserError(
                f"unknown option {name} before the recipe.{suggest(name, _FLAGS | _VALUES | _OURS)} "
                "Options of training stand behind the recipe"
            )
        else:
            rest.append(name + equals + value)
    if not rest:
        raise UserError("name a recipe; ready ones are in launchers/recipes/")
    return options, rest


def _hosts(options: dict[str, str | None]) -> Hosts:
    """The hosts that pdsh starts ranks on; none for this host alone, and for other launchers, which see to theirs."""
    file = Path(options.get("--hostfile") or DEFAULT_HOSTFILE)
    if "--hostfile" not in options and not file.is_file():
        return Hosts({})
    slots = chosen(
        read_hostfile(file),
        include=options.get("--include") or "",
        exclude=options.get("--exclude") or "",
        nodes=_number(options, "--num_nodes", -1),
        slots=_number(options, "--num_gpus", -1),
    )
    foreign = (options.get("--launcher") or "pdsh").lower() != "pdsh"
    alone = foreign or "--no_ssh" in options or (len(slots) == 1 and "--force_multi" not in options)
    return Hosts({} if alone else slots)


def _number(options: dict[str, str | None], name: str, default: int) -> int:
    value = options.get(name)
    if value is None:
        return default
    if not value.isdigit():
        raise UserError(f"{name} {value}: must be a whole number, 0 or more")
    return int(value)
