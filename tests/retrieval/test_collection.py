"""Reading collections: what is accepted, and that every defect is named with file, line and field."""

import json

import pytest

from laser_dist.errors import UserError
from laser_dist.files import replacing, write_json
from laser_dist.retrieval.collection import (
    keep_judged,
    read_collection,
    read_corpus,
    read_qrels,
    read_queries,
)


@pytest.fixture
def write(tmp_path):
    def write_file(name, *rows):
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write_file


def test_corpus_takes_both_id_names_numbers_titles_and_blank_lines(write):
    rows = (
        {"_id": "a", "text": "x", "title": "T"},
        "",
        {"id": 7, "text": "y", "title": None},
        {"id": "c", "title": "only"},
    )
    corpus = read_corpus(write("corpus.jsonl", *rows))
    assert corpus.ids == ["a", "7", "c"]
    assert corpus.texts == ["x", "y", "only"]
    assert corpus.titles == ["T", "", ""]
    assert len(corpus) == 3


def test_corpus_keeps_unicode_line_separators_and_skips_a_byte_order_mark(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"id": "ä", "text": "one\u2028two"}\r\n'.encode())
    assert read_corpus(path).texts == ["one\u2028two"]


def test_queries_have_optional_instructions_and_rationales(write):
    rows = {"id": "1", "text": "q", "instruction": "find", "rationale": "r"}, {"id": "2", "text": "p", "metadata": {}}
    queries = read_queries(write("queries.jsonl", *rows))
    assert queries.instructions == ["find", None]
    assert queries.rationales == ["r", None]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"id": "b", "text"', r":2: not valid JSON .*one JSON object per line"),
        ("[1]", r":2: a JSON list: write one JSON object"),
        ({"text": "x"}, r":2: id is missing"),
        ({"id": " ", "text": "x"}, r":2: id is missing, empty"),
        ({"id": True, "text": "x"}, r":2: id is missing, empty or not text"),
        ({"id": "a", "text": "x"}, r":2: id 'a' was used on an earlier line"),
        ({"id": "b"}, r":2: text is missing or empty"),
        ({"id": "b", "text": " \n"}, r":2: text is missing or empty"),
        ({"id": "b", "text": ["x"]}, r":2: text is a list: write it as text"),
    ],
)
@pytest.mark.parametrize("read", [read_corpus, read_queries])
def test_defective_rows_are_named(write, read, row, message):
    with pytest.raises(UserError, match=r"rows\.jsonl" + message):
        read(write("rows.jsonl", {"id": "a", "text": "x"}, row))


@pytest.mark.parametrize("read", [read_corpus, read_queries, read_qrels])
def test_empty_missing_and_badly_encoded_files_are_named(tmp_path, read):
    path = tmp_path / "file"
    with pytest.raises(UserError, match="file: cannot be read"):
        read(path)
    path.write_text("\n\n")
    with pytest.raises(UserError, match="file: (the file is empty|no judgement)"):
        read(path)
    path.write_bytes(b'{"id": "a", "text": "caf\xe9"}\n')
    with pytest.raises(UserError, match="file:1: not UTF-8"):
        read(path)


@pytest.mark.parametrize(
    "lines",
    [
        ["query-id\tcorpus-id\tscore", "q\td\t1", "q\te e\t0"],
        ["q\td\t1", "q\te e\t0"],
        ["q\t0\td\t1", "q\t0\te e\t0", "q\t0\td\t1"],
    ],
)
def test_qrels_with_and_without_header_and_in_trec_format(write, lines):
    assert read_qrels(write("qrels.tsv", *lines)) == {"q": {"d": 1, "e e": 0}}


def test_qrels_separated_by_spaces(write):
    assert read_qrels(write("qrels.txt", "q 0 d 2", "p 0 d -1")) == {"q": {"d": 2}, "p": {"d": -1}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q\td", r":2: 2 columns"),
        ("q\t\t1", r":2: 3 columns"),
        ("q\te\t0.5", r":2: score '0.5' is not a whole number"),
        ("q\te\tscore", r":2: score 'score' is not a whole number"),
        ("q\td\t0", r":2: score of 'q', 'd' contradicts"),
    ],
)
def test_defective_judgements_are_named(write, line, message):
    with pytest.raises(UserError, match=r"qrels\.tsv" + message):
        read_qrels(write("qrels.tsv", "q\td\t1", line))


def test_a_misspelt_first_judgement_is_no_header(write):
    with pytest.raises(UserError, match=":1: score 'one' is not a whole number"):
        read_qrels(write("qrels.tsv", "q\td\tone"))


def test_collection_must_fit_together(write):
    corpus = write("corpus.jsonl", {"id": "d", "text": "x"})
    queries = write("queries.jsonl", {"id": "q", "text": "x"})
    good = write("good.tsv", "q\td\t1")
    assert read_collection(corpus, queries, good)[2] == {"q": {"d": 1}}
    unknown = write("unknown.tsv", *(f"q\tx{i}\t1" for i in range(5)))
    with pytest.raises(UserError, match=r"unknown\.tsv: corpus-id: 5 not in .*corpus\.jsonl: 'x0', 'x1', 'x2', \.\.\."):
        read_collection(corpus, queries, unknown)
    with pytest.raises(UserError, match=r"query-id: 1 not in .*queries\.jsonl: 'p'; use"):
        read_collection(corpus, queries, write("other.tsv", "q\td\t1", "p\td\t1"))


def test_queries_without_a_relevant_passage_are_left_out(write):
    queries = read_queries(write("q.jsonl", *({"id": i, "text": f"text {i}", "rationale": i} for i in "abc")))
    kept, qrels = keep_judged(queries, {"b": {"d": 1, "e": 0}, "c": {"d": 0}})
    assert (kept.ids, kept.texts, kept.rationales) == (["b"], ["text b"], ["b"])
    assert qrels == {"b": {"d": 1, "e": 0}}
    with pytest.raises(UserError, match="none of the queries"):
        keep_judged(queries, {"c": {"d": 0}})


def test_replacing_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "new" / "out.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]
