"""The latent step's attention over packed prompts: outputs and every gradient against the plain computation."""

import pytest
import torch
from laser_kernels import latent_attention, latent_attention_reference

from laser_dist.testing import assert_close_relative

# rows' prompts, what follows each of them (a rationale), heads, heads of keys and values, head size, soft tokens
SHAPES = {
    "a tile and its edges": ([63, 64, 65, 1], [5, 0, 9, 2], 4, 2, 64, 1),
    "one row, long": ([300], [40], 8, 8, 32, 2),
    "nine queries a head, head of 96": ([17, 130], [0, 3], 9, 1, 96, 5),
    "head of 80": ([33, 7, 2], [1, 1, 1], 6, 3, 80, 3),
}


def operands(shape, dtype, device):
    prompts, rationales, heads, groups, head_size, soft = shape
    generator = torch.Generator().manual_seed(5)

    def draw(*size):
        return torch.randn(*size, generator=generator).to(device, dtype)

    rows, tokens = len(prompts), sum(prompts) + sum(rationales)
    lengths = torch.tensor(prompts, device=device)
    whole = lengths + torch.tensor(rationales, device=device)
    tensors = [draw(rows, heads, head_size), draw(tokens, groups, head_size), draw(tokens, groups, head_size)]
    tensors += [draw(rows, soft, groups, head_size), draw(rows, soft, groups, head_size)]
    return [x.requires_grad_() for x in tensors], whole.cumsum(0) - whole, lengths


def run(function, tensors, starts, lengths):
    query, key, value, soft_key, soft_value = tensors
    output = function(query, key, value, starts, lengths, soft_key, soft_value, query.shape[-1] ** -0.5)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output).to(output.dtype)
    return output, torch.autograd.grad((output * weights).sum(), tensors)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_equals_the_plain_computation(shape, dtype, tolerance, device, poisoned_memory):
    """A rationale that is attended to, a head mixed up with another, a tile's edge, a soft token left out."""
    tensors, starts, lengths = operands(shape, dtype, device)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected, expected_gradients = run(latent_attention_reference, exact, starts, lengths)
    output, gradients = run(latent_attention, tensors, starts, lengths)
    assert output.dtype == dtype
    assert_close_relative(output, expected, tolerance, "output")
    for name, gradient, wanted in zip(
        ("query", "key", "value", "soft key", "soft value"), gradients, expected_gradients, strict=True
    ):
        assert_close_relative(gradient, wanted, tolerance, f"gradient of {name}")


def test_a_rationale_gets_no_gradient_and_results_repeat(device, poisoned_memory):
    tensors, starts, lengths = operands(SHAPES["a tile and its edges"], torch.float32, device)
    first, second = (run(latent_attention, tensors, starts, lengths) for _ in range(2))
    assert torch.equal(first[0], second[0]) and all(map(torch.equal, first[1], second[1]))
    inside = torch.zeros(len(tensors[1]), dtype=torch.bool)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        inside[start : start + length] = True
    for gradient in first[1][1:3]:
        assert not gradient.cpu()[~inside].any() and gradient.cpu()[inside].any(-1).all()


def test_large_scores_do_not_overflow(device):
    tensors, starts, lengths = operands(SHAPES["head of 80"], torch.float32, device)
    big = [(x.detach() * 60).requires_grad_() for x in tensors]
    exact = [x.detach().double().requires_grad_() for x in big]
    output, gradients = run(latent_attention, big, starts, lengths)
    expected, expected_gradients = run(latent_attention_reference, exact, starts, lengths)
    assert_close_relative(output, expected, 1e-4, "output")  # scores of 1e4 are good to 1e-3 in float32
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_where_triton_cannot_run_it_says_so(monkeypatch):
    tensors, starts, lengths = operands(SHAPES["head of 80"], torch.float64, "cpu")
    with pytest.raises(ValueError, match="cannot run here"):
        run(latent_attention, tensors, starts, lengths)
