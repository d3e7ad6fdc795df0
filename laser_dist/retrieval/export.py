"""`laser-dist export`: a checkpoint as one plain model folder, which needs nothing of ours to load.

The folder: full weights (LoRA merged in float32) and config.json of the backbone's own architecture, the tokenizer with
its chat template, laser_dist.json (see `card`), modules.json and config_sentence_transformers.json, and a README.md.
It is written under a temporary name beside the target, loaded again and compared with the source, and then renamed:
what bears the target's name is complete and gives the checkpoint's vectors.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Literal

from laser_dist import __version__
from laser_dist.config import TextConfig
from laser_dist.errors import UserError
from laser_dist.retrieval.card import FILE as CARD

if TYPE_CHECKING:
    import numpy as np

    from laser_dist.retrieval.card import RetrieverCard
    from laser_dist.retrieval.encoder import LaserEncoder

Dtype = Literal["float32", "bfloat16", "float16", "keep"]
TOLERANCE = 1e-5
_MODULE = "laser_dist.retrieval.sentence_transformers_module.LaserModule"
_MARK = "\u241ftext\u241f"
_PROBE = "Why is the sky blue? Air scatters short waves of light more than long ones."

HELP = """Turn a checkpoint into one plain model folder, for laser_dist, transformers and sentence-transformers.

LoRA adapters are merged. The export is loaded again and compared with the checkpoint before it gets its name.

Examples:
  laser-dist export runs/first --out exports/first
  laser-dist export runs/first/checkpoints/step-000020 --out exports/step20 --dtype bfloat16
  laser-dist export runs/first --out exports/first --overwrite
"""


@dataclass(frozen=True)
class Export:
    """A finished export."""

    folder: Path
    dtype: str
    rounding: float
    """Largest change of a probe vector's component by the export's precision; 0 where nothing was rounded."""


def export(checkpoint: Path, /, *, out: Path, dtype: Dtype = "keep", overwrite: bool = False) -> Export:
    """Write the model of a checkpoint to the folder `out`, verified.

    Raises UserError for a source that is no model, a target that holds something else, weights that overflow `dtype`,
    and an export that does not give the checkpoint's vectors.

    Args:
        checkpoint: A run (its newest checkpoint), a checkpoint, or a model folder.
        out: Folder to write; must be new or empty.
        dtype: Precision of the weights; keep: as they are stored (merged adapters: as the backbone's).
        overwrite: Replace an earlier export in that folder.
    """
    source, out = _source(checkpoint), Path(out).expanduser().resolve()
    _check_target(out, overwrite)
    encoder, precision = _load(source), _target_dtype(source, dtype)
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        rounding = _write_and_verify(encoder, staging, precision)
        _replace(staging, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Export(out, precision, rounding)


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    import tyro

    done = tyro.cli(export, args=argv, prog="laser-dist export", description=HELP)
    rounded = f"; rounding to {done.dtype} moved a probe vector by at most {done.rounding:.1e}" if done.rounding else ""
    print(f"exported to {done.folder} in {done.dtype}, and verified against the checkpoint{rounded}")
    return 0


def save_folder(lm: Any, tokenizer: Any, card: "RetrieverCard", folder: Path) -> None:
    """Weights, config, tokenizer and card, in the form that plain transformers users can load and use."""
    lm.save_pretrained(folder)
    # We pack rows and never pad. Others pad, and thinking goes on after each row's last position, which must hold the
    # text's last token: with padding on the right it would hold padding, and the vectors would be silently wrong.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    card.save(folder)


def split_template(template: str, field: str, **filled: str) -> tuple[str, str]:
    """What a template of TextConfig puts before and after `field`, with its other fields filled in."""
    before, _, after = template.format(**{field: _MARK}, **filled).partition(_MARK)
    return before, after


def query_prompt(config: TextConfig) -> str:
    """The sentence-transformers prompt that says "this is a query": the text that the query template puts before it.

    Where the template begins with the query, the template itself serves as the sign; see LaserModule.preprocess.
    """
    return split_template(config.query_template, "query", instruction=config.instruction)[0] or config.query_template


def _source(checkpoint: Path) -> Path:
    from laser_dist.retrieval.encoder import model_folder

    # A hub id is no checkpoint; a mistyped folder must not be looked up there.
    if not Path(checkpoint).expanduser().is_dir():
        raise UserError(f"{checkpoint}: this folder does not exist; give a run, a checkpoint or a model folder")
    return Path(model_folder(checkpoint)).resolve()


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out}: is a file; give the name of a folder")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"--out {out}: is not empty; choose another folder, or replace the export in it with --overwrite"
        )
    if not _is_export(out):
        raise UserError(
            f"--out {out}: holds something else than an export, and --overwrite does not delete that; "
            "choose another folder"
        )


def _is_export(folder: Path) -> bool:
    """Whether nothing is lost by replacing the folder. A checkpoint has no modules.json; a clone of a hub has .git."""
    modules = folder / "modules.json"
    if not (folder / CARD).is_file() or not modules.is_file() or not all(path.is_file() for path in folder.iterdir()):
        return False
    return _MODULE in modules.read_text(encoding="utf-8", errors="replace")


def _load(source: Path) -> "LaserEncoder":
    from safetensors import SafetensorError

    from laser_dist.retrieval.encoder import LaserEncoder

    try:
        # float32 whatever the target: adapters merged in bfloat16 lose what training has learnt in small steps.
        return LaserEncoder.from_pretrained(source, device="cpu", dtype="float32")
    except UserError as error:
        raise UserError(f"{source} cannot be exported: {error}") from error
    except SafetensorError as error:
        raise UserError(f"{source}: its weights are damaged ({error}); export another checkpoint") from error


def _target_dtype(source: Path, dtype: str) -> str:
    """`dtype`, or for keep that of the full weights: the folder's own, or those of the adapters' backbone."""
    if dtype != "keep":
        return dtype
    from transformers import AutoConfig

    from laser_dist.retrieval.card import RetrieverCard

    adapters = (source / "adapter_config.json").is_file()
    stored = AutoConfig.from_pretrained(RetrieverCard.load(source).backbone if adapters else source).dtype
    name = str(stored or "float32").removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"{source}: is stored in {name}, which an export cannot keep: choose --dtype float32")
    return name


def _write_and_verify(encoder: "LaserEncoder", folder: Path, dtype: str) -> float:
    """Write all files and load them again; returns what rounding changed. Raises UserError if the vectors differ."""
    import numpy as np

    from laser_dist.retrieval.encoder import LaserEncoder

    exact = _probe(encoder)
    _cast(encoder, dtype)
    save_folder(encoder.retriever.lm, encoder.text.tokenizer, encoder.card, folder)
    _write_sentence_transformers(encoder.card, folder)
    (folder / "README.md").write_text(_model_card(encoder, dtype), encoding="utf-8")
    _cast(encoder, "float32")
    written = _probe(encoder)
    if not np.isfinite(written).all():
        raise UserError(f"--dtype {dtype}: the weights overflow it; choose float32 or bfloat16")
    del encoder.retriever  # two copies of a large model may not fit into memory
    difference = float(
        np.abs(_probe(LaserEncoder.from_pretrained(folder, device="cpu", dtype="float32")) - written).max()
    )
    if not difference <= TOLERANCE:
        raise UserError(
            f"the export gives other vectors than the checkpoint (largest difference {difference:.1e}), so it was "
            "removed: its architecture cannot be saved as a plain folder by the installed transformers"
        )
    return float(np.abs(written - exact).max())


def _probe(encoder: "LaserEncoder") -> "np.ndarray":
    import numpy as np

    return np.concatenate([encoder.encode_queries([_PROBE]), encoder.encode_passages([_PROBE])])


def _cast(encoder: "LaserEncoder", dtype: str) -> None:
    from laser_dist.model.backbone import DTYPES

    # Parameters only: the buffers of rotary embeddings are made anew at loading, and must not be rounded here either.
    for parameter in encoder.retriever.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])


def _replace(staging: Path, out: Path) -> None:
    """Rename staging to out; an export that is there stays whole until the new one has its name."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    staging.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _write_sentence_transformers(card: "RetrieverCard", folder: Path) -> None:
    modules = [{"idx": 0, "name": "0", "path": "", "type": _MODULE}]
    config = {
        "model_type": "SentenceTransformer",
        "requirements": {"laser-dist": f">={__version__}"},
        "prompts": {"query": query_prompt(card.text), "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    for name, value in (("modules.json", modules), ("config_sentence_transformers.json", config)):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model_card(encoder: "LaserEncoder", dtype: str) -> str:
    """README.md: what the folder is and how to load it; nothing that was not measured or configured."""
    card, tokenizer, config = encoder.card, encoder.text.tokenizer, encoder.retriever.base.config
    steps, official = card.thinking.steps, card.thinking.convention == "official"
    # A folder's path says nothing to others, and something about its owner.
    hub_id = card.backbone if card.backbone.count("/") == 1 and not Path(card.backbone).exists() else ""
    total = sum(parameter.numel() for parameter in encoder.retriever.parameters())
    kept = f", the first {card.layers} layers of its backbone" if card.layers else ""
    return _README.substitute(
        base=f"base_model: {hub_id}\n" if hub_id else "",
        backbone=hub_id or Path(card.backbone).name or "not recorded",
        size=f"{config.num_hidden_layers} layers{kept}; hidden size {config.hidden_size}; "
        f"{total:,} parameters in {dtype}",
        steps=steps,
        convention=card.thinking.convention,
        soft=steps - 1 if official else steps,
        sweeps=steps if official else steps + 1,
        averaged="states" if official else "states[1:]",
        instruction=card.text.instruction,
        query_template=json.dumps(card.text.query_template, ensure_ascii=False),
        passage_template=json.dumps(card.text.passage_template, ensure_ascii=False),
        frame="the chat template, thinking turned off" if encoder.text.tail else "nothing but a first token, if any",
        query_tokens=card.text.max_query_tokens,
        passage_tokens=card.text.max_passage_tokens,
        head=repr(tokenizer.decode(encoder.text.head)),
        tail=repr(tokenizer.decode(encoder.text.tail)),
        prompt=repr(split_template(card.text.query_template, "query", instruction=card.text.instruction)[0]),
    )


_README = Template("""\
---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, sentence-similarity, feature-extraction, dense-retrieval, laser-dist]
$base---

# Dense retriever with latent thinking

A causal language model that turns a query or a passage into one vector of unit length. Before it answers, it thinks
in continuous tokens: no text is generated. Trained and exported with `laser_dist`.

| | |
|---|---|
| backbone | $backbone |
| size | $size |
| latent steps K | $steps |
| convention | $convention ($soft soft tokens) |
| query | `$query_template` |
| instruction of a query that brings none | $instruction |
| passage | `$passage_template` (without title: the text alone) |
| around both | $frame |
| longest query, passage | $query_tokens, $passage_tokens tokens; longer content is cut, never what is around it |

Vectors are compared by their dot product. Queries and passages are encoded differently: use the right method for each.

## laser_dist

```python
from laser_dist import LaserEncoder

encoder = LaserEncoder.from_pretrained("DIR")  # steps=6 thinks longer
queries = encoder.encode_queries(["why is the sky blue?"])
passages = encoder.encode_passages(["Air scatters short waves of light more than long ones."])
scores = queries @ passages.T
```

## sentence-transformers

Needs `laser-dist` installed. From version 6 on, sentence-transformers wants `trust_remote_code=True` for every class
that is not its own; the code that runs is the installed package's, and this folder contains none.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("DIR", trust_remote_code=True)
queries = model.encode_query(["why is the sky blue?"])
passages = model.encode_document(["Air scatters short waves of light more than long ones."])
scores = model.similarity(queries, passages)
```

## transformers

The folder is a plain causal LM. Without `laser_dist`, a vector is made so; batches must be padded on the left, as this
tokenizer does.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("DIR")
lm = AutoModelForCausalLM.from_pretrained("DIR").eval()
HEAD, TAIL = $head, $tail


def ids(text):
    return tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def encode(contents, longest):
    room = longest - len(ids(HEAD)) - len(ids(TAIL))
    prompts = [ids(HEAD) + ids(content)[:room] + ids(TAIL) for content in contents]
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    mask, table = batch["attention_mask"], lm.get_input_embeddings().weight
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs, cache, states = table[batch["input_ids"]], None, []
    for _ in range($sweeps):
        output = lm.get_decoder()(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        state, cache = output.last_hidden_state[:, -1], output.past_key_values
        states.append(state)
        # The soft token: the embeddings of the vocabulary, weighted by how likely each is to come next.
        weights = lm.get_output_embeddings()(state).float().softmax(-1)
        inputs = (weights.to(table.dtype) @ table)[:, None]
        mask, positions = torch.nn.functional.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
    return torch.nn.functional.normalize(torch.stack($averaged).mean(0).float(), dim=-1)


queries = encode([$prompt + "why is the sky blue?"], $query_tokens)
passages = encode(["Air scatters short waves of light more than long ones."], $passage_tokens)
scores = queries @ passages.T
```
""")
