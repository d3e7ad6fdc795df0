"""Passages that pass by in a ring give the values and gradients of all of them gathered on every rank."""

from typing import Any

import pytest
import torch
from laser_kernels import align, alignment, pair_torch
from torch import Tensor

from laser_dist.testing import assert_close_relative, run_distributed

B, K, D, G = 3, 2, 24, 5  # per rank: queries, latent steps, width, passages a query
TEMPERATURES = {"temperature": 0.05, "distill_temperature": 0.1, "trajectory_temperature": 0.2}
WEIGHTS = (1.0, 0.7, 3.0, 0.5)


def rows(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def inputs(world_size: int) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    """All ranks' rows; some passages of one rank carry the id of another rank's positive."""
    b, n = B * world_size, B * G * world_size
    values = [rows(b, D, seed=0), rows(b, D, seed=1), rows(b, K, D, seed=2), rows(b, K, D, seed=3), rows(n, D, seed=4)]
    labels, passage_ids = torch.arange(b) * G, torch.arange(n) % 7
    return values, labels, {"query_ids": passage_ids[labels], "passage_ids": passage_ids}


def share(values: Tensor, rank: int, world_size: int) -> Tensor:
    return values.chunk(world_size)[rank]


def on_a_rank(rank: int, world_size: int, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    pair_torch.CHUNK_SCORES, pair_torch.SHORTEST_CHUNK, alignment.LONGEST_CHUNK = 1, 4, 128
    values, labels, mask = inputs(world_size)
    own = [share(x, rank, world_size).to(dtype).requires_grad_() for x in values]
    own_mask = {name: share(x, rank, world_size) for name, x in mask.items()}
    label = share(labels, rank, world_size) - rank * B * G
    found = align(*own, label, **TEMPERATURES, **own_mask, group=torch.distributed.group.WORLD, **options)
    total = sum(weight * term for weight, term in zip(WEIGHTS, found.terms, strict=True))
    total.backward()
    return {
        "terms": torch.stack(found.terms).detach(),
        "counts": torch.stack([found.rivals_above_B, found.explicit_rivals_above_B, found.dropped_B]),
        "gradients": [x.grad for x in own],
    }


CHUNKED = {"kernel": "chunked"}
TRITON = {"kernel": "triton"}


@pytest.mark.parametrize(
    "world_size, dtype, options",
    [
        (2, torch.float64, CHUNKED),
        (4, torch.float64, CHUNKED | {"margin": 0.1}),
        (4, torch.bfloat16, CHUNKED),
        (2, torch.float32, TRITON | {"margin": 0.1}),
        (4, torch.float32, TRITON),
    ],
)
def test_ring_equals_the_gathered_path(world_size, dtype, options, device):
    values, labels, mask = inputs(world_size)
    leaves = [x.to(dtype).double().requires_grad_() for x in values]
    expected = []
    for rank in range(world_size):
        mine = [share(x, rank, world_size) for x in leaves[:4]]
        label, ids = (share(x, rank, world_size) for x in (labels, mask["query_ids"]))
        found = align(
            *mine, leaves[4], label, **TEMPERATURES, query_ids=ids, passage_ids=mask["passage_ids"],
            **options | {"kernel": "reference"},
        )  # fmt: skip
        sum(weight * term for weight, term in zip(WEIGHTS, found.terms, strict=True)).backward()
        expected.append(found)
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}[
        dtype
    ]  # bf16: largest entry, not norm
    environment = {"TRITON_INTERPRET": "1"} if options["kernel"] == "triton" else {}
    ranks = run_distributed(on_a_rank, world_size, dtype, options, init=True, env=environment)
    for rank, found in enumerate(ranks):
        wanted = expected[rank]
        terms_tolerance = min(tolerance, 1e-5)
        assert_close_relative(found["terms"], torch.stack(wanted.terms), terms_tolerance, f"terms of rank {rank}")
        counts = torch.stack([wanted.rivals_above_B, wanted.explicit_rivals_above_B, wanted.dropped_B])
        assert torch.equal(found["counts"].double(), counts)
        # Rows: this rank's own loss alone. Passages: what all ranks' losses add up to, home on the rank that has them.
        for name, gradient, leaf in zip(("student", "teacher", "steps"), found["gradients"], leaves, strict=False):
            assert_close_relative(gradient, share(leaf.grad, rank, world_size), tolerance, f"{name} of rank {rank}")
        assert found["gradients"][3] is None
        passages = share(leaves[4].grad, rank, world_size)
        assert_close_relative(found["gradients"][4], passages, tolerance, f"passages of rank {rank}")


def test_the_reference_has_no_ring():
    values, labels, _ = inputs(1)
    with pytest.raises(ValueError, match="reference has no ring"):
        align(*values, labels, **TEMPERATURES, group=object(), kernel="reference")
