"""Entry of training: `laser-dist train RECIPE.toml ...` or `deepspeed --module laser_dist.train RECIPE.toml ...`."""

import os
import sys

from laser_dist.cli import run
from laser_dist.config import load_config
from laser_dist.ds_config import resolve
from laser_dist.launch.meeting import together
from laser_dist.launch.outcome import reported
from laser_dist.launch.ranks import adopt_ranks

EXIT_PREEMPTED = 75
"""Exit code after a signal asked to stop and a checkpoint was saved: resume later (EX_TEMPFAIL)."""


def main(arguments: list[str]) -> int:
    """Train; what can be wrong with the configuration is found before a model loads, and told to all ranks."""
    adopt_ranks()
    # The launcher's own argument; the environment says the same.
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    config = together(lambda: load_config(arguments))
    with reported(config.output) as outcome:
        ds_config = together(lambda: resolve(config.train.deepspeed, config))
        os.environ.setdefault("WDS_SECURE", "1")

        from laser_dist.observability.console import quiet_libraries

        quiet_libraries()
        from laser_dist.trainer import Trainer

        outcome.code = 0 if Trainer(config, ds_config).fit() else EXIT_PREEMPTED
    return outcome.code


if __name__ == "__main__":
    sys.exit(run("laser_dist.train", sys.argv[1:]))
