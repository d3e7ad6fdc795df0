"""What a struck run came to, held to one that nothing struck: weights, losses, and where its time went."""

import json
from dataclasses import dataclass
from pathlib import Path

from laser_dist.bench.faults.run import weights
from laser_dist.run_page.account import Account
from laser_dist.run_page.read import LEDGER, METRICS, read_run

COMPARED = ("loss/", "train/", "weight/", "dev/")
"""Scalars that say what a run computed; the others say how fast, or what a process has seen since its start."""
ALLOWED = 0.01
"""Share of the wall time that the ledger may be wrong by."""
OUTSIDE = 1.0
"""Seconds for each job that no ledger can know of: what its supervisor does when the last attempt is over."""


@dataclass
class Held:
    """The comparison."""

    weights: bool
    steps: int
    """Compared, of the run that lasted."""
    scalars: int
    other: list[str]
    """Where values differ, or stand in one run only."""
    account: Account | None
    wall: float
    """Seconds by the benchmark's clock, from the first job's start to the last one's end."""
    jobs: int

    @property
    def unknown(self) -> float:
        """Seconds of the wall time that the ledger does not hold."""
        return self.wall - sum(self.account.parts.values()) if self.account else self.wall

    @property
    def problems(self) -> list[str]:
        found = [] if self.weights else ["other weights than without faults"]
        if self.other:
            found.append(f"{len(self.other)} values differ from those without faults: {', '.join(self.other[:5])}")
        if abs(self.unknown) > ALLOWED * self.wall + OUTSIDE * self.jobs:
            found.append(f"the ledger is {self.unknown:+.1f} s from {self.wall:.1f} s")
        return found


def hold(struck: Path, whole: Path, steps: int, wall: float, jobs: int) -> Held:
    """`struck` and `whole`: output folders of the two runs."""
    own, expected = values(struck), values(whole)
    other = [
        f"{name} of step {step}" for step, name in sorted(own.keys() | expected.keys())
        if own.get((step, name)) != expected.get((step, name))
    ]  # fmt: skip
    same = bool(hashed := weights(whole, steps)) and weights(struck, steps) == hashed
    account = read_run(struck).account if (struck / LEDGER).is_file() else None
    return Held(same, len({step for step, _ in own}), len(own), other, account, wall, jobs)


def values(output: Path) -> dict[tuple[int, str], object]:
    """(step, scalar) -> what metrics.jsonl says, if there is one; a list of values where it says it more than once."""
    found: dict[tuple[int, str], object] = {}
    if not (output / METRICS).is_file():
        return found
    for line in (output / METRICS).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name.startswith(COMPARED):
                key = (row["step"], name)
                found[key] = [found[key], value] if key in found else value
    return found
