"""`explain` shows what the model computes: the trainer's states, the encoder's vector, the LM's distribution."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from laser_dist import LaserEncoder
from laser_dist.batch import pack
from laser_dist.config import TextConfig, ThinkingConfig
from laser_dist.data.schema import Example
from laser_dist.errors import UserError
from laser_dist.model.thinking import SoftToken
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.retrieval.explaining.thoughts import think
from laser_dist.testing import tiny_model_folder

QUERY = "why does ice float on water?"
RATIONALE = "The essential problem is density.\n\nIce is less dense than water.\n\nSo it floats.\n\nHydrogen bonds."
CASES = [("official", 1), ("official", 3), ("paper", 1), ("paper", 4)]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request, tmp_path_factory):
    options = {"llama": {"tied": False}, "qwen3": {"chat_template": True}}[request.param]
    return tiny_model_folder(tmp_path_factory.mktemp("model"), architecture=request.param, **options)


def encoder_of(folder, convention, steps, **text):
    RetrieverCard(thinking=ThinkingConfig(steps=steps, convention=convention), text=TextConfig(**text)).save(folder)
    return LaserEncoder.from_pretrained(folder, device="cpu", dtype="float32")


def views_of(encoder, rationale):
    """The trainer's views of the same query."""
    (whole,) = encoder.text.whole_queries([Example("", QUERY, rationale, (), ())], with_rationale=bool(rationale))
    batch = pack([encoder.text.cut_query(whole)], encoder.text.eos if rationale else None, queries=1)
    with torch.no_grad():
        return encoder.retriever(batch)


@pytest.mark.parametrize("rationale", ["", RATIONALE])
@pytest.mark.parametrize("convention, steps", CASES)
def test_thoughts_are_the_models_own(folder, convention, steps, rationale):
    encoder = encoder_of(folder, convention, steps)
    thoughts, views = think(encoder, QUERY, rationale), views_of(encoder, rationale)
    soft_tokens = steps - (convention == "official")
    assert thoughts.probabilities_SV.shape == (soft_tokens, encoder.retriever.base.config.vocab_size)
    torch.testing.assert_close(thoughts.probabilities_SV.sum(-1), torch.ones(soft_tokens))
    entropy = thoughts.entropies_S.mean() if soft_tokens else torch.zeros(())
    torch.testing.assert_close(entropy, views.soft_token_entropy, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(thoughts.vector_D, encoder.encode_queries([QUERY])[0], atol=1e-5)
    assert thoughts.states_KD.shape == (steps, encoder.dim)
    torch.testing.assert_close(
        thoughts.states_KD, torch.nn.functional.normalize(views.query_steps_BKD[0], dim=-1), atol=1e-5, rtol=1e-5
    )
    assert [thoughts.state_after(s) for s in range(1, soft_tokens + 1)] == list(
        range(steps - soft_tokens + 1, steps + 1)
    )


def test_the_first_distribution_is_the_language_models(folder):
    """Against transformers alone: what it would say next after the prompt."""
    encoder = encoder_of(folder, "official", 3)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([encoder.text.query(QUERY)])).logits[0, -1]
    thoughts = think(encoder, QUERY)
    torch.testing.assert_close(thoughts.probabilities_SV[0], logits.softmax(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("convention, steps", CASES)
def test_segments_are_those_of_training(folder, convention, steps):
    encoder = encoder_of(folder, convention, steps)
    segments, views = think(encoder, QUERY, RATIONALE).segments, views_of(encoder, RATIONALE)
    assert segments.texts == RATIONALE.split("\n\n") and not segments.is_cut
    trained = torch.nn.functional.normalize(views.segments_BKD[0], dim=-1)
    torch.testing.assert_close(segments.states_MD[segments.aligned_K], trained, atol=1e-5, rtol=1e-5)
    explicit = encoder.encode_queries([QUERY], rationales=[RATIONALE])[0]
    np.testing.assert_allclose(segments.explicit_D, explicit, atol=1e-5)


def test_truncation_is_told(folder):
    encoder = encoder_of(folder, "official", 3, max_query_tokens=24, max_explicit_tokens=40, chat_template="never")
    thoughts = think(encoder, QUERY * 9, RATIONALE)
    assert thoughts.prompt_is_cut and thoughts.prompt_tokens == 24 and thoughts.segments.is_cut
    with pytest.raises(UserError, match="max_explicit_tokens = 25 leaves none"):
        full = encoder_of(folder, "official", 3, max_query_tokens=24, max_explicit_tokens=25, chat_template="never")
        think(full, QUERY * 9, RATIONALE)


def test_listening_ends(folder, monkeypatch):
    """A hook that stays would keep the logits of every later batch in memory."""
    encoder = encoder_of(folder, "official", 3)
    think(encoder, QUERY)
    assert not encoder.retriever.soft_token._forward_pre_hooks
    monkeypatch.setattr(SoftToken, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        think(encoder, QUERY)
    assert not encoder.retriever.soft_token._forward_pre_hooks


def test_tokens_can_be_read(folder):
    """Blanks, line breaks, halves of a character and rows beyond the tokenizer must all show as something."""
    encoder = encoder_of(folder, "official", 2)
    text, tokenizer = think(encoder, QUERY).token_text, encoder.text.tokenizer
    shown = [text(token) for token in range(len(tokenizer))]
    assert all(len(one) == len(one.strip()) > 0 and one.isprintable() for one in shown)
    assert text(len(tokenizer) + 3) == f"[{len(tokenizer) + 3}]"
    assert text(tokenizer("\n", add_special_tokens=False)["input_ids"][0]) == "\u21b5"
    assert text(tokenizer(" water", add_special_tokens=False)["input_ids"][0]).startswith("\u2423")
