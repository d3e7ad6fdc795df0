"""The files beside the weights: tokenizer, card, and what sentence-transformers reads."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laser_dist import __version__
from laser_dist.config import TextConfig
from laser_dist.files import write_json

if TYPE_CHECKING:
    from laser_dist.retrieval.card import RetrieverCard

INSTALLED = "laser_dist.retrieval.sentence_transformers_module.LaserModule"
SHIPPED = "modeling_laser"
"""The module that a self-contained export brings along."""
_MARK = "\u241ftext\u241f"


def save_folder(lm: Any, tokenizer: Any, card: "RetrieverCard", folder: Path, *, max_shard_size: str = "5GB") -> None:
    """Weights, config, tokenizer and card, in the form that plain transformers users can load and use."""
    lm.save_pretrained(folder, max_shard_size=max_shard_size)
    save_text(tokenizer, card, folder)


def save_text(tokenizer: Any, card: "RetrieverCard", folder: Path) -> None:
    """Tokenizer and card."""
    # We pack rows and never pad. Others pad, and thinking goes on after each row's last position, which must hold the
    # text's last token: with padding on the right it would hold padding, and the vectors would be silently wrong.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    card.save(folder)


def write_sentence_transformers(card: "RetrieverCard", folder: Path, *, self_contained: bool) -> None:
    """modules.json and config_sentence_transformers.json: one module, the prompts and the similarity.

    From version 6 on, sentence-transformers imports any class outside its own package only with trust_remote_code, be
    it installed or not, and neither it nor transformers looks for plug-ins (entry points): there is no name to write
    here that `SentenceTransformer(DIR)` alone would follow to latent thinking.
    """
    kind = f"{SHIPPED}.LaserModule" if self_contained else INSTALLED
    config = {
        "model_type": "SentenceTransformer",
        "requirements": {} if self_contained else {"laser-dist": f">={__version__}"},
        "prompts": {"query": query_prompt(card.text), "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": kind}])
    write_json(folder / "config_sentence_transformers.json", config)


def write_shipped_module(folder: Path) -> None:
    """The model as one readable file, and config.json naming it for `AutoModel`; AutoModelForCausalLM stays plain."""
    shutil.copyfile(Path(__file__).with_name(f"{SHIPPED}.py"), folder / f"{SHIPPED}.py")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"auto_map": {"AutoModel": f"{SHIPPED}.LaserModel"}})


def split_template(template: str, field: str, **filled: str) -> tuple[str, str]:
    """What a template of TextConfig puts before and after `field`, with its other fields filled in."""
    before, _, after = template.format(**{field: _MARK}, **filled).partition(_MARK)
    return before, after


def query_prompt(config: TextConfig) -> str:
    """The sentence-transformers prompt that says "this is a query": the text that the query template puts before it.

    Where the template begins with the query, the template itself serves as the sign; see LaserModule.preprocess.
    """
    return split_template(config.query_template, "query", instruction=config.instruction)[0] or config.query_template
