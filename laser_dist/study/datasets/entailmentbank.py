"""EntailmentBank (Dalvi et al., "Explaining Answers with Entailment Trees", EMNLP 2021; CC BY) as a retrieval task.

A question's passages are the leaves of its tree, to be found among all facts of WorldTree; its rationale is the tree's
conclusions in the order of the proof, the last of which states the answer.
"""

import re
from pathlib import Path
from typing import Any

from laser_dist.errors import UserError
from laser_dist.reading import read_object
from laser_dist.study.datasets.task import SPLITS, Question, Task, rows_of, value_of

CORPUS = "supporting_data/worldtree_corpus_sentences_extended.json"
# "sent2 & sent3 -> int1: some conclusion; int1 & sent1 -> hypothesis; ": conclusions may hold anything, also a ";".
_STEP = re.compile(r"((?:sent|int)\d+(?: & (?:sent|int)\d+)*) -> (int\d+|hypothesis)\b")


def read(source: Path) -> Task:
    """Of the unpacked release, entailment_trees_emnlp2021_data_v3. Raises UserError for what is not as published."""
    task = Task()
    facts = task.facts
    for name, text in _corpus(source / CORPUS).items():
        if text != "DUMMY":  # the first entry
            facts.add(text, name)
    for split in SPLITS:
        for where, row in rows_of(source / "dataset" / "task_1" / f"{split}.jsonl"):
            meta = value_of(where, row, "meta", dict)
            sentences = value_of(where, meta, "triples", dict)
            premises, conclusions = _steps(where, row, meta)
            # A leaf that annotators wrote is in no corpus: it becomes a passage of its own.
            leaves = [facts.number(value_of(where, sentences, name, str), "EB_leaf:") for name in premises]
            name, question = value_of(where, row, "id", str), value_of(where, row, "question", str)
            task.add(split, Question(f"eb-{name}", question, conclusions, list(dict.fromkeys(leaves))))
    return task


def _corpus(path: Path) -> dict[str, str]:
    try:
        texts = read_object(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give --source the unpacked release of EntailmentBank") from None
    except ValueError as error:
        raise UserError(f"{path}: no table of sentences: {error}") from None
    if wrong := next((name for name, text in texts.items() if not (isinstance(text, str) and text.strip())), None):
        raise UserError(f"{path}: {wrong}: expected a sentence, got {texts[wrong]!r:.60}")
    return texts


def _steps(where: str, row: dict[str, Any], meta: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The sentences that a proof uses, and its conclusions, both in its order."""
    intermediate = value_of(where, meta, "intermediate_conclusions", dict)
    steps = _STEP.findall(value_of(where, row, "proof", str))
    if not steps:
        raise UserError(f'{where}: proof: no step like "sent1 & sent2 -> hypothesis" in it: is this task_1?')
    premises = [name for used, _ in steps for name in used.split(" & ") if name.startswith("sent")]
    conclusions = [
        value_of(where, row, "hypothesis", str) if name == "hypothesis" else value_of(where, intermediate, name, str)
        for _, name in steps
    ]
    return premises, conclusions
