"""The published implementation's numbers, in float64, through the real packed path (weights, vectors, every gradient).

`tests/golden` holds one small case; LASER_DIST_GOLDEN may name a folder with more.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from laser_dist.batch import PackedBatch, TokenSequence, pack
from laser_dist.config import ObjectiveConfig
from laser_dist.model.attention import NAME
from laser_dist.model.retriever import LaserRetriever
from laser_dist.objective.alignment import AlignmentObjective
from laser_dist.testing import assert_close_relative

FOLDERS = [Path(__file__).parents[1] / "golden", Path(os.environ.get("LASER_DIST_GOLDEN", "missing"))]
CASES = sorted(case for folder in FOLDERS for case in folder.glob("*.json"))
TOLERANCE = 1e-9


def latent_batch(case: dict) -> PackedBatch:
    """Queries and passages as the published code sees them."""
    rows = [TokenSequence(ids) for ids in case["queries"] + case["passages"]]
    batch = pack(rows, queries=case["B"], labels_B=torch.arange(case["B"]) * case["G"])
    queries = left_padded_offsets(case["queries"])
    return with_offsets(batch, torch.cat([queries, left_padded_offsets(case["passages"])]))


def explicit_batch(case: dict) -> PackedBatch:
    """[query ; rationale ; EOS] alone. The ids have no text, so a segment ends where the published code says."""
    rows = []
    for query, rationale in zip(case["queries"], case["rationales"], strict=True):
        ends = [i for i, token in enumerate(rationale) if token == case["newline_id"]]
        last = len(rationale) - 1
        rows.append(TokenSequence(query, rationale, ends if last in ends else [*ends, last]))
    batch = pack(rows, case["eos_id"], queries=case["B"])
    return with_offsets(batch, batch.lengths_R.max() - batch.lengths_R)


def left_padded_offsets(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([max(map(len, rows)) - len(row) for row in rows])


def with_offsets(batch: PackedBatch, offsets_R: torch.Tensor) -> PackedBatch:
    """Positions counted from the first pad of a left-padded batch.

    Rotary attention does not depend on the offset, but transformers computes cos and sin in float32: another offset
    moves a float64 result by 1e-7. Each view was padded by itself, so the golden case runs each view by itself, too;
    that sharing the prefix changes nothing is `test_retriever`'s to show.
    """
    return replace(batch, positions_T=batch.positions_T + torch.repeat_interleave(offsets_R, batch.lengths_R))


def golden_model(case: dict, weights: dict[str, torch.Tensor], **options: object) -> LaserRetriever:
    config = AutoConfig.for_model(**case["config"])
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=torch.float64)
    state = {name.removeprefix("weight."): value for name, value in weights.items() if name.startswith("weight.")}
    missing, unexpected = lm.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    lm.tie_weights()
    return LaserRetriever(lm.train(), steps=case["K"], **options)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_published_numbers_are_reproduced(path: Path, checkpointing: bool) -> None:
    case, golden = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    model = golden_model(case, golden)
    if checkpointing:
        model.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = case["weights"]
    objective = AlignmentObjective(
        ObjectiveConfig(
            explicit_weight=weights["infonce_explicit"],
            output_weight=weights["kl_output"],
            trajectory_weight=weights["kl_trajectory"],
            temperature=case["temperature"],
            distill_temperature=case["temperature"],
            mask_false_negatives=False,
        ),
        case["trajectory_temperature"],
    )
    batch = latent_batch(case)
    explicit = model(explicit_batch(case))
    views = model(batch)._replace(teacher_BD=explicit.teacher_BD, segments_BKD=explicit.segments_BKD)
    loss = objective(views, batch, step=0)
    loss.total.backward()

    outputs = {
        "query": views.query_BD,
        "passage": views.passage_PD,
        "teacher": views.teacher_BD,
        "query_steps": views.query_steps_BKD,
        "teacher_steps": views.segments_BKD,
    }
    for name, value in outputs.items():
        assert_close_relative(value, golden[f"out.{name}"], TOLERANCE, name)
    for name, value in {**loss.terms, "total": loss.total}.items():
        assert_close_relative(value, golden[f"loss.{name}"], TOLERANCE, name)
    for name, parameter in model.lm.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_close_relative(gradient, golden[f"grad.{name}"], TOLERANCE, f"gradient of {name}")
