"""Runs over two hosts, each with its own network, processes and sshd; hosts die and the run goes on exactly.

Needs root and the tools that `laser_dist.testing.hosts.missing` lists; skipped, saying why, where they are not.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from laser_dist.data import sample_folder
from laser_dist.data.preparation import prepare
from laser_dist.testing import run_command, tiny_model_folder
from laser_dist.testing.hosts import Cluster, hosts, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=f"two hosts: {missing()}")]

STEPS = 12


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("setting")
    tiny_model_folder(root / "model")
    rows = [json.loads(line) for line in (sample_folder() / "train.jsonl").read_text().splitlines()[:12]]
    for row in rows:
        row["query"], row["rationale"] = row["query"][:60], row["rationale"][:120]
        for passage in row["positives"] + row["negatives"]:
            passage["text"] = passage["text"][:60]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.main(["--source", str(root / "train.jsonl"), "--out", str(root / "shards")])
    (root / "recipe.toml").write_text(
        f'[model]\nname = "{root}/model"\ndtype = "float32"\n'
        f'[data]\ntrain = "{root}/shards"\nworkers = 0\n'
        f'[train]\nqueries_per_rank = 2\nmax_steps = {STEPS}\ndeepspeed = "zero3-test"\n'
        "[checkpoint]\nevery = 2\nkeep = 9\n"
    )
    return root / "recipe.toml"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with hosts(["alpha", "beta"], tmp_path_factory.mktemp("ssh")) as cluster:
        # A lost host is noticed after 12 seconds, not 30: a user's own options go before ours.
        cluster.environment["PDSH_SSH_ARGS_APPEND"] += " -o ServerAliveInterval=4"
        yield cluster


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one host that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "run"
    done = run_command("train", recipe, "--output", output, ranks=2, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return output


class Launched:
    """`launchers/train.sh` on the two hosts, one rank on each."""

    def __init__(self, cluster: Cluster, recipe: Path, output: Path, *options: str, training: tuple[str, ...] = ()):
        self.log = output.with_suffix(".log")
        hostfile = cluster.hostfile(output.with_suffix(".hosts"), slots=1)
        environment = {**os.environ, **cluster.environment, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "laser_dist.cli", "launch", "--hostfile", str(hostfile), *options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, str(recipe), "--output", str(output), *training],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def told(self) -> str:
        return self.log.read_text()

    def wait_for(self, condition, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.told()
            time.sleep(0.02)

    def wait(self) -> int:
        return self.process.wait(timeout=300)


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss/total"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def require_same(output: Path, whole: Path) -> None:
    """Every step logged once with the same loss, and the last parameters bit for bit."""
    assert len(losses(whole)) == STEPS and losses(output) == losses(whole)
    expected, actual = (
        load_file(run / f"checkpoints/step-{STEPS:06d}/model/model.safetensors") for run in (whole, output)
    )
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_lost_hosts_are_named_and_the_run_goes_on_exactly(
    cluster: Cluster, recipe: Path, whole: Path, tmp_path: Path
) -> None:
    """Two hosts train as one; first a host loses its power, then its network, and both are waited for.

    A cut link once left the other host's ranks waiting for gloo's half hour, and its own ones holding the run.
    """
    output = tmp_path / "run"
    launched = Launched(cluster, recipe, output, "--max-restarts", "2", "--backoff", "1")
    alpha, beta = cluster.hosts["alpha"], cluster.hosts["beta"]
    launched.wait_for((output / "checkpoints/step-000002/manifest.json").is_file)
    beta.power_off()
    lost(launched, 1)
    assert not alpha.processes()
    cluster.revive("beta")
    beta = cluster.hosts["beta"]
    launched.wait_for((output / "checkpoints/step-000008/manifest.json").is_file)
    beta.link("down")
    lost(launched, 2)
    assert not alpha.processes() and beta.processes(), "cut off, its rank still waits"
    beta.link("up")
    assert launched.wait() == 0, launched.told()
    told = launched.told()
    assert "restart 2 of 2" in told and "attempt 3 of 3 finished" in told
    assert told.count("alpha: preflight: 2 ranks alike") == told.count("alpha: preflight: beta (rank 1)") == 3
    assert told.count(f"step 1/{STEPS} ") == 1  # rank 0 alone speaks
    require_same(output, whole)
    assert not any(host.processes() for host in cluster.hosts.values())


def lost(launched: Launched, attempt: int) -> None:
    """Beta's loss ends the attempt, and is its verdict."""
    began, head = time.monotonic(), f"attempt {attempt} of 3 failed"
    launched.wait_for(lambda: head in launched.told(), seconds=120)
    assert time.monotonic() - began < 120
    verdict = next(line for line in launched.told().splitlines() if head in line)
    assert "host beta was lost" in verdict and "rank 1 without a word" in verdict


def test_a_signal_to_the_launcher_saves_on_all_hosts(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    """DeepSpeed's own launcher passes nothing on to the other hosts' ranks before it kills them."""
    output = tmp_path / "run"
    launched = Launched(cluster, recipe, output, "--max-restarts", "3", training=("--train.max-steps", "1000"))
    launched.wait_for(lambda: "step 1/" in launched.told())
    launched.process.terminate()
    assert launched.wait() == 75, launched.told()
    assert "1 on alpha, 1 on beta" in launched.told() and "saved and stopped" in launched.told()
    assert "restart" not in launched.told()
    assert not any(host.processes() for host in cluster.hosts.values())
    saved = [int(folder.name.split("-")[1]) for folder in (output / "checkpoints").glob("step-*")]
    assert 0 < max(saved) < 1000 and len(losses(output)) == max(saved)
