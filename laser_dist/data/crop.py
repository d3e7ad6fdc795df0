"""`laser-dist crop`: training rows from a corpus alone. Random words of a passage ask for that passage.

After Contriever (Izacard et al. 2022, arXiv 2112.09118, section 3.1: random cropping and word deletion). It teaches a
language model to match texts before it has seen a question. A passage's row depends on the seed and its id only.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from laser_dist.errors import UserError
from laser_dist.files import replacing

HELP = """Make training rows of a corpus without questions: random words of a passage ask for it.

A backbone that has never retrieved learns from them to match texts; training on questions starts from the export.
Rows have no rationales: train on them with launchers/recipes/methods/contrastive.toml.

Examples:
  laser-dist crop --corpus corpus.jsonl --out crops.jsonl
  laser-dist crop --corpus corpus.jsonl --out crops.jsonl --keep 0.3 0.6 --limit 1000000
  # the whole way
  laser-dist mine --source crops.jsonl --corpus corpus.jsonl --out mined.jsonl --method bm25 --ranks 2 50 \\
      --without-negatives drop
  laser-dist prepare --source mined.jsonl --missing-rationale keep --out shards/
  laser-dist train recipe.toml launchers/recipes/methods/contrastive.toml --data.train shards/ --output runs/crops
  laser-dist export runs/crops --out models/crops      # then: --model.name models/crops
"""
FEWEST = 4  # words of a passage; what three of three words ask for is the passage itself


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Which passages, and how much of one its query has."""

    corpus: Path
    """corpus.jsonl: id, text and optionally title per line."""
    out: Path
    """JSONL file to write: rows for `laser-dist mine` or `prepare`; it appears only when it is whole."""
    keep: tuple[float, float] = (0.4, 0.8)
    """Least and largest share of the words that a query keeps, in their order; at least three words."""
    max_words: int = 64
    """Of a longer text, words are taken from a random span of this length."""
    seed: int = 0
    """A passage's query depends on it and the passage's id only."""
    limit: int | None = None
    """Read only this many passages."""
    overwrite: bool = False
    """Replace --out."""

    def validate(self) -> None:
        """Raises UserError for values that make no sense."""
        least, most = self.keep
        if not 0 < least <= most < 1:
            raise UserError(f"--keep {least:g} {most:g}: give two shares above 0 and below 1, the smaller first")
        if self.max_words < FEWEST:
            raise UserError(f"--max-words {self.max_words}: must be at least {FEWEST}")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit}: must be at least 1")
        if self.out.suffix != ".jsonl" or self.out.is_dir():
            raise UserError(f"--out {self.out}: give the name of a .jsonl file")
        if self.out.exists() and not self.overwrite:
            raise UserError(f"--out {self.out} exists: choose another name, or replace it with --overwrite")


def crop(passage_id: str, text: str, keep: tuple[float, float], max_words: int, seed: int) -> str | None:
    """Random words of `text` in their order, with one blank between them; None where it has too few."""
    words = text.split()
    if len(words) < FEWEST:
        return None
    draw = random.Random(f"crops-{seed}-{passage_id}")
    if len(words) > max_words:
        first = draw.randrange(len(words) - max_words + 1)
        words = words[first : first + max_words]
    count = max(3, round(len(words) * draw.uniform(*keep)))
    return " ".join(words[index] for index in sorted(draw.sample(range(len(words)), count)))


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code. Raises UserError for wrong input."""
    import tyro

    config = tyro.cli(CropConfig, args=arguments, prog="laser-dist crop", description=HELP)
    config.validate()
    read, written = _write(config)
    print(f"{config.out}: {written:,} rows")
    if written < read:
        print(f"left out: {read - written:,} passages with fewer than {FEWEST} words")
    return 0


def _write(config: CropConfig) -> tuple[int, int]:
    """Passages read, and rows written."""
    from itertools import islice

    from laser_dist.retrieval.collection import iter_passages

    read = written = 0
    with replacing(config.out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for passage_id, text, title in islice(iter_passages(config.corpus), config.limit):
            read += 1
            if query := crop(passage_id, text, config.keep, config.max_words, config.seed):
                passage = {"id": passage_id, "text": text} | ({"title": title} if title else {})
                row = {"query_id": f"crop-{passage_id}", "query": query, "positives": [passage], "negatives": []}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written += 1
        if not written:
            raise UserError(f"{config.corpus}: no passage has {FEWEST} words with blanks between them")
    return read, written
