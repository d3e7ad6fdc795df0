import contextlib
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from laser_dist.batch import TokenSequence, pack
from laser_dist.config import ModelConfig
from laser_dist.distributed.engine import Engine, init_distributed
from laser_dist.model.backbone import load_backbone, prepare_for_training
from laser_dist.model.retriever import LaserRetriever
from laser_dist.testing import RankFailed, run_distributed, tiny_model_folder


def alone_in_a_collective(rank: int, world_size: int, folder: Path) -> None:
    """Rank 0 writes down what it hears when rank 1 never comes to a collective of ZeRO's process group."""
    from deepspeed.utils import groups

    init_distributed(timeout=3)
    if rank == 0:
        with pytest.raises(RuntimeError) as error:
            dist.all_reduce(torch.ones(1), group=groups._get_data_parallel_group())
        (folder / "message").write_text(str(error.value))
    while not (folder / "message").exists():
        time.sleep(0.05)
    os._exit(1)  # a group that timed out aborts some processes while they end: none leaves a result


def test_the_timeout_holds_for_zeros_own_group(tmp_path: Path) -> None:
    """DeepSpeed makes that group with torch's default, so a lost rank once went unnoticed for half an hour."""
    with contextlib.suppress(RankFailed):  # ranks leave without a result
        run_distributed(alone_in_a_collective, 2, tmp_path, timeout=120)
    assert "3000ms" in (tmp_path / "message").read_text()


def judged_updates(rank: int, world_size: int, folder: Path) -> list[tuple[str, float, bool, bool]]:
    """Per stage and dtype: the norm that the judge heard, whether it was the engine's, and what a refusal left."""
    init_distributed()
    found = []
    for stage, dtype in [(0, "float32"), (0, "bfloat16"), (1, "float32"), (2, "bfloat16"), (3, "float32")]:
        config = ModelConfig(name=str(folder), dtype=dtype, activation_checkpointing=False)
        model = LaserRetriever(prepare_for_training(load_backbone(config), config))
        ds_config = {
            "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.5, "bf16": {"enabled": dtype == "bfloat16"},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }  # fmt: skip
        # Two groups: DeepSpeed calls the optimizer once for each of them.
        trained = list(model.parameters())
        engine = Engine(model, torch.optim.AdamW([{"params": trained[:3]}, {"params": trained[3:]}]), ds_config)
        batch = pack([TokenSequence([5 + rank, 6, 7]), TokenSequence([8, 9 + rank])])
        heard: list[float] = []
        engine.backward(engine(batch).passage_PD[:, :5].square().sum())
        norm = engine.step(heard.append)

        def refuse(norm: float) -> None:
            raise ValueError(f"{norm}")

        before = contents(engine)
        engine.backward(engine(batch).passage_PD[:, :5].square().sum())
        with pytest.raises(ValueError, match=r"\d"):
            engine.step(refuse)
        after = contents(engine)
        same = all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        whole = engine.full_state_dict()  # weights can be looked at still, and saved
        found.append((f"{stage} {dtype}", norm, heard == [norm] and same, bool(whole) == (rank == 0)))
    return found


def contents(engine: Engine) -> list[torch.Tensor]:
    parameters = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    states = [x for state in engine.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    return [x.detach().clone() for x in [*parameters, *states, *(high for _, high in engine.masters())]]


def test_a_judge_hears_the_norm_once_and_can_refuse_the_update(tmp_path: Path) -> None:
    """Whatever the stage: DeepSpeed's own optimizers would have clipped and gone on."""
    first, second = run_distributed(judged_updates, 2, tiny_model_folder(tmp_path / "model"))
    assert first == second
    for case, norm, good, whole in first:
        assert norm > 0 and good and whole, case
