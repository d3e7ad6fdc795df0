import hashlib

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from laser_dist.testing import run_distributed, tiny_model_folder


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def digests_elsewhere(rank, world_size, folder):
    return digests(tiny_model_folder(folder, architecture="qwen3", chat_template=True))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_loads_and_runs(tmp_path, architecture, tied):
    folder = tiny_model_folder(tmp_path, architecture=architecture, tied=tied, layers=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == architecture and model.config.num_hidden_layers == 1
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert len(tokenizer) == model.config.vocab_size
    batch = tokenizer("why is the sky blue?", return_tensors="pt", return_token_type_ids=False)
    assert model(**batch).logits.isfinite().all()


def test_weights_are_large_enough_to_matter(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder(tmp_path))
    logits = model(torch.arange(20)[None]).logits[0]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert entropy.max() < 0.95 * torch.tensor(model.config.vocab_size).log()
    assert logits.std(0).mean() > 0.3  # the prediction depends on the token


def test_dtype_and_seed(tmp_path):
    half = AutoModelForCausalLM.from_pretrained(tiny_model_folder(tmp_path / "half", dtype=torch.bfloat16))
    other = AutoModelForCausalLM.from_pretrained(tiny_model_folder(tmp_path / "other", seed=1))
    assert half.dtype == torch.bfloat16 and other.dtype == torch.float32
    assert not torch.equal(half.lm_head.weight.float(), other.lm_head.weight)


def test_same_bytes_in_another_process_and_generator_left_alone(tmp_path):
    state = torch.get_rng_state()
    here = digests(tiny_model_folder(tmp_path / "here", architecture="qwen3", chat_template=True))
    assert torch.equal(state, torch.get_rng_state())
    assert run_distributed(digests_elsewhere, 1, tmp_path / "there") == [here]


def test_tokenizer_is_lossless_and_merges_blank_lines(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder(tmp_path))
    for text in ("Ice floats.\n\nWhy? Ünïcode 水 <think>", " leading and trailing \n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id is not None and tokenizer.bos_token_id is None
    assert ".\n\n" in [tokenizer.decode([token]) for token in tokenizer("Ice floats.\n\nWhy?").input_ids]


def test_bos_comes_first_when_asked(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder(tmp_path, bos=True))
    assert tokenizer("ice").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer("ice", add_special_tokens=False).input_ids[0] != tokenizer.bos_token_id


def test_chat_template_ends_in_an_empty_think_block(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder(tmp_path, architecture="qwen3", chat_template=True))
    turn = [{"role": "user", "content": "why?"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    thinking = tokenizer.apply_chat_template(turn, **options)
    assert thinking == "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    silent = tokenizer.apply_chat_template(turn, enable_thinking=False, **options)
    assert silent == thinking + "<think>\n\n</think>\n\n"
    assert len(tokenizer("<think></think>").input_ids) == 2
