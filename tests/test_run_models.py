from dataclasses import replace

import pytest
import torch

from laser_dist.config import ModelConfig, ObjectiveConfig, RunConfig, TextConfig
from laser_dist.errors import UserError
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.run_models import frozen_teacher
from laser_dist.testing import tiny_model_folder

OFFLINE = ObjectiveConfig(explicit_weight=0.0, teacher="elsewhere")


def test_teacher_is_loaded_frozen_and_must_read_the_same_tokens(tmp_path):
    folder = tiny_model_folder(tmp_path / "teacher", seed=1)
    RetrieverCard(text=TextConfig(chat_template="never")).save(folder)
    config = RunConfig(
        model=ModelConfig(name=str(tiny_model_folder(tmp_path / "student")), dtype="float32"),
        text=TextConfig(chat_template="never"),
        objective=replace(OFFLINE, teacher=str(folder)),
    )
    teacher = frozen_teacher(config, torch.device("cpu"))
    assert teacher is not None and not any(p.requires_grad for p in teacher.retriever.parameters())
    assert frozen_teacher(replace(config, objective=ObjectiveConfig()), torch.device("cpu")) is None
    other = replace(config, text=TextConfig(chat_template="never", max_query_tokens=100))
    with pytest.raises(UserError, match="other tokens than the run"):
        frozen_teacher(other, torch.device("cpu"))
    with pytest.raises(UserError, match="does not exist"):
        frozen_teacher(replace(config, objective=replace(OFFLINE, teacher="./nowhere")), torch.device("cpu"))
