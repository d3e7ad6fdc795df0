"""`laser-dist launch`: DeepSpeed's launcher under supervision, and again after a failure."""

import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from laser_dist.errors import UserError
from laser_dist.launch.attempt import SAVED, Attempt, Result, Signals
from laser_dist.launch.options import DEFAULT_PORT, HELP, Job, parse
from laser_dist.launch.ranks import free_port, port_is_free
from laser_dist.observability.ledger import process_age, supervised
from laser_dist.run_folder import latest_checkpoint
from laser_dist.run_page.report import page_at_end
from laser_dist.watch.pulse import STEPPING
from laser_dist.watch.verdict import Verdict

LONGEST_BACKOFF = 300.0
WAIT_FOR_HOSTS = 600.0
"""Seconds that a host may take to come back before a restart; a reboot takes minutes."""
HOW = {0: "finished", SAVED: "stopped"}
"""An attempt's end for the ledger, by its code."""


def main(arguments: list[str]) -> int:
    """Returns 0 when the run is finished, 2 after a user error, 75 after a clean stop, 1 after the last failure."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    job = parse(arguments)
    with Signals() as signals:
        job = _ready(job)
        with page_at_end(job.output):  # rank 0 writes it, too, unless it was killed
            return _supervise(job, signals).code


def say(line: str) -> None:
    print(f"launch: {line}", file=sys.stderr, flush=True)


def _ready(job: Job) -> Job:
    """All hosts answer, none of them still works on this run, and rank 0's address is known."""
    running = job.hosts.processes(job.output, "end" if job.takeover else "count")
    if silent := [host for host, number in running.items() if number is None]:
        raise UserError(
            f"{', '.join(silent)}: no answer over ssh, or no {sys.executable} there. Try `pdsh -R ssh -w {silent[0]} "
            f"{sys.executable} --version`, or leave the host out with --exclude {silent[0]}"
        )
    if not job.takeover and (busy := [f"{n} on {host}" for host, n in running.items() if n]):
        raise UserError(
            f"{job.output}: processes of this run are still there ({', '.join(busy)}): wait for it, choose another "
            "--output, or end them with --takeover"
        )
    if job.alone:
        return replace(job, launcher={**job.launcher, "--master_port": str(_port(job))})
    if not job.hosts.remote or "--master_addr" in job.launcher:
        return job
    first = next(iter(job.hosts.slots))
    addresses = job.hosts.run("hostname -I", only=first).get(first, "").split()
    if not addresses:
        raise UserError(f"{first} does not tell its address (hostname -I): give it with --master_addr")
    return replace(job, launcher={**job.launcher, "--master_addr": addresses[0]})


def _port(job: Job) -> int:
    """Where the ranks of this host meet: the port asked for, DeepSpeed's own, or a free one where that is taken."""
    asked = job.launcher.get("--master_port") or os.environ.get("MASTER_PORT")
    port = int(asked or DEFAULT_PORT)
    if port_is_free(port):
        return port
    if asked:
        raise UserError(
            f"--master_port {port}: another process of this host listens there. End it, name another port, or leave "
            "the option out: a free one is then chosen"
        )
    return free_port()


def _supervise(job: Job, signals: Signals) -> Result:
    """Attempts, until one ends the run or there is no use in another. A line for each: what happened, what is next."""
    progress = [_progress(job.output)]
    died_at: list[int] = []
    for number in range(1, job.max_restarts + 2):
        supervised(job.output, "attempt", progress[-1], ago=process_age() if number == 1 else 0.0)
        result = Attempt(job, number, signals, say).run()
        supervised(job.output, "over", _progress(job.output), how=HOW.get(result.code, "failed"))
        head = f"attempt {number} of {job.max_restarts + 1} {result.verdict}"
        if result.code != 1 or signals.count:
            say(head)
            return result
        progress.append(_progress(job.output))
        where = f"step {progress[-1]}" if progress[-1] else "no checkpoint yet"
        poisoned = _poisoned(result.told, died_at)
        skips = job.skip_poisoned_step and poisoned is not None
        if final := _no_restart(job, number, progress, poisoned, skips=skips):
            say(f"{head}; {final} ({where}); " + ("--resume goes on from there" if progress[-1] else "start it again"))
            return result
        if skips and poisoned:
            job = _without(job, poisoned)
            head += f"; step {poisoned.step} killed the run twice and is passed over, see launch/poisoned.jsonl"
        pause = min(job.backoff * 2 ** (number - 1), LONGEST_BACKOFF)
        say(f"{head}; restart {number} of {job.max_restarts} in {pause:.0f} s, from {where}")
        if not _wait(pause, signals) or not _hosts_back(job, signals):
            return replace(result, code=SAVED) if signals.count else result
    raise AssertionError("unreachable")


def _poisoned(told: Verdict | None, died_at: list[int]) -> Verdict | None:
    """The verdict, if its step has killed an attempt before; notes the step that this one died at."""
    if told is None or told.phase not in STEPPING:
        return None
    died_at.append(told.step)
    return told if died_at.count(told.step) > 1 else None


def _no_restart(job: Job, number: int, progress: list[int], poisoned: Verdict | None, *, skips: bool) -> str:
    """Why another attempt would be of no use; '' if it may be, as it is where it `skips` what killed this one."""
    if poisoned and not skips:
        queries = ", ".join(poisoned.queries) or "not known"
        return (
            f"no restart: step {poisoned.step} killed the run twice; queries of rank {poisoned.rank}'s micro-batch: "
            f"{queries}. Look at them and at the stacks, or go on without them with --skip-poisoned-step"
        )
    if number > job.max_restarts:
        return "no restart is left" if job.max_restarts else "no restart was asked for with --max-restarts"
    if number > 1 and progress[-1] == progress[-2] and not skips:
        return "no restart: two failures in a row without a new checkpoint"
    return ""


def _without(job: Job, poisoned: Verdict) -> Job:
    """The run without the examples of a step, which is on record."""
    with (job.output / "launch" / "poisoned.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(poisoned), ensure_ascii=False) + "\n")
    steps = (*job.config.data.skip_steps, poisoned.step)
    return replace(job, config=replace(job.config, data=replace(job.config.data, skip_steps=steps)))


def _progress(output: Path) -> int:
    """Step of the newest complete checkpoint; 0 if there is none."""
    try:
        return int(latest_checkpoint(output).name.partition("-")[2])
    except (UserError, ValueError):
        return 0


def _hosts_back(job: Job, signals: Signals) -> bool:
    """Wait until every host answers, and end there what the last attempt left."""
    deadline = time.monotonic() + WAIT_FOR_HOSTS
    told: list[str] = []
    while silent := [host for host, n in job.hosts.processes(job.output, "end").items() if n is None]:
        if silent != told:
            say(f"waiting up to {WAIT_FOR_HOSTS:.0f} s for {', '.join(silent)} to answer")
            told = silent
        if time.monotonic() > deadline:
            say(f"no restart: {', '.join(silent)} did not come back; leave it out with --exclude {silent[0]}")
            return False
        if not _wait(5, signals):
            return False
    return True


def _wait(seconds: float, signals: Signals) -> bool:
    """False if a signal came meanwhile."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not signals.count:
        time.sleep(0.1)
    if signals.count:
        say(f"{signals.name}: no restart; --resume goes on")
    return not signals.count
