"""Hosts on one machine, for tests: each has its own network, process table, host name and sshd.

A host is a network namespace on a common bridge, and a process namespace whose first process is its sshd: when that
is killed, everything on the host dies at once, as in a power cut. Files are shared, as on a cluster's storage. Needs
root, iproute2, unshare (util-linux), an OpenSSH server and pdsh.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("ip", "unshare", "setpriv", "ssh", "ssh-keygen", "sshd", "pdsh")
SUBNET = "10.77.0"
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def missing() -> str | None:
    """Why this machine cannot pretend to be several; None if it can."""
    if lacking := [tool for tool in TOOLS if not shutil.which(tool, path=_PATH)]:
        return f"not installed: {', '.join(lacking)} (Debian: iproute2 util-linux openssh-server pdsh)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if _run("unshare", "--net", "--pid", "--fork", "true", check=False):
        return "this machine does not let us make namespaces"
    return None


@dataclass(frozen=True)
class Host:
    """One of the pretended machines."""

    name: str
    address: str
    namespace: str
    sshd: int
    """Process id of its first process, seen from outside."""

    def power_off(self) -> None:
        """Every process of the host dies at once; the kernel still closes their connections."""
        os.kill(self.sshd, signal.SIGKILL)

    def link(self, state: str) -> None:
        """`down` or `up`: with its link down the host lives on, but nothing reaches it and nobody hears from it."""
        _run("ip", "-n", self.namespace, "link", "set", "eth0", state)

    def processes(self) -> list[int]:
        """Process ids, seen from outside, of all that runs on the host besides its sshd."""
        own = os.stat(f"/proc/{self.sshd}/ns/pid").st_ino
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.stat(entry / "ns/pid").st_ino == own and "sshd" not in (entry / "comm").read_text():
                    found.append(int(entry.name))
        return found


@dataclass(frozen=True)
class Cluster:
    """Hosts by name, and the environment in which `ssh NAME` and `pdsh -w NAME` reach them."""

    folder: Path
    """Keys and configurations of ssh."""
    hosts: dict[str, Host]
    environment: dict[str, str]

    def hostfile(self, path: Path, slots: int) -> Path:
        path.write_text("".join(f"{name} slots={slots}\n" for name in self.hosts))
        return path

    def revive(self, name: str) -> None:
        """Switch a host on again after `power_off`."""
        old = self.hosts[name]
        self.hosts[name] = _boot(self.folder, name, old.address, old.namespace)


@contextmanager
def hosts(names: list[str], folder: Path) -> Iterator[Cluster]:
    """Hosts of these names until the block ends; then nothing of them is left, however it ends."""
    _remove_orphans()
    mark = f"ld{os.getpid()}"  # interface names have at most 15 characters
    bridge = f"{mark}br"
    cluster = Cluster(folder, {}, {})
    namespaces = {name: f"{mark}-{name}" for name in names}
    try:
        _keys(folder)
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "address", "add", f"{SUBNET}.254/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        for number, (name, namespace) in enumerate(namespaces.items(), 1):
            _connect(namespace, f"{SUBNET}.{number}", bridge, f"{mark}v{number}")
            cluster.hosts[name] = _boot(folder, name, f"{SUBNET}.{number}", namespace)
        addresses = {name: host.address for name, host in cluster.hosts.items()}
        cluster.environment.update(PDSH_SSH_ARGS_APPEND=f"-F {_client(folder, addresses)}")
        yield cluster
    finally:
        for host in cluster.hosts.values():
            with suppress(ProcessLookupError):
                host.power_off()
        for namespace in namespaces.values():
            _run("ip", "netns", "delete", namespace, check=False)
        _run("ip", "link", "delete", bridge, check=False)


def _remove_orphans() -> None:
    """Networks of a test that was killed: its hosts died with it, their names did not."""
    names = [path.name for path in Path("/run/netns").glob("ld*-*")]
    links = [path.name for path in Path("/sys/class/net").glob("ld*br")]
    for name in names + links:
        owner = re.match(r"ld(\d+)", name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            _run("ip", *(("netns",) if name in names else ("link",)), "delete", name, check=False)


def _keys(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("host_key", "user_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd confines itself; the service would make it


def _connect(namespace: str, address: str, bridge: str, link: str) -> None:
    """A network of its own; its interface has the same name on every host, as GLOO_SOCKET_IFNAME needs it."""
    _run("ip", "netns", "add", namespace)
    _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _run("ip", "link", "set", link, "master", bridge, "up")
    _run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _run("ip", "-n", namespace, "link", "set", device, "up")


def _boot(folder: Path, name: str, address: str, namespace: str) -> Host:
    config = folder / f"sshd_{name}"
    config.write_text(
        f"ListenAddress {address}:22\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\n"
        "PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
    )
    sshd = shutil.which("sshd", path=_PATH)
    script = f"hostname {name}; exec {sshd} -D -e -f {config}"
    # The host ends with this process, even when that is killed.
    command = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", namespace]
    command += ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts", "sh", "-c", script]
    log = folder / f"sshd_{name}.log"
    with log.open("wb") as output:
        outer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=_environment())
    deadline = time.monotonic() + 10
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    while "listening" not in log.read_text():
        if outer.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{name}'s sshd did not start:\n{log.read_text()}")
        time.sleep(0.02)
    return Host(name, address, namespace, int(children.read_text().split()[0]))


def _client(folder: Path, addresses: dict[str, str]) -> Path:
    """A private ssh configuration, so that nobody's own is read or written."""
    config = folder / "ssh_config"
    config.write_text(
        "".join(f"Host {name}\n  HostName {address}\n" for name, address in addresses.items())
        + f"Host *\n  User root\n  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n  BatchMode yes\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    return config


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": _PATH}


def _run(*command: str, check: bool = True) -> int:
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.returncode
