"""Runs the struck run: starts its jobs, strikes at random times, and follows each strike until its end."""

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from laser_dist.bench.faults.rank import FAULT
from laser_dist.bench.soak.job import Job
from laser_dist.bench.soak.rank import fits, order_of, struck_of
from laser_dist.bench.soak.strikes import Act, shuffled
from laser_dist.files import write_json
from laser_dist.launch import processes
from laser_dist.launch.ranks import free_port

RANKS, SAVED_EVERY, EVALUATED_EVERY = 2, 5, 20
LIMIT = 120.0
"""Seconds from a strike until its attempt must be over: a process that is killed is known in one, a hung one in ten."""
QUIET = 25.0
"""Seconds after a strike that must end nothing in which a false alarm would have come."""


@dataclass
class Strike:
    """One of the struck run's faults."""

    number: int
    act: Act
    rank: int
    job: int
    attempt: int
    step: int
    phase: str
    at: float
    """Seconds since the soak began."""
    line: str = ""
    """What the supervisor said of the attempt."""
    settled: bool = False
    reached: int = 0
    """The step that its attempt came to."""
    lost: float | None = None
    """Seconds from the strike until the run was further than that."""
    problems: list[str] = field(default_factory=list)


@dataclass
class Soak:
    """A run in `output`, and what struck it."""

    root: Path
    output: Path
    steps: int
    acts: tuple[Act, ...]
    every: float
    """Mean seconds from a strike to the next one."""
    most: int
    """Strikes; 0 for as many as come."""
    seed: int
    cold: bool
    pace: float
    seconds: float = 0.0
    """For all steps; 0: as fast as it goes, and nothing strikes."""
    say: Callable[["Strike"], None] = lambda strike: None
    """Called when it is known what became of a strike."""
    strikes: list[Strike] = field(default_factory=list)
    jobs: int = 0
    problems: list[str] = field(default_factory=list)
    wall: float = 0.0
    printed: list[str] = field(default_factory=list)

    def run(self) -> None:
        """From the first job's start to the last one's end; `problems` says what must not have been."""
        self.began = time.monotonic()
        self.rng = random.Random(self.seed)
        self.drawn = shuffled(self.acts, self.rng)
        self.due = self.rng.expovariate(1 / self.every)
        self.asked: tuple[Act, int] | None = None
        limit = 3 * self.seconds + 600
        code = None
        while code != 0 and not self.problems:
            job, struck = self._start(), len(self.strikes)
            try:
                self._until_end(job, limit)
            finally:
                if not job.ended():
                    job.kill()
            self.wall = self.now
            if not job.leave():
                self.problems.append("processes were left when the supervisor had ended, and had to be killed")
            self._take(job)
            self._settle(job)
            self._unexplained(job)
            kept = self.output.with_name(f"{self.output.name}-job-{self.jobs:03d}")
            shutil.copytree(self.output / "launch", kept)  # the next job writes over it
            code = job.code
            self.printed += job.lines
            if code != 0 and len(self.strikes) == struck:
                self.problems.append(f"the job ended with {code}, and nothing had struck it")
        for rank in range(RANKS):
            order_of(self.root, rank).unlink(missing_ok=True)

    def _until_end(self, job: Job, limit: float) -> None:
        while not job.ended():
            time.sleep(0.05)
            self._follow(job)
            if self.now > limit:
                self.problems.append(f"no end after {self.now:.0f} s")
                job.kill()

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def _start(self) -> Job:
        self.jobs += 1
        until = self.began + self.seconds if self.seconds else 0.0
        told = {"folder": str(self.root), "until": until, "steps": self.steps, "longest": 2 * self.pace}
        options = {"--num_accelerators": RANKS, "--master_port": free_port(), "--max-restarts": 999, "--backoff": 0}
        flags = {
            "--output": self.output, "--train.max-steps": self.steps, "--checkpoint.every": SAVED_EVERY,
            "--checkpoint.keep": 2, "--evaluation.every": EVALUATED_EVERY, "--data.timeout": 10,
            "--launch.hang-seconds": 10,
        }  # fmt: skip
        arguments = [*_words(options), str(self.root / "recipe.toml"), *_words(flags), "--resume"]
        environment = {FAULT: json.dumps(told), "OMP_NUM_THREADS": "1"}
        return Job(self.output, arguments, environment, cold=self.cold)

    def _follow(self, job: Job) -> None:
        self._take(job)
        self._settle(job)
        self._look(job)
        enough = self.most and len(self.strikes) >= self.most
        if self.seconds and not enough and self.now > self.due and (not self.strikes or self.strikes[-1].settled):
            if not self.asked:
                self.asked = act, rank = next(self.drawn), self.rng.randrange(RANKS)
                if not act.number:
                    order = {"act": act.name, "when": act.when, "number": len(self.strikes)}
                    write_json(order_of(self.root, rank), order)  # once: the rank may just be taking it
            self._strike(job, *self.asked)

    def _strike(self, job: Job, act: Act, rank: int) -> None:
        """From outside, if the rank can be struck now; one that strikes itself has been told to."""
        attempt = job.attempt
        beats = {beat.rank: beat for beat in job.beats(attempt) if beat.code is None}
        if not act.number or rank not in beats or not fits(act.when, beats[rank]) or act.job and len(beats) < RANKS:
            return
        beat = beats[rank]
        if processes.send([b.pid for b in beats.values()] if act.job else [beat.pid], act.number):
            if act.job:
                os.kill(job.process.pid, act.number)
            self._note(Strike(0, act, rank, self.jobs, attempt, beat.step, beat.phase, self.now))

    def _take(self, job: Job) -> None:
        """Note that a rank has struck itself."""
        file = struck_of(self.root, len(self.strikes))
        if self.asked and file.is_file():
            told, (act, rank) = json.loads(file.read_bytes()), self.asked
            file.unlink()
            at = told["at"] - self.began
            self._note(Strike(0, act, rank, self.jobs, told["attempt"], told["step"], told["phase"], at))

    def _note(self, strike: Strike) -> None:
        self.strikes.append(strike)
        strike.number = len(self.strikes)
        self.asked = None
        self.due = strike.at + self.rng.expovariate(1 / self.every)

    def _settle(self, job: Job) -> None:
        """The last strike's end, if it has come."""
        if not self.strikes or (strike := self.strikes[-1]).settled:
            return
        over, waited = len(job.verdicts) >= strike.attempt, self.now - strike.at
        if over and job.code is None and len(job.verdicts) == strike.attempt and not job.beats(strike.attempt + 1):
            return  # whether another attempt comes is not known yet
        if over:
            strike.line = job.verdicts[strike.attempt - 1]
        elif waited > LIMIT:
            strike.problems.append(f"nothing had come of it {waited:.0f} s later")
            job.kill()
        unharmed = strike.act.ends == "nothing" and waited > QUIET and strike.lost is not None
        if over or unharmed or waited > LIMIT or job.code is not None:
            strike.settled = True
            strike.problems += _wrong(strike, job)
            self.say(strike)

    def _look(self, job: Job) -> None:
        """Whether the run is further than it was when it was struck."""
        if not (waiting := [strike for strike in self.strikes if strike.lost is None]):
            return
        step = max((beat.step for beat in job.beats(job.attempt)), default=0)
        for strike in waiting:
            if not strike.settled and strike.act.ends != "nothing":
                strike.reached = max(strike.reached, step)
            elif step > max(strike.reached, strike.step):
                strike.lost = self.now - strike.at

    def _unexplained(self, job: Job) -> None:
        explained = {s.attempt for s in self.strikes if s.job == self.jobs and s.act.ends != "nothing"}
        for number, line in enumerate(job.verdicts, 1):
            if number not in explained and not (number == len(job.verdicts) and job.code == 0):
                self.problems.append(f"job {self.jobs}: nothing had struck the attempt: {line}")


def _wrong(strike: Strike, job: Job) -> list[str]:
    """What is wrong with the end of a strike's attempt, which is over unless it must not be."""
    act, told = strike.act, job.verdict(strike.attempt)
    over = len(job.verdicts) >= strike.attempt
    if act.ends == "nothing":
        finished = job.code == 0 and len(job.verdicts) == strike.attempt
        return ["it ended the attempt"] if over and not finished else []
    if not over:
        return ["the supervisor did not say how the attempt ended"]
    last = len(job.verdicts) == strike.attempt  # with another one after it the supervisor took it for a failure
    allowed = {"requeue": (75,), "mended": (2, None), "restart": (1, None)}[act.ends]
    wrong = [] if (job.code if last else None) in allowed else [f"exit code {job.code}"]
    if bool(act.kind) != bool(told):
        return [*wrong, f"verdict: {told.line if told else 'none'}"]
    # What fails all ranks alike, as a save does, is told by the first of them, and names the one that it is about.
    named = told and (told.rank == strike.rank or act.ends == "mended" and f"rank {strike.rank}: " in told.cause)
    if told and not (named and told.kind == act.kind):
        wrong.append(f"verdict: {told.line}")
    return wrong


def _words(flags: Mapping[str, object]) -> list[str]:
    return [str(word) for pair in flags.items() for word in pair]
