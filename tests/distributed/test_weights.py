"""The model folder of a checkpoint is written in shards, of which rank 0 holds one at a time."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from laser_dist.config import CheckpointConfig, ModelConfig
from laser_dist.distributed.engine import Engine, init_distributed
from laser_dist.distributed.together import Together
from laser_dist.distributed.weights import save_model
from laser_dist.errors import UserError
from laser_dist.model.backbone import load_backbone, prepare_for_training
from laser_dist.model.retriever import LaserRetriever
from laser_dist.testing import run_distributed, tiny_model_folder

SHARD = 60_000  # bytes; the tiny model's embedding alone takes more


class Counted(Engine):
    """Knows how many bytes of what `whole` gave out were ever alive at once."""

    alive = most = 0

    def whole(self, names: list[str]) -> dict[str, Tensor]:
        state = super().whole(names)
        for value in state.values():
            size = value.numel() * value.element_size()
            self.alive += size
            weakref.finalize(value, self.gone, size)
        self.most = max(self.most, self.alive)
        return state

    def gone(self, size: int) -> None:
        self.alive -= size


def saved(rank: int, world_size: int, root: Path) -> list[tuple[int, int]]:
    """For each model: most bytes alive, and the largest parameter's."""
    init_distributed()
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    made = []
    for name in ("tied", "untied"):
        config = ModelConfig(name=str(root / name), dtype="float32")
        model = LaserRetriever(prepare_for_training(load_backbone(config, ds_config), config))
        engine = Counted(model, torch.optim.AdamW(model.parameters()), ds_config)
        save_model(engine, root / f"{name}-saved", SHARD / 1e9, Together())
        made.append((engine.most, max(p.ds_numel * 4 for p in model.parameters())))
    return made


def test_shards_hold_the_weights_and_rank_0_holds_one_shard(tmp_path: Path) -> None:
    """A 70B model was once held whole by rank 0, at every save."""
    for name in ("tied", "untied"):
        tiny_model_folder(tmp_path / name, architecture="qwen3", tied=name == "tied", layers=3)
    ranks = run_distributed(saved, 2, tmp_path)
    for number, name in enumerate(("tied", "untied")):
        most, largest = ranks[0][number]
        assert largest > SHARD and most <= largest
        assert ranks[1][number][0] == 0
        expected = load_file(tmp_path / name / "model.safetensors")
        folder = tmp_path / f"{name}-saved"
        files = sorted(folder.glob("*.safetensors"))
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert len(files) > 3 and set(index["weight_map"].values()) == {file.name for file in files}
        assert index["metadata"]["total_size"] == sum(x.numel() * 4 for x in expected.values())
        actual = {key: (file.name, value) for file in files for key, value in load_file(file).items()}
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert actual[key][0] == index["weight_map"][key] and torch.equal(actual[key][1], value), key
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert all(torch.equal(lm.state_dict()[key], value) for key, value in expected.items())
        tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
        assert tied == (name == "tied")


def test_a_shard_needs_a_size() -> None:
    with pytest.raises(UserError, match="checkpoint.max_shard_gb"):
        CheckpointConfig(max_shard_gb=0)
