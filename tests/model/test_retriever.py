"""The packed step equals the published one in value and in every gradient, and does no more work than it says.

All in float64. transformers' RMSNorm computes in float32 even then, which rounds a shared prefix's gradient once and
that of separate passes once each (1e-8 relative); `causal_lm` lifts that, so that equal mathematics is equal to 1e-11.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from laser_dist.batch import PackedBatch, TokenSequence, Views, pack
from laser_dist.config import ModelConfig, ObjectiveConfig
from laser_dist.errors import UserError
from laser_dist.model.attention import NAME
from laser_dist.model.backbone import prepare_for_training
from laser_dist.model.retriever import LaserRetriever
from laser_dist.objective.alignment import AlignmentObjective
from laser_dist.testing import assert_close_relative, tiny_model_folder
from laser_dist.testing.published import PublishedStep, all_rows_loss

TOLERANCE = 1e-10
EOS = 0
# Odd and even lengths, prompts of one token; rationales of 1 segment (one token), 2, 7 and 3 segments.
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


def loss_and_gradients(step: nn.Module, batch: PackedBatch) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """The four terms and their total, and the gradient of every parameter."""
    objective = AlignmentObjective(ObjectiveConfig(mask_false_negatives=False), 0.05)
    loss_of = all_rows_loss if isinstance(step, PublishedStep) else AlignmentObjective.__call__
    loss = loss_of(objective, step(batch), batch, 0)
    loss.total.backward()
    gradients = {name: parameter.grad for name, parameter in step.lm.named_parameters()}
    return {**loss.terms, "total": loss.total}, gradients


def assert_same_step(actual: nn.Module, expected: nn.Module, batch: PackedBatch, tolerance: float = TOLERANCE) -> None:
    values, gradients = loss_and_gradients(actual, batch)
    expected_values, expected_gradients = loss_and_gradients(expected, batch)
    for name, value in expected_values.items():
        assert value > 0
        # The published loss subtracts logits of up to 1 / 0.02, each off by half a unit in its last place.
        assert_close_relative(values[name], value, tolerance, name, noise=50 * torch.finfo(torch.float64).eps)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        if gradient is None:  # without a soft token nobody reads the LM head
            assert name == "lm_head.weight" and expected.steps == 1 and expected.convention == "official"
            assert gradients[name] is None
        else:
            assert gradient.any(), f"{name} has no gradient to compare"
            assert_close_relative(gradients[name], gradient, tolerance, f"gradient of {name}")


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("convention", ["official", "paper"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("architecture, tied", LMS)
def test_step_equals_the_published_one(folders, architecture, tied, steps, convention, cached):
    folder, options = folders[architecture, tied], {"steps": steps, "convention": convention}
    published = PublishedStep(causal_lm(folder, "sdpa"), checkpointing=not cached, **options)
    assert_same_step(packed(folder, **options), published, packed_batch())


@pytest.mark.parametrize("architecture, tied", LMS)
def test_one_query_equals_the_published_step(folders, architecture, tied):
    folder = folders[architecture, tied]
    assert_same_step(packed(folder), PublishedStep(causal_lm(folder, "sdpa")), packed_batch(1))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("architecture, tied", LMS)
def test_checkpointing_changes_nothing(folders, architecture, tied, steps):
    folder, batch = folders[architecture, tied], packed_batch()
    plain, plain_gradients = loss_and_gradients(packed(folder, steps=steps), batch)
    values, gradients = loss_and_gradients(packed(folder, steps=steps, checkpointing=True), batch)
    assert all(torch.equal(values[name], value) for name, value in plain.items())
    for name, gradient in plain_gradients.items():
        if gradient is not None:
            assert_close_relative(gradients[name], gradient, 1e-12, f"gradient of {name}")


def test_rationale_never_reaches_the_latent_view(folders):
    model = packed(folders["llama", True])
    rows, passages = sequences()
    batch = pack([*rows, *passages], EOS, queries=4)
    others = [replace(row, rationale=[token + 1 for token in row.rationale]) for row in rows]
    views, changed = model(batch), model(pack([*others, *passages], EOS, queries=4))
    assert not torch.allclose(views.teacher_BD, changed.teacher_BD)  # the change is one that shows
    for name in ("query_BD", "passage_PD", "query_steps_BKD"):
        assert torch.equal(getattr(views, name), getattr(changed, name)), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_latent_view_sends_no_gradient_into_the_rationale(folders, checkpointing):
    model, batch, inputs = packed(folders["qwen3", False], checkpointing=checkpointing), packed_batch(), []
    model.base.get_input_embeddings().register_forward_hook(lambda *call: inputs.append(call[-1]))
    views = model(batch)
    prompt_T = torch.cat([
        torch.arange(length) < prompt for length, prompt in zip(batch.lengths_R, batch.prompt_lengths_R, strict=True)
    ])  # fmt: skip
    latent = views.query_steps_BKD.square().sum() + views.passage_PD[:, 0].sum()
    (gradient_TD,) = torch.autograd.grad(latent, inputs, retain_graph=True)
    assert gradient_TD[prompt_T].any(1).all() and not gradient_TD[~prompt_T].any()
    (gradient_TD,) = torch.autograd.grad(views.teacher_BD.sum(), inputs)
    queries_T = torch.arange(len(prompt_T)) < batch.lengths_R[:4].sum()
    assert gradient_TD[queries_T].any(1).all() and not gradient_TD[~queries_T].any()


def test_shared_prefix_equals_rows_of_their_own(folders):
    """Lengths and padding differ between the two, so that sums run in another order: 1e-12, not bit for bit."""
    model = packed(folders["qwen3", True])
    rows, passages = sequences()
    views = model(packed_batch())
    alone = model(pack([*(TokenSequence(row.prompt) for row in rows), *passages], queries=4))
    assert alone.teacher_BD is None and alone.segments_BKD is None
    for name in ("query_BD", "passage_PD", "query_steps_BKD", "soft_token_entropy"):
        assert_close_relative(getattr(views, name), getattr(alone, name), 1e-12, name)


def test_rows_do_not_see_each_other(folders):
    model = packed(folders["llama", False], steps=5)
    rows, passages = sequences()
    views = model(packed_batch())
    for i, row in enumerate(rows):
        alone = model(pack([row, passages[i]], EOS, queries=1))
        assert_views_close(alone, views, [i], [i])
    order = [3, 1, 0, 2]
    permuted = model(pack([*(rows[i] for i in order), *reversed(passages)], EOS, queries=4))
    assert_views_close(permuted, views, order, list(reversed(range(8))))


def assert_views_close(actual: Views, expected: Views, queries: list[int], passages: list[int]) -> None:
    for name in ("query_BD", "query_steps_BKD", "teacher_BD", "segments_BKD"):
        assert_close_relative(getattr(actual, name), getattr(expected, name)[queries], 1e-12, name)
    assert_close_relative(actual.passage_PD, expected.passage_PD[passages], 1e-12, "passage_PD")


def test_batch_without_queries(folders):
    model = packed(folders["llama", True])
    _, passages = sequences()
    views = model(pack(passages))
    assert views.query_BD.shape == (0, 48) and views.query_steps_BKD.shape == (0, 3, 48) and views.teacher_BD is None
    assert_close_relative(views.passage_PD, model(packed_batch()).passage_PD, 1e-12)


def test_vectors_have_unit_length_in_float32_at_least(folders):
    model = packed(folders["llama", True]).to(torch.bfloat16)
    views = model(packed_batch())
    for vectors in (views.query_BD, views.passage_PD, views.teacher_BD):
        assert vectors.dtype == torch.float32
        assert_close_relative(vectors.norm(dim=-1), torch.ones(len(vectors)), 1e-6)
    assert views.query_steps_BKD.dtype == torch.bfloat16


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("convention, sweeps", [("official", 3), ("paper", 4)])
def test_work_of_one_forward(folders, convention, sweeps, checkpointing):
    """One sweep over all T tokens, then one token per row and step; the LM head never sees a whole text."""
    model = packed(folders["qwen3", False], steps=3, convention=convention, checkpointing=checkpointing)
    batch, swept, decoded = packed_batch(), [], []
    model.decoder.register_forward_pre_hook(
        lambda _, args, inputs: swept.append(tuple(inputs["inputs_embeds"].shape)), with_kwargs=True
    )
    model.base.lm_head.register_forward_pre_hook(lambda _, args: decoded.append(tuple(args[0].shape)))
    model(batch).query_BD.sum().backward()
    tokens, rows = len(batch.tokens_T), len(batch.lengths_R)
    assert swept == [(1, tokens, 48)] + [(1, rows, 48)] * (sweeps - 1)
    assert decoded == [(rows, 48)] * (sweeps - 1)


@pytest.mark.parametrize("architecture", ["bloom"])  # codegen has used the registry since transformers 5.24
def test_model_with_attention_of_its_own_is_refused(architecture):
    config = AutoConfig.for_model(
        architecture, vocab_size=32, n_embd=16, hidden_size=16, n_layer=1, n_head=4, rotary_dim=4
    )
    model = LaserRetriever(AutoModelForCausalLM.from_config(config, attn_implementation=NAME))
    with pytest.raises(UserError, match="0 of 1 layers go through transformers' attention registry"):
        model(pack([TokenSequence([1, 2, 3]), TokenSequence([4])]))


def test_packed_model_called_past_the_retriever_is_refused(folders):
    with pytest.raises(UserError, match="call it through LaserRetriever"):
        causal_lm(folders["llama", True], NAME)(torch.tensor([[1, 2]]))


def test_text_beyond_a_sliding_window_is_refused():
    config = AutoConfig.for_model(
        "mistral", vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=6,
    )  # fmt: skip
    model = LaserRetriever(AutoModelForCausalLM.from_config(config, attn_implementation=NAME), steps=3)
    assert model(pack([TokenSequence([1, 2, 3, 4])])).passage_PD.isfinite().all()
    with pytest.raises(UserError, match="sliding window of 6"):
        model(pack([TokenSequence([1, 2, 3, 4, 5])]))


def tiny_lm(architecture: str, **options: object) -> nn.Module:
    config = AutoConfig.for_model(
        architecture, vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()


def test_model_with_some_layers_beside_the_registry_is_refused():
    model = LaserRetriever(tiny_lm("lfm2", layer_types=["conv", "full_attention"]))
    with pytest.raises(UserError):
        model(pack([TokenSequence([1, 2, 3]), TokenSequence([4])]))


def test_model_with_attention_sinks_is_refused():
    model = LaserRetriever(tiny_lm("gpt_oss", num_local_experts=2, num_experts_per_tok=1))
    with pytest.raises(UserError):
        model(pack([TokenSequence([1, 2, 3]), TokenSequence([4])]))


def test_model_with_scaled_embeddings_is_refused():
    """Its soft tokens would lack the scale and come out sqrt(D) too small."""
    with pytest.raises(UserError, match="scales its rows by"):
        LaserRetriever(tiny_lm("gemma3_text"))
