"""One run over two hosts, each with its own network, processes and sshd; hosts die and the run goes on exactly.

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
from laser_dist.testing import tiny_model_folder
from laser_dist.testing.hosts import Cluster, hosts, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=f"two hosts: {missing()}")]

STEPS = 6


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
def whole(cluster: Cluster, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "run"
    launched = Launched(cluster, recipe, output)
    assert launched.wait() == 0, launched.told()
    assert "attempt 1 of 1 finished" in launched.told()
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


def test_two_hosts_train_as_one(whole: Path) -> None:
    told = whole.with_suffix(".log").read_text()
    assert "alpha: preflight: 2 ranks alike" in told
    assert "alpha: preflight: beta (rank 1)" in told
    assert told.count(f"step 1/{STEPS} ") == 1  # rank 0 alone speaks
    assert len(losses(whole)) == STEPS


@pytest.mark.parametrize("fault", ["power", "link"])
def test_a_lost_host_is_named_and_the_run_goes_on_exactly(
    cluster: Cluster, recipe: Path, whole: Path, tmp_path: Path, fault: str
) -> None:
    """A cut link once left the other host's ranks waiting for gloo's half hour, and its own ones holding the run."""
    output = tmp_path / "run"
    launched = Launched(cluster, recipe, output, "--max-restarts", "1", "--backoff", "1")
    launched.wait_for((output / "checkpoints/step-000002/manifest.json").is_file)
    began = time.monotonic()
    beta = cluster.hosts["beta"]
    if fault == "power":
        beta.power_off()
    else:
        beta.link("down")
    launched.wait_for(lambda: "attempt 1 of 2 failed" in launched.told(), seconds=120)
    assert time.monotonic() - began < 120
    verdict = next(line for line in launched.told().splitlines() if "attempt 1 of 2 failed" in line)
    assert "host beta was lost" in verdict and "rank 1 without a word" in verdict
    assert not cluster.hosts["alpha"].processes()
    if fault == "power":
        cluster.revive("beta")
    else:
        assert beta.processes(), "cut off, its rank still waits"
        beta.link("up")
    assert launched.wait() == 0, launched.told()
    assert "restart 1 of 1" in launched.told() and "attempt 2 of 2 finished" in launched.told()
    require_same(output, whole)
    assert not any(host.processes() for host in cluster.hosts.values())


@pytest.mark.long
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
