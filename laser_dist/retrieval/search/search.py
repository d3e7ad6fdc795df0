"""`laser-dist search`: queries against an encoded corpus, exactly or through a FAISS index."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from laser_dist.errors import UserError
from laser_dist.files import write_json
from laser_dist.retrieval.collection import Queries, iter_passages, read_queries
from laser_dist.retrieval.search.faiss_index import IndexOptions, check_tuning, open_index, recall, search_index

if TYPE_CHECKING:
    from laser_dist.retrieval.encoder import LaserEncoder
    from laser_dist.retrieval.metrics import Run

HELP = """Search an encoded corpus (see `laser-dist encode`): the best passages of each query, as a TREC run file.

exact compares each query with every vector, block by block, on CPU or GPU. flat, hnsw and ivfpq are FAISS indexes on
the CPU, built at the first use and kept beside the vectors; their recall against exact search is measured and printed.

Examples:
  laser-dist search --vectors vectors --model mine --queries queries.jsonl --out run.trec
  laser-dist search --vectors vectors --model mine --queries queries.jsonl --out run.trec --index hnsw --ef-search 256
  laser-dist search --vectors vectors --model mine --query "why is the sky blue?" --corpus corpus.jsonl
  laser-dist search --vectors vectors --query-vectors query_vectors --k 1000 --out run.trec
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `laser-dist search`."""

    vectors: Path
    """Folder of the encoded corpus."""
    model: str | None = None
    """Folder of the model that made the vectors; not needed with --query-vectors."""
    queries: Path | None = None
    """queries.jsonl: id, text and optionally instruction per line."""
    query: tuple[str, ...] = ()
    """Instead: the text of one query or several; what is found is printed."""
    query_vectors: Path | None = None
    """Instead: a folder of encoded queries."""
    k: int | None = None
    """Passages per query. Unset: 100, and 5 with --query."""
    corpus: Path | None = None
    """With --query: the corpus.jsonl that was encoded, to print the passages' texts."""
    out: Path | None = None
    """TREC run file to write; needed without --query."""
    json: Path | None = None
    """Also write the run as JSON: query id -> [[passage id, score], ...], best first."""
    index: Literal["exact", "flat", "hnsw", "ivfpq"] = "exact"
    """exact, or a FAISS index."""
    tuning: IndexOptions = field(default_factory=IndexOptions)
    rebuild_index: bool = False
    """Build the index again, even if a saved one fits."""
    recall_queries: int = 100
    """Queries whose results are compared with exact search; 0 compares none."""
    instruction: str | None = None
    """Instruction of queries that bring none; unset: the model's own."""
    steps: int | None = None
    """Latent steps; unset: as many as in training. Must be what the vectors were made with."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; unset: a GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the model; unset: the encoder's choice."""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code. Raises UserError for wrong input, before the model is loaded."""
    import tyro

    config = (tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction)
    args = tyro.cli(Arguments, args=argv, prog="laser-dist search", description=HELP, config=config)
    _check_flags(args)

    from laser_dist.retrieval.search.origin import check_passages
    from laser_dist.retrieval.search.runs import to_run, write_run
    from laser_dist.retrieval.vectors import load_vectors

    ids, vectors = load_vectors(args.vectors)
    check_passages(args.vectors)
    query_ids, query_vectors = _query_vectors(args, vectors.shape[1])
    k = args.k or (5 if args.query else 100)
    scores, indices = _search(args, query_vectors, vectors, k)
    run = to_run(scores, indices, query_ids, ids)
    if args.out is not None:
        write_run(args.out, run)
        print(f"{len(query_ids)} queries against {len(ids)} passages; run in {args.out}")
    if args.json is not None:
        write_json(args.json, run)
    if args.query:
        _print(args, run)
    return 0


def _check_flags(args: Arguments) -> None:
    ways = [name for name in ("queries", "query", "query_vectors") if getattr(args, name)]
    if len(ways) != 1:
        found = " and ".join(f"--{way.replace('_', '-')}" for way in ways) or "none of them"
        raise UserError(f"give --queries, --query or --query-vectors: found {found}")
    if ways != ["query_vectors"] and args.model is None:
        raise UserError("--model: give the model that made the vectors, or --query-vectors")
    if not args.query and args.out is None and args.json is None:
        raise UserError("--out: name the run file to write")
    if args.corpus is not None and not args.query:
        raise UserError("--corpus: is for printing what --query finds")
    if any(not text.strip() for text in args.query):
        raise UserError("--query: is empty: give the query's text")
    if args.k is not None and args.k < 1:
        raise UserError(f"--k {args.k}: must be at least 1")
    for flag, path in (("--out", args.out), ("--json", args.json)):
        if path is not None and path.is_dir():
            raise UserError(f"{flag} {path}: is a folder: give the name of a file")
    if args.query_vectors is not None and (args.instruction or args.steps):
        raise UserError("--instruction and --steps: --query-vectors are encoded already: leave them out")
    check_tuning(args.index, args.tuning, args.rebuild_index)


def _query_vectors(args: Arguments, dim: int) -> tuple[Sequence[str], np.ndarray]:
    """Ids and vectors [n, dim] of what is asked."""
    from laser_dist.retrieval.search.origin import check_same_vectors
    from laser_dist.retrieval.vectors import load_vectors

    if args.query_vectors is not None:
        ids, vectors = load_vectors(args.query_vectors)
        check_same_vectors(args.vectors, args.query_vectors)
        return ids, vectors
    queries = _queries(args)
    encoder = _encoder(args)
    instructions = [instruction or args.instruction for instruction in queries.instructions]
    encoded = encoder.encode_queries(queries.texts, instructions=instructions, dim=dim, progress=not args.query)
    return queries.ids, encoded


def _queries(args: Arguments) -> Queries:
    if args.queries is not None:
        return read_queries(args.queries)
    count = len(args.query)
    ids = [str(number) for number in range(1, count + 1)]
    return Queries(ids, list(args.query), [None] * count, [None] * count)


def _encoder(args: Arguments) -> "LaserEncoder":
    """The model, after checking that it made the vectors."""
    from laser_dist.retrieval.card import RetrieverCard
    from laser_dist.retrieval.encoder import LaserEncoder
    from laser_dist.retrieval.folders import model_folder
    from laser_dist.retrieval.search.origin import check_same_model

    model = model_folder(str(args.model))
    card = RetrieverCard.load(Path(model))
    if args.steps is not None:
        card = dataclasses.replace(card, thinking=dataclasses.replace(card.thinking, steps=args.steps))
    check_same_model(args.vectors, model, card)
    return LaserEncoder.from_pretrained(model, steps=args.steps, device=args.device, dtype=args.dtype)


def _search(args: Arguments, queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    import torch

    from laser_dist.retrieval.search.exact import search

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.index == "exact":
        return search(queries, vectors, k, device=device, progress=True)
    index = open_index(args.vectors, vectors, args.index, args.tuning, rebuild=args.rebuild_index)
    found = search_index(index, queries, vectors, k, args.index, args.tuning)
    if args.recall_queries:
        sample = np.random.default_rng(0).permutation(len(queries))[: args.recall_queries]
        _, exact = search(queries[sample], vectors, k, device=device)
        share = recall(found[1][sample], exact)
        print(f"{args.index}: {share:.2%} of the {exact.shape[1]} best of exact search, on {len(sample)} queries")
    return found


def _print(args: Arguments, run: "Run") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    wanted = {passage for ranking in run.values() for passage, _ in ranking}
    texts: dict[str, Any] = {}
    if args.corpus is not None:
        texts = {i: f"{title}\n{text}".strip() for i, text, title in iter_passages(args.corpus) if i in wanted}
    console = Console(file=sys.stdout, highlight=False)
    for query, ranking in zip(args.query, run.values(), strict=True):
        table = Table("rank", "score", "passage", title=Text(query), title_justify="left", show_lines=bool(texts))
        if texts:
            table.add_column("text", overflow="fold", ratio=1)
        for rank, (passage, score) in enumerate(ranking, start=1):
            cells = [Text(texts.get(passage, "(not in --corpus)"))] if texts else []
            table.add_row(str(rank), f"{score:.4f}", Text(passage), *cells)
        console.print(table)
