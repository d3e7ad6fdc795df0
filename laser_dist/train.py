"""Entry of training: `laser-dist train RECIPE.toml ...` or `deepspeed --module laser_dist.train RECIPE.toml ...`."""

import os
import signal
import sys
from typing import NoReturn

from laser_dist.cli import run
from laser_dist.config import RunConfig
from laser_dist.data.streaming.store import LONGEST_PAUSE, is_remote
from laser_dist.ds_config import resolve
from laser_dist.launch.meeting import together
from laser_dist.launch.outcome import EXIT_PREEMPTED, Asked, own_folder, reported
from laser_dist.launch.ranks import adopt_ranks
from laser_dist.recipe import load_config
from laser_dist.watch import watchdog
from laser_dist.watch.pulse import Limits


def main(arguments: list[str]) -> int:
    """Train; what can be wrong with the configuration is found before a model loads, and told to all ranks."""
    adopt_ranks()
    # The launcher's own argument; the environment says the same.
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    config = together(lambda: load_config(arguments))
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _asked_early)  # until there are steps to finish and something to save
    watchdog.current = watchdog.Watchdog(own_folder(config.output), limits(config))
    with reported(config.output, watchdog.current) as outcome:
        ds_config = together(lambda: resolve(config.train.deepspeed, config))
        os.environ.setdefault("WDS_SECURE", "1")

        from laser_dist.observability.console import quiet_libraries

        quiet_libraries()
        from laser_dist.trainer import Trainer

        outcome.code = 0 if Trainer(config, ds_config).fit() else EXIT_PREEMPTED
    return outcome.code


def _asked_early(number: int, _: object) -> NoReturn:
    raise Asked(f"{signal.Signals(number).name} came before the first step")


def limits(config: RunConfig) -> Limits:
    """When a rank counts as hung. A traced step takes longer than the others, so that profiles are not timed."""
    fetch = config.data.attempts * (config.data.timeout + LONGEST_PAUSE)
    remote = any(is_remote(place) for place in config.data.sources)
    return Limits(
        0.0 if config.profile.active else config.launch.hang_steps,
        config.launch.hang_seconds,
        fetch if remote else config.data.timeout,
    )


if __name__ == "__main__":
    code = run("laser_dist.train", sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # at once: threads of a process group that one rank has left can abort an orderly end
