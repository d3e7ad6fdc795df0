"""How published data sets lay out a row, brought to the fields that `schema.parse_example` reads.

passages  lists of passages under the names of schema.NAMES: this project's own rows, LaSER-Training, ReasonEmbed,
          BGE-Reasoner and everything else in FlagEmbedding's format. Nothing to do but to rename fields.
triplets  a column per text, as sentence-transformers publishes its data sets: `anchor` (or `query`, `question`),
          `positive` (or `answer`), and `negative` or `negative_1`, `negative_2`, ... Its trainer goes by the order of
          the columns; here the names count, and --fields brings other names.
beir      a folder with corpus.jsonl, queries.jsonl and qrels/train.tsv, see `beir`.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from laser_dist.data.schema import NAMES
from laser_dist.errors import UserError, suggest

Layout = Literal["auto", "passages", "triplets", "beir"]
_TRIPLET = {"query": ("query", "anchor", "question"), "positives": ("positive", "answer"), "negatives": ("negative",)}
_OF_PASSAGES = ("id", "text", "title")


@dataclass(frozen=True)
class RowForm:
    """The layout of a source's rows, and which of their fields have other names."""

    layout: Layout = "auto"
    fields: Mapping[str, str] = field(default_factory=dict)  # our name -> the source's

    def detect(self, row: Any, where: str) -> "RowForm":
        """The form with `auto` decided by the first row. UserError if it fits none, or lacks a field it nearly has."""
        if not isinstance(row, dict):
            return RowForm("passages", self.fields)  # parse_example says what is wrong with it
        for ours, theirs in self.fields.items():
            # A row may lack an optional field. That it lacks one and has nearly that name is a misspelling.
            near = difflib.get_close_matches(theirs, map(str, row), n=1, cutoff=0.8)
            if ours not in _OF_PASSAGES and not self._columns(row, ours) and near:
                raise UserError(f'{where}: --fields {ours}={theirs}: no {theirs!r} there. Did you mean "{near[0]}"?')
        if self.layout != "auto":
            return self
        names = {name for field in ("positives", "negatives") for name in (*NAMES[field], self.fields.get(field))}
        if any(isinstance(row.get(name), list | tuple) for name in names if name):
            return RowForm("passages", self.fields)
        if self._columns(row, "positives"):
            return RowForm("triplets", self.fields)
        raise UserError(
            f"{where}: no layout has these fields: {', '.join(sorted(map(str, row))) or 'none'}. Needed are query and "
            'positives (a list of {"id", "text"}), or anchor and positive (texts); '
            "say which field is which with --fields query=NAME positives=NAME"
        )

    def apply(self, row: Any) -> Any:
        """The row in the fields of `parse_example`, which then judges it."""
        if not isinstance(row, dict) or (self.layout == "passages" and not self.fields):
            return row
        return self._from_columns(row) if self.layout == "triplets" else self._renamed(row)

    def _renamed(self, row: dict) -> dict:
        # A field that is mapped has no other name any more: what bears one is something else.
        shadowed = {name for ours in self.fields for name in NAMES[ours] if ours not in _OF_PASSAGES}
        renamed = {name: value for name, value in row.items() if name not in shadowed}
        renamed |= {
            ours: row[theirs] for ours, theirs in self.fields.items() if ours not in _OF_PASSAGES and theirs in row
        }
        inner = {ours: theirs for ours, theirs in self.fields.items() if ours in _OF_PASSAGES}
        if inner:
            for name in (*NAMES["positives"], *NAMES["negatives"]):
                if isinstance(renamed.get(name), list):
                    renamed[name] = [
                        {**p, **{ours: p.get(theirs) for ours, theirs in inner.items()}} if isinstance(p, dict) else p
                        for p in renamed[name]
                    ]
        return renamed

    def _from_columns(self, row: dict) -> dict:
        columns = {field: self._columns(row, field) for field in _TRIPLET}
        used = {name for names in columns.values() for name in names}
        plain = self._renamed({name: value for name, value in row.items() if name not in used})
        query = {"query": row[columns["query"][0]]} if columns["query"] else {}
        passages = {
            field: [row[name] for name in columns[field] if row[name] is not None]
            for field in ("positives", "negatives")
        }
        return plain | query | passages

    def _columns(self, row: dict, field: str) -> list[str]:
        """The columns of a row that hold this field's texts: the first name that is there, plain or numbered."""
        for name in (self.fields[field],) if field in self.fields else _TRIPLET.get(field, ()):
            numbered = re.compile(rf"{re.escape(name)}(?:_(\d{{1,9}}))?")
            found = {key: numbered.fullmatch(key) for key in row if isinstance(key, str)}
            matches = sorted((int(match[1] or 0), key) for key, match in found.items() if match)
            if matches:
                return [key for _, key in matches]
        return []


def parse_fields(pairs: list[str]) -> dict[str, str]:
    """`query=question` pairs as a mapping. Raises UserError."""
    fields: dict[str, str] = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not (equals and theirs):
            raise UserError(f"--fields {pair}: write OURS=THEIRS, for example query=question")
        if ours not in NAMES:
            known = ", ".join(NAMES)
            raise UserError(f'--fields {pair}: "{ours}" is no field.{suggest(ours, NAMES)} The fields are {known}')
        if ours in fields:
            raise UserError(f"--fields {pair}: {ours} is given twice")
        fields[ours] = theirs
    return fields
