"""Which folder a path means; and what is no model, or another model's tokenizer, is refused by name."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from laser_dist import LaserEncoder
from laser_dist.errors import UserError
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.retrieval.folders import model_folder
from laser_dist.retrieval.loading import find_device
from laser_dist.testing import tiny_model_folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("tiny"), architecture="qwen3", chat_template=True)


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy, for tests that change it."""
    return shutil.copytree(tiny, tmp_path / "model")


def test_runs_and_checkpoints_resolve_to_the_model_in_them(tiny, tmp_path):
    for step in ("step-000010", "step-000020"):
        shutil.copytree(tiny, tmp_path / "run" / "checkpoints" / step / "model")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-000010\n")
    model = tmp_path / "run" / "checkpoints" / "step-000010" / "model"
    for path in (tmp_path / "run", model.parent, model):
        assert model_folder(path) == str(model)


def test_folders_that_are_no_model_are_refused_by_name(folder, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        LaserEncoder.from_pretrained(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no model"):
        LaserEncoder.from_pretrained(tmp_path / "empty")
    (folder / "laser_dist.json").write_text("{")
    with pytest.raises(UserError, match="laser_dist.json"):
        LaserEncoder.from_pretrained(folder)
    (folder / "laser_dist.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(UserError, match=f"{folder}.*not a causal LM"):
        LaserEncoder.from_pretrained(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder):
    """Its last ids ended in an IndexError at the first text that had one, or in a device-side assert."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=f"{folder}: its tokenizer has ids up to .* another model's tokenizer"):
        LaserEncoder.from_pretrained(folder, device="cpu")


def test_another_tokenizer_than_the_card_s_is_refused(folder, tmp_path):
    """Of the same size, it loaded, and every vector was wrong."""
    RetrieverCard().save(folder)
    LaserEncoder.from_pretrained(folder, device="cpu")
    AutoTokenizer.from_pretrained(folder, padding_side="left").save_pretrained(folder)  # maps text to the same ids
    LaserEncoder.from_pretrained(folder, device="cpu")
    stored = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="laser_dist.json.*not the tokenizer that this model was saved with"):
        LaserEncoder.from_pretrained(folder, device="cpu")


def test_a_card_without_a_tokenizer_s_hash_loads(folder):
    """Cards of before had none."""
    RetrieverCard().save(folder)
    card = json.loads((folder / "laser_dist.json").read_text())
    assert len(card.pop("tokenizer")) == 64
    (folder / "laser_dist.json").write_text(json.dumps(card))
    assert RetrieverCard.load(folder) == RetrieverCard()


def test_devices_that_do_not_exist_are_refused():
    assert find_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")
    for name in ("tpuu", f"cuda:{torch.cuda.device_count()}"):
        with pytest.raises(UserError, match=f"device '{name}'"):
            find_device(name)
