"""What ranks the passages for mining: BM25, or any encoder over memory-mapped vectors of the corpus."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from laser_dist.data.schema import Example, Passage
from laser_dist.errors import UserError
from laser_dist.files import locked, sha256
from laser_dist.reading import read_json, read_object
from laser_dist.retrieval.collection import Corpus

_MODULES = ("Transformer", "Pooling", "Normalize", "Dense", "LaserModule")


@dataclass(frozen=True)
class Found:
    """Rows of the corpus with their scores, best first, and the scores of the example's own positives."""

    rows: list[int]
    scores: list[float]
    positives: list[float]


class Positives:
    """Where every positive of the source stands in the corpus; those that it lacks get the rows behind its last."""

    def __init__(self, corpus: Corpus, passages: Iterable[Passage]):
        wanted = {(p.title, p.text): p for p in passages}
        self.rows: dict[tuple[str, str], int] = {}
        for row, pair in enumerate(zip(corpus.titles, corpus.texts, strict=True)):
            if pair in wanted:
                self.rows.setdefault(pair, row)
        self.missing = [passage for pair, passage in wanted.items() if pair not in self.rows]
        self.rows |= {(p.title, p.text): len(corpus) + i for i, p in enumerate(self.missing)}


class Scorer(Protocol):
    """Ranks the corpus for examples."""

    def search(self, examples: Sequence[Example], depth: int) -> list[Found]:
        """The `depth` best passages of each example; equal scores rank by position in the corpus."""


class Bm25:
    """As `retrieval.bm25`. Positives that the corpus lacks are indexed and scored, but never found."""

    def __init__(self, corpus: Corpus, positives: Positives):
        from laser_dist.retrieval.bm25 import Bm25Index

        texts = [f"{title} {text}" for title, text in zip(corpus.titles, corpus.texts, strict=True)]
        texts += [f"{p.title} {p.text}" for p in positives.missing]
        self._size, self._rows, self._index = len(corpus), positives.rows, Bm25Index(texts)

    def search(self, examples: Sequence[Example], depth: int) -> list[Found]:
        import torch

        from laser_dist.retrieval.search.exact import top_k

        found = []
        for example, scores in zip(examples, self._index.scores([e.query for e in examples]), strict=True):
            best, rows = top_k(torch.from_numpy(scores[None, : self._size]), depth)
            positives = [float(scores[self._rows[p.title, p.text]]) for p in example.positives]
            found.append(Found(rows[0].tolist(), best[0].tolist(), positives))
        return found


class Dense:
    """An encoder, exact search by inner product, and vectors [n, D] of the corpus, row by row in its order."""

    def __init__(self, encoder: Any, vectors: np.ndarray, positives: Positives, device: str):
        self._encoder, self._vectors, self._rows, self._device = encoder, vectors, positives.rows, device

    def search(self, examples: Sequence[Example], depth: int) -> list[Found]:
        from laser_dist.retrieval.search.exact import search

        instructions = [example.instruction for example in examples]
        queries = self._encoder.encode_queries([e.query for e in examples], instructions=instructions)
        scores, rows = search(queries, self._vectors, depth, device=self._device)
        positives = self._positives(examples)
        return [
            Found(r, s, [float(query @ positives[p.title, p.text]) for p in example.positives])
            for r, s, query, example in zip(rows.tolist(), scores.tolist(), queries, examples, strict=True)
        ]

    def _positives(self, examples: Sequence[Example]) -> dict[tuple[str, str], np.ndarray]:
        wanted = {(p.title, p.text): self._rows[p.title, p.text] for e in examples for p in e.positives}
        size = len(self._vectors)
        found = {pair: np.asarray(self._vectors[row], np.float32) for pair, row in wanted.items() if row < size}
        if missing := [pair for pair, row in wanted.items() if row >= size]:
            titles, texts = map(list, zip(*missing, strict=True))
            found |= dict(zip(missing, self._encoder.encode_passages(texts, titles=titles), strict=True))
        return found


class SentenceTransformerEncoder:
    """A sentence-transformers model with LaserEncoder's methods. Its own query and passage prompts are used."""

    def __init__(self, folder: str, device: str | None):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise UserError("sentence-transformers models need: pip install 'laser-dist[st]'") from None
        _check_modules(folder)
        try:
            self._model = SentenceTransformer(folder, device=device, trust_remote_code=False)
        except Exception as error:  # it raises many kinds
            raise UserError(f"{folder}: sentence-transformers cannot load it: {error}") from error
        self.dim = self._model.get_embedding_dimension()

    def description(self) -> dict[str, Any]:
        return {"library": "sentence-transformers", "prompts": self._model.prompts}

    def encode_queries(self, texts: list[str], *, instructions: Any = None) -> np.ndarray:
        """float32 [n, D], rows of unit length; the rows' instructions are not used."""
        return self._unit(self._model.encode_query(texts, normalize_embeddings=True, show_progress_bar=False))

    def encode_passages(self, texts: list[str], *, titles: list[str]) -> np.ndarray:
        """float32 [n, D], rows of unit length; a title stands before its text."""
        texts = [f"{title} {text}".strip() for title, text in zip(titles, texts, strict=True)]
        return self._unit(self._model.encode_document(texts, normalize_embeddings=True, show_progress_bar=False))

    @staticmethod
    def _unit(vectors: Any) -> np.ndarray:
        return np.asarray(vectors, np.float32)


def _check_modules(folder: str) -> None:
    """UserError for a modules.json that names other classes than those of plain text encoders.

    sentence-transformers imports whatever is named, from its own package at least, and some classes import on.
    """
    path = Path(folder) / "modules.json"
    try:
        named = [str(module["type"]) for module in read_json(path)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a sentence-transformers folder") from None
    for name in named:
        package, _, kind = name.rpartition(".")
        if package.split(".")[0] != "sentence_transformers" or kind not in _MODULES:
            raise UserError(
                f"{path} names {name[:80]!r}: only {', '.join(_MODULES)} of sentence_transformers are loaded"
            )


def encoder_folder(model: str) -> str:
    """The folder of a model: itself, a run's newest checkpoint, or a download. Raises UserError."""
    from laser_dist.retrieval.folders import model_folder

    path = Path(model).expanduser()
    return str(path) if (path / "modules.json").is_file() else model_folder(model)


def load_encoder(folder: str, library: str, *, steps: int | None, device: str | None) -> Any:
    """The encoder in a folder. "auto" goes by the files: sentence-transformers', unless there is a card of ours."""
    from laser_dist.retrieval.encoder import LaserEncoder

    if library == "auto":
        files = Path(folder)
        foreign = (files / "modules.json").is_file() and not (files / "laser_dist.json").is_file()
        library = "sentence-transformers" if foreign else "laser-dist"
    if library == "sentence-transformers":
        return SentenceTransformerEncoder(folder, device)
    return LaserEncoder.from_pretrained(folder, steps=steps, device=device)


def corpus_vectors(encoder: Any, folder: str, corpus: Path, out: Path) -> np.ndarray:
    """Vectors of a corpus.jsonl, [n, D] memory-mapped: those in `out`, or made there; continues what was interrupted.

    One process makes them, others wait for it. Raises UserError for vectors of another corpus or model.
    """
    from laser_dist.retrieval.encode import encode_corpus, weights_hash
    from laser_dist.retrieval.vectors import load_vectors

    with locked(out / ".lock"):
        weights = weights_hash(folder)
        if not (out / "manifest.json").is_file():
            encode_corpus(encoder, corpus, out, weights=weights)
    ids, vectors = load_vectors(out)
    manifest = read_object(out / "manifest.json")
    expected = {
        "corpus": sha256(corpus),
        "model": json.loads(json.dumps(encoder.description())),
        "weights": weights,
    }
    found = {"corpus": manifest["corpus"]["sha256"], "model": manifest["encoder"], "weights": manifest["weights"]}
    if different := [name for name, value in expected.items() if found[name] != value]:
        raise UserError(f"{out}: these vectors are of another {' and '.join(different)}: give another --vectors folder")
    return vectors
