"""LaserEncoder: the vectors of a plain left-padded computation, whatever the batch; and clear refusals."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from laser_dist import LaserEncoder
from laser_dist.batch import TokenSequence
from laser_dist.config import TextConfig, ThinkingConfig
from laser_dist.data.schema import Example, Passage
from laser_dist.errors import UserError
from laser_dist.retrieval.card import RetrieverCard
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


def test_unknown_dtype_is_refused(folders):
    with pytest.raises(UserError, match="float32"):
        LaserEncoder.from_pretrained(folders["llama-tied"], dtype="fp8")


@pytest.fixture(scope="module")
def encoder(folders):
    return LaserEncoder.from_pretrained(folders["qwen3-tied-chat"], device="cpu")


RATIONALES = [
    "Density.\n\nIce is lighter.",
    "One segment",
    "a b c\n\nd e f\n\ng h\n\ni",
    "Short waves.\n \nScatter.",
    "Mass per volume.",
]


@pytest.mark.parametrize("convention", ["official", "paper"])
def test_both_views_are_the_trainer_s(folder, convention):
    """One batch as training packs it: its query, passage and teacher vectors, from texts given one by one."""
    RetrieverCard(thinking=ThinkingConfig(convention=convention)).save(folder)
    encoder = LaserEncoder.from_pretrained(folder, device="cpu")
    instructions = [None, "Find proofs", None, "Find proofs", None]
    titles = ["a", "c", "e", "", ""]
    passages = [Passage(f"p{i}", TEXTS[i], titles[i]) for i in range(5)]
    examples = [
        Example(f"q{i}", TEXTS[i], RATIONALES[i], (passages[i],), instruction=instructions[i]) for i in range(5)
    ]
    batch = encoder.text.batch(examples, [[passage] for passage in passages], with_rationale=True)
    with torch.no_grad():
        views = encoder.retriever(batch)
    for i, (text, passage) in enumerate(zip(TEXTS, passages, strict=True)):
        how = instructions[i : i + 1]
        explicit = encoder.encode_queries([text], instructions=how, rationales=RATIONALES[i : i + 1])
        latent = encoder.encode_queries([text], instructions=how)
        passage_vector = encoder.encode_passages([passage.text], titles=[passage.title])
        for found, expected in (
            (explicit, views.teacher_BD),
            (latent, views.query_BD),
            (passage_vector, views.passage_PD),
        ):
            np.testing.assert_allclose(found[0], expected[i], atol=1e-5)
        assert np.abs(explicit - latent).max() > 1e-2
    together = encoder.encode_queries(TEXTS, instructions=instructions, rationales=RATIONALES)
    np.testing.assert_allclose(together, views.teacher_BD, atol=1e-5)


@pytest.mark.parametrize("rationales", [["a", "b", None, "d", "e"], ["a", " ", "c", "d", "e"], ["a"], "one string"])
def test_a_rationale_for_some_texts_only_is_refused(encoder, rationales):
    """None was encoded as the latent view: two kinds of vectors in one array, and nobody told."""
    with pytest.raises(UserError, match="rationales"):
        encoder.encode_queries(TEXTS, rationales=rationales)


def test_the_explicit_view_has_no_latent_steps_and_needs_room(folder):
    text = dataclasses.replace(TextConfig(), max_query_tokens=64, max_explicit_tokens=64)
    RetrieverCard(text=text).save(folder)
    encoder = LaserEncoder.from_pretrained(folder, device="cpu")
    with pytest.raises(UserError, match="steps"):
        encoder.encode_queries(["a"], rationales=["b"], steps=2)
    with pytest.raises(UserError, match=r"rationales\[1\].*max_explicit_tokens = 64 leaves none"):
        encoder.encode_queries(["a", TEXTS[2]], rationales=["b", "c"])


def test_steps_are_free_in_every_call(folders, encoder):
    for steps in (1, 2, 5):
        fixed = LaserEncoder.from_pretrained(folders["qwen3-tied-chat"], steps=steps, device="cpu")
        np.testing.assert_array_equal(encoder.encode_queries(TEXTS, steps=steps), fixed.encode_queries(TEXTS))
        np.testing.assert_array_equal(encoder.encode_passages(TEXTS, steps=steps), fixed.encode_passages(TEXTS))
    assert encoder.retriever.steps == 3
    for steps in (0, -1, 2.5):
        with pytest.raises(UserError, match="steps.*at least 1"):
            encoder.encode_queries(TEXTS, steps=steps)
    with pytest.raises(UserError, match="steps"):
        LaserEncoder.from_pretrained(folders["qwen3-tied-chat"], steps=0, device="cpu")


def test_one_instruction_serves_all_texts(encoder):
    one, each = (encoder.encode_queries(TEXTS, instructions=how) for how in ("Find it", ["Find it"] * len(TEXTS)))
    np.testing.assert_array_equal(one, each)
    with pytest.raises(UserError, match="instructions: expected a list of 5, one for each text, got 2"):
        encoder.encode_queries(TEXTS, instructions=["a", "b"])
    for titles in ("abcde", ["a"]):
        with pytest.raises(UserError, match="titles: expected a list of 5"):
            encoder.encode_passages(TEXTS, titles=titles)


def test_dimensions_are_cut_and_renormalised(folders, encoder):
    whole = encoder.encode_queries(TEXTS)
    for dim in (1, 7, 48):
        cut = whole[:, :dim] / np.linalg.norm(whole[:, :dim], axis=1, keepdims=True)
        np.testing.assert_allclose(encoder.encode_queries(TEXTS, dim=dim), cut, atol=1e-6)
        short = LaserEncoder.from_pretrained(folders["qwen3-tied-chat"], device="cpu", dim=dim)
        assert (short.dim, short.hidden_size) == (dim, 48)
        np.testing.assert_allclose(short.encode_queries(TEXTS), cut, atol=1e-6)
        np.testing.assert_array_equal(short.encode_queries(TEXTS, dim=48), whole)
    for dim in (0, 49):
        with pytest.raises(UserError, match=f"dim = {dim}: must be from 1 to 48"):
            encoder.encode_passages(TEXTS, dim=dim)
        with pytest.raises(UserError, match=f"dim = {dim}"):
            LaserEncoder.from_pretrained(folders["qwen3-tied-chat"], device="cpu", dim=dim)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_gives_float32_vectors_near_the_exact_ones(folders, encoder, dtype):
    half = LaserEncoder.from_pretrained(folders["qwen3-tied-chat"], device="cpu", dtype=dtype)
    vectors = half.encode_queries(TEXTS, steps=1)
    assert vectors.dtype == np.float32 and half.dtype == dtype
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (vectors * encoder.encode_queries(TEXTS, steps=1)).sum(1).min() > 0.99


@pytest.mark.parametrize("dtype, remedy", [("float16", "bfloat16 or float32"), ("float32", "weights")])
def test_vectors_that_are_not_finite_are_refused(folders, dtype, remedy):
    """An overflow in half precision gave NaN vectors, which rank anywhere."""
    encoder = LaserEncoder.from_pretrained(folders["llama-tied"], device="cpu", dtype=dtype, batch_tokens=1)
    with torch.no_grad():
        [row] = encoder.text.tokenizer("7", add_special_tokens=False)["input_ids"]
        encoder.retriever.base.get_input_embeddings().weight[row] = float("inf")
    encoder.encode_passages(["ice", "density of water"], steps=1)
    with pytest.raises(UserError, match=rf"texts\[2\].*not finite in {dtype}: .*{remedy}"):
        encoder.encode_passages(["ice", "density of water", "7", "water"], steps=1)


def test_a_text_of_a_hundred_thousand_tokens_is_cut_by_the_rule(folder):
    RetrieverCard(text=dataclasses.replace(TextConfig(), max_passage_tokens=64, max_query_tokens=64)).save(folder)
    encoder = LaserEncoder.from_pretrained(folder, device="cpu")
    words = "density " * 100_000
    assert len(encoder.text.tokenizer(words)["input_ids"]) >= 100_000
    room = 64 - len(encoder.text.head) - len(encoder.text.tail)
    kept = encoder.text.tokenizer.decode(encoder.text.tokenizer(words)["input_ids"][:room])
    long, short = encoder.encode_passages([words, "ice"]), encoder.encode_passages([kept])
    np.testing.assert_allclose(long[0], short[0], atol=1e-5)
    assert np.isfinite(encoder.encode_queries([words, "ice"], rationales=[words, "ice"])).all()


def test_published_vectors_come_out_of_a_folder_without_card(tmp_path):
    """A released checkpoint: config, weights and tokenizer, nothing of ours. tests/golden has its vectors."""
    path = Path(__file__).parents[1] / "golden" / "qwen3_tied_k3.json"
    case, golden = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**case["config"]), dtype=torch.float64)
    weights = {name.removeprefix("weight."): value for name, value in golden.items() if name.startswith("weight.")}
    lm.load_state_dict(weights, strict=False)
    lm.tie_weights()
    lm.save_pretrained(tmp_path)
    small_tokenizer(case["config"]["vocab_size"]).save_pretrained(tmp_path)
    encoder = LaserEncoder.from_pretrained(tmp_path, device="cpu", dtype="float64", batch_tokens=40)
    assert encoder.card == RetrieverCard()
    assert encoder.text.query("x") == encoder.text.query("x", TextConfig().instruction)
    for name in ("queries", "passages"):
        vectors = encoder.encode_rows([TokenSequence(ids) for ids in case[name]])
        expected = golden["out.query" if name == "queries" else "out.passage"]
        # Not 1e-9: positions count from 0 here, and rotary angles are float32; see tests/model/test_golden.py.
        np.testing.assert_allclose(vectors, expected, atol=1e-6)


def small_tokenizer(size):
    """Words to ids below `size`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w1", eos_token="w2")
