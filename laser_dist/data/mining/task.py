"""The work behind `laser-dist mine`: what is read and checked first, the parts, and putting them together."""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from laser_dist.data.advance import progress_bar
from laser_dist.data.mining.mine import MineConfig
from laser_dist.data.mining.negatives import Candidate, KnownPositives, Rules, select
from laser_dist.data.mining.report import Report
from laser_dist.data.mining.scorers import (
    Bm25,
    Dense,
    Found,
    Positives,
    Scorer,
    corpus_vectors,
    encoder_folder,
    load_encoder,
)
from laser_dist.data.schema import NAMES, Example, Passage, example_to_row, parse_example
from laser_dist.data.sources.read import read_examples, read_source
from laser_dist.errors import UserError
from laser_dist.files import locked, replacing, write_json
from laser_dist.observability.console import quiet_libraries
from laser_dist.reading import read_object
from laser_dist.retrieval.collection import Corpus, read_corpus, read_qrels
from laser_dist.retrieval.encode import weights_hash

_FIELDS = {name for names in NAMES.values() for name in names}
# What the result does not depend on, or depends on by content and not by name.
_LEFT_OUT = ("out", "shard", "device", "overwrite", "vectors", "corpus", "source", "qrels", "limit", "model")


@dataclass(frozen=True)
class Task:
    """Everything that was read and checked before the first search."""

    config: MineConfig
    rules: Rules
    rows: int
    known: KnownPositives
    corpus: Corpus
    positives: Positives
    folder: str | None  # of the model
    identity: dict[str, Any]  # all that the result depends on

    @property
    def parts(self) -> list[Path]:
        count = -(-self.rows // self.config.chunk)
        return [self.config.work / f"part-{number:06d}.jsonl" for number in range(count)]

    @property
    def lock(self) -> Path:
        return self.config.out.with_name(f"{self.config.out.name}.lock")


def read_task(config: MineConfig) -> Task:
    """Read and check all files. Raises UserError, naming several defects of the source where there are several."""
    if config.model:
        quiet_libraries()
    qrels = read_qrels(config.qrels) if config.qrels else None
    corpus = read_corpus(config.corpus) if config.corpus else None
    folder = encoder_folder(config.model) if config.model else None
    known, union, positives = KnownPositives(qrels), dict[str, Passage](), dict[tuple[str, str], Passage]()
    digest, rows, judged = hashlib.sha256(), 0, 0
    for where, row, example in read_examples(config.source, config.limit):
        rows += 1
        judged += bool(qrels and example.query_id in qrels)
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        known.add(example)
        positives |= {(p.title, p.text): p for p in example.positives}
        if corpus is None:
            _unite(union, example, where)
    if not rows:
        raise UserError(f"source {config.source} has no rows")
    if qrels and not judged:
        raise UserError(f"--qrels {config.qrels}: no query_id of the source is in it: do the files match?")
    corpus = corpus or Corpus(*map(list, zip(*((p.id, p.text, p.title) for p in union.values()), strict=True)))
    settings = {name: value for name, value in asdict(config).items() if name not in _LEFT_OUT}
    identity = settings | {
        "source": digest.hexdigest(),
        "corpus": _hash_corpus(corpus),
        "qrels": hashlib.sha256(json.dumps(qrels, sort_keys=True).encode()).hexdigest(),
        "model": [folder, weights_hash(folder)] if folder else None,
    }
    identity = json.loads(json.dumps(identity))  # as it will come back from disk
    return Task(config, config.rules(), rows, known, corpus, Positives(corpus, positives.values()), folder, identity)


def mine_parts(task: Task) -> None:
    """Make this process' parts that are not there yet. Raises UserError if the work folder belongs to another run."""
    numbers = range(task.config.part_of[0], len(task.parts), task.config.part_of[1])
    with locked(task.lock):
        _claim(task)
        todo = {number for number in numbers if not task.parts[number].exists()}
    if not todo:
        return
    scorer = _scorer(task)
    with progress_bar("mining", len(numbers), len(numbers) - len(todo)) as advance:
        rows = read_source(task.config.source)
        for number in range(max(todo) + 1):
            chunk = list(islice(rows, min(task.config.chunk, task.rows - number * task.config.chunk)))
            if not chunk:
                raise UserError(f"{task.config.source} changed while it was read: give the command again")
            if number in todo:
                _write_part(task, scorer, task.parts[number], chunk)
                advance()


def finish(task: Task) -> int:
    """Put the parts together, write statistics and plot, and remove the work folder; say so if parts are missing."""
    config = task.config
    with locked(task.lock):
        if not config.work.exists():
            print(f"{config.out}: written by another shard")
            return 0
        absent = sum(not part.exists() for part in task.parts)
        if absent:
            print(f"{len(task.parts) - absent} of {len(task.parts)} parts are done; the other shards do the rest")
            return 0
        report = Report(task.rules, drops=config.without_negatives == "drop")
        with replacing(config.out) as temporary, temporary.open("w", encoding="utf-8") as file:
            for part in task.parts:
                for line in part.open(encoding="utf-8"):
                    record = json.loads(line)
                    report.add(record)
                    if config.without_negatives == "drop" and not record["row"]["negatives"]:
                        continue
                    file.write(json.dumps(record["row"], ensure_ascii=False) + "\n")
        write_json(config.out.with_name(f"{config.out.name}.stats.json"), report.statistics() | {"run": task.identity})
        plotted = report.plot(config.out.with_name(f"{config.out.name}.png"))
        shutil.rmtree(config.work)
    task.lock.unlink(missing_ok=True)
    print(report.summary(config.out, plotted))
    return 0


def _unite(union: dict[str, Passage], example: Example, where: str) -> None:
    for passage in (*example.positives, *example.negatives):
        first = union.setdefault(passage.id, passage)
        if (first.text, first.title) != (passage.text, passage.title):
            raise UserError(
                f"{where}: passage id {passage.id!r} has another text than on an earlier row: give every passage an id "
                "of its own, or name the passages to search with --corpus"
            )


def _hash_corpus(corpus: Corpus) -> str:
    digest = hashlib.sha256()
    for passage in zip(corpus.ids, corpus.texts, corpus.titles, strict=True):
        digest.update(json.dumps(passage).encode())
    return digest.hexdigest()


def _claim(task: Task) -> None:
    """Open the work folder, or make it; UserError if it holds work on something else."""
    config, file = task.config, task.config.work / "run.json"
    try:
        before = read_object(file) if file.is_file() else None
    except (OSError, ValueError) as error:
        before = {"damaged": str(error)}
    if before is not None and before != task.identity:
        different = sorted(name for name, value in task.identity.items() if before.get(name) != value)
        if not config.overwrite:
            raise UserError(
                f"{config.work} holds unfinished work with another {', '.join(different)}: give that command again, "
                "choose another --out, or start anew with --overwrite"
            )
        shutil.rmtree(config.work)
    write_json(file, task.identity)


def _scorer(task: Task) -> Scorer:
    config = task.config
    if task.folder is None:
        return Bm25(task.corpus, task.positives)
    import torch

    encoder = load_encoder(task.folder, config.library, steps=config.steps, device=config.device)
    vectors = corpus_vectors(encoder, task.folder, _corpus_file(task), config.vectors or config.work / "vectors")
    return Dense(encoder, vectors, task.positives, config.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _corpus_file(task: Task) -> Path:
    if task.config.corpus is not None:
        return task.config.corpus
    path = task.config.work / "corpus.jsonl"
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in zip(task.corpus.ids, task.corpus.texts, task.corpus.titles, strict=True):
            file.write(json.dumps(dict(zip(("id", "text", "title"), row, strict=True)), ensure_ascii=False) + "\n")
    return path


def _write_part(task: Task, scorer: Scorer, path: Path, rows: list[tuple[str, Any]]) -> None:
    examples = [parse_example(row, where) for where, row in rows]
    found = scorer.search(examples, task.rules.ranks[1])
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for (_, row), example, result in zip(rows, examples, found, strict=True):
            file.write(json.dumps(_record(task, row, example, result), ensure_ascii=False) + "\n")


def _record(task: Task, row: dict[str, Any], example: Example, found: Found) -> dict[str, Any]:
    """A row with its negatives, and what the statistics need to know about them."""
    kept = example.negatives if task.config.existing == "keep" else ()
    candidates = [
        Candidate(Passage(task.corpus.ids[index], task.corpus.texts[index], task.corpus.titles[index]), rank, score)
        for rank, (index, score) in enumerate(zip(found.rows, found.scores, strict=True), 1)
        if rank >= task.rules.ranks[0]
    ]
    picked, excluded = select(example, candidates, found.positives, task.rules, task.known, kept)
    mined = replace(example, negatives=(*kept, *(candidate.passage for candidate in picked)))
    others = {name: value for name, value in row.items() if name not in _FIELDS}
    return {
        "row": example_to_row(mined) | others,
        "picked": [[candidate.rank, round(candidate.score, 6)] for candidate in picked],
        "positives": [round(score, 6) for score in found.positives],
        "excluded": excluded,
    }
