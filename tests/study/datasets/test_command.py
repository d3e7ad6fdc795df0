"""`laser-dist dataset` on rows as their authors publish them (EntailmentBank: CC BY; StrategyQA: MIT), shortened."""

import json
from pathlib import Path
from typing import Any

import pytest

from laser_dist.cli import main
from laser_dist.data.schema import parse_example
from laser_dist.retrieval.collection import collection_files, read_collection

# As in supporting_data/worldtree_corpus_sentences_extended.json: capitals and ";" where the trees have neither.
WORLDTREE = {
    "ET_addon:0": "DUMMY",
    "ET_addon:290": "if a place is in summer, then it will have the most sunlight",
    "ET_addon:291": "a hemisphere of earth is a kind of place",
    "ET_addon:297": "the sun is a kind of star",
    "ET_addon:299": "the earth revolves around the sun",
    "ET_addon:985": "earth is a kind of planet",
    "8745-b081-65b5-bc99": "the Northern Hemisphere is a kind of hemisphere of Earth",
    "9baa-2f01-60c7-64fa": "a complete revolution; orbit of the moon around the Earth takes 1; one month",
    "af26-8083-b908-7d3b": "the Sun is a kind of star",
    "b107-d162-bbc9-c5d8": "a complete revolution; orbit of a planet around its star takes 1; one planetary year",
}


def entailment(
    name: str, question: str, hypothesis: str, proof: str, triples: list[str], conclusions: list[str]
) -> dict[str, Any]:
    meta = {
        "triples": {f"sent{number}": text for number, text in enumerate(triples, 1)},
        "intermediate_conclusions": {f"int{number}": text for number, text in enumerate(conclusions, 1)},
    }
    return {"id": name, "question": question, "hypothesis": hypothesis, "proof": proof, "meta": meta}


SUMMER = entailment(
    "Mercury_SC_408040",
    "Which season receives the most hours of sunlight in the Northern Hemisphere?",
    "northern hemisphere will have the most sunlight in summer",
    "sent2 & sent3 -> int1: the northern hemisphere is a kind of place; int1 & sent1 -> hypothesis; ",
    [
        "if a place is in summer, then it will have the most sunlight",
        "the northern hemisphere is a kind of hemisphere of earth",
        "a hemisphere of earth is a kind of place",
    ],
    ["the northern hemisphere is a kind of place", "northern hemisphere will have the most sunlight in summer"],
)
YEAR = entailment(
    "NYSEDREGENTS_2014_4_2",
    "About how long does it take Earth to make one revolution around the Sun?",
    "a complete revolution of the earth around the sun will take one earth year",
    "sent1 & sent2 & sent4 -> int1: the earth revolving around the sun is an example of a planet revolving around its "
    "star; int1 & sent3 -> hypothesis; ",
    [
        "the sun is a kind of star",
        "the earth revolves around the sun",
        "a complete revolution / orbit of a planet around its star takes 1 / one planetary year",
        "earth is a kind of planet",
    ],
    ["the earth revolving around the sun is an example of a planet revolving around its star"],
)
MONTH = entailment(
    "Mercury_7011270",
    "About how long does it take for the Moon to complete one revolution around Earth?",
    "a complete revolution of the moon around the earth takes 28 to 31 days",
    "sent1 & sent2 -> hypothesis; ",
    [
        "a complete revolution / orbit of the moon around the earth takes 1 / one month",
        "1 month is equal to 28-31 days",
    ],
    ["a complete revolution of the moon around the earth takes 28 to 31 days"],
)
STRATEGY = [
    ("b8677742616fef051f00", "Are more people today related to Genghis Khan than Julius Caesar?", "Genghis Khan"),
    ("4668264df84fb7c25b39", "Could the members of The Police perform lawful arrests?", "The Police"),
    ("41450dbd623437269f8f", "Would a Monoamine Oxidase candy bar cheer up a depressed friend?", "Depression"),
]


def released(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    task = folder / "dataset" / "task_1"
    task.mkdir(parents=True)
    for split, rows in splits.items():
        (task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "supporting_data").mkdir()
    corpus = folder / "supporting_data" / "worldtree_corpus_sentences_extended.json"
    corpus.write_text(json.dumps(WORLDTREE), encoding="utf-8")
    return folder


def test_entailmentbank_becomes_a_folder_that_studies_read(tmp_path: Path) -> None:
    source, out = released(tmp_path / "eb", train=[YEAR, YEAR], dev=[MONTH], test=[SUMMER]), tmp_path / "out"
    assert main(["dataset", "entailmentbank", "--source", str(source), "--out", str(out), "--negatives", "2"]) == 0
    corpus, queries, qrels = read_collection(*collection_files(out, "test"))
    assert queries.rationales == [
        "the northern hemisphere is a kind of place\n\nnorthern hemisphere will have the most sunlight in summer"
    ]
    # In the order of the proof; WorldTree's text of a fact that the tree writes in lower case.
    assert list(qrels["eb-Mercury_SC_408040"]) == ["8745-b081-65b5-bc99", "ET_addon:291", "ET_addon:290"]
    assert "DUMMY" not in corpus.texts and len(set(corpus.texts)) == len(corpus)
    assert "af26-8083-b908-7d3b" not in corpus.ids  # the same fact as ET_addon:297
    # A leaf that is in no corpus gets an id; the other one is found although its punctuation differs.
    _, _, dev = read_collection(*collection_files(out, "dev"))
    assert list(dev["eb-Mercury_7011270"]) == ["9baa-2f01-60c7-64fa", "EB_leaf:0"]
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    (example,) = [parse_example(row, "train.jsonl") for row in rows]  # the id stands twice in the source
    assert [passage.id for passage in example.positives] == [
        "ET_addon:297",
        "ET_addon:299",
        "ET_addon:985",
        "b107-d162-bbc9-c5d8",
    ]
    assert len({passage.id for passage in example.negatives} - {passage.id for passage in example.positives}) == 2


def test_strategyqa_splits_by_id_whatever_the_order(tmp_path: Path) -> None:
    def rows(count: int) -> list[dict[str, Any]]:
        return [
            {
                "qid": f"{name}{copy}",
                "question": f"{question} ({copy})",
                "facts": [f"{about} is known for {copy}.  ", "Everybody knows this."],
                "decomposition": [f"Who is {about}?", "Is #1 known?"],
            }
            for copy in range(count)
            for name, question, about in STRATEGY
        ]

    (tmp_path / "strategyqa_train.json").write_text(json.dumps(rows(30)), encoding="utf-8")
    arguments = ["dataset", "strategyqa", "--source", str(tmp_path), "--out"]
    assert main([*arguments, str(tmp_path / "a")]) == 0
    (tmp_path / "strategyqa_train.json").write_text(json.dumps(rows(30)[::-1]), encoding="utf-8")
    assert main([*arguments, str(tmp_path / "b")]) == 0
    splits = [
        {split: set(read_collection(*collection_files(tmp_path / name, split))[1].ids) for split in ("dev", "test")}
        for name in "ab"
    ]
    assert splits[0] == splits[1]
    assert splits[0]["dev"] and splits[0]["test"] and not splits[0]["dev"] & splits[0]["test"]
    corpus, _, _ = read_collection(*collection_files(tmp_path / "a", "test"))
    assert len(corpus) == 91 and "Genghis Khan is known for 0." in corpus.texts  # a fact of several questions is one


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"proof": "because"}, 'train.jsonl: question 1: proof: no step like "sent1 & sent2 -> hypothesis"'),
        ({"proof": "sent1 & sent9 -> hypothesis; "}, "train.jsonl: question 1: sent9: expected str, but it is missing"),
        ({"id": 7}, "train.jsonl: question 1: id: expected str, but it is int"),
        ({"meta": {}}, "train.jsonl: question 1: meta: expected dict, but it is missing or empty"),
    ],
)
def test_a_row_that_is_not_as_published_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], said: str
) -> None:
    source, out = released(tmp_path / "eb", train=[YEAR | change], dev=[MONTH], test=[SUMMER]), tmp_path / "out"
    assert main(["dataset", "entailmentbank", "--source", str(source), "--out", str(out)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_without_the_files_or_with_an_empty_split_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["dataset", "entailmentbank", "--out", str(tmp_path / "out"), "--source"]
    assert main([*arguments, str(tmp_path)]) == 2
    assert "worldtree_corpus_sentences_extended.json does not exist" in capsys.readouterr().err
    assert main([*arguments, str(released(tmp_path / "eb", train=[YEAR], dev=[], test=[SUMMER]))]) == 2
    assert "no dev question" in capsys.readouterr().err


def test_a_folder_that_exists_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = released(tmp_path / "eb", train=[YEAR], dev=[MONTH], test=[SUMMER]), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert main(["dataset", "entailmentbank", "--source", str(source), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err and (out / "notes.txt").read_text() == "mine"


def test_overwriting_deletes_only_what_this_command_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = released(tmp_path / "eb", train=[YEAR], dev=[MONTH], test=[SUMMER]), tmp_path / "out"
    again = ["dataset", "entailmentbank", "--source", str(source), "--out", str(out), "--overwrite"]
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert main(again) == 2
    assert "move it away" in capsys.readouterr().err and (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    out.rmdir()
    assert main(again) == 0 and main(again) == 0
    assert not list(tmp_path.glob(".out*"))
