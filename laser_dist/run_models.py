"""The models of a run, built from its recipe: what is trained, and who teaches it if it does not teach itself."""

from pathlib import Path
from typing import Any

import torch

from laser_dist.config import RunConfig
from laser_dist.errors import UserError
from laser_dist.model.backbone import load_backbone, load_tokenizer, prepare_for_training
from laser_dist.model.retriever import LaserRetriever
from laser_dist.model.teacher import FrozenTeacher
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.retrieval.folders import model_folder
from laser_dist.retrieval.loading import load_trained_lm


def build_retriever(config: RunConfig, ds_config: dict[str, Any]) -> LaserRetriever:
    """The backbone around which the run thinks, partitioned while it loads if `ds_config` says so."""
    return LaserRetriever(
        prepare_for_training(load_backbone(config.model, ds_config), config.model),
        steps=config.thinking.steps,
        convention=config.thinking.convention,
        attention=config.model.attention,
        passage_steps=config.objective.compares_steps,
    )


def frozen_teacher(config: RunConfig, device: torch.device) -> FrozenTeacher | None:
    """The model of objective.teacher, whole on this rank; None if the run teaches itself.

    UserError for a folder that holds no model, and for one that reads other tokens than the run.
    """
    if not config.objective.teacher:
        return None
    folder = model_folder(config.objective.teacher)
    card = RetrieverCard.load(Path(folder))
    lm, tokenizer = load_trained_lm(folder, card, dtype=config.model.dtype)
    if card.text != config.text or tokenizer.get_vocab() != load_tokenizer(config.model).get_vocab():
        raise UserError(
            f"objective.teacher = {config.objective.teacher!r}: was trained with another tokenizer or other [text] "
            "settings, and would read other tokens than the run: train both with the same"
        )
    retriever = LaserRetriever(
        lm, steps=card.thinking.steps, convention=card.thinking.convention, attention=config.model.attention
    )
    return FrozenTeacher(
        retriever.to(device),
        steps=config.thinking.steps,
        convention=config.thinking.convention,
        chunk_tokens=config.train.chunk_tokens,
    )
