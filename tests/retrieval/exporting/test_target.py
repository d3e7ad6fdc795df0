"""A checkpoint's card must say what training recorded: with another K or prompt, vectors are silently worse."""

import json

import pytest

from laser_dist.config import TextConfig, ThinkingConfig
from laser_dist.errors import UserError
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.retrieval.exporting.target import _check_card

RECORDED = {"thinking.steps": 3, "text.instruction": "Find it", "objective.temperature": 0.02, "seed": 0}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"temperature": None}, None),  # cards from before
        ({"thinking": ThinkingConfig(steps=4)}, "thinking.steps = 4, and training used 3"),
        ({"text": TextConfig(instruction="Find  it")}, "text.instruction = 'Find  it', and training used 'Find it'"),
        ({"temperature": 0.05}, "objective.temperature = 0.05, and training used 0.02"),
    ],
)
def test_a_card_that_says_otherwise_than_training_is_named(tmp_path, change, told):
    model = tmp_path / "model"
    model.mkdir()
    RetrieverCard(**{"text": TextConfig(instruction="Find it"), "temperature": 0.02} | change).save(model)
    (tmp_path / "trainer.json").write_text(json.dumps({"step": 1, "settings": RECORDED}))
    if told is None:
        _check_card(model)
    else:
        with pytest.raises(UserError, match=f"laser_dist.json says {told}: copy the checkpoint again"):
            _check_card(model)


def test_checkpoints_without_settings_and_model_folders_alone_are_taken(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    RetrieverCard(temperature=0.5).save(model)
    _check_card(model)
    (tmp_path / "trainer.json").write_text('{"step": 1, "settings": null}')
    _check_card(model)
