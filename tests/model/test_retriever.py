"""The packed step equals the published one in value and in every gradient, and does no more work than it says.

All in float64. transformers' RMSNorm computes in float32 even then, which rounds a shared prefix's gradient once and
that of separate passes once each (1e-8 relative); `causal_lm` lifts that, so that equal mathematics is equal to 1e-12.
"""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from laser_dist.batch import PackedBatch, TokenSequence, pack
from laser_dist.config import ModelConfig, ObjectiveConfig
from laser_dist.model.attention import NAME
from laser_dist.model.backbone import prepare_for_training
from laser_dist.model.retriever import LaserRetriever
from laser_dist.objective.alignment import AlignmentObjective
from laser_dist.testing import assert_close_relative, tiny_model_folder
from laser_dist.testing.published import PublishedStep, all_rows_loss

TOLERANCE = 1e-9
EOS = 0
# The second passage of a query is as long as no other row; rationales have 1 (of one token), 2, 7 and 3 segments.
PROMPTS = [5, 1, 9, 4]
SEGMENTS = [[1], [3, 2], [2, 1, 1, 4, 3, 1, 2], [1, 1, 5]]
PASSAGES = [7, 3, 11, 1, 6, 13, 2, 8]
LMS = list(itertools.product(["llama", "qwen3"], [True, False]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        (architecture, tied): tiny_model_folder(root / f"{architecture}-{tied}", architecture=architecture, tied=tied)
        for architecture, tied in LMS
    }


def causal_lm(folder: Path, attention: str, *, checkpointing: bool = False) -> nn.Module:
    lm = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float64)
    for module in lm.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: m.weight * x * (x.pow(2).mean(-1, True) + m.variance_epsilon).rsqrt()
    return prepare_for_training(lm, ModelConfig(name=str(folder), activation_checkpointing=checkpointing))


def packed(folder: Path, *, checkpointing: bool = False, **options: object) -> LaserRetriever:
    return LaserRetriever(causal_lm(folder, NAME, checkpointing=checkpointing), **options)


def random_ids(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(1, 260, (count,), generator=generator).tolist()


def sequences(queries: int = 4) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """Rows of odd lengths: queries with their rationales, and two passages of each."""
    generator = torch.Generator().manual_seed(11)
    rows = []
    for prompt, segments in zip(PROMPTS[:queries], SEGMENTS[:queries], strict=True):
        ends = torch.tensor(segments).cumsum(0) - 1
        rows.append(TokenSequence(random_ids(prompt, generator), random_ids(sum(segments), generator), ends.tolist()))
    return rows, [TokenSequence(random_ids(n, generator)) for n in PASSAGES[: 2 * queries]]


def packed_batch(queries: int = 4) -> PackedBatch:
    rows, passages = sequences(queries)
    return pack([*rows, *passages], EOS, queries=queries, labels_B=2 * torch.arange(queries))


def loss_and_gradients(step: nn.Module, batch: PackedBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The four terms and their total, and the gradient of every parameter."""
    objective = AlignmentObjective(ObjectiveConfig(mask_false_negatives=False), 0.05)
    loss_of = all_rows_loss if isinstance(step, PublishedStep) else objective.__class__.__call__
    loss = loss_of(objective, step(batch), batch, 0)
    loss.total.backward()
    gradients = {name: parameter.grad for name, parameter in step.lm.named_parameters()}
    return {**loss.terms, "total": loss.total}, gradients


def assert_same_step(actual: nn.Module, expected: nn.Module, batch: PackedBatch) -> None:
    values, gradients = loss_and_gradients(actual, batch)
    expected_values, expected_gradients = loss_and_gradients(expected, batch)
    for name, value in expected_values.items():
        assert value > 0
        assert_close_relative(values[name], value, TOLERANCE, name)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert gradient.any(), f"{name} has no gradient to compare"
        assert_close_relative(gradients[name], gradient, TOLERANCE, f"gradient of {name}")


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("convention", ["official", "paper"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("architecture, tied", LMS)
def test_step_equals_the_published_one(folders, architecture, tied, steps, convention, cached):
    folder, options = folders[architecture, tied], {"steps": steps, "convention": convention}
    published = PublishedStep(causal_lm(folder, "sdpa"), checkpointing=not cached, **options)
    if not tied and steps == 1 and convention == "official":
        published.lm.lm_head.requires_grad_(False)  # no soft token: nothing reads the LM head
    ours = packed(folder, **options)
    ours.lm.load_state_dict(published.lm.state_dict())
    for (_, mine), theirs in zip(ours.lm.named_parameters(), published.lm.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    batch = packed_batch()
    values, gradients = loss_and_gradients(ours, batch)
    expected_values, expected_gradients = loss_and_gradients(published, batch)
    for name, value in expected_values.items():
        assert value > 0
        assert_close_relative(values[name], value, TOLERANCE, name)
    for name, parameter in published.lm.named_parameters():
        if parameter.requires_grad:
            assert expected_gradients[name].any(), f"{name} has no gradient to compare"
            assert_close_relative(gradients[name], expected_gradients[name], TOLERANCE, f"gradient of {name}")
