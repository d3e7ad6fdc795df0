"""From a user's files to the rows of a micro-batch."""

from importlib.resources import files
from pathlib import Path


def sample_folder() -> Path:
    """Folder of the embedded sample set (train.jsonl, dev.jsonl, corpus.jsonl, queries.jsonl, qrels.tsv, README.md)."""
    return Path(str(files(__name__) / "sample"))
