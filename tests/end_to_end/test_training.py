"""Whole runs of a tiny model: resume is exact, faults stop cleanly, scalars and checkpoints are what they claim."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from laser_dist import LaserEncoder
from laser_dist.data import sample_folder
from laser_dist.launch.ranks import free_port
from laser_dist.objective.alignment import STEP_TERMS
from laser_dist.observability.metrics import SCALARS
from laser_dist.run_page.read import read_run
from laser_dist.testing import run_command, run_distributed, start_command, tiny_model_folder
from laser_dist.testing.forked import end, launched

STEPS = 6
TEXTS = ["why does ice float", "a drop on a hot pan skates about", "x"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, 24 training examples and a dev set of 12 passages."""
    root = tmp_path_factory.mktemp("setting")
    tiny_model_folder(root / "model", tied=True)
    rows = [json.loads(line) for line in (sample_folder() / "train.jsonl").read_text().splitlines()[:24]]
    for row in rows:  # short texts: these tests are about the machinery
        row["query"], row["rationale"] = row["query"][:60], row["rationale"][:120]
        for passage in row["positives"] + row["negatives"]:
            passage["text"] = passage["text"][:60]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    passages = [row["positives"][0] for row in rows[:12]]
    (root / "corpus.jsonl").write_text(
        "".join(json.dumps({"id": f"d{i}", "text": p["text"]}) + "\n" for i, p in enumerate(passages))
    )
    (root / "queries.jsonl").write_text(
        "".join(json.dumps({"id": f"q{i}", "text": row["query"]}) + "\n" for i, row in enumerate(rows[:4]))
    )
    (root / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(4)))
    run("prepare", "--source", root / "train.jsonl", "--out", root / "shards", "--shard-examples", 7)
    (root / "recipe.toml").write_text(
        f"""
[model]
name = "{root}/model"
dtype = "float32"
activation_checkpointing = true
[data]
train = "{root}/shards"
[objective]
temperature = 0.05
distill_temperature = 0.05
output_weight = 1.0
ramp_steps = 3
[optimizer]
learning_rate = 3e-3
[train]
queries_per_rank = 2
accumulation = 2
max_steps = {STEPS}
deepspeed = "zero3-test"
[checkpoint]
every = 2
"""
    )
    return root


def run(*arguments: object, ranks: int = 0, check: bool = True, env: dict[str, str] | None = None):
    result = run_command(*arguments, ranks=ranks, env={"OMP_NUM_THREADS": "1", **(env or {})})
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:06d}" / "model" / "model.safetensors")


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(setting: Path, tmp_path: Path) -> None:
    """Parameters after the last step equal the uninterrupted run's bit for bit; no step is logged twice.

    The end is trained as users do it, with launchers/train.sh, the supervisor and DeepSpeed's launcher.
    """
    recipe, killed = setting / "recipe.toml", tmp_path / "killed"
    run("train", recipe, "--output", tmp_path / "whole", ranks=2)

    ranks = start_command("train", recipe, "--output", killed, ranks=2, output=tmp_path / "log")
    wait_for((killed / "checkpoints/step-000004/manifest.json").is_file)
    for rank in ranks:
        end(rank)

    # A checkout whose .venv is the one that these tests run in.
    (tmp_path / "launchers").mkdir()
    shutil.copy(Path(__file__).parents[2] / "launchers/train.sh", tmp_path / "launchers")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    options = ["--num_accelerators", "2", "--master_port", str(free_port())]
    resumed = subprocess.run(
        [tmp_path / "launchers/train.sh", *options, recipe, "--output", killed, "--resume"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-3000:]
    assert "launch: attempt 1 of 1 finished" in resumed.stderr
    expected, actual = weights(tmp_path / "whole", STEPS), weights(tmp_path / "killed", STEPS)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    losses = [[row["loss/total"] for row in rows(tmp_path / name)] for name in ("whole", "killed")]
    assert len(losses[0]) == STEPS and losses[0] == losses[1]
    ledger = read_run(killed).account
    assert ledger is not None and [attempt.how for attempt in ledger.attempts] == ["no end", "finished"]
    assert abs(ledger.unaccounted) <= 0.01 * ledger.wall and min(ledger.parts.values()) >= 0
    assert all(ledger.parts[part] > 0 for part in ("train", "start", "save", "restart"))
    assert (killed / "run.html").stat().st_size > 10_000


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(setting: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process with evaluation, per-term gradient norms and LoRA off."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run("train", setting / "recipe.toml", "--output", folder, "--evaluation.corpus", setting / "corpus.jsonl",
        "--evaluation.queries", setting / "queries.jsonl", "--evaluation.qrels", setting / "qrels.tsv",
        "--evaluation.every", 3, "--logging.term-gradient-norms-every", 2, "--checkpoint.keep", 2,
        "--profile.active", 1, "--profile.wait", 1, "--logging.peak-tflops", 0.1)  # fmt: skip
    return folder


def test_scalars_are_documented_finite_and_in_tensorboard(finished: Path) -> None:
    seen = {name for row in rows(finished) for name in row} - {"step"}
    of_steps = {name for name in SCALARS if name.partition("/")[2] in STEP_TERMS}  # another objective's
    assert {name for name in seen if not name.startswith("dev/")} == set(SCALARS) - of_steps
    assert {"dev/ndcg@10", "dev/recall@100"} <= seen
    assert all(abs(value) < 1e9 for row in rows(finished) for value in row.values())
    assert all(row["speed/model_tflops"] > 0 for row in rows(finished) if "speed/model_tflops" in row)
    assert all(row["train/gradient_norm"] > 0 for row in rows(finished) if "train/gradient_norm" in row)
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    assert seen == set(events.Tags()["scalars"])
    assert "config/text_summary" in events.Tags()["tensors"]
    ramp = [row["weight/kl_output"] for row in rows(finished) if "weight/kl_output" in row]
    assert ramp[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_chunks_by_token_budget_train_alike(setting: Path, finished: Path, tmp_path: Path) -> None:
    run("train", setting / "recipe.toml", "--output", tmp_path / "run", "--train.chunk-tokens", 200,
        "--checkpoint.every", 0)  # fmt: skip
    whole = [row for row in rows(finished) if "loss/total" in row]
    chunked = [row for row in rows(tmp_path / "run") if "loss/total" in row]
    assert [row["loss/total"] for row in chunked] == pytest.approx([row["loss/total"] for row in whole], rel=1e-3)
    assert all(row["train/chunks"] == 1 for row in whole) and all(row["train/chunks"] >= 2 for row in chunked)


def test_a_text_longer_than_a_chunk_is_named_before_any_update(setting: Path, tmp_path: Path) -> None:
    result = run("train", setting / "recipe.toml", "--output", tmp_path / "run", "--train.chunk-tokens", 60,
                 check=False)  # fmt: skip
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "with its rationale has" in result.stderr and "train.chunk_tokens = 60" in result.stderr, result.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_checkpoints_keep_the_newest_and_the_best(finished: Path) -> None:
    kept = {folder.name for folder in (finished / "checkpoints").glob("step-*")}
    best = (finished / "checkpoints" / "best").read_text().strip()
    assert (finished / "checkpoints" / "latest").read_text().strip() == f"step-{STEPS:06d}"
    assert kept == {"step-000004", f"step-{STEPS:06d}", best}
    assert not list((finished / "checkpoints").glob(".*partial"))


def test_the_checkpoint_serves_and_training_changed_the_model(setting: Path, finished: Path) -> None:
    texts = ["why does ice float", "a drop on a hot pan"]
    trained = LaserEncoder.from_pretrained(finished).encode_queries(texts)
    untrained = LaserEncoder.from_pretrained(setting / "model").encode_queries(texts)
    assert trained.shape == (2, 48)
    assert abs(trained - untrained).max() > 1e-3


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped_with_a_reason(setting: Path, tmp_path: Path) -> None:
    """DeepSpeed's own `latest` names what it has not finished writing; ours must step back to a complete one."""
    arguments = ("train", setting / "recipe.toml", "--output", tmp_path / "run", "--checkpoint.keep", 9)
    run(*arguments)
    victim = next((tmp_path / "run/checkpoints/step-000006/deepspeed").glob("*optim*"))
    victim.write_bytes(victim.read_bytes()[:-100])
    result = run(*arguments, "--resume")
    assert "skipped an incomplete checkpoint" in result.stdout and "step-000006" in result.stdout
    assert "resuming after step 4" in result.stderr


@pytest.mark.parametrize("whole_group", [False, True], ids=["rank", "group"])
def test_a_signal_saves_and_stops(setting: Path, tmp_path: Path, whole_group: bool) -> None:
    """Schedulers signal every process: a loader that died of it once took the rank along before it could save."""
    flags = ("--output", tmp_path / "run", "--train.max-steps", 500, "--checkpoint.every", 0)
    [process] = start_command("train", setting / "recipe.toml", *flags, output=tmp_path / "log")
    wait_for((tmp_path / "run/metrics.jsonl").is_file)
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGTERM)
    assert launched([process], 60) == 75
    assert (tmp_path / "run/checkpoints/latest").is_file()


def test_a_step_launched_by_another_scheduler_without_ranks_is_refused(setting: Path, tmp_path: Path) -> None:
    """Each task would believe to be alone, and all would write into the same folder."""
    flags = ("--output", tmp_path / "run")
    result = run("train", setting / "recipe.toml", *flags, check=False, env={"SLURM_NTASKS": "8"})
    assert result.returncode == 2 and "SLURM_NTASKS = 8, but RANK is not set" in result.stderr


def test_a_weight_that_is_not_a_number_stops_the_run_before_the_update(setting: Path, tmp_path: Path) -> None:
    """The message names step, term, rank and queries; nothing is saved after it. With DeepSpeed's own launcher."""
    broken = tmp_path / "model"
    shutil.copytree(setting / "model", broken)
    state = load_file(broken / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(free_port())]
    result = subprocess.run(
        [sys.executable, *launcher, "--module", "laser_dist.train", setting / "recipe.toml",
         "--model.name", broken, "--output", tmp_path / "run"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert result.returncode != 0
    message = result.stdout + result.stderr
    for part in (
        "step 1: not finite: infonce_latent on rank 0",
        "infonce_latent on rank 1",
        "rank 1: ",
        "No parameter was updated",
    ):
        assert part in message
    assert "Traceback" not in message
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (["--train.queries-per-rank", "40"], ["24 examples", "80", "train.queries-per-rank"]),
        (["--model.name", "/no/such/model"], ["model.name", "/no/such/model", "does not exist"]),
        (["--evaluation.metric", "ndgc@10"], ["evaluation.metric", "ndcg@10"]),
        (["--train.deepspeed", "zero9"], ["train.deepspeed", "zero3.json"]),
        (["--data.negatives", "1", "--thinking.steps", "0"], ["thinking.steps", "from 1 to 1024"]),
    ],
)
def test_a_mistake_is_one_message_before_training(
    setting: Path, tmp_path: Path, change: list[str], parts: list[str]
) -> None:
    result = run("train", setting / "recipe.toml", "--output", tmp_path / "run", *change, check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert all(part in result.stderr for part in parts), result.stderr
    assert not (tmp_path / "run").exists()


def test_resuming_another_configuration_is_refused(setting: Path, finished: Path) -> None:
    result = run("train", setting / "recipe.toml", "--output", finished, "--resume", "--thinking.steps", 4, check=False)
    assert result.returncode == 2 and "another configuration" in result.stderr
    assert "thinking.steps: 3 in the checkpoint, 4 in this run" in result.stderr


def vectors_of_trainer(rank: int, world_size: int, recipe: Path, output: Path, flags: list[str]) -> np.ndarray:
    """Train, and encode with the trainer's own weights, still sharded, before anything is saved and loaded."""
    from laser_dist.ds_config import resolve
    from laser_dist.recipe import load_config
    from laser_dist.trainer import Trainer

    config = load_config([str(recipe), "--output", str(output), *flags])
    trainer = Trainer(config, resolve(config.train.deepspeed, config))
    trainer.fit()
    return trainer.encoder.encode_queries(TEXTS)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.slow
def test_checkpoint_and_export_give_the_trainers_vectors(setting: Path, tmp_path: Path, lora: bool) -> None:
    """A prefix left in the names of saved weights once made reloading give a random model, with only a warning."""
    flags = ["--model.lora-rank", "4", "--model.lora-targets", "q_proj", "up_proj"] if lora else []
    recipe, output = setting / "recipe.toml", tmp_path / "run"
    expected, other = run_distributed(vectors_of_trainer, 2, recipe, output, flags)
    assert np.array_equal(expected, other)
    assert abs(LaserEncoder.from_pretrained(output).encode_queries(TEXTS) - expected).max() < 1e-5
    run("export", output, "--out", tmp_path / "exported")
    assert abs(LaserEncoder.from_pretrained(tmp_path / "exported").encode_queries(TEXTS) - expected).max() < 1e-5
    untrained = LaserEncoder.from_pretrained(setting / "model").encode_queries(TEXTS)
    assert abs(untrained - expected).max() > 1e-3


@pytest.fixture(scope="module")
def in_bfloat16(setting: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ZeRO-1."""
    folder = tmp_path_factory.mktemp("bfloat16") / "run"
    train_in_bfloat16(setting, folder, stage=1)
    return folder


def train_in_bfloat16(setting: Path, folder: Path, *flags: object, stage: int) -> None:
    flags = ("--train.deepspeed", f"zero{stage}", "--train.max-steps", 4, "--checkpoint.keep", 9, *flags)
    flags += ("--logging.term-gradient-norms-every", 1, "--model.dtype", "bfloat16")
    run("train", setting / "recipe.toml", "--output", folder, *flags)


def curve(folder: Path, name: str) -> list[float]:
    return [row[name] for row in rows(folder)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.slow
def test_every_stage_trains_alike_in_bfloat16_and_resumes(
    setting: Path, tmp_path: Path, in_bfloat16: Path, stage: int
) -> None:
    """Stages differ in how they shard float32 master copies, not in numbers; a resumed run repeats itself.

    Optimizer states of stages 1 and 2 once failed to load, because a type in them was not on the list of safe ones.
    """
    folder = tmp_path / "run"
    train_in_bfloat16(setting, folder, stage=stage)
    # ZeRO-0 adds up micro-batches in bfloat16 and in another order; Adam's first step turns a rounded gradient near 0
    # into a whole step. So it is compared before its first update. The others sum the norm that clips in another order,
    # in float32: a master copy next to a tie is rounded the other way, which this model makes 1 % of a loss by step 3.
    compared = 1 if stage == 0 else 2
    losses = curve(folder, "loss/total")
    assert losses[:compared] == pytest.approx(curve(in_bfloat16, "loss/total")[:compared], rel=1e-6)
    if stage > 0:
        norms = [curve(each, "train/gradient_norm")[:compared] for each in (folder, in_bfloat16)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)
        actual, other = weights(folder, compared), weights(in_bfloat16, compared)
        assert sum(int((actual[name] != other[name]).sum()) for name in other) <= 10  # of 65,520
        for name in other:  # by one rounding
            torch.testing.assert_close(actual[name], other[name], rtol=torch.finfo(torch.bfloat16).eps, atol=0)
    expected = weights(folder, 4)
    shutil.rmtree(folder / "checkpoints/step-000004")
    train_in_bfloat16(setting, folder, "--resume", stage=stage)
    assert curve(folder, "loss/total") == losses
    actual = weights(folder, 4)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.slow
def test_dropout_goes_on_where_it_stopped(setting: Path, tmp_path: Path) -> None:
    """The loader once drew its seed from the generator that dropout continues."""
    flags = ("--model.lora-rank", 4, "--model.lora-dropout", 0.3, "--train.max-steps", 4, "--checkpoint.keep", 9)
    run("train", setting / "recipe.toml", "--output", tmp_path / "run", *flags)
    adapters = tmp_path / "run/checkpoints/step-000004/model/adapter_model.safetensors"
    expected = load_file(adapters)
    shutil.rmtree(tmp_path / "run/checkpoints/step-000004")
    run("train", setting / "recipe.toml", "--output", tmp_path / "run", *flags, "--resume")
    actual = load_file(adapters)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
