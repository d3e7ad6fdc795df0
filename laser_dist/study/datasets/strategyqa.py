"""StrategyQA (Geva et al., "Did Aristotle Use a Laptop?", TACL 2021; MIT) as a retrieval task.

A question's passages are the facts its author wrote down, to be found among everybody's; its rationale is its
decomposition. Only the training file has both, so dev and test are parts of it, by a hash of the question's id.
"""

import hashlib
from pathlib import Path
from typing import Any

from laser_dist.errors import UserError
from laser_dist.study.datasets.task import Question, Task, rows_of, value_of


def read(source: Path) -> Task:
    """Of strategyqa_train.json, or the folder it is in. Raises UserError for what is not as published."""
    task = Task()
    for where, row in rows_of(source / "strategyqa_train.json" if source.is_dir() else source):
        name, text = value_of(where, row, "qid", str), value_of(where, row, "question", str)
        facts = [task.facts.number(fact, "sqa-f") for fact in _texts(where, row, "facts")]
        decomposition = _texts(where, row, "decomposition")
        task.add(_split(name), Question(f"sqa-{name}", text, decomposition, list(dict.fromkeys(facts))))
    return task


def _split(name: str) -> str:
    """15 % for testing and 7 % for choosing, whatever the order of the file."""
    part = int(hashlib.md5(name.encode(), usedforsecurity=False).hexdigest(), 16) % 100
    return "test" if part < 15 else "dev" if part < 22 else "train"


def _texts(where: str, row: dict[str, Any], name: str) -> list[str]:
    values = value_of(where, row, name, list)
    texts = [value.strip() for value in values if isinstance(value, str) and value.strip()]
    if len(texts) < len(values):
        raise UserError(f"{where}: {name}: expected sentences, got {values!r:.60}")
    return texts
