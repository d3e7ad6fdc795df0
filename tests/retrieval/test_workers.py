"""A pool gives the vectors of one process, in order; a dead worker is an error and not a hang."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from laser_dist import LaserEncoder
from laser_dist.config import ModelConfig, RunConfig
from laser_dist.errors import UserError
from laser_dist.retrieval.workers import WorkerFailed, Workers
from laser_dist.testing import tiny_model_folder

TEXTS = ["why does ice float on water? " * (i * 5 % 13 + 1) for i in range(60)]
RATIONALES = ["Density.\n\nIce is lighter. " * (i * 3 % 5 + 1) for i in range(60)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tiny_model_folder(tmp_path_factory.mktemp("tiny"), architecture="qwen3", chat_template=True)
    return LaserEncoder.from_pretrained(folder, device="cpu", batch_tokens=300)


@pytest.fixture(scope="module")
def pooled(encoder):
    with encoder.pool(["cpu", "cpu"]) as pool:
        yield pool


def processes(pool):
    return [worker._process for worker in pool._workers._all]


def test_vectors_are_those_of_one_process(encoder, pooled):
    for encode in ("encode_queries", "encode_passages"):
        expected = getattr(encoder, encode)(TEXTS, steps=2, dim=20)
        np.testing.assert_allclose(getattr(pooled, encode)(TEXTS, steps=2, dim=20), expected, atol=1e-6)
    expected = encoder.encode_queries(TEXTS, instructions="Find it", rationales=RATIONALES)
    found = pooled.encode_queries(TEXTS, instructions="Find it", rationales=RATIONALES)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert pooled.encode_passages([]).shape == (0, 48)
    with pytest.raises(UserError, match="texts"):
        pooled.encode_passages([""])
    assert len(pooled.encode_passages(TEXTS[:1])) == 1


def test_every_worker_takes_part(pooled, monkeypatch):
    took = set()
    real = type(pooled._workers._all[0]).answer
    monkeypatch.setattr(
        type(pooled._workers._all[0]), "answer", lambda worker: (took.add(worker._process.pid), real(worker))[1]
    )
    pooled.encode_passages(TEXTS)
    assert took == {process.pid for process in processes(pooled)}


def test_workers_end_with_their_parent(encoder, tmp_path):
    """The parent is a script that nobody can import and that has no main guard; it dies without leaving the block."""
    script = f"""
import os
from laser_dist import LaserEncoder
encoder = LaserEncoder.from_pretrained({encoder._origin["folder"]!r}, device="cpu")
with encoder.pool(["cpu"]) as pool:
    print(pool.encode_passages(["ice"]).shape, pool._workers._all[0]._process.pid, flush=True)
    os._exit(0)
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-"], input=script, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("(1, 48) "), done.stderr
    pid = int(done.stdout.split()[-1])
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{pid}/stat") as file:
            if file.read().split()[2] == "Z":  # nobody here waits for it
                return
        threading.Event().wait(0.05)
    pytest.fail("the worker outlived its parent")


def test_what_cannot_be_pooled_is_told(encoder):
    for devices in ([], "cpu"):
        with pytest.raises(UserError, match="devices"), encoder.pool(devices):
            pass
    with pytest.raises(UserError, match="device 'cuda:99'"), encoder.pool(["cpu", "cuda:99"]):
        pass
    with pytest.raises(UserError, match="/absent: this folder does not exist"):
        Workers({"folder": "/absent"}, ["cpu"])
    untrained = LaserEncoder.from_config(RunConfig(model=ModelConfig(name=encoder._origin["folder"])))
    with pytest.raises(UserError, match="from_pretrained"), untrained.pool(["cpu"]):
        pass


def test_a_worker_that_dies_is_an_error(pooled):
    """The last test of this file: it ends the pool that the others share."""
    both = processes(pooled)
    os.kill(both[1].pid, signal.SIGSTOP)  # so that it cannot have answered
    threading.Timer(0.5, both[1].kill).start()
    with pytest.raises(WorkerFailed, match="on cpu ended with code -9"):
        pooled.encode_passages(TEXTS)
    assert all(process.poll() is not None for process in both)
    with pytest.raises(WorkerFailed):
        pooled.encode_passages(TEXTS)
