"""Tiny random causal LMs with a real tokenizer, made offline and alike on every machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

_END, _BEGIN, _TURN, _TURN_END = "<|endoftext|>", "<|begin_of_text|>", "<|im_start|>", "<|im_end|>"

# Qwen3's format in short: turns, and an empty think block where thinking is turned off.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif -%}
{%- endif -%}"""

# Words as Qwen's and Llama 3's tokenizers see them: line breaks belong to the punctuation before them.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Enough repetition for a hundred merges; blank lines after a full stop, because real tokenizers merge those.
_TEXT = """\
Instruct: Given a query, retrieve passages that help answer it
Query: why does ice float on water?

The essential problem is density. Water is densest near four degrees.

Ice is less dense than water, because its crystal holds the molecules apart. So ice floats on the water below.

A passage that explains hydrogen bonds and density would help to answer the query.

Query: why is the sky blue? Air scatters short waves more than long ones; the sky is blue because blue light scatters.
"""


def tiny_model_folder(
    folder: Path | str,
    *,
    architecture: Literal["llama", "qwen3"] = "llama",
    tied: bool = True,
    chat_template: bool = False,
    bos: bool = False,
    layers: int = 2,
    seed: int = 0,
    dtype: "torch.dtype | None" = None,
) -> Path:
    """Write a random model (hidden size 48, 4 heads, 2 of keys and values) with its tokenizer; returns the folder.

    `bos`: the tokenizer puts a first token before each text, as Llama's does. `dtype`: float32 unless given.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    folder = Path(folder)
    tokenizer = _tokenizer(chat_template=chat_template, bos=bos)
    kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    make_config, make_model = kinds[architecture]
    config = make_config(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        # Ten times the usual: soft tokens and attention then depend on their input enough for a test to notice.
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # Unset, as in real checkpoints: a padding row would be zero and get no gradient, and here it would be EOS's.
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(config).to(dtype or torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(*, chat_template: bool, bos: bool) -> "PreTrainedTokenizerFast":
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [_END] + [_BEGIN] * bos + [_TURN, _TURN_END] * chat_template
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([_TEXT], trainer)
    if chat_template:  # tokens of their own, but part of the text: as in Qwen3
        bpe.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    if bos:
        begin = (_BEGIN, bpe.token_to_id(_BEGIN))
        bpe.post_processor = processors.TemplateProcessing(single=f"{_BEGIN} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=_BEGIN if bos else None,
        eos_token=_END,
        pad_token=_END,
        chat_template=_CHAT_TEMPLATE if chat_template else None,
        clean_up_tokenization_spaces=False,
    )
