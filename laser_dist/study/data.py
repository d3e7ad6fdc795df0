"""A study's datasets: shards to train on, collections to measure with, and what identifies both."""

import hashlib
import json
import random
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from laser_dist.data import sample_folder
from laser_dist.errors import UserError
from laser_dist.files import locked, replacing, sha256, write_json
from laser_dist.reading import decode_json
from laser_dist.retrieval.collection import collection_files, read_collection
from laser_dist.study.definition import Dataset

SAMPLE = "@sample"
Files = tuple[Path, Path, Path]


@dataclass(frozen=True)
class Prepared:
    """A dataset on disk."""

    shards: Path
    splits: dict[str, Files]
    """dev and test: corpus, queries, qrels."""
    hashes: dict[str, str]
    """train, dev and test -> what their content hashes to."""
    curve: Files | None
    """A smaller dev collection for learning curves."""


def find(dataset: Dataset, root: Path) -> tuple[Path, dict[str, Files]]:
    """The rows or shards to train on, and both splits' files. UserError where one does not exist."""
    folder = sample_folder() if dataset.folder == SAMPLE else root / (dataset.folder or dataset.name)
    if not folder.is_dir():
        raise UserError(
            f"[datasets.{dataset.name}]: {folder} does not exist: give --data FOLDER, which it is relative to "
            "(laser_dist/study/README.md says where the datasets of the ready-made studies come from)"
        )
    train = root / dataset.train if dataset.train else folder / "train.jsonl"
    if not train.exists():
        raise UserError(f"[datasets.{dataset.name}] train: {train} does not exist")
    return train, {split: collection_files(folder, getattr(dataset, split)) for split in ("dev", "test")}


def prepare_dataset(dataset: Dataset, root: Path, out: Path, curve_passages: int) -> Prepared:
    """Shards and the collections of a dataset; what lies in `out` from before is kept while its source is the same.

    Parts of a study that are started together wait for the one that prepares.
    """
    train, splits = find(dataset, root)
    hashes = {split: _digest(map(file_hash, files)) for split, files in splits.items()}
    with locked(out / ".lock"):
        shards = train if (train / "manifest.json").is_file() else _shards(train, dataset.prepare, out / "shards")
        curve = _curve(splits["dev"], hashes["dev"], out / "curve", curve_passages) if curve_passages else None
    manifest = decode_json((shards / "manifest.json").read_text(encoding="utf-8"))
    hashes["train"] = _digest([shard["sha256"] for shard in manifest["shards"]])
    return Prepared(shards, splits, hashes, curve)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, or of the files in a folder."""
    if path.is_dir():
        return _digest(f"{child.name} {file_hash(child)}" for child in sorted(path.iterdir()))
    return sha256(path)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _shards(rows: Path, flags: list[str], out: Path) -> Path:
    from laser_dist.data.preparation import prepare

    source = {"rows": file_hash(rows), "flags": flags}
    note = out.with_suffix(".json")
    if (out / "manifest.json").is_file() and note.is_file() and decode_json(note.read_text()) == source:
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".txt").open("w", encoding="utf-8") as said, redirect_stdout(said):
        prepare.main(["--source", str(rows), "--out", str(out), "--overwrite", *flags])
    write_json(note, source)
    return out


def _curve(dev: Files, dev_hash: str, out: Path, others: int) -> Files:
    """The dev collection with its judged passages and `others` more, drawn alike every time."""
    files = (out / "corpus.jsonl", dev[1], dev[2])
    note, source = out / "source.json", {"dev": dev_hash, "others": others}
    if note.is_file() and decode_json(note.read_text()) == source:
        return files
    corpus, _, qrels = read_collection(*dev)
    judged = {passage for grades in qrels.values() for passage in grades}
    rest = [row for row, name in enumerate(corpus.ids) if name not in judged]
    kept = set(random.Random(0).sample(rest, min(others, len(rest))))
    out.mkdir(parents=True, exist_ok=True)
    with replacing(files[0]) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row, (name, text, title) in enumerate(zip(corpus.ids, corpus.texts, corpus.titles, strict=True)):
            if name in judged or row in kept:
                file.write(json.dumps({"id": name, "text": text, "title": title}, ensure_ascii=False) + "\n")
    write_json(note, source)
    return files
