"""What is wrong with the machine itself, and how it is mended."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from laser_dist.launch.options import DEFAULT_PORT
from laser_dist.launch.ranks import free_port

FOLDER = "LASER_DIST_BENCH_FOLDER"
"""Environment variable: the folder that is on the disk in question."""


def make_read_only(folder: Path) -> None:
    """Nothing can be written below the folder. For root, whom permissions do not stop, it is mounted read-only."""
    if os.geteuid() == 0:
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    else:
        _chmod(folder, 0o500)


def make_writable(folder: Path) -> None:
    """As it was."""
    if os.geteuid() != 0:
        _chmod(folder, 0o700)
    else:  # fails where it is not mounted
        subprocess.run(["umount", "--lazy", folder], stderr=subprocess.DEVNULL)


def _chmod(folder: Path, mode: int) -> None:
    for path, _, _ in os.walk(folder):
        os.chmod(path, mode)


@contextmanager
def disturbed(fault: str, folder: Path) -> Iterator[list[str]]:
    """The launcher's options for a run into `folder` while that is wrong with the machine; "": nothing is."""
    with ExitStack() as mending:
        mending.callback(make_writable, folder)
        port = free_port()
        if fault == "the run's folder takes no writes":
            folder.mkdir()
            make_read_only(folder)
        elif fault == "the usual port is taken":
            mending.enter_context(_listener(int(DEFAULT_PORT)))
            yield []
            return
        elif fault == "the port asked for is taken":
            mending.enter_context(_listener(port))
        yield ["--master_port", str(port)]


def _listener(port: int) -> socket.socket:
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("", port))
    listening.listen()
    return listening
