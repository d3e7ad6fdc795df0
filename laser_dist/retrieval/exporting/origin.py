"""How a model was made, as far as its run says: settings, data, and what was measured; for the model card.

A card is read by strangers: of paths and addresses only the last part is told, of hub data sets the name.
"""

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from laser_dist.data.manifest import LARGEST, MANIFEST, Source, parse_manifest
from laser_dist.errors import UserError
from laser_dist.reading import LARGEST_RESULTS, decode_json, read_file, read_object
from laser_dist.retrieval.card import RetrieverCard

# What of a run's config.toml is told: nothing that names a place.
_TOLD = {
    "thinking": ("steps", "convention"),
    "model": ("dtype", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets"),
    "data": ("negatives", "homogeneous"),
    "train": ("queries_per_rank", "accumulation", "epochs", "max_steps"),
    "optimizer": None,
    "objective": None,
}
_METRIC = re.compile(r"[a-z]+@\d+")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class DataSource:
    """Where training examples came from."""

    name: str
    examples: int | None = None
    """None where the shards' manifest cannot be read from here."""
    licence: str = ""
    hub_id: str = ""


@dataclass(frozen=True)
class Measured:
    """The metrics of one `laser-dist evaluate`."""

    name: str
    metrics: dict[str, float]
    steps: int | None = None
    bm25: dict[str, float] | None = None
    queries: int | None = None
    passages: int | None = None


@dataclass(frozen=True)
class Origin:
    """All of it; empty where a model folder came without its run."""

    settings: str = ""
    """TOML."""
    step: int | None = None
    ranks: int | None = None
    zero_stage: int | None = None
    dev: dict[str, float] | None = None
    data: tuple[DataSource, ...] = ()
    results: tuple[Measured, ...] = ()

    @property
    def hub_datasets(self) -> list[str]:
        return sorted({source.hub_id for source in self.data if source.hub_id})


def origin_of(source: Path, results: tuple[Path, ...] = ()) -> Origin:
    """What the run around the model folder `source` says, and the result files. UserError where these are damaged."""
    measured = tuple(_measured(path, RetrieverCard.load(source)) for path in results)
    checkpoint = source.parent
    if source.name != "model" or not (checkpoint / "trainer.json").is_file():
        return Origin(results=measured)
    state = _read_json(checkpoint / "trainer.json")
    run = checkpoint.parent.parent
    config = _read_config(run / "config.toml")
    return Origin(
        settings=_settings(config),
        step=state.get("step"),
        ranks=state.get("world_size"),
        zero_stage=state.get("stage"),
        dev=_dev_metrics(run / "metrics.jsonl", state.get("step")),
        data=_data(config.get("data", {})),
        results=measured,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, LARGEST_RESULTS)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error


def _read_config(path: Path) -> dict[str, Any]:
    """The run's config as a plain table: what another version wrote is told as it stands."""
    if not path.is_file():
        return {}
    try:
        return tomllib.loads(read_file(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: is not valid TOML ({error}); mend it, or remove it: the card then says less"
        ) from None


def _settings(config: dict[str, Any]) -> str:
    sections = []
    for name, keys in _TOLD.items():
        section = config.get(name, {})
        told = {key: value for key, value in section.items() if keys is None or key in keys}
        if name == "model" and not told.get("lora_rank"):
            told = {key: value for key, value in told.items() if not key.startswith("lora_")}
        if told:
            # Numbers, strings and lists of them are TOML in JSON's spelling, too.
            sections.append("\n".join([f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in told.items())]))
    return "\n\n".join(sections)


def _dev_metrics(path: Path, step: int | None) -> dict[str, float] | None:
    found: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = decode_json(line)
        except ValueError:  # a crash can cut the last line off
            continue
        if row.get("step") == step:
            found |= {key.removeprefix("dev/"): value for key, value in row.items() if key.startswith("dev/")}
    return found or None


def _data(config: dict[str, Any]) -> tuple[DataSource, ...]:
    places = config.get("mix") or ({config["train"]: 1.0} if config.get("train") else {})
    sources: list[DataSource] = []
    for place in places:
        path = Path(place).expanduser() / MANIFEST
        if "://" in place or not path.is_file():  # not asked over the network: what is there now may be other data
            sources.append(DataSource(_last_part(place)))
        else:
            sources += [_source(source) for source in parse_manifest(read_file(path, LARGEST), path).sources]
    return tuple(sources)


def _source(source: Source) -> DataSource:
    hub_id = source.name.partition(":")[0] if source.revision else ""
    public = bool(_HUB_ID.fullmatch(hub_id))
    name = source.name if public else _last_part(source.name)
    return DataSource(name, source.examples, source.licence, hub_id if public else "")


def _last_part(place: str) -> str:
    """The file's or folder's name alone; an address may hold a password and a token besides."""
    return PurePosixPath(urlsplit(place).path if "://" in place else place).name or "unnamed"


def _measured(path: Path, card: RetrieverCard) -> Measured:
    result = _read_json(path)
    metrics = _metrics(result)
    if not metrics:
        raise UserError(
            f"--results {path}: holds no metric such as ndcg@10; give a file of `laser-dist evaluate --out`"
        )
    encoder = result.get("encoder") or {}
    thinking = encoder.get("thinking") or {}
    for what, theirs, ours in (
        ("a model of backbone", encoder.get("backbone"), card.backbone),
        ("a model of convention", thinking.get("convention"), card.thinking.convention),
    ):
        if theirs not in (None, ours):
            raise UserError(
                f"--results {path}: measured {what} {theirs!r}, and this one has {ours!r}; "
                "evaluate the checkpoint you export"
            )
    bm25 = result.get("bm25")
    return Measured(
        name=path.stem,
        metrics=metrics,
        steps=thinking.get("steps"),
        bm25=_metrics(bm25) if isinstance(bm25, dict) else None,
        queries=result.get("queries"),
        passages=result.get("passages"),
    )


def _metrics(table: dict[str, Any]) -> dict[str, float]:
    return {key: float(x) for key, x in table.items() if _METRIC.fullmatch(key) and isinstance(x, int | float)}
