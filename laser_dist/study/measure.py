"""Measurements of one cell, in a process of its own: `python -m laser_dist.study.measure JOB.json`.

The corpus is encoded once; every test then encodes the queries its own way. What a test found is on disk before the
next begins, so that a killed process loses one at most.
"""

import copy
import json
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from laser_dist.cli import run
from laser_dist.data.text import TextFormat
from laser_dist.files import write_json
from laser_dist.model.backbone import DTYPES
from laser_dist.recipe import read_recipe
from laser_dist.retrieval.bm25 import bm25_run, out_of_reach
from laser_dist.retrieval.collection import Corpus, Qrels, Queries, keep_judged, read_collection
from laser_dist.retrieval.encoder import LaserEncoder
from laser_dist.retrieval.evaluation.evaluate import evaluate, written_rationales
from laser_dist.retrieval.loading import find_device
from laser_dist.retrieval.metrics import Run, evaluate_run
from laser_dist.study.definition import Test
from laser_dist.study.rewriting import Rewriter

TIMED = 16
"""Queries that are encoded one at a time for their latency."""


class Measurer:
    """A model, or BM25, and the collections it is measured on."""

    def __init__(self, job: dict[str, Any]):
        self.job = job
        self.encoder = self._encoder()
        self.rewriter = Rewriter(**{**job["rewriting"], "folder": Path(job["rewriting"]["folder"])})
        self.vectors: dict[tuple[str, int], Any] = {}

    def task(self, split: str, test: Test) -> dict[str, Any]:
        """Metrics, values per query, recall@100 of what shares no word with its query, the model's precision, and
        seconds to encode one query alone.
        """
        corpus, queries, qrels = read_collection(*self.job["splits"][split])
        queries, judged = keep_judged(queries, qrels)
        hidden = out_of_reach(corpus, queries, judged)
        asked, writing = self._asked(queries, test)
        if self.encoder is None:
            texts = replace(asked, texts=_appended(asked)) if test.rationale != "none" else asked
            found = bm25_run(corpus, texts, 100)
            metrics, per_query = evaluate_run(found, judged)
            return {"metrics": metrics, "per_query": per_query, "recall_unshared": _recall(found, hidden)}
        with _steps(self.encoder, test.steps) as encoder:
            vectors = self._corpus(corpus, split, test)
            explicit = test.view == "explicit"
            if test.rationale != "none" and not explicit:
                encoder, asked = _with_room(encoder), replace(asked, texts=_appended(asked))
            result = evaluate(encoder, corpus, asked, judged, passage_vectors=vectors, explicit=explicit)
            seconds = _latency(encoder, asked, explicit=explicit)
        return {
            "metrics": result.metrics,
            "per_query": result.per_query,
            "recall_unshared": _recall(result.run, hidden),
            "dtype": self.encoder.dtype,
            "seconds_per_query": seconds + writing,
            **({"seconds_of_writing": writing} if writing else {}),
        }

    def _encoder(self) -> LaserEncoder | None:
        if self.job["kind"] == "bm25":
            return None
        dtype = self.job["dtype"]
        if self.job["kind"] == "untrained":
            encoder = LaserEncoder.from_config(read_recipe(Path(self.job["recipe"])))
            encoder.retriever.to(device=find_device(None), dtype=DTYPES.get(dtype))
            return encoder
        return LaserEncoder.from_pretrained(self.job["model"], dtype=dtype or None)

    def _asked(self, queries: Queries, test: Test) -> tuple[Queries, float]:
        """The queries with the test's rationales, and the seconds it took to write one."""
        if test.rationale == "oracle":
            written_rationales(queries)
        if test.rationale != "generated":
            return queries, 0.0
        written = self.rewriter(queries.texts)
        return replace(queries, rationales=[written.by_query[text] for text in queries.texts]), written.seconds

    def _corpus(self, corpus: Corpus, split: str, test: Test) -> Any:
        assert self.encoder is not None
        steps = test.steps if test.steps and test.reindex else self.encoder.card.thinking.steps
        key = (str(self.job["splits"][split][0]), steps)
        if key not in self.vectors:
            self.vectors.clear()  # one at a time in memory: tests of one kind follow each other
            titles = corpus.titles if any(corpus.titles) else None
            self.vectors[key] = self.encoder.encode_passages(corpus.texts, titles=titles, steps=steps, progress=True)
        return self.vectors[key]


def _recall(run: Run, qrels: Qrels) -> float | None:
    """recall@100, over the queries of `qrels`; None without any."""
    return evaluate_run(run, qrels)[0]["recall@100"] if qrels else None


@contextmanager
def _steps(encoder: LaserEncoder, steps: int | None) -> Any:
    """The encoder, thinking so many steps about queries."""
    trained = encoder.retriever.steps
    encoder.retriever.steps = steps or trained
    try:
        yield encoder
    finally:
        encoder.retriever.steps = trained


def _appended(queries: Queries) -> list[str]:
    return [f"{text}\n\n{why}" for text, why in zip(queries.texts, queries.rationales, strict=True)]


def _with_room(encoder: LaserEncoder) -> LaserEncoder:
    """The same encoder, whose queries may be as long as a query with its rationale in training."""
    config = replace(encoder.text.config, max_query_tokens=encoder.text.config.max_explicit_tokens)
    roomy = copy.copy(encoder)
    roomy.text = TextFormat(encoder.text.tokenizer, config)
    return roomy


def _latency(encoder: LaserEncoder, queries: Queries, *, explicit: bool) -> float:
    """Median seconds to encode one query alone, tokenising included, over a fixed sample of the queries."""
    rows = range(0, len(queries), max(1, len(queries) // TIMED))
    times = []
    for row in [0, *rows]:  # the first call pays for what is set up once
        asked: dict[str, Any] = {"rationales": [queries.rationales[row]]} if explicit else {}
        began = time.perf_counter()
        encoder.encode_queries([queries.texts[row]], instructions=[queries.instructions[row]], **asked)
        times.append(time.perf_counter() - began)
    return median(times[1:])


def main(arguments: list[str]) -> int:
    """Run the job's tasks; results go into its `out`, beside what is there under the same key."""
    job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    out = Path(job["out"])
    kept = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    results = kept if kept.get("key") == job["key"] else {"key": job["key"], "measured": {}}
    measurer = Measurer(job)
    # Tests that index anew come last, so that the corpus is encoded once for all others.
    for task in sorted(job["tasks"], key=lambda task: task["test"]["reindex"]):
        test = Test(**task["test"])
        found = measurer.task(task["split"], test)
        results["measured"][f"{task['split']}/{test.name}"] = {"key": task["key"], **found}
        write_json(out, results)
        print(f"{task['split']}/{test.name}: " + " · ".join(f"{k} {v:.4f}" for k, v in found["metrics"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(run("laser_dist.study.measure", sys.argv[1:]))
