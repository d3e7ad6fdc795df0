"""LaserEncoder: the vectors of a plain left-padded computation, whatever the batch; and clear refusals."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from laser_dist import LaserEncoder
from laser_dist.config import TextConfig, ThinkingConfig
from laser_dist.errors import UserError
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.retrieval.encoder import model_folder
from laser_dist.testing.tiny import tiny_model_folder

TEXTS = [
    "why does ice float on water?",
    "ice",
    "Ice is less dense than water, because its crystal holds the molecules apart. " * 4,
    "why is the sky blue?\n\nAir scatters short waves.",
    "density of water",
]
KINDS = {
    "llama-tied": {"architecture": "llama", "tied": True},
    "llama-untied-bos": {"architecture": "llama", "tied": False, "bos": True},
    "qwen3-tied-chat": {"architecture": "qwen3", "tied": True, "chat_template": True},
    "qwen3-untied": {"architecture": "qwen3", "tied": False},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_model_folder(root / name, **kind) for name, kind in KINDS.items()}


@pytest.fixture
def folder(folders, tmp_path):
    """A copy, for tests that change it."""
    return shutil.copytree(folders["qwen3-tied-chat"], tmp_path / "model")


def vectors_of(encoder):
    return np.concatenate([encoder.encode_queries(TEXTS), encoder.encode_passages(TEXTS)])


@torch.no_grad()
def plain_vectors(folder, prompts, steps, convention):
    """The definition, with transformers alone: one left-padded batch and its K/V cache."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    table, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = lm.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
    state = output.last_hidden_state[:, -1]
    states = [state] if convention == "official" else []
    position = positions[:, -1:]
    while len(states) < steps:
        soft = torch.softmax(state @ head.T, -1) @ table
        mask, position = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1), position + 1
        output = lm.model(
            inputs_embeds=soft[:, None],
            attention_mask=mask,
            position_ids=position,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        state = output.last_hidden_state[:, -1]
        states.append(state)
    return torch.nn.functional.normalize(torch.stack(states).mean(0), dim=-1).numpy()


@pytest.mark.parametrize("convention", ["official", "paper"])
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_a_plain_computation(folders, kind, convention, tmp_path):
    folder = shutil.copytree(folders[kind], tmp_path / "model")
    RetrieverCard(thinking=ThinkingConfig(steps=4, convention=convention)).save(folder)
    # In float64, because the soft tokens of a random model amplify the rounding in which the two differ.
    encoder = LaserEncoder.from_pretrained(folder, device="cpu", dtype="float64")
    text = encoder.text
    for encode, make in ((encoder.encode_queries, text.query), (encoder.encode_passages, lambda t: prompt_of(text, t))):
        expected = plain_vectors(folder, [make(t) for t in TEXTS], 4, convention)
        np.testing.assert_allclose(encode(TEXTS), expected, atol=1e-6)


def prompt_of(text, passage):
    content = text.tokenizer(passage.strip(), add_special_tokens=False)["input_ids"]
    return text.head + content[: 512 - len(text.head) - len(text.tail)] + text.tail


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_alone_has_the_vector_it_has_in_a_batch(folders, kind):
    encoder = LaserEncoder.from_pretrained(folders[kind], device="cpu")
    together = vectors_of(encoder)
    alone = [encoder.encode_queries([text]) for text in TEXTS] + [encoder.encode_passages([text]) for text in TEXTS]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)
    for batch_tokens in (1, 50, 100_000):
        encoder = LaserEncoder.from_pretrained(folders[kind], device="cpu", batch_tokens=batch_tokens)
        np.testing.assert_allclose(vectors_of(encoder), together, atol=1e-5)


def test_vectors_are_float32_unit_rows(folders):
    encoder = LaserEncoder.from_pretrained(folders["llama-tied"], device="cpu", dtype="bfloat16")
    vectors = vectors_of(encoder)
    assert (vectors.dtype, vectors.shape) == (np.float32, (2 * len(TEXTS), encoder.dim))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert encoder.encode_queries([]).shape == (0, encoder.dim)


def test_the_tokenizer_s_padding_side_is_irrelevant(folder):
    expected = vectors_of(LaserEncoder.from_pretrained(folder, device="cpu"))
    for side in ("left", "right"):
        AutoTokenizer.from_pretrained(folder, padding_side=side).save_pretrained(folder)
        encoder = LaserEncoder.from_pretrained(folder, device="cpu")
        assert encoder.text.tokenizer.padding_side == side
        np.testing.assert_array_equal(vectors_of(encoder), expected)


def test_steps_override_the_card(folder):
    by_steps = {}
    for steps in (1, 3, 6):
        RetrieverCard(thinking=ThinkingConfig(steps=steps)).save(folder)
        by_steps[steps] = vectors_of(LaserEncoder.from_pretrained(folder, device="cpu"))
    assert np.abs(by_steps[1] - by_steps[3]).max() > 1e-2 and np.abs(by_steps[3] - by_steps[6]).max() > 1e-2
    for steps, expected in by_steps.items():
        encoder = LaserEncoder.from_pretrained(folder, steps=steps, device="cpu")
        np.testing.assert_array_equal(vectors_of(encoder), expected)
        assert encoder.description()["thinking"]["steps"] == steps


def test_instructions_and_titles_change_the_text(folders):
    encoder = LaserEncoder.from_pretrained(folders["qwen3-untied"], device="cpu")
    default, own, mixed = (
        encoder.encode_queries(TEXTS[:2], instructions=instructions)
        for instructions in ([None, None], ["Find proofs", "Find proofs"], ["Find proofs", None])
    )
    np.testing.assert_array_equal(default, encoder.encode_queries(TEXTS[:2]))
    assert np.abs(default - own).max() > 1e-2
    np.testing.assert_allclose(mixed, [own[0], default[1]], atol=1e-5)
    titled = encoder.encode_passages(["floats"], titles=["Ice"])
    np.testing.assert_allclose(titled, encoder.encode_passages(["Ice\nfloats"]), atol=1e-6)


def test_long_content_is_cut_and_the_chat_template_stays(folder):
    text = dataclasses.replace(TextConfig(), max_query_tokens=40, max_passage_tokens=24)
    RetrieverCard(text=text).save(folder)
    encoder = LaserEncoder.from_pretrained(folder, device="cpu")
    prompt = encoder.text.query(TEXTS[2] * 3)
    assert len(prompt) == 40 and prompt[-len(encoder.text.tail) :] == encoder.text.tail
    ends = [TEXTS[2] + " one end", TEXTS[2] + " another end"]
    first, second = encoder.encode_passages(ends)
    np.testing.assert_allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("texts", ["one string", [""], ["good", " \n"], ["good", None], [3]])
def test_what_is_no_list_of_texts_is_refused(folders, texts):
    encoder = LaserEncoder.from_pretrained(folders["llama-tied"], device="cpu")
    for encode in (encoder.encode_queries, encoder.encode_passages):
        with pytest.raises(UserError, match="texts"):
            encode(texts)


def test_training_mode_is_restored_and_has_no_say(folders):
    encoder = LaserEncoder.from_pretrained(folders["llama-tied"], device="cpu")
    expected = vectors_of(encoder)
    encoder.retriever.train()
    np.testing.assert_array_equal(vectors_of(encoder), expected)
    assert encoder.retriever.training


def test_runs_and_checkpoints_resolve_to_the_model_in_them(folders, tmp_path):
    for step in ("step-000010", "step-000020"):
        shutil.copytree(folders["llama-tied"], tmp_path / "run" / "checkpoints" / step / "model")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-000010\n")
    model = tmp_path / "run" / "checkpoints" / "step-000010" / "model"
    for path in (tmp_path / "run", model.parent, model):
        assert model_folder(path) == str(model)


def test_folders_that_are_no_model_are_refused_by_name(folder, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        LaserEncoder.from_pretrained(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no model"):
        LaserEncoder.from_pretrained(tmp_path / "empty")
    (folder / "laser_dist.json").write_text("{")
    with pytest.raises(UserError, match="laser_dist.json"):
        LaserEncoder.from_pretrained(folder)
    (folder / "laser_dist.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(UserError, match=f"{folder}.*not a causal LM"):
        LaserEncoder.from_pretrained(folder)


def test_unknown_dtype_is_refused(folders):
    with pytest.raises(UserError, match="float32"):
        LaserEncoder.from_pretrained(folders["llama-tied"], dtype="fp8")
