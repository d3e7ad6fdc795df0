import math
from dataclasses import replace

import pytest
import torch
from laser_kernels import alignment_loss_reference
from torch import Tensor

from laser_dist.batch import PackedBatch, Views
from laser_dist.config import ObjectiveConfig, RunConfig, ThinkingConfig
from laser_dist.model.retriever import unit
from laser_dist.objective.alignment import AlignmentObjective
from laser_dist.objective.terms import STEP_TERMS, TERMS
from laser_dist.testing import assert_close_relative, run_distributed
from laser_dist.testing.published import all_rows_loss

B, G, K, D = 4, 2, 3, 6
CONFIG = ObjectiveConfig(
    temperature=0.2, distill_temperature=0.3, explicit_weight=0.7, output_weight=2.0, trajectory_weight=0.5
)
UNMASKED = replace(CONFIG, mask_false_negatives=False)
FIELDS = ("query_BD", "passage_PD", "query_steps_BKD", "teacher_BD", "segments_BKD")
STEP_FIELDS = ("query_steps_BKD", "passage_steps_PKD")
GIRCSE = replace(
    UNMASKED, explicit_weight=0.0, output_weight=0.0, trajectory_weight=0.0, steps_weight=1.0, refinement_weight=1.0
)


def make_views() -> Views:
    """Views whose fields are leaves, in float64. Vectors have unit length, states do not."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(B, D), (B * G, D), (B, K, D), (B, D), (B, K, D)]
    values = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    leaves = [(unit(x) if x.dim() == 2 else x).requires_grad_() for x in values]
    return Views(*leaves, soft_token_entropy=torch.tensor(1.5))


def make_batch(labels: list[int], passage_keys: list[int], positive_keys: list[list[int]]) -> PackedBatch:
    """Only what the objective reads."""
    nothing = torch.empty(0, dtype=torch.int64)
    return PackedBatch(
        *[nothing] * 4,
        queries=len(labels),
        labels_B=torch.tensor(labels),
        passage_keys_P=torch.tensor(passage_keys),
        positive_keys_BX=torch.tensor(positive_keys),
    )


def whole_batch() -> PackedBatch:
    """Passage 20 is the positive of queries 0 and 3 and a negative of query 2; query 1 has a second positive, 50."""
    keys = [20, 21, 30, 31, 40, 20, 20, 50]
    return make_batch([0, 2, 4, 6], keys, [[20, 20], [30, 50], [40, 40], [20, 20]])


def gradients(total: Tensor, views: Views) -> dict[str, Tensor | None]:
    leaves = [getattr(views, name) for name in FIELDS]
    values = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
    return dict(zip(FIELDS, values, strict=True))


def test_total_is_the_weighted_sum_of_the_kernels_terms():
    views, batch = make_views(), whole_batch()
    loss = AlignmentObjective(CONFIG, 0.4)(views, batch, 0)
    expected = alignment_loss_reference(
        views.query_BD, views.teacher_BD, unit(views.query_steps_BKD), unit(views.segments_BKD), views.passage_PD,
        batch.labels_B, temperature=0.2, distill_temperature=0.3, trajectory_temperature=0.4,
        query_ids=batch.positive_keys_BX, passage_ids=batch.passage_keys_P,
    )  # fmt: skip
    assert tuple(loss.terms) == TERMS
    for name, value in zip(TERMS, expected, strict=True):
        assert_close_relative(loss.terms[name], value, 1e-12, name)
    assert loss.total.item() == pytest.approx(
        sum(w * x.item() for w, x in zip((1.0, 0.7, 2.0, 0.5), expected, strict=True)), rel=1e-14
    )


def test_ramp_raises_the_distillation_weights():
    objective = AlignmentObjective(replace(CONFIG, ramp_steps=4), 0.4)
    assert objective.weights(0) == dict(zip(TERMS, (1.0, 0.7, 0.0, 0.0), strict=True))
    assert objective.weights(1) == dict(zip(TERMS, (1.0, 0.7, 0.5, 0.125), strict=True))
    for step in (4, 5, 1000):
        assert objective.weights(step) == dict(zip(TERMS, (1.0, 0.7, 2.0, 0.5), strict=True))
    assert AlignmentObjective(CONFIG, 0.4).weights(0) == objective.weights(4)


def test_first_step_of_a_ramp_has_the_contrastive_gradient_only():
    views, batch = make_views(), whole_batch()
    loss = AlignmentObjective(replace(CONFIG, ramp_steps=4), 0.4)(views, batch, 0)
    assert loss.terms["kl_output"] > 0 and loss.terms["kl_trajectory"] > 0  # reported all the same
    expected = gradients(loss.terms["infonce_latent"] + 0.7 * loss.terms["infonce_explicit"], views)
    for name, gradient in gradients(loss.total, views).items():
        assert (gradient is None) == (expected[name] is None)
        assert gradient is None or torch.equal(gradient, expected[name])


@pytest.mark.parametrize(
    "zero, untouched",
    [
        (("trajectory_weight",), {"query_steps_BKD"}),
        (("explicit_weight",), {"teacher_BD"}),  # the KL's teacher is detached
        (("explicit_weight", "output_weight"), {"teacher_BD"}),
        (("explicit_weight", "output_weight", "trajectory_weight"), {"teacher_BD", "query_steps_BKD"}),
    ],
)
def test_weight_of_zero_stays_out_of_the_graph(zero, untouched):
    views = make_views()
    loss = AlignmentObjective(replace(CONFIG, **dict.fromkeys(zero, 0.0)), 0.4)(views, whole_batch(), 0)
    found = {name for name, gradient in gradients(loss.total, views).items() if gradient is None or not gradient.any()}
    assert found == untouched | {"segments_BKD"}


def test_term_of_weight_zero_cannot_spoil_the_total():
    """0 * NaN is NaN: a diverged teacher must not reach a run that does not use it."""
    views = make_views()
    views = views._replace(teacher_BD=views.teacher_BD * torch.nan, segments_BKD=views.segments_BKD * torch.nan)
    config = replace(CONFIG, explicit_weight=0.0, output_weight=0.0, trajectory_weight=0.0)
    loss = AlignmentObjective(config, 0.4)(views, whole_batch(), 0)
    assert loss.total.isfinite() and all(loss.terms[name] == 0 for name in TERMS[1:])


def test_batch_without_rationale_has_the_contrastive_term_only():
    views = make_views()._replace(teacher_BD=None, segments_BKD=None)
    loss = AlignmentObjective(CONFIG, 0.4)(views, whole_batch(), 0)
    assert torch.equal(loss.total, loss.terms["infonce_latent"]) and all(loss.terms[name] == 0 for name in TERMS[1:])
    assert "explicit_top1_accuracy" not in loss.diagnostics


def test_masking_can_be_turned_off():
    views, batch = make_views(), whole_batch()
    masked = AlignmentObjective(CONFIG, 0.4)(views, batch, 0)
    plain = AlignmentObjective(UNMASKED, 0.4)(views, batch, 0)
    assert plain.terms["infonce_latent"] > masked.terms["infonce_latent"]  # fewer columns, smaller normaliser
    assert "false_negatives_masked" not in plain.diagnostics
    published = all_rows_loss(AlignmentObjective(UNMASKED, 0.4), views, batch, 0)
    assert_close_relative(plain.total, published.total, 1e-12, "total")


@pytest.mark.parametrize("convention, temperature", [("official", 0.05), ("paper", 0.02)])
def test_trajectory_temperature_follows_the_convention(convention, temperature):
    config = RunConfig(thinking=ThinkingConfig(convention=convention))
    assert config.trajectory_temperature == temperature
    assert replace(config, objective=ObjectiveConfig(trajectory_temperature=0.3)).trajectory_temperature == 0.3
    assert (config.objective.temperature, config.objective.distill_temperature) == (0.02, 0.02)


def test_diagnostics_of_an_example_made_by_hand():
    """In the plane, by angle: query 0 ranks its positive first, query 1 third; their teachers both rank it first."""

    def at(*degrees: float) -> Tensor:
        radians = torch.tensor([math.radians(x) for x in degrees], dtype=torch.float64)
        return torch.stack([radians.cos(), radians.sin()], 1)

    views = Views(
        query_BD=at(0, 90),
        passage_PD=at(5, 80, 60, 95),
        query_steps_BKD=at(0, 90)[:, None],
        teacher_BD=at(2, 55),
        segments_BKD=at(0, 0)[:, None],
        soft_token_entropy=torch.tensor(1.5),
    )
    batch = make_batch([0, 2], [1, 2, 3, 1], [[1], [3]])
    diagnostics = AlignmentObjective(CONFIG, 0.4)(views, batch, 0).diagnostics
    assert {name: value.item() for name, value in diagnostics.items()} == {
        "positive_mean_rank": (1 + 3) / 2,
        "latent_top1_accuracy": 1 / 2,
        "explicit_top1_accuracy": 1.0,
        "soft_token_entropy": 1.5,
        "false_negatives_masked": 1 / 8,  # the second copy of passage 1, for query 0
    }
    assert not any(value.requires_grad for value in diagnostics.values())


def share_of_rank(views: Views, batch: PackedBatch, rank: int, world_size: int) -> tuple[Views, PackedBatch]:
    b, p = B // world_size, B * G // world_size
    own = {name: getattr(views, name).detach()[rank * b : (rank + 1) * b] for name in FIELDS}
    own["passage_PD"] = views.passage_PD.detach()[rank * p : (rank + 1) * p]
    rows = slice(rank * b, (rank + 1) * b)
    return views._replace(**{name: value.requires_grad_() for name, value in own.items()}), replace(
        batch,
        queries=b,
        labels_B=batch.labels_B[rows] - rank * p,
        positive_keys_BX=batch.positive_keys_BX[rows],
        passage_keys_P=batch.passage_keys_P[rank * p : (rank + 1) * p],
    )


def outcome_of_rank(rank: int, world_size: int) -> list[dict[str, dict[str, Tensor]]]:
    """Terms, diagnostics and gradients of this rank's share: as trained, as published, and with passages in a ring."""
    outcomes = []
    ring = replace(CONFIG, passages="ring")
    ours = AlignmentObjective.__call__
    for loss_of, config in ((ours, CONFIG), (all_rows_loss, UNMASKED), (ours, ring)):
        views, batch = share_of_rank(make_views(), whole_batch(), rank, world_size)
        objective = AlignmentObjective(config, 0.4)
        per_term = {}
        for name in (*TERMS, "total"):
            loss = loss_of(objective, views, batch, 0)
            found = gradients(loss.total if name == "total" else loss.terms[name], views)
            per_term[name] = {field: g for field, g in found.items() if g is not None}
        values = {name: value.detach() for name, value in {**loss.terms, **loss.diagnostics}.items()}
        outcomes.append({"values": values, **per_term})
    return outcomes


def everything_of_rank(rank: int, world_size: int) -> tuple[list, dict]:
    return outcome_of_rank(rank, world_size), steps_of_rank(rank, world_size)


@pytest.fixture(scope="module")
def two_ranks() -> list[tuple[list, dict]]:
    return run_distributed(everything_of_rank, 2, init=True)


def test_ranks_together_equal_one_process(two_ranks):
    """Mean over ranks of the values, and of the gradient: of each term apart, since errors in two can cancel."""
    ranks = [found for found, _ in two_ranks]
    gathered, published, ring = zip(*ranks, strict=True)
    whole = outcome_of_rank(0, 1)
    for ours in (gathered, ring):
        for name, value in whole[0]["values"].items():
            mean = torch.stack([rank["values"][name] for rank in ours]).mean(0)
            assert_close_relative(mean, value, 1e-12, name)
        for name in (*TERMS, "total"):
            assert_same_gradient([rank[name] for rank in ours], whole[0][name], name)
    for name in TERMS:  # all rows on every rank: no mean to take
        assert_close_relative(published[1]["values"][name], whole[1]["values"][name], 1e-12, name)
    assert_same_gradient([rank["total"] for rank in published], whole[1]["total"], "published total")


def assert_same_gradient(ranks: list[dict[str, Tensor]], whole: dict[str, Tensor], term: str) -> None:
    """Data parallelism averages over ranks: each row's gradient counts 1 / W."""
    for field, gradient in whole.items():
        joined = torch.cat([rank[field] for rank in ranks]) / len(ranks)
        assert_close_relative(joined, gradient, 1e-12, f"{term}: gradient of {field}")


def thinking_views(seed: int = 5) -> Views:
    """Views whose vectors are the means of their states, as the model makes them; the states are leaves."""
    generator = torch.Generator().manual_seed(seed)
    steps = [torch.randn(n, K, D, generator=generator, dtype=torch.float64).requires_grad_() for n in (B, B * G)]
    query_BKD, passage_PKD = steps
    return Views(
        unit(query_BKD.mean(1)),
        unit(passage_PKD.mean(1)),
        query_BKD,
        None,
        None,
        torch.tensor(1.5),
        passage_steps_PKD=passage_PKD,
    )


def step_gradients(total: Tensor, views: Views) -> dict[str, Tensor]:
    values = torch.autograd.grad(total, [getattr(views, name) for name in STEP_FIELDS], retain_graph=True)
    return dict(zip(STEP_FIELDS, values, strict=True))


def gircse(queries_BKD: Tensor, passages_PKD: Tensor, labels_B: Tensor, temperature: float) -> Tensor:
    """The loss as published (embedding/trainer.py of Roytsai27/GIRCSE), over all ranks' rows."""
    losses = []
    for k in range(1, K + 1):
        query_BD, passage_PD = (unit(states[:, :k].mean(1)) for states in (queries_BKD, passages_PKD))
        losses.append(torch.nn.functional.cross_entropy(query_BD @ passage_PD.T / temperature, labels_B))
    loss_K = torch.stack(losses)
    return loss_K.mean() + torch.relu((loss_K + 1e-8).log().diff()).mean()


@pytest.mark.parametrize("seed", [5, 6, 8])
def test_both_step_weights_make_k_times_the_published_gircse(seed):
    views, batch = thinking_views(seed), whole_batch()
    loss = AlignmentObjective(GIRCSE, 0.4)(views, batch, 0)
    expected = K * gircse(views.query_steps_BKD, views.passage_steps_PKD, batch.labels_B, 0.2)
    assert_close_relative(loss.total, expected, 1e-7, "total")  # 1e-8 inside both logarithms
    found, wanted = step_gradients(loss.total, views), step_gradients(expected, views)
    for name in STEP_FIELDS:
        assert_close_relative(found[name], wanted[name], 1e-6, name)


def test_some_of_these_batches_get_worse_with_a_step():
    """Else the comparison above would not see the penalty."""
    penalties = [
        AlignmentObjective(GIRCSE, 0.4)(thinking_views(s), whole_batch(), 0).terms["refinement"] for s in (5, 6, 8)
    ]
    assert max(penalties) > 0


def test_steps_that_are_not_asked_for_are_not_there():
    loss = AlignmentObjective(CONFIG, 0.4)(make_views(), whole_batch(), 0)
    assert not set(STEP_TERMS) & (set(loss.terms) | set(AlignmentObjective(CONFIG, 0.4).weights(0)))


def steps_of_rank(rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
    b, p = B // world_size, B * G // world_size
    whole, batch = thinking_views(), whole_batch()
    query_BKD = whole.query_steps_BKD.detach()[rank * b : (rank + 1) * b].requires_grad_()
    passage_PKD = whole.passage_steps_PKD.detach()[rank * p : (rank + 1) * p].requires_grad_()
    views = Views(
        unit(query_BKD.mean(1)),
        unit(passage_PKD.mean(1)),
        query_BKD,
        None,
        None,
        torch.tensor(1.5),
        passage_steps_PKD=passage_PKD,
    )
    batch = replace(batch, queries=b, labels_B=batch.labels_B[rank * b : (rank + 1) * b] - rank * p)
    found = {}
    for passages in ("gather", "ring"):
        loss = AlignmentObjective(replace(GIRCSE, passages=passages), 0.4)(views, batch, 0)
        found[passages] = step_gradients(loss.total, views) | {"refinement": loss.terms["refinement"].detach()}
    return found


def test_penalty_over_ranks_is_the_global_batchs(two_ranks):
    """relu(log L_k - log L_k-1) of a rank's own means would be another number, and another gradient."""
    ranks, whole = [found for _, found in two_ranks], steps_of_rank(0, 1)["gather"]
    for passages in ("gather", "ring"):
        found = [rank[passages] for rank in ranks]
        for rank in found:
            assert_close_relative(rank.pop("refinement"), whole["refinement"], 1e-12, "refinement")
        assert_same_gradient(found, {name: whole[name] for name in STEP_FIELDS}, passages)
