"""README.md of an export: what it is, how it was made, what was measured, how to load it; nothing that is not known."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laser_dist import __version__
from laser_dist.retrieval.exporting.formats import split_template
from laser_dist.retrieval.exporting.origin import Measured, Origin

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from laser_dist.retrieval.encoder import LaserEncoder

_TEMPLATE = Path(__file__).with_suffix(".md")


def write_model_card(
    encoder: "LaserEncoder", origin: Origin, folder: Path, *, name: str, dtype: str, adapter: bool, self_contained: bool
) -> None:
    """README.md with front matter for the hub; `name` is the model's in the list of results."""
    from huggingface_hub import ModelCard

    card, tokenizer = encoder.card, encoder.text.tokenizer
    steps, official = card.thinking.steps, card.thinking.convention == "official"
    measured = [table for result in origin.results for table in (result.metrics, result.bm25 or {})]
    text = ModelCard.from_template(
        _front_matter(encoder, origin, name, adapter),
        str(_TEMPLATE),
        version=__version__,
        origin=origin,
        metric_names=list(dict.fromkeys(metric for table in measured for metric in table)),
        adapter=adapter,
        self_contained=self_contained,
        backbone=_public_backbone(card.backbone) or Path(card.backbone).name or "not recorded",
        base_model=_public_backbone(card.backbone) or "BACKBONE",
        layers=card.layers,
        size=_size(encoder, dtype, adapter),
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
    (folder / "README.md").write_text(str(text) + "\n", encoding="utf-8")


def _public_backbone(backbone: str) -> str:
    """The backbone's hub id, or "": a folder's path says nothing to others, and something about its owner."""
    return backbone if backbone.count("/") == 1 and not Path(backbone).exists() else ""


def _size(encoder: "LaserEncoder", dtype: str, adapter: bool) -> str:
    config, card = encoder.retriever.base.config, encoder.card
    total = sum(parameter.numel() for parameter in encoder.retriever.parameters())
    kept = f", the first {card.layers} layers of its backbone" if card.layers else ""
    merged = " with its backbone, of which this folder holds the LoRA adapters" if adapter else f" in {dtype}"
    return f"{config.num_hidden_layers} layers{kept}; hidden size {config.hidden_size}; {total:,} parameters{merged}"


def _front_matter(encoder: "LaserEncoder", origin: Origin, name: str, adapter: bool) -> "ModelCardData":
    from huggingface_hub import ModelCardData

    base = _public_backbone(encoder.card.backbone)
    results = [evaluated for measured in origin.results for evaluated in _eval_results(measured)]
    known: dict[str, Any] = {
        "base_model": base or None,
        "base_model_relation": ("adapter" if adapter else "finetune") if base else None,
        "datasets": origin.hub_datasets or None,
        "model_name": name if results else None,
        "eval_results": results or None,
    }
    kind = ["lora"] if adapter else []
    return ModelCardData(
        library_name="peft" if adapter else "sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "sentence-similarity", "feature-extraction", "dense-retrieval", "laser-dist"]
        + kind,
        **{key: value for key, value in known.items() if value is not None},
    )


def _eval_results(measured: Measured) -> list["EvalResult"]:
    from huggingface_hub import EvalResult

    steps = f" (K = {measured.steps})" if measured.steps else ""
    return [
        EvalResult(
            task_type="information-retrieval",
            task_name="Information Retrieval",
            dataset_type=measured.name,
            dataset_name=measured.name + steps,
            metric_type=metric.replace("@", "_at_"),
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in measured.metrics.items()
    ]
