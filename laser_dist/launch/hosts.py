"""Which hosts a run uses, as DeepSpeed's launcher will resolve them, and commands on all of them at once.

DeepSpeed answers a missing hostfile with a run on this machine alone, and reads a malformed one into a traceback; here
both are refused first. Its rules are repeated, because importing DeepSpeed takes seconds; a test compares the two.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from laser_dist.errors import UserError
from laser_dist.launch import processes

DEFAULT_HOSTFILE = Path("/job/hostfile")
"""Read by DeepSpeed when it exists and no other is named."""

# A host that is gone without a word is noticed after 30 seconds; nobody is there to type a password.
SSH_OPTIONS = "-o ServerAliveInterval=10 -o ServerAliveCountMax=3 -o ConnectTimeout=10 -o BatchMode=yes"
EXITED = re.compile(r"^pdsh@\S+: (\S+): ssh exited with exit code (\d+)$")
"""pdsh's line for a host whose command failed; ssh's own code is 255, for a host that was lost or cannot be reached."""


def read_hostfile(path: Path) -> dict[str, list[int]]:
    """`name slots=N` per line -> host -> its slots, in order. UserError with the line that is wrong."""
    if not path.is_file():
        raise UserError(f"--hostfile {path}: no such file; write a line `name slots=8` for each host")
    hosts: dict[str, list[int]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)(\s*#.*)?", line)
        if not match or not int(match[2]):
            raise UserError(f"{path}:{number}: {line!r} is not `name slots=N` with N of 1 or more")
        if match[1] in hosts:
            raise UserError(f"{path}:{number}: {match[1]} appears twice; give it all its slots in one line")
        hosts[match[1]] = list(range(int(match[2])))
    if not hosts:
        raise UserError(f"{path} names no host; write a line `name slots=8` for each")
    return hosts


def chosen(
    hosts: dict[str, list[int]], *, include: str = "", exclude: str = "", nodes: int = -1, slots: int = -1
) -> dict[str, list[int]]:
    """The hosts and slots that DeepSpeed's --include, --exclude, --num_nodes and --num_gpus leave."""
    if (include or exclude) and (nodes >= 0 or slots >= 0) or (include and exclude):
        raise UserError("give one of --include, --exclude, or --num_nodes and --num_gpus")
    if include or exclude:
        named = _filter(include or exclude, hosts)
        if include:
            left = {host: named[host] or hosts[host] for host in hosts if host in named}
        else:
            gone = {host: named[host] or hosts[host] for host in named}
            left = {host: [s for s in own if s not in gone.get(host, ())] for host, own in hosts.items()}
        hosts = {host: own for host, own in left.items() if own}
        if not hosts:
            raise UserError(f"--exclude {exclude}: leaves no host")
    if nodes > len(hosts):
        raise UserError(f"--num_nodes {nodes}: the hostfile has {len(hosts)} hosts")
    kept = list(hosts)[:nodes] if nodes > 0 else list(hosts)
    return {host: list(range(slots)) if slots > 0 else hosts[host] for host in kept}


def _filter(text: str, hosts: dict[str, list[int]]) -> dict[str, list[int]]:
    """`host@host:0,2` -> host -> slots named, [] for all."""
    named: dict[str, list[int]] = {}
    for part in text.split("@"):
        host, _, slots = part.partition(":")
        if host not in hosts:
            raise UserError(f"{text!r}: host {host!r} is not in the hostfile ({', '.join(hosts)})")
        try:
            numbers = [int(slot) for slot in slots.split(",")] if slots else []
        except ValueError:
            raise UserError(f"{text!r}: write host:0,2 for slots 0 and 2 of a host, @ between hosts") from None
        if beyond := [number for number in numbers if number not in hosts[host]]:
            raise UserError(f"{text!r}: {host} has slots 0 to {len(hosts[host]) - 1}, not {beyond[0]}")
        named[host] = sorted({*named.get(host, []), *numbers})
    return named


@dataclass(frozen=True)
class Hosts:
    """The hosts of a run; `slots` is empty for a run on this machine alone, which needs no ssh."""

    slots: dict[str, list[int]]

    @property
    def remote(self) -> bool:
        return bool(self.slots)

    def ranks(self) -> dict[str, range]:
        """Host -> its ranks."""
        found, first = {}, 0
        for host, own in self.slots.items():
            found[host] = range(first, first + len(own))
            first += len(own)
        return found

    def processes(self, run: Path, action: str) -> dict[str, int | None]:
        """count, stop or end the processes of a run; host -> how many, None for a host that does not answer."""
        if not self.remote:
            act = {"count": lambda name: len(processes.processes(name)), "stop": processes.stop, "end": processes.end}
            return {"this host": act[action](str(run))}
        command = shlex.join([sys.executable, "-I", processes.__file__, str(run), action])
        answers = self.run(command)
        return {host: int(answers[host]) if answers.get(host, "").isdigit() else None for host in self.slots}

    def run(self, command: str, only: str | None = None) -> dict[str, str]:
        """Run a shell command on all hosts or one; host -> its last line of output, for those that answered."""
        done = subprocess.run(
            ["pdsh", "-f", "1024", "-w", only or ",".join(self.slots), command],
            env=ssh_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            start_new_session=True,  # a Ctrl-C is the supervisor's to handle
        )
        pairs = (line.partition(": ") for line in done.stdout.splitlines())
        return {host: text.strip() for host, _, text in pairs}

    def require_ssh(self) -> None:
        if self.remote and not shutil.which("pdsh"):
            raise UserError("several hosts need pdsh on this one (Debian, Ubuntu: apt install pdsh)")


def ssh_environment() -> dict[str, str]:
    """Environment for pdsh; options of the user's own come first, and with ssh the first one counts."""
    own = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
    return {**os.environ, "PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": f"{own} {SSH_OPTIONS}".strip()}
