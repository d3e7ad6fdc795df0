"""One run on 2, then 1, then 4 ranks, with ZeRO-3, 2 and 3: examples and numbers are those of a run on 2."""

import json
from pathlib import Path

import pytest

from laser_dist.data import sample_folder
from laser_dist.testing import run_distributed, tiny_model_folder

# One optimizer step takes four queries, on however many ranks.
LEGS = [(2, "zero3-test", 2), (1, "zero2", 4), (4, "zero3-test", 6)]
STEPS = LEGS[-1][-1]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("elastic")
    tiny_model_folder(root / "model", tied=True)
    rows = [json.loads(line) for line in (sample_folder() / "train.jsonl").read_text().splitlines()[:12]]
    for row in rows:
        row["query"], row["rationale"] = row["query"][:60], row["rationale"][:120]
        for passage in row["positives"] + row["negatives"]:
            passage["text"] = passage["text"][:60]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "recipe.toml").write_text(
        f"""
[model]
name = "{root}/model"
dtype = "float32"
[data]
train = "{root}/shards"
[objective]
temperature = 0.05
distill_temperature = 0.05
output_weight = 1.0
[optimizer]
learning_rate = 1e-3
[train]
max_steps = {STEPS}
[checkpoint]
every = 0
"""
    )
    return root


def prepare(rank: int, world_size: int, root: Path) -> int:
    from laser_dist.cli import main

    return main(["prepare", "--source", str(root / "train.jsonl"), "--out", str(root / "shards"),
                 "--shard-examples", "5"])  # fmt: skip


def trained(rank: int, world_size: int, root: Path, output: Path, stage: str, until: int, flags: list[str]) -> list:
    """Train up to step `until` of `STEPS`; returns this rank's query ids, step by step."""
    from laser_dist.ds_config import resolve
    from laser_dist.recipe import load_config
    from laser_dist.trainer import Trainer

    recipe = root / "recipe.toml"
    config = load_config([str(recipe), "--output", str(output), "--train.deepspeed", stage,
                          "--train.queries-per-rank", str(4 // world_size), *flags])  # fmt: skip
    trainer = Trainer(config, resolve(config.train.deepspeed, config))
    seen: list[list[str]] = []
    step, following = trainer.step, trainer._next

    def recorded(batches):
        loaded, chunks = following(batches)
        seen.append(list(loaded.packed.query_ids))
        return loaded, chunks

    def stopping(number, batches):
        if number + 1 == until:
            trainer.stop_requested = until < STEPS  # as a signal would ask
        return step(number, batches)

    trainer._next, trainer.step = recorded, stopping
    trainer.fit()
    return seen


@pytest.mark.slow
def test_ranks_and_stages_change_and_the_run_stays_the_same(setting: Path, tmp_path: Path) -> None:
    """Optimizer states once tied a run to its number of ranks; a position that did not would repeat examples."""
    assert run_distributed(prepare, 1, setting) == [0]
    whole = run_distributed(trained, 2, setting, tmp_path / "whole", "zero3-test", STEPS, [])
    expected = [sorted(sum(step, [])) for step in zip(*whole, strict=True)]
    seen: list[list[str]] = []
    for ranks, stage, until in LEGS:
        flags = ["--resume"] if seen else []
        leg = run_distributed(trained, ranks, setting, tmp_path / "elastic", stage, until, flags)
        seen += [sorted(sum(step, [])) for step in zip(*leg, strict=True)]
    assert seen == expected
    # Twelve examples, four a step: each once in an epoch of three steps.
    for epoch in (seen[:3], seen[3:]):
        assert len(set(sum(epoch, []))) == 12

    losses = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
              for name in ("whole", "elastic")]  # fmt: skip
    for row, other in zip(*losses, strict=True):
        assert row["step"] == other["step"]
        assert row["train/learning_rate"] == other["train/learning_rate"]
        # float32 sums in other orders: 1e-6 of a loss, and after Adam, whose first steps turn a gradient's relative
        # error into the weight's, about 1e-5 a step.
        assert other["loss/total"] == pytest.approx(row["loss/total"], rel=1e-4), row["step"]
    saved = sorted(path.name for path in (tmp_path / "elastic/checkpoints").iterdir())
    assert saved == ["latest", *(f"step-{until:06d}" for _, _, until in LEGS[1:])]
