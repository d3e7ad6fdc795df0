"""Two ranks that differ in one thing: one error, the same on both, and nobody waits for the other."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from laser_dist.config import DataConfig, ModelConfig, RunConfig
from laser_dist.data.streaming.sets import TrainingData
from laser_dist.errors import UserError
from laser_dist.launch import facts
from laser_dist.launch.facts import Facts
from laser_dist.launch.preflight import checkpoint_bytes, differences, preflight, report
from laser_dist.testing import run_distributed, tiny_model_folder


def checked(rank: int, world_size: int, root: Path, fault: str) -> str:
    """Run the check with a fault on rank 1; the message of its error, or ''."""
    os.chdir(root)
    facts.socket.gethostname = lambda: ["alpha", "beta"][rank]
    if rank == 1 and fault == "version":
        known = facts.versions()
        facts.versions = lambda: {**known, "torch": "2.12.1"}
    if rank == 1 and fault == "model":
        shutil.copytree("model", "other")
        with open("other/model.safetensors", "ab") as file:
            file.write(b"x")
        original = facts.model_files
        facts.model_files = lambda _: original(ModelConfig(name="other"))
    if rank == 1 and fault == "not shared":
        shutil.copytree("model", "elsewhere/model")
        os.chdir("elsewhere")
    # One recipe for both: where they differ, it is by what lies under its names.
    output = "blocked/run" if fault == "unwritable" else "run"
    config = RunConfig(output=output, model=ModelConfig(name="model"), data=DataConfig(train="shards"))
    try:
        preflight(config, {}, TrainingData(()), torch.device("cpu"))
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny_model_folder(tmp_path / "model", layers=1)
    return tmp_path


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        ("version", ["torch: ", "2.12.1 on beta (rank 1)", "on alpha (rank 0)"]),
        ("model", ["model model: ", "on beta (rank 1)"]),
        ("not shared", ["must be shared by all hosts (rank 1 on beta)"]),
        ("unwritable", ["output blocked/run: cannot be written to"]),
    ],
)
def test_a_difference_is_the_same_error_on_all_ranks(root: Path, fault: str, parts: list[str]) -> None:
    if fault == "unwritable":
        (root / "blocked").touch()
    own, other = run_distributed(checked, 2, root, fault, init=True, timeout=120)
    assert own == other
    assert all(part in own for part in parts), own
    assert not list(root.rglob(".preflight-*"))


def test_hosts_that_are_alike_pass_with_a_line_each(root: Path) -> None:
    assert run_distributed(checked, 2, root, "", init=True, timeout=120) == ["", ""]
    assert not list(root.rglob(".preflight-*"))


def test_differences_name_ranks_by_host() -> None:
    everyone = [Facts(host, {"torch": version}) for host, version in zip("aabbc", "11212", strict=True)]
    assert differences(everyone) == ["torch: 1 on a (ranks 0-1), b (rank 3), 2 on b (rank 2), c (rank 4)"]


def test_a_wrong_clock_and_a_full_disk_are_told() -> None:
    alike = dict.fromkeys(("python", "torch", "deepspeed", "transformers"), "1")
    everyone = [Facts(host, alike, free_bytes=2**30) for host in "ab"]
    lines = report(everyone, [100.0, 107.0], [{"large": 1.0, "small": 0.1}] * 2, wanted=2**31)
    assert len(lines) == 4
    assert "clock +7.00 s (WARNING" in lines[2] and "WARNING" not in lines[1]
    assert "2.0 GiB" in lines[3]


def test_a_checkpoint_is_sized_by_the_models_files(root: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = RunConfig(output="run", model=ModelConfig(name=str(root / "model")))
    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(root / "model").parameters())
    assert checkpoint_bytes(config) == 16 * count
