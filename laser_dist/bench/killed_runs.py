"""`laser-dist bench killed-runs`: is a run that was killed and resumed, again and again, the run that nobody touched?

A tiny model trains once to the end, and then again, killed three times at random moments of random steps and
resumed each time. After every step each rank writes down its examples, its learning rate and hashes of its
parameters with the optimizer's states and of its generator, which dropout draws from. All must be those of the whole
run, also of steps that were taken twice, and every step must stand in metrics.jsonl once.
"""

import hashlib
import json
import random
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from laser_dist.bench.nursery import Trials
from laser_dist.errors import UserError

HELP = """Kill a run at random moments, resume it, and compare it step by step with one that was not killed.

Examples:
  laser-dist bench killed-runs
  laser-dist bench killed-runs --kills 6 --stage 2 --out runs.json
"""
EVERY, RESUMES = 2, 3


@dataclass(frozen=True, kw_only=True)
class Settings(Trials):
    """What is tried."""

    kills: int = 50
    """Each run is killed three times and then ends by itself."""
    steps: int = 12
    """Of a run."""

    def validate(self) -> None:
        super().validate()
        if self.steps < EVERY:
            raise UserError(f"--steps {self.steps}: must be at least {EVERY}, when the first checkpoint is saved")


def main(arguments: list[str]) -> int:
    """Run the trials; returns the exit code. UserError: a resumed run differs."""
    import tyro
    from rich.console import Console
    from rich.progress import track

    from laser_dist.bench.nursery import trials

    settings = tyro.cli(Settings, args=arguments, prog="laser-dist bench killed-runs", description=HELP)
    settings.validate()
    with tempfile.TemporaryDirectory(prefix="laser-dist-bench-") as root:
        prepare(Path(root))
        job = {"root": root, **{name: getattr(settings, name) for name in ("kills", "steps", "ranks", "stage", "seed")}}
        running = trials("laser_dist.bench.killed_runs", job)
        console = Console(stderr=True)
        rows = list(track(running, "killing", settings.kills, console=console, disable=not sys.stderr.isatty()))
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {name: str(value) for name, value in asdict(settings).items()},
        "kills": len(rows),
        "runs": len({row["run"] for row in rows}),
        "steps compared": sum(row["compared"] for row in rows),
    }
    print(
        f"{result['kills']} kills in {result['runs']} runs of {settings.steps} steps on {settings.ranks} ranks with "
        f"ZeRO-{settings.stage}: {result['steps compared']} steps of ranks compared, all are the whole run's"
    )
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(result | {"trials": rows}, indent=2) + "\n")
    return 0


def prepare(root: Path) -> None:
    """Shards of the embedded sample, its texts cut short, and a recipe."""
    from laser_dist.data import sample_folder
    from laser_dist.testing import run_command

    rows = [json.loads(line) for line in (sample_folder() / "train.jsonl").read_text().splitlines()[:16]]
    for row in rows:
        row["query"], row["rationale"] = row["query"][:60], row["rationale"][:120]
        for passage in row["positives"] + row["negatives"]:
            passage["text"] = passage["text"][:60]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_command("prepare", "--source", root / "train.jsonl", "--out", root / "shards")
    if done.returncode:
        raise UserError(f"the sample cannot be prepared: {done.stderr[-500:]}")


def run_trials(root: str, kills: int, steps: int, ranks: int, stage: int, seed: int) -> Iterator[dict[str, Any]]:
    """In a process that forks (see `nursery`): one dict per kill. UserError: a comparison failed."""
    from laser_dist.bench.nursery import run_ranks
    from laser_dist.testing import tiny_model_folder

    folder, rng = Path(root), random.Random(seed)
    tiny_model_folder(folder / "model", tied=True, layers=1)
    life = Life(folder, "whole", stage, steps)
    codes, output = run_ranks(life.run, ranks)
    if any(codes):
        raise UserError(f"the whole run failed: {output[-2000:]}")
    whole = life.records(ranks)
    for number in range(kills):
        run = f"run-{number // RESUMES}"
        life = Life(folder, run, stage, steps, moment=rng.random())
        life.kill_in = rng.randint(life.reached(), steps)
        codes, output = run_ranks(life.run, ranks)
        if not any(code < 0 for code in codes):
            raise UserError(f"{life}: ranks ended with {codes}: {output[-2000:]}")
        last = (number + 1) % RESUMES == 0 or number + 1 == kills
        if last:
            codes, output = run_ranks(Life(folder, run, stage, steps).run, ranks)
            if any(codes):
                raise UserError(f"{run} cannot be resumed: {output[-2000:]}")
        compared = life.compare(whole, ranks, whole_too=last)
        yield {"run": run, "step": life.kill_in, "moment": life.moment, "codes": codes, "compared": compared}


@dataclass
class Life:
    """A run until it ends, or is killed in step `kill_in`, `moment` step times (0 to 1, of 1.5) after its beginning."""

    folder: Path
    name: str
    stage: int
    steps: int
    kill_in: int | None = None
    moment: float = 0.0

    @property
    def output(self) -> Path:
        return self.folder / self.name

    def reached(self) -> int:
        """The first step that this life takes: its kill cannot come before it."""
        pointer = self.output / "checkpoints" / "latest"
        saved = int(pointer.read_text().strip().split("-")[1]) if pointer.is_file() else 0
        return min(saved + 1, self.steps)

    def run(self, rank: int) -> None:
        """What a rank does: train, write down each step, and maybe die."""
        import torch

        from laser_dist.bench.nursery import digest
        from laser_dist.ds_config import resolve
        from laser_dist.recipe import load_config
        from laser_dist.trainer import Trainer

        config = load_config(self._flags())
        trainer: Any = Trainer(config, resolve(config.train.deepspeed, config))
        step, following = trainer.step, trainer._next
        ids: list[str] = []
        seconds = [0.2]

        def next_batch(batches: Any) -> Any:
            loaded, chunks = following(batches)
            ids.extend(loaded.packed.query_ids)
            return loaded, chunks

        def recorded(number: int, batches: Any) -> Any:
            ids.clear()
            if number + 1 == self.kill_in:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel ends the process, whatever it does just then
                signal.setitimer(signal.ITIMER_REAL, max(1.5 * self.moment * seconds[0], 1e-6))
            values = step(number, batches)
            seconds[0] = sum(value for name, value in values.items() if name.startswith("time/"))
            found = {
                "step": number + 1,
                "examples": list(ids),
                "learning rate": values["train/learning_rate"],
                "loss": values["loss/total"],
                "parameters and optimizer": digest(trainer.engine),
                "generator": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
            }
            with (self.output / f"rank-{rank}.jsonl").open("a") as file:
                file.write(json.dumps(found) + "\n")
            if self.kill_in and number + 1 == self.steps:  # not yet: there is no step behind it to die in
                signal.pause()
            return values

        trainer._next, trainer.step = next_batch, recorded
        trainer.fit()
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _flags(self) -> list[str]:
        values = {
            "--output": self.output, "--model.name": self.folder / "model", "--model.dtype": "float32",
            "--data.train": self.folder / "shards", "--data.workers": 0, "--train.max-steps": self.steps,
            "--train.queries-per-rank": 2, "--checkpoint.every": EVERY, "--model.lora-rank": 4,
            "--model.lora-dropout": 0.3, "--optimizer.learning-rate": 1e-2, "--objective.ramp-steps": 5,
            "--train.deepspeed": "zero3-test" if self.stage == 3 else f"zero{self.stage}", "--rehearse": "off",
        }  # fmt: skip
        return [*(str(x) for pair in values.items() for x in pair), "--resume", "--launch.no-preflight"]

    def records(self, ranks: int) -> dict[str, list[dict[str, Any]]]:
        """Rank -> what it wrote down; the line that a kill cut short left out."""
        found: dict[str, list[dict[str, Any]]] = {}
        for rank in range(ranks):
            file = self.output / f"rank-{rank}.jsonl"
            lines = file.read_text().splitlines() if file.is_file() else []
            found[str(rank)] = [json.loads(line) for line in lines if line.endswith("}")]
        return found

    def compare(self, whole: dict[str, list[dict[str, Any]]], ranks: int, *, whole_too: bool) -> int:
        """How many steps of ranks were compared. UserError names the first that differs."""
        own = self.records(ranks)
        for rank, rows in own.items():
            expected = {row["step"]: row for row in whole[rank]}
            for row in rows:
                if wrong := [name for name in row if row[name] != expected[row["step"]][name]]:
                    raise UserError(f"{self}: rank {rank}, step {row['step']}: {', '.join(wrong)} differ")
            if whole_too and {row["step"] for row in rows} != set(expected):
                raise UserError(f"{self}: rank {rank} did not take every step")
        if not whole_too:
            return 0
        logged = [json.loads(line)["step"] for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        if logged != list(range(1, self.steps + 1)):
            raise UserError(f"{self}: metrics.jsonl has the steps {logged}")
        return sum(map(len, own.values()))
