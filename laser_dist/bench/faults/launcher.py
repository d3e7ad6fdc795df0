"""`laser-dist launch` with ranks that have a fault in them."""

import sys

from laser_dist.cli import run
from laser_dist.launch.attempt import Attempt

if __name__ == "__main__":
    Attempt.module = "laser_dist.bench.faults.rank"
    sys.exit(run("laser_dist.launch.launch", sys.argv[1:]))
