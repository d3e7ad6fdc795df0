"""The shell scripts that start training; `srun` and `scontrol` are stand-ins that note how they were called."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCHERS = Path(__file__).parents[2] / "launchers"

SCONTROL = """#!/bin/sh
[ "$1" = show ] && echo node1 && echo node2 && exit
echo "$@" >>"$LOG"
"""
# Runs the task as task 0 without srun's own options, or hangs until a signal as srun does.
SRUN = """#!/bin/sh
echo "srun $*" >>"$LOG"
while case "$1" in --*) true ;; *) false ;; esac; do shift; done
SLURM_PROCID=0 SLURM_NODEID=0 exec "$@"
"""


@pytest.fixture
def submit(tmp_path: Path):
    """Starts train.slurm as a job of two nodes whose Python does as told; returns the process."""
    for name, content in (("scontrol", SCONTROL), ("srun", SRUN), ("sleep", "#!/bin/sh\n")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)

    def start(python: str, *arguments: str, **environment: str) -> subprocess.Popen:
        (tmp_path / ".venv/bin/python").write_text(f"#!{sys.executable}\n{python}\n")
        (tmp_path / ".venv/bin/python").chmod(0o755)
        env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            **{"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "TMPDIR": str(tmp_path)},
            **{"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[1-2]"},
            **environment,
        }
        command = ["bash", str(LAUNCHERS / "train.slurm"), *arguments]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    start.log = tmp_path / "log"  # type: ignore[attr-defined]
    return start


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCHERS.glob("*.s*")))
def test_scripts_parse(script: str) -> None:
    assert subprocess.run(["bash", "-n", LAUNCHERS / script], capture_output=True).stderr == b""


def test_train_shows_the_launchers_help() -> None:
    if not (LAUNCHERS.parent / ".venv/bin/python").exists():
        pytest.skip("no .venv beside launchers/")
    told = subprocess.run([LAUNCHERS / "train.sh", "--help"], capture_output=True, text=True)
    assert told.returncode == 0 and "--max-restarts" in told.stdout and "--hostfile" in told.stdout


@pytest.mark.parametrize(("code", "ends", "requeued"), [(0, 0, False), (75, 75, True), (2, 2, False), (1, 1, False)])
def test_only_a_saved_run_is_queued_again(submit, code: int, ends: int, requeued: bool) -> None:
    """srun passes on the highest code of all tasks, and ends the others when one is not 0: 75 must not reach it."""
    job = submit(f"import sys; print(sys.argv[1:]); sys.exit({code})", "recipe.toml", "--output", "o")
    told, _ = job.communicate(timeout=60)
    assert job.returncode == ends, told
    assert "['-m', 'laser_dist.train', 'recipe.toml', '--output', 'o']" in told
    assert ("requeue 41" in submit.log.read_text()) == requeued


def test_a_job_that_was_queued_again_resumes(submit) -> None:
    job = submit("import sys; print(sys.argv[1:])", "recipe.toml", SLURM_RESTART_COUNT="1")
    assert "'recipe.toml', '--resume']" in job.communicate(timeout=60)[0]


def test_a_signal_to_the_job_reaches_the_ranks(submit) -> None:
    rank = (
        "import signal, sys, time\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    job = submit(rank, "recipe.toml")
    assert job.stdout.readline() == "ready\n"
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    job.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert children.read_text()  # the batch shell waits for its ranks
    # srun passes a signal on to its tasks; its stand-in is the task's shell, whose child is the rank.
    task = children.read_text().split()[0]
    os.kill(int(Path(f"/proc/{task}/task/{task}/children").read_text().split()[0]), signal.SIGUSR1)
    told, _ = job.communicate(timeout=60)
    assert job.returncode == 75 and "back into the queue" in told
    assert "requeue 41" in submit.log.read_text()


def test_deepspeeds_form_starts_a_launcher_on_each_node(submit) -> None:
    arguments = ["recipe.toml", "--output", "o"]
    job = submit("import sys; print(*sys.argv[1:])", *arguments, LAUNCH="deepspeed", SLOTS="4")
    told, _ = job.communicate(timeout=60)
    assert "-m laser_dist.cli launch --no_ssh --node_rank 0 --hostfile" in told
    assert "--master_addr node1 --master_port 20041 recipe.toml --output o" in told
    assert "--ntasks-per-node=1" in submit.log.read_text()


def test_a_job_without_a_recipe_or_an_environment_says_so(submit) -> None:
    job = submit("")
    assert "name a recipe" in job.communicate(timeout=60)[0] and job.returncode == 2
    job = submit("", "recipe.toml", LASER_DIST_ROOT="/no/such")
    assert "/no/such/.venv" in job.communicate(timeout=60)[0] and job.returncode == 2
