"""The flags of `laser-dist evaluate`, what makes them wrong, and the encoder they ask for."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from laser_dist.errors import UserError, require
from laser_dist.run_folder import existing_folder

if TYPE_CHECKING:
    from laser_dist.retrieval.card import RetrieverCard
    from laser_dist.retrieval.encoder import LaserEncoder

FILES = ("corpus", "queries", "qrels")

HELP = """Measure retrieval: nDCG@10, recall@10, recall@100 and MRR@10 of a model, beside BM25's on the same files.

All files are read and checked before the model is loaded. Search is exact. The network is used only by --task, to
download the task's data. `laser-dist compare` says whether two result files differ by more than chance.

Examples:
  laser-dist evaluate --model mine --corpus corpus.jsonl --queries queries.jsonl --qrels qrels.tsv --out results.json
  laser-dist evaluate --model mine --data beir/scifact --out results.json --plot results.png
  laser-dist evaluate --model mine --data shards/dev --out k6.json --steps 6 --no-bm25
  laser-dist evaluate --model mine --data set --out oracle.json --explicit
  laser-dist evaluate --model mine --task BRIGHT --max-tokens 8192 --out bright.json
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `laser-dist evaluate`."""

    model: str
    """Folder of the model: an export, a checkpoint, or a run (its newest checkpoint)."""
    out: Path
    """JSON file of the results; an existing one is replaced."""
    corpus: Path | None = None
    """corpus.jsonl: id, text and optionally title per line."""
    queries: Path | None = None
    """queries.jsonl: id, text and optionally instruction and rationale per line."""
    qrels: Path | None = None
    """qrels.tsv: query-id, corpus-id, score; or TREC's four columns."""
    data: Path | None = None
    """Instead of these three: a folder in BEIR's layout (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv)."""
    split: str = "test"
    """With --data: whose judgements."""
    task: str | None = None
    """Instead: a retrieval task of mteb by name, or BRIGHT, BRIGHT-long, FollowIR or BrowseComp-Plus."""
    task_data: Path | None = None
    """With --task: a copy of the task's dataset, as on the hub; for several tasks a folder of copies."""
    vectors: Path | None = None
    """Folder that `laser-dist encode` made of this corpus with this model; the corpus is then not encoded again."""
    steps: int | None = None
    """Latent steps; unset: as many as in training."""
    dim: int | None = None
    """Keep only the first components of every vector; unset: all, or as many as --vectors has."""
    max_tokens: int | None = None
    """Longest query and longest passage in tokens; unset: as in training."""
    explicit: bool = False
    """Read each query with the rationale in the queries file: the explicit view, an oracle for the latent one."""
    bm25: bool = True
    """Also evaluate BM25 on the same files (not with --task)."""
    run_file: Path | None = None
    """Also write the 100 best passages of each query as a TREC run file."""
    plot: Path | None = None
    """Also draw the metrics as a PNG."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; unset: a GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the model; unset: the encoder's choice."""


def check_flags(args: Arguments) -> None:
    for flag, path in (("--out", args.out), ("--run-file", args.run_file), ("--plot", args.plot)):
        if path is not None and path.is_dir():
            raise UserError(f"{flag} {path}: is a folder: give the name of a file")
        if path is not None and not existing_folder(path.parent).is_dir():
            raise UserError(f"{flag} {path}: {existing_folder(path.parent)} is a file: choose another folder")
    three = [flag for flag in FILES if getattr(args, flag) is not None]
    ways = [" ".join(f"--{flag}" for flag in three)] * bool(three)
    ways += [f"--{flag}" for flag in ("data", "task") if getattr(args, flag) is not None]
    if len(ways) != 1 or (three and len(three) < len(FILES)):
        found = " and ".join(ways) or "none of them"
        raise UserError(f"give --corpus, --queries and --qrels, or --data, or --task: found {found}")
    if args.task is not None and (args.vectors or args.explicit or args.run_file):
        raise UserError("--vectors, --explicit and --run-file go with files of your own, not with --task")
    if args.task_data is not None and args.task is None:
        raise UserError("--task-data: goes with --task")
    if args.split != "test" and args.data is None:
        raise UserError("--split: goes with --data")
    for flag, least in (("dim", 1), ("steps", 1), ("max_tokens", 8)):
        if (value := getattr(args, flag)) is not None and value < least:
            raise UserError(f"--{flag.replace('_', '-')} {value}: must be at least {least}")
    if args.plot is not None:
        require("--plot", "matplotlib", extra="plots")


def load_encoder(args: Arguments, folder: str | None = None) -> "LaserEncoder":
    """The model of the flags; `folder` is where it was found, if that was looked up before."""
    from laser_dist.data.text import TextFormat
    from laser_dist.retrieval.encoder import LaserEncoder

    encoder = LaserEncoder.from_pretrained(
        folder or args.model, steps=args.steps, dim=args.dim, device=args.device, dtype=args.dtype
    )
    if args.max_tokens is not None:
        encoder.card = as_asked(encoder.card, args)
        encoder.text = TextFormat(encoder.text.tokenizer, encoder.card.text)
    return encoder


def as_asked(card: "RetrieverCard", args: Arguments) -> "RetrieverCard":
    """The model's card with the flags' steps and limits of length."""
    if args.steps is not None:
        card = dataclasses.replace(card, thinking=dataclasses.replace(card.thinking, steps=args.steps))
    if args.max_tokens is not None:
        longest = max(args.max_tokens, card.text.max_explicit_tokens)
        limits = {"max_query_tokens": args.max_tokens, "max_passage_tokens": args.max_tokens}
        card = dataclasses.replace(card, text=dataclasses.replace(card.text, **limits, max_explicit_tokens=longest))
    return card
