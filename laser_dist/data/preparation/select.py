"""Which rows become training examples, which the dev split, and which are left out: what depends on other rows too."""

from array import array
from typing import Literal, NamedTuple

from laser_dist.data.preparation.convert import Record
from laser_dist.data.preparation.keyset import KeySet

Kind = Literal["train", "dev", "drop", "error"]


class Verdict(NamedTuple):
    """What becomes of a row; `reason` says why it is left out, or what is wrong."""

    kind: Kind
    reason: str = ""


TRAIN, DEV = Verdict("train"), Verdict("dev")
DUPLICATE_ID, DUPLICATE_QUERY, NO_RATIONALE = "duplicate query_id", "duplicate query", "no rationale"


class Selection:
    """Judges rows in their order. Queries with a key below `dev_below` go to the dev split.

    The key is a hash of the normalised query, so that all repetitions of a query land on one side, in every run and
    every source. What is kept in memory is two keys per row.
    """

    def __init__(
        self,
        *,
        missing_rationale: Literal["error", "drop", "keep"] = "error",
        duplicates: Literal["error", "drop"] = "error",
        duplicate_queries: Literal["error", "drop", "keep"] = "keep",
        dev_below: int = 0,
    ) -> None:
        self.on_missing, self.on_id, self.on_query = missing_rationale, duplicates, duplicate_queries
        self.dev_below = dev_below
        self.repeated_queries = 0
        self.news = array("Q")  # keys of ids and queries in turn, since they were last taken
        self._ids, self._queries = KeySet(), KeySet()

    def judge(self, record: Record) -> Verdict:
        if not self._ids.add(record.id_key):
            return Verdict("drop" if self.on_id == "drop" else "error", DUPLICATE_ID)
        self.news.extend((record.id_key, record.query_key))
        if not self._queries.add(record.query_key):
            self.repeated_queries += 1
            if self.on_query != "keep":
                return Verdict("drop" if self.on_query == "drop" else "error", DUPLICATE_QUERY)
        if not record.has_rationale and self.on_missing != "keep":
            return Verdict("drop" if self.on_missing == "drop" else "error", NO_RATIONALE)
        return DEV if record.query_key < self.dev_below else TRAIN

    def take_news(self) -> bytes:
        """The keys since the last call, as `recall` takes them."""
        news, self.news = self.news, array("Q")
        return news.tobytes()

    def recall(self, taken: bytes) -> None:
        """Know the rows that an earlier process has judged."""
        keys = array("Q", taken)
        for id_key, query_key in zip(keys[::2], keys[1::2], strict=True):
            self._ids.add(id_key)
            self.repeated_queries += not self._queries.add(query_key)
