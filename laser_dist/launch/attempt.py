"""One attempt at a run: start DeepSpeed's launcher, pass signals on, end what it leaves behind, and say what happened.

What DeepSpeed's launcher does not do, and is done here:
1. When a host fails, the others wait for it in a collective, for up to the timeout. They are given GRACE seconds to
   notice by themselves and are then ended.
2. A signal reaches the ranks themselves, on every host. DeepSpeed's launcher kills them after 30 seconds, saved or not.
3. A launcher that was killed exits with 0. Here only a rank 0 that says so has finished.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, ClassVar

from laser_dist.files import replacing
from laser_dist.launch import outcome, processes
from laser_dist.launch.environment import for_attempt, write_environment
from laser_dist.launch.hosts import EXITED, ssh_environment
from laser_dist.launch.options import Job
from laser_dist.launch.outcome import Outcome
from laser_dist.recipe import to_toml
from laser_dist.watch import verdict
from laser_dist.watch.verdict import Verdict

GRACE = 15.0
"""Seconds between a host's failure and the end of the others: a lost peer is noticed in well under one."""
SAVED, USER = 75, 2


class Signals:
    """Counts requests to stop, while it is entered; the previous handlers come back after it."""

    def __init__(self) -> None:
        self.count = 0
        self.name = ""

    def _note(self, number: int, _: object) -> None:
        self.count += 1
        self.name = signal.Signals(number).name

    def __enter__(self) -> "Signals":
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@dataclass
class Result:
    """How an attempt ended."""

    code: int
    """0 finished, 2 a user error, 75 saved and stopped, 1 failed."""
    verdict: str
    """One line: what happened on which host and rank."""
    told: Verdict | None = None
    """What the ranks found out about a failure."""


@dataclass
class Attempt:
    """The processes of one attempt; `run` starts them and comes back when none is left."""

    module: ClassVar[str] = "laser_dist.train"
    """What the ranks run."""

    job: Job
    number: int
    signals: Signals
    say: Callable[[str], None]
    codes: dict[str, int] = field(default_factory=dict)
    """Host -> exit code of its part, where it was not 0."""
    failed_at: float | None = None
    passed_on: int = 0

    def run(self) -> Result:
        records = outcome.folder(self.job.output, self.number)
        shutil.rmtree(records, ignore_errors=True)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="laser-dist-launch-") as scratch:
            marks = for_attempt(self.job.output, self.number)
            exported = Path(scratch) / "deepspeed_env"
            meeting = {} if self.job.name == "pdsh" else self.job.meeting_point()
            write_environment(exported, marks | meeting, Path(sys.executable).parent, launcher=self.job.name)
            environment = {**ssh_environment(), "DS_ENV_FILE": str(exported)}
            environment |= {} if self.job.hosts.remote else marks | meeting
            # A session of its own: a Ctrl-C goes to us alone, and then to the ranks.
            process = subprocess.Popen(
                self._command(),
                env=environment,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE if self.job.hosts.remote else None,
                text=True,
                start_new_session=True,
                # Slurm may send it to all processes of a job, and it would end the launcher; ranks handle it.
                preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
            )
            reader = threading.Thread(target=self._read, args=(process.stderr,), daemon=True)
            reader.start()
            try:
                self._watch(process)
            finally:
                _kill_group(process)
                self.job.hosts.processes(self.job.output, "end")
            reader.join(timeout=5)
        told = verdict.read(records) or verdict.inferred(records)
        return self._result(process.wait(), read_outcomes(records), told, time.monotonic() - began)

    def _command(self) -> list[str]:
        """DeepSpeed's launcher on a resolved recipe: no value passes through a remote shell, whatever is in it."""
        recipe = self.job.output / "launch" / "recipe.toml"
        with replacing(recipe) as temporary:
            temporary.write_text(to_toml(self.job.config), encoding="utf-8")
        command = [sys.executable, "-m", "deepspeed.launcher.runner"]
        for name, value in {"--log_level": "warning", **self.job.launcher}.items():
            command += [name] if value is None else [name, value]
        if self.job.hosts.remote or self.job.name != "pdsh":
            command += ["--no_ssh_check"]  # it would not use the user's ssh options, and names no host
        # DeepSpeed's Slurm launcher forgets --module.
        script = Path(__file__).parents[1] / "train.py"
        command += [str(script)] if self.job.name == "slurm" else ["--module", self.module]
        return [*command, str(recipe), *(["--resume"] if self.number > 1 else [])]

    def _read(self, stream: IO[str] | None) -> None:
        """Pass the launcher's messages on and note the hosts whose part failed."""
        for line in stream or ():
            print(line, end="", file=sys.stderr, flush=True)
            if match := EXITED.match(line.strip()):
                self.codes[match[1]] = int(match[2])
                self.failed_at = self.failed_at or time.monotonic()

    def _watch(self, process: "subprocess.Popen[str]") -> None:
        while process.poll() is None:
            time.sleep(0.1)
            if self.signals.count > self.passed_on:
                self.passed_on = self.signals.count
                self._pass_on()
            # After a clean stop the last rank may still be tidying up.
            grace = 4 * GRACE if set(self.codes.values()) == {SAVED} else GRACE
            if self.failed_at and time.monotonic() - self.failed_at > grace:
                left = [host for host in self.job.hosts.slots if host not in self.codes]
                self.say(f"{', '.join(self.codes)} failed {grace:.0f} s ago; ending what is left on {', '.join(left)}")
                return

    def _pass_on(self) -> None:
        """The first signal asks the ranks to save and stop, the second ends them."""
        action = "stop" if self.passed_on == 1 else "end"
        if self.job.name != "pdsh" and action == "stop":
            sent: dict[str, int | None] = {"this host": _signal_foreign_launcher(str(self.job.output))}
        else:
            sent = self.job.hosts.processes(self.job.output, action)
        told = ", ".join(f"{n} on {host}" if n is not None else f"{host} does not answer" for host, n in sent.items())
        done = "asked the ranks to save and stop; again ends them" if action == "stop" else "ended all processes"
        self.say(f"{self.signals.name}: {done} ({told})")

    def _result(self, code: int, outcomes: dict[int, Outcome], told: Verdict | None, seconds: float) -> Result:
        codes = {*self.codes.values(), *(o.code for o in outcomes.values()), code}
        first = min(outcomes, default=0)
        after = f"after {seconds:.0f} s"
        if code == 0 and not self.codes and first == 0 and first in outcomes and outcomes[first].code == 0:
            return Result(0, f"finished {after}")
        if USER in codes:
            reason = next((o.reason for o in outcomes.values() if o.code == USER), "see above")
            return Result(USER, f"not started or stopped {after} by an error to be mended: {reason}")
        if SAVED in codes and not told and all(o.code in (0, SAVED) for o in outcomes.values()):
            if early := next((o.reason for o in outcomes.values() if o.reason), ""):
                return Result(SAVED, f"stopped {after}, as a signal asked: {early}")
            return Result(SAVED, f"saved and stopped {after}, as a signal asked; --resume goes on from there")
        if self.passed_on and not any(o.code == 1 for o in outcomes.values()):
            return Result(SAVED, f"stopped {after}, as a signal asked, before all ranks could save")
        return Result(1, f"failed {after}: {self._blame(code, outcomes, told)}", told)

    def _blame(self, code: int, outcomes: dict[int, Outcome], told: Verdict | None) -> str:
        """Which host was lost comes first, then what the ranks found out.

        Where they had not met yet: who is silent, then who complained, the earliest first, for the loss of one makes
        the others fail.
        """
        ranks = self.job.hosts.ranks()
        parts = []
        for host, own in ranks.items():
            silent = [r for r in own if r not in outcomes]
            if host in self.codes and silent:
                parts.append(f"{_ended(host, self.codes[host])}, {_ranks(silent)} without a word")
        if told:
            killed = f" ({name})" if told.kind == "died" and (name := _signal(code)) else ""
            stacks = outcome.folder(self.job.output, self.number)
            return "; ".join([*parts, f"{_shortened(told.line)}{killed}; stacks of all ranks: {stacks}/stacks-*.txt"])
        complaints = sorted((o for o in outcomes.values() if o.code not in (0, SAVED)), key=lambda o: o.time)
        parts += [f"rank {o.rank} on {o.host}: {_shortened(o.reason)}" for o in complaints[: 1 if parts else 2]]
        if not ranks and outcomes:
            everyone = range(max(o.ranks for o in outcomes.values()))
            if silent := [r for r in everyone if r not in outcomes]:
                parts.insert(0, f"{_ranks(silent)} ended without a word")
        return "; ".join(parts) or f"the launcher ended with {code}, and no rank said why"


def _shortened(reason: str) -> str:
    """Without the place in a library's sources, which gloo and NCCL begin with."""
    return textwrap.shorten(re.sub(r"\[\S+\.(cc|cpp):\d+\] ?", "", reason), 300, placeholder=" ...")


def _ended(host: str, code: int) -> str:
    if code == 255:
        return f"host {host} was lost (no answer, or ssh was cut)"
    killed = _signal(code)
    return f"on {host} a process was killed by {killed}" if killed else f"host {host} ended with {code}"


def _signal(code: int) -> str:
    """The name of the signal that an exit code speaks of; '' if it speaks of none."""
    number = 256 - code if code > 192 else code - 128  # DeepSpeed's launcher exits with -N, a shell with 128 + N
    return signal.Signals(number).name if number in signal.valid_signals() else ""


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def read_outcomes(records: Path) -> dict[int, Outcome]:
    found = {}
    for path in sorted(records.glob("rank-*.json")):
        record = Outcome(**json.loads(path.read_text(encoding="utf-8")))
        found[record.rank] = record
    return found


def _kill_group(process: "subprocess.Popen[str]") -> None:
    """The launcher and its ssh clients."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _signal_foreign_launcher(run: str) -> int:
    """mpirun and srun pass SIGUSR1 on to the ranks, wherever these are."""
    names = ("srun", "mpirun", "mpiexec", "orterun", "prterun")
    comms = {pid: Path(f"/proc/{pid}/comm") for pid in processes.processes(run)}
    found = [pid for pid, comm in comms.items() if comm.is_file() and comm.read_text().strip().startswith(names)]
    return processes.send(found, signal.SIGUSR1)
