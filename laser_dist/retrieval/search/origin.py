"""Where a folder of vectors comes from: another model's queries, or another corpus's texts, would rank by accident."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from laser_dist.errors import UserError
from laser_dist.files import sha256
from laser_dist.reading import read_object
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.retrieval.encode import weights_hash

# What of a card shapes a passage's vector; the rest concerns queries, which may be asked otherwise than in training.
_PASSAGE_TEXT = ("passage_template", "chat_template", "max_passage_tokens")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder of vectors (`load_vectors` has checked it)."""
    return read_object(folder / "manifest.json")


def manifest_hash(folder: Path) -> str:
    """SHA-256 of the manifest, which names corpus, model and settings: equal hashes, equal vectors."""
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


def check_passages(folder: Path) -> None:
    """UserError for a folder of encoded queries: they would be searched as if they were a corpus."""
    if read_manifest(folder)["what"] != "passages":
        raise UserError(f"--vectors {folder}: holds encoded queries: give the folder of an encoded corpus")


def check_same_model(folder: Path, model: str, card: RetrieverCard) -> None:
    """UserError unless the model folder `model`, used as `card` says, is what made the vectors in `folder`."""
    manifest = read_manifest(folder)
    ours = json.loads(json.dumps(dataclasses.asdict(card)))
    made, given = manifest["weights"], weights_hash(model)
    if made != given:
        raise UserError(
            f"{folder} was made with {_name(manifest['encoder'], made)}, but {model} holds {_name(ours, given)}: give "
            "the model that made the vectors, or encode again"
        )
    _check_shaping(folder, manifest["encoder"], ours)


def check_same_vectors(folder: Path, queries: Path) -> None:
    """UserError unless the second folder holds queries, encoded by the model and with the dimension of the first."""
    ours, theirs = read_manifest(folder), read_manifest(queries)
    if theirs["what"] != "queries":
        raise UserError(f"--query-vectors {queries}: holds encoded passages: encode the queries with --what queries")
    for key in ("weights", "dim"):
        if ours[key] != theirs[key]:
            raise UserError(
                f"{queries}: {key} {theirs[key]!r}, but {folder} has {ours[key]!r}: encode both with one model"
            )
    _check_shaping(folder, ours["encoder"], theirs["encoder"])


def check_same_corpus(folder: Path, ids: Sequence[str], corpus: Path, corpus_ids: Sequence[str]) -> None:
    """UserError unless row i of the vectors is line i of the corpus file, as it is now."""
    hashed = read_manifest(folder)["corpus"]["sha256"]
    same = sha256(corpus) == hashed
    if not same or len(ids) != len(corpus_ids) or any(a != b for a, b in zip(ids, corpus_ids, strict=True)):
        raise UserError(f"{folder} holds the vectors of another corpus than {corpus}: give that one, or encode again")


def _check_shaping(folder: Path, made: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    theirs, ours = _shaping(made), _shaping(given)
    if differing := [f"{key} {theirs[key]!r}, not {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]]:
        raise UserError(f"{folder} was made with {'; '.join(differing)}: use the same, or encode the corpus again")


def _shaping(description: Mapping[str, Any]) -> dict[str, Any]:
    text, thinking = description["text"], description["thinking"]
    return {**{f"text.{key}": text[key] for key in _PASSAGE_TEXT}, **{f"thinking.{k}": v for k, v in thinking.items()}}


def _name(description: Mapping[str, Any], weights: str | None) -> str:
    told = f"weights {weights[:12] if weights else 'unknown'}"
    return f"{told} of {backbone}" if (backbone := description.get("backbone")) else told
