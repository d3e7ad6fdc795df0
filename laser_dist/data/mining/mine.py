"""`laser-dist mine`: hard negatives by BM25 or by any encoder, ours or one of sentence-transformers.

Queries are worked on in parts of `--chunk` rows. A finished part is a file in `OUT.work/`; an interrupted run keeps its
parts, several processes share them (`--shard`), and whoever finishes the last one writes the result. What a part holds
depends on its own rows only, so neither interruptions nor the number of processes change a byte.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from laser_dist.errors import UserError

if TYPE_CHECKING:
    from laser_dist.data.mining.negatives import Rules

HELP = """Find hard negatives: passages that rank high for a query and do not answer it.

Left out are the positives of the row and of every row with the same query, what --qrels calls relevant, near-duplicates
of a positive, and passages that score nearly as high as the positive. Beside OUT: OUT.stats.json says how many
and why, OUT.png shows ranks and scores. An interrupted run continues with the same command.

Examples:
  laser-dist mine --source rows.jsonl --corpus corpus.jsonl --out mined.jsonl --method bm25
  laser-dist mine --source rows.jsonl --corpus corpus.jsonl --out mined.jsonl --model runs/first --ranks 1 50
  laser-dist mine --source rows.jsonl --out mined.jsonl --model BAAI/bge-small-en-v1.5 --negatives 4 --pick top
  # on two GPUs, in two shells (the corpus is encoded once):
  laser-dist mine --source rows.jsonl --corpus c.jsonl --out mined.jsonl --model runs/first --shard 1/2 --device cuda:0
  laser-dist mine --source rows.jsonl --corpus c.jsonl --out mined.jsonl --model runs/first --shard 2/2 --device cuda:1
"""
_MODEL_RATIO = 0.95


@dataclass(frozen=True, kw_only=True)
class MineConfig:
    """What is searched with what, what is left out, and how many are taken."""

    source: str
    """Rows with queries and positives: a JSONL or Parquet file, a saved dataset folder, or a hub id."""
    out: Path
    """JSONL file to write: the rows with their negatives, in the order of the source."""
    corpus: Path | None = None
    """corpus.jsonl to search: id, text and optionally title per line. Unset: all passages of the source."""
    method: Literal["bm25"] | None = None
    """Search with BM25; or give --model."""
    model: str | None = None
    """Search with this encoder: a run, a checkpoint, an export, a sentence-transformers folder, or a hub id."""
    library: Literal["auto", "laser-dist", "sentence-transformers"] = "auto"
    """What loads --model; auto goes by the files in its folder."""
    qrels: Path | None = None
    """Judgements by query_id: passages with a score above 0 are left out too."""
    negatives: int = 8
    """Negatives per query."""
    ranks: tuple[int, int] = (10, 100)
    """First and last rank to take them from, counted from 1 with the positives among them."""
    pick: Literal["sample", "top"] = "sample"
    """Draw from the window by the seed, or take the best that are left."""
    max_score_ratio: float | None = None
    """Leave out what scores this share of the positive's score or more. Unset: 0.95 with --model; no limit with BM25,
    as its score of a positive says little. inf: no limit."""
    margin: float | None = None
    """Leave out what scores less than this below the positive."""
    reference: Literal["highest", "lowest", "mean"] = "highest"
    """Which of several positives' scores counts for the two above."""
    max_overlap: float = 0.8
    """Leave out what shares more than this of its three-word shingles with a positive (Jaccard)."""
    existing: Literal["replace", "keep"] = "replace"
    """What becomes of negatives that rows have: new ones stand in their place, or after them."""
    without_negatives: Literal["keep", "drop"] = "keep"
    """Rows for which none is left: stay as they are (for training with --data.negatives 0), or are left out."""
    seed: int = 0
    """Of --pick sample; a query's negatives depend on it and the query's id only."""
    steps: int | None = None
    """Latent steps of a LaSER model; unset: as many as in training."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; unset: a GPU if there is one."""
    vectors: Path | None = None
    """Folder of the corpus' vectors: one made by `laser-dist encode`, or made here and kept."""
    chunk: int = 1000
    """Rows per part: what an interruption can cost."""
    shard: str = "1/1"
    """I/N: work on every N-th part only, as one of N processes that share --out."""
    limit: int | None = None
    """Read only this many rows."""
    overwrite: bool = False
    """Replace --out, and work in progress on something else."""

    def validate(self) -> None:
        """Raises UserError for values that do not fit, alone or together."""
        if (self.method is None) == (self.model is None):
            raise UserError("give either --method bm25 or --model FOLDER")
        if self.out.suffix != ".jsonl" or self.out.is_dir():
            raise UserError(f"--out {self.out}: give the name of a .jsonl file")
        for name in ("negatives", "chunk", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name} {value}: must be at least 1")
        first, last = self.ranks
        if not 1 <= first <= last:
            raise UserError(f"--ranks {first} {last}: give the first and the last rank, from 1 on")
        if last - first + 1 < self.negatives:
            raise UserError(f"--ranks {first} {last}: fewer ranks than --negatives {self.negatives}")
        if self.max_score_ratio is not None and not self.max_score_ratio > 0:
            raise UserError(f"--max-score-ratio {self.max_score_ratio}: must be above 0")
        if self.margin is not None and not 0 <= self.margin < float("inf"):
            raise UserError(f"--margin {self.margin}: must be a number from 0 on")
        if not 0 < self.max_overlap <= 1:
            raise UserError(f"--max-overlap {self.max_overlap}: must be above 0 and at most 1")
        if self.vectors is not None and self.model is None:
            raise UserError("--vectors belongs to --model: BM25 has none")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"--steps {self.steps}: must be at least 1")
        _ = self.part_of

    @property
    def part_of(self) -> tuple[int, int]:
        """This process' number from 0, and how many there are."""
        number, slash, count = self.shard.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise UserError(f"--shard {self.shard}: write it as 1/4, 2/4, 3/4 and 4/4")
        return int(number) - 1, int(count)

    @property
    def work(self) -> Path:
        return self.out.with_name(f"{self.out.name}.work")

    def rules(self) -> "Rules":
        from laser_dist.data.mining.negatives import Rules

        ratio = self.max_score_ratio
        if ratio is None:
            ratio = _MODEL_RATIO if self.model else float("inf")
        names = ("negatives", "ranks", "margin", "reference", "max_overlap", "pick", "seed")
        return Rules(
            **{name: getattr(self, name) for name in names}, max_score_ratio=ratio, positive_scores_only=not self.model
        )


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code. Raises UserError for wrong input, before any model is loaded."""
    import tyro

    config = tyro.cli(MineConfig, args=arguments, prog="laser-dist mine", description=HELP)
    config.validate()
    if config.out.exists() and not config.overwrite:
        raise UserError(f"--out {config.out} exists: choose another name, or replace it with --overwrite")
    if config.overwrite and config.part_of[1] > 1:
        raise UserError("--overwrite would remove what other shards have done: remove --out by hand, and leave it out")
    from laser_dist.data.mining.task import finish, mine_parts, read_task

    task = read_task(config)
    print(f"{config.source}: {task.rows:,} rows; {len(task.corpus):,} passages to search")
    try:
        mine_parts(task)
        return finish(task)
    except OSError as error:
        where, what = error.filename or config.out, error.strerror or error
        raise UserError(f"{where}: {what}; finished parts are kept: the same command continues") from error
