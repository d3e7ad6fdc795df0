"""The dev split as a test collection in BEIR's layout, which `laser-dist evaluate` reads."""

import json
from typing import Any

from laser_dist.data.schema import Passage, decode_example, passage_key

FOLDER = "dev"
CORPUS, QUERIES, QRELS = (f"{FOLDER}/{name}" for name in ("corpus.jsonl", "queries.jsonl", "qrels.tsv"))
_HEADER = b"query-id\tcorpus-id\tscore\n"


class DevCollection:
    """Queries with their rationales, their positives as judgements, and as corpus every passage that they bring.

    The corpus is therefore small and hard: its scores rank runs of one data set, and say little beyond.
    """

    def __init__(self, corpus: bytes = b"") -> None:
        """`corpus`: what an earlier process wrote."""
        self._texts: dict[int, int] = {}  # key of the passage id -> key of the passage
        for line in corpus.splitlines():
            self._add(Passage(**json.loads(line)))
        self._begun = bool(corpus)
        self._lines: dict[str, list[bytes]] = {}
        self._discard_lines()

    @property
    def passages(self) -> int:
        return len(self._texts)

    def add(self, text: bytes) -> str | None:
        """Add an example; or say why it cannot be: two passages of one id."""
        example = decode_example(text, "dev")
        for passage in (*example.positives, *example.negatives):
            known = self._texts.get(passage_key(passage.id))
            if known not in (None, _content_key(passage)):
                return f'passage id "{passage.id}" is used for two texts, which the dev split cannot hold'
        row: dict[str, Any] = {"id": example.query_id, "text": example.query}
        row |= {name: value for name in ("instruction", "rationale") if (value := getattr(example, name))}
        self._write(QUERIES, row)
        for passage in (*example.positives, *example.negatives):
            if self._add(passage):
                self._write(CORPUS, {name: value for name, value in vars(passage).items() if value})
        for passage_id in dict.fromkeys(passage.id for passage in example.positives):
            self._lines[QRELS].append(f"{example.query_id}\t{passage_id}\t1\n".encode())
        return None

    def take_news(self) -> dict[str, bytes]:
        """File name -> what is to be appended to it, since the last call."""
        news = {name: b"".join(lines) for name, lines in self._lines.items() if lines}
        if QRELS in news and not self._begun:
            news[QRELS] = _HEADER + news[QRELS]
            self._begun = True
        self._discard_lines()
        return news

    def _add(self, passage: Passage) -> bool:
        key = passage_key(passage.id)
        is_new = key not in self._texts
        self._texts[key] = _content_key(passage)
        return is_new

    def _write(self, name: str, row: dict[str, Any]) -> None:
        self._lines[name].append(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def _discard_lines(self) -> None:
        self._lines = {name: [] for name in (CORPUS, QUERIES, QRELS)}


def _content_key(passage: Passage) -> int:
    return passage_key(f"{passage.title}\0{passage.text}")
