"""The attention of GPUs, as far as a CPU can run it: layout, latent steps, the choice, and the libraries' calls."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from laser_dist.batch import TokenSequence, pack
from laser_dist.config import ModelConfig
from laser_dist.errors import UserError
from laser_dist.model import varlen
from laser_dist.model.backbone import load_backbone, prepare_for_training
from laser_dist.model.retriever import LaserRetriever
from laser_dist.model.varlen import PackedKV, choose_attention, varlen_function
from laser_dist.testing import assert_close_relative, tiny_model_folder

CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16


def plain_varlen(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scaling: float, dropout: float):
    """Row by row, as the libraries' functions do it for (T, heads, head)."""
    assert dropout == 0 and longest == int((borders[1:] - borders[:-1]).max()) and borders.dtype == torch.int32
    rows = []
    for a, b in zip(borders.tolist(), borders.tolist()[1:], strict=False):
        row = [x[a:b].transpose(0, 1)[None] for x in (q, k, v)]
        grouped = q.shape[1] != k.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(*row, is_causal=True, scale=scaling, enable_gqa=grouped)
        rows.append(out[0].transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("convention", "steps"), [("official", 3), ("paper", 2), ("official", 1)])
def test_packed_layout_equals_the_padded_one(tmp_path, monkeypatch, convention, steps, checkpointing):
    """Keys of the rationale or of a neighbour in a prompt's place; a gradient lost where nothing is copied."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    config = ModelConfig(name=str(tiny_model_folder(tmp_path)), dtype="float32", activation_checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(2)

    def ids(count: int) -> list[int]:
        return torch.randint(1, 250, (count,), generator=generator).tolist()

    queries = [TokenSequence(ids(5), ids(7), [2, 6]), TokenSequence(ids(1), ids(2), [1])]
    batch = pack([*queries, *(TokenSequence(ids(n)) for n in (9, 3, 1, 6))], 0, queries=2)
    results = []
    for packed in (False, True):
        torch.manual_seed(0)
        model = LaserRetriever(prepare_for_training(load_backbone(config), config), steps=steps, convention=convention)
        if packed:
            model._store = lambda batch: PackedKV(batch, plain_varlen)
        views = model(batch)
        loss = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in views[:5])
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    assert results[1][0].item() == pytest.approx(results[0][0].item(), rel=1e-5)
    for name, gradient in results[0][1].items():
        assert_close_relative(results[1][1][name], gradient, 5e-5, name)  # float32 sums in another order


def installed(monkeypatch, *modules: str, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(varlen, "_has", lambda module: module in modules)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["triton", "flash_attn", "flash_attn_interface", "torch.nn.attention.varlen"], "flash-attn 3"),
        (["triton", "flash_attn", "flash_attn.cute"], "flash-attn 4"),
        (["triton", "flash_attn"], "flash-attn 2"),
        (["triton", "torch.nn.attention.varlen"], "torch varlen"),
        (["triton"], "sdpa"),
        (["flash_attn", "torch.nn.attention.varlen"], "sdpa"),  # latent steps need triton
    ],
)
def test_auto_takes_the_best_that_is_installed(monkeypatch, modules, expected):
    installed(monkeypatch, *modules)
    name, why = choose_attention("auto", CUDA, BF16, 128)
    assert name == expected and why


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "head_size", "capability", "part"),
    [
        ("flash", torch.device("cpu"), BF16, 64, (9, 0), "needs a GPU"),
        ("flash", CUDA, torch.float32, 64, (9, 0), 'model.dtype = "bfloat16"'),
        ("varlen", CUDA, BF16, 320, (9, 0), "at most 256"),
        ("varlen", CUDA, BF16, 60, (9, 0), "multiples of 8"),
        ("flash", CUDA, BF16, 64, (7, 5), "Ampere"),
    ],
)
def test_what_cannot_run_is_refused_with_a_remedy_and_avoided_by_auto(
    monkeypatch, requested, device, dtype, head_size, capability, part
):
    installed(monkeypatch, "triton", "flash_attn", "torch.nn.attention.varlen", capability=capability)
    with pytest.raises(UserError, match="cannot run here") as error:
        choose_attention(requested, device, dtype, head_size)
    assert part in str(error.value) and "sdpa" in str(error.value)
    name, why = choose_attention("auto", device, dtype, head_size)
    assert name == "sdpa" and part in why
    assert choose_attention("sdpa", device, dtype, head_size)[0] == "sdpa"


def test_flash_that_is_not_installed_is_refused(monkeypatch):
    installed(monkeypatch, "triton", "torch.nn.attention.varlen")
    with pytest.raises(UserError, match="not installed"):
        choose_attention("flash", CUDA, BF16, 64)


def operands() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(9, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16), torch.tensor([0, 5, 9]).int()


def flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
            causal=False, window_size=(-1, -1)):  # fmt: skip
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
    return plain_varlen(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, dropout_p)


def flash_4(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False):
    return plain_varlen(q, k, v, cu_seqlens_q, 5, softmax_scale, 0.0), None


@pytest.mark.parametrize(("name", "function"), [("flash-attn 2", flash_2), ("flash-attn 4", flash_4)])
def test_each_flash_attn_is_called_as_it_wants(monkeypatch, name, function):
    module = ModuleType(varlen.FLASH[name])
    module.flash_attn_varlen_func = function
    monkeypatch.setitem(sys.modules, varlen.FLASH[name], module)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    q, k, v, borders = operands()
    varlen_function.cache_clear()
    try:
        output = varlen_function(name)(q, k, v, borders, 5, 0.3, 0.0)
    finally:
        varlen_function.cache_clear()
    assert torch.equal(output, plain_varlen(q, k, v, borders, 5, 0.3, 0.0))


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal and query.shape[1] == key.shape[1], "this version knows no grouped queries"
    return plain_varlen(query, key, value, cu_seq_q, max_q, query.shape[-1] ** -0.5, 0.0)


def torch_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
               enable_gqa=False):  # fmt: skip
    assert window_size == (-1, 0) and enable_gqa
    return plain_varlen(query, key, value, cu_seq_q, max_q, scale, 0.0)


@pytest.mark.parametrize("function", [torch_2_10, torch_2_13])
def test_torchs_own_is_called_as_each_version_wants(monkeypatch, function):
    library = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(library, "varlen_attn", function)
    q, k, v, borders = operands()
    output = varlen_function("torch varlen")(q, k, v, borders, 5, 0.3, 0.0)
    torch.testing.assert_close(output, plain_varlen(q, k, v, borders, 5, 0.3, 0.0))


def test_dropout_that_a_library_lacks_is_refused():
    q, k, v, borders = operands()
    with pytest.raises(UserError, match="sdpa"):
        varlen_function("torch varlen")(q, k, v, borders, 5, 0.3, 0.1)
