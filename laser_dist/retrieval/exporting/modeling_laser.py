"""A dense retriever that thinks in K continuous tokens before it answers with one vector; the whole of it, in one file.

It lies beside the weights, and needs torch and transformers only (LaserModule also sentence-transformers):

1. A prompt is head + content + tail. Head and tail are what the chat template puts around the content, or nothing; a
   prompt that is too long loses the end of its content, never the tail.
2. The causal LM reads all prompts, padded. The state of a prompt's last token is what the LM would say next.
3. A soft token is the embedding of what comes next, averaged over the vocabulary: softmax(logits) times the embedding
   table. Read as the next token, it gives the next state; keys and values of all before it come from the cache.
4. The vector is the mean of K states, scaled to unit length. By the official convention the first of them is the
   prompt's (K - 1 soft tokens), by the paper's it is the first soft token's (K soft tokens).

laser_dist.json holds K, the convention, templates and limits. Copied from laser_dist, Apache-2.0.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

try:
    from sentence_transformers.base.modules import InputModule
except ImportError:  # LaserModel does without
    InputModule = nn.Module  # type: ignore

CARD = "laser_dist.json"
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")


class LaserModel(nn.Module):
    """Token ids to vectors of unit length; `encode_queries` and `encode_passages` begin with text."""

    def __init__(self, lm, tokenizer, card):
        super().__init__()
        self.lm = lm
        self.config = lm.config
        self.tokenizer = tokenizer
        self.card = card
        self.head, self.tail = frame(tokenizer, card["text"])

    @classmethod
    def from_pretrained(cls, folder, *, steps=None, **options):
        """A folder or hub id; `steps` thinks for another K, `options` are AutoModelForCausalLM's."""
        hub = {name: options[name] for name in HUB_OPTIONS if name in options}
        card = json.loads(Path(cached_file(folder, CARD, **hub)).read_text(encoding="utf-8"))
        if steps is not None:
            card["thinking"]["steps"] = int(steps)
        if options.get("dtype") in (None, "auto"):
            options["dtype"] = "auto" if torch.cuda.is_available() else torch.float32
        lm = AutoModelForCausalLM.from_pretrained(folder, **options)
        return cls(lm.eval(), AutoTokenizer.from_pretrained(folder, **hub), card)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """AutoModel calls this; config.json names the class already."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Ids and mask (R, L), padded left or right -> vectors (R, D) of unit length, at least float32."""
        thinking, mask_RL = self.card["thinking"], attention_mask
        unread = int(thinking["convention"] == "paper")  # states that are not averaged: the prompt's
        self._check_window(mask_RL.shape[1] + thinking["steps"])
        table_VD = self.lm.get_input_embeddings().weight
        row_R = torch.arange(len(mask_RL), device=mask_RL.device)
        last_R = (mask_RL * torch.arange(mask_RL.shape[1], device=mask_RL.device)).argmax(1)
        position_RL = (mask_RL.cumsum(1) - 1).clamp(min=0)  # padding counts for nothing
        states: list[Tensor] = []
        inputs_RLD, cache = self.lm.get_input_embeddings()(input_ids), None
        for _ in range(unread + thinking["steps"]):
            if states:
                p_RV = self.lm.get_output_embeddings()(states[-1]).float().softmax(-1)
                inputs_RLD = (p_RV.to(table_VD.dtype) @ table_VD)[:, None]
                position_RL = position_RL[row_R, last_R][:, None] + 1
                mask_RL, last_R = nn.functional.pad(mask_RL, (0, 1), value=1), torch.zeros_like(last_R)
            output = self.lm.get_decoder()(
                inputs_embeds=inputs_RLD,
                attention_mask=mask_RL,
                position_ids=position_RL,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            states.append(output.last_hidden_state[row_R, last_R])
        return nn.functional.normalize(torch.stack(states[unread:]).mean(0).float(), dim=-1)

    def encode_queries(self, texts, *, instructions=None, batch_size=32):
        """Queries -> (n, D); an instruction of None is the model's own default."""
        instructions = instructions or [None] * len(texts)
        return self._encode([self.query(t, i) for t, i in zip(texts, instructions, strict=True)], batch_size)

    def encode_passages(self, texts, *, titles=None, batch_size=32):
        """Passages -> (n, D)."""
        titles = titles or [""] * len(texts)
        return self._encode([self.passage(t, title) for t, title in zip(texts, titles, strict=True)], batch_size)

    def query(self, text, instruction=None, prompt=None):
        """Token ids of a query; `prompt` stands in for what the template puts before the text."""
        settings = self.card["text"]
        content = settings["query_template"].format(instruction=instruction or settings["instruction"], query=text)
        if prompt is not None:
            content = prompt + text + around(settings["query_template"], "query", instruction="")[1]
        return self._cut(content, settings["max_query_tokens"])

    def passage(self, text, title="", prompt=""):
        """Token ids of a passage; `prompt` goes before all of it."""
        settings = self.card["text"]
        content = settings["passage_template"].format(title=title, text=text)
        if prompt:
            before, after = around(settings["passage_template"], "text", title="")
            content = prompt + before.lstrip() + text + after
        return self._cut(content.strip(), settings["max_passage_tokens"])

    def _cut(self, content, longest):
        if longest <= len(self.head) + len(self.tail):
            raise ValueError(f"at most {longest} tokens: the chat template alone takes as many; allow more")
        ids = self.head + self.tokenizer(content, add_special_tokens=False)["input_ids"] + self.tail
        return ids if len(ids) <= longest else ids[: longest - len(self.tail)] + self.tail

    @torch.no_grad()
    def _encode(self, prompts, batch_size):
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # alike lengths waste little padding
        vectors = []
        for start in range(0, len(order), batch_size):
            ids, mask = padded([prompts[i] for i in order[start : start + batch_size]])
            vectors.append(self(ids.to(self.lm.device), mask.to(self.lm.device)).cpu())
        return torch.cat(vectors)[torch.tensor(order).argsort()]

    def _check_window(self, longest):
        window = getattr(self.config, "sliding_window", None)
        if window is not None and longest > window:
            raise ValueError(f"{longest} tokens and steps exceed the model's sliding window of {window}")


class LaserModule(InputModule):
    """LaserModel as the only module of a SentenceTransformer: encode_query, encode_document, prompts, K."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.tokenizer = model.tokenizer

    @classmethod
    def load(  # type: ignore[override]
        cls,
        model_name_or_path,
        subfolder="",
        token=None,
        cache_folder=None,
        revision=None,
        local_files_only=False,
        model_kwargs=None,
        config_kwargs=None,
        **_,
    ):
        """Heeds `model_kwargs={"dtype": ...}` and `config_kwargs={"steps": 6}`."""
        folder = cls.load_dir_path(model_name_or_path, subfolder, token, cache_folder, revision, local_files_only)
        return cls(LaserModel.from_pretrained(folder, **(config_kwargs or {}), **(model_kwargs or {})))

    def preprocess(self, inputs, prompt=None, task=None, **_):
        """Texts -> ids and mask. The saved query prompt is a sign, "this is a query", as is the task of encode_query.

        Any other prompt of a query replaces what the template puts before the text; that of a document goes before it.
        """
        text = self.model.card["text"]
        before, _after = around(text["query_template"], "query", instruction=text["instruction"])
        if task == "query" or (task != "document" and prompt):
            own = None if prompt in (None, before or text["query_template"]) else prompt
            rows = [self.model.query(x, prompt=own) for x in inputs]
        else:
            rows = [self.model.passage(x, prompt=prompt or "") for x in inputs]
        ids, mask = padded(rows)
        return {"input_ids": ids, "attention_mask": mask}

    def forward(self, features, **_):
        features["sentence_embedding"] = self.model(features["input_ids"], features["attention_mask"])
        return features

    def get_embedding_dimension(self):
        return self.model.config.hidden_size

    def get_config_dict(self):
        return self.model.card["thinking"]

    @property
    def max_seq_length(self):
        return max(self.model.card["text"]["max_query_tokens"], self.model.card["text"]["max_passage_tokens"])

    @max_seq_length.setter
    def max_seq_length(self, value):
        self.model.card["text"].update(max_query_tokens=value, max_passage_tokens=value)

    def save(self, output_path, *_, **__):
        self.model.lm.save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)
        card = json.dumps(self.model.card, indent=2, ensure_ascii=False) + "\n"
        (Path(output_path) / CARD).write_text(card, encoding="utf-8")


def frame(tokenizer, text):
    """Token ids before and after a content: the chat template's with thinking turned off, or the first token if any."""
    if text["chat_template"] == "never" or not tokenizer.chat_template:
        bos = tokenizer.bos_token_id
        return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else [], []
    mark = "\u241fcontent\u241f"
    head, tail = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    ).split(mark)
    return tuple(tokenizer([head, tail], add_special_tokens=False)["input_ids"])


def around(template, field, **others):
    """What a template puts before and after `field`, with its other fields filled in."""
    mark = "\u241ftext\u241f"
    before, _, after = template.format(**{field: mark}, **others).partition(mark)
    return before, after


def padded(rows):
    """Rows of ids -> ids and mask (R, L), padded on the right."""
    ids_RL = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return ids_RL, pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
