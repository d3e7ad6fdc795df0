import math

import pytest
import torch
from torch import nn

from laser_dist.model.thinking import SoftToken, aligned_segments
from laser_dist.testing import assert_close_relative

SEGMENTS = torch.arange(1, 65)


@pytest.mark.parametrize("steps", range(1, 17))
def test_official_alignment_is_the_published_one(steps):
    """Literally: linspace over the segments, or all of them and then the last again."""
    for segments, actual in zip(SEGMENTS.tolist(), aligned_segments(SEGMENTS, steps, "official"), strict=True):
        if segments >= steps:
            expected = torch.linspace(0, segments - 1, steps).long().tolist()
        else:
            expected = [*range(segments), *[segments - 1] * (steps - segments)]
        assert actual.tolist() == expected, f"{segments} segments"


@pytest.mark.parametrize("steps", range(1, 17))
def test_paper_alignment_is_the_papers(steps):
    for segments, actual in zip(SEGMENTS.tolist(), aligned_segments(SEGMENTS, steps, "paper"), strict=True):
        from_one = [math.floor(i * segments / steps) for i in range(1, steps + 1)]
        assert actual.tolist() == [max(index, 1) - 1 for index in from_one], f"{segments} segments"


@pytest.mark.parametrize("convention", ["official", "paper"])
@pytest.mark.parametrize("steps", range(1, 17))
def test_alignment_is_an_index_that_never_falls(convention, steps):
    segment_BK = aligned_segments(SEGMENTS, steps, convention)
    assert segment_BK.shape == (64, steps) and segment_BK.dtype == torch.int64
    assert (segment_BK >= 0).all() and (segment_BK < SEGMENTS[:, None]).all() and (segment_BK.diff() >= 0).all()
    if steps > 1:  # official with K = 1 takes the first segment, and that is published, too
        assert (segment_BK[:, -1] == SEGMENTS - 1).all()


def test_rounding_of_linspace_is_kept():
    """7 * 16 / 14 is 8; in linspace's float32 it is a little less, and the published code rounds down."""
    assert aligned_segments(torch.tensor([17]), 15, "official")[0, 7] == torch.linspace(0, 16, 15)[7].long()


def test_soft_token_is_the_expected_embedding():
    torch.manual_seed(0)
    embedding = nn.Embedding(50, 8, dtype=torch.float64)
    logits_RV = 3 * torch.randn(4, 50, dtype=torch.float64)
    soft_RD, entropy = SoftToken(embedding)(logits_RV)
    p_RV = logits_RV.exp() / logits_RV.exp().sum(1, keepdim=True)
    assert_close_relative(soft_RD, sum(p_RV[:, v, None] * embedding.weight[v] for v in range(50)), 1e-14)
    assert_close_relative(entropy, -(p_RV * p_RV.log()).sum(1).mean(), 1e-14)


def test_soft_token_gradient():
    torch.manual_seed(0)
    soft_token = SoftToken(nn.Embedding(7, 3, dtype=torch.float64))
    weight_VD = soft_token.embedding.weight
    logits_RV = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: soft_token(x)[0], logits_RV)
    # With respect to the table: t is linear in it, so that t . u has the gradient p u.
    u_RD = torch.randn(2, 3, dtype=torch.float64)
    (gradient_VD,) = torch.autograd.grad((soft_token(logits_RV)[0] * u_RD).sum(), weight_VD)
    assert_close_relative(gradient_VD, logits_RV.softmax(1).T @ u_RD, 1e-14)


def test_entropy_spans_certain_to_uniform_and_has_no_gradient():
    soft_token = SoftToken(nn.Embedding(1000, 4))
    _, uniform = soft_token(torch.full((3, 1000), 7.0, requires_grad=True))
    _, certain = soft_token(torch.eye(1000)[:3] * 1e4)
    assert uniform.item() == pytest.approx(math.log(1000), rel=1e-6) and certain.item() == 0.0
    assert not uniform.requires_grad


def test_soft_token_of_half_precision_logits_is_computed_in_float32():
    """softmax in bfloat16 would lose 2^-9 of every probability before they are summed over V."""
    torch.manual_seed(0)
    embedding = nn.Embedding(5000, 8).to(torch.bfloat16)
    logits_RV = torch.randn(2, 5000).to(torch.bfloat16)
    soft_RD, entropy = SoftToken(embedding)(logits_RV)
    assert soft_RD.dtype == torch.bfloat16 and entropy.dtype == torch.float32
    exact = torch.distributions.Categorical(logits=logits_RV.double()).entropy().mean()
    assert entropy.item() == pytest.approx(exact.item(), rel=1e-6)


def test_embedding_is_named_for_zero_and_not_owned():
    embedding = nn.Embedding(5, 2)
    soft_token = SoftToken(embedding)
    assert soft_token.external_parameters() == [embedding.weight] and not list(soft_token.parameters())


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_few_rows_are_as_exact_as_many(rows):
    """One row went through BLAS's matrix-vector product, 1e-5 off over a vocabulary of 49,152."""
    torch.manual_seed(0)
    embedding = nn.Embedding(49152, 64)
    logits = 2 * torch.randn(rows, 49152, requires_grad=True)
    soft, _ = SoftToken(embedding)(logits)
    exact = torch.softmax(logits.double(), -1) @ embedding.weight.double()
    assert_close_relative(soft, exact, 2e-6, "soft token")
    gradient, expected = (torch.autograd.grad(x.square().sum(), logits)[0] for x in (soft, exact.float()))
    assert gradient.shape == (rows, 49152)
    assert_close_relative(gradient, expected, 1e-4, "gradient")
