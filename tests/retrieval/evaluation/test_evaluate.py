"""The evaluation and its command, with a bag-of-words encoder in the place of a model."""

import json
import re
import subprocess
import sys
import zlib

import numpy as np
import pytest

from laser_dist.errors import UserError
from laser_dist.retrieval.collection import Corpus, Queries
from laser_dist.retrieval.evaluation.command import main
from laser_dist.retrieval.evaluation.evaluate import evaluate
from laser_dist.retrieval.metrics import METRICS


class FakeEncoder:
    """Hashed bag of words; records what it was given."""

    dim = 512

    def __init__(self, **options):
        self.options, self.calls = options, []

    @classmethod
    def from_pretrained(cls, folder, steps=None, dim=None, device=None, dtype=None):
        return cls(model=folder, steps=steps)

    def description(self):
        return self.options

    def _encode(self, texts):
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                vectors[row, zlib.crc32(word.encode()) % self.dim] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def encode_queries(self, texts, *, instructions=None, rationales=None, dim=None, progress=False):
        self.calls.append(("queries", texts, instructions))
        return self._encode(rationales or texts)[:, :dim]

    def encode_passages(self, texts, *, titles=None, progress=False):
        self.calls.append(("passages", texts, titles))
        return self._encode([f"{a} {b}" for a, b in zip(titles, texts, strict=True)] if titles else texts)


CORPUS = Corpus(["d1", "d2", "d3"], ["red apple pie", "green pear tart", "blue plum cake"], ["", "", ""])
QUERIES = Queries(["q1", "q2", "q3"], ["apple pie", "pear tart", "cake"], [None] * 3, [None] * 3)
QRELS = {"q1": {"d1": 1}, "q2": {"d3": 1}, "q3": {"d3": 0}}


def test_evaluate_scores_judged_queries_and_counts_the_others():
    encoder = FakeEncoder()
    result = evaluate(encoder, CORPUS, QUERIES, QRELS)
    assert result.counts == {"queries": 2, "passages": 3, "queries_left_out": 1}
    assert result.per_query["q1"] == dict.fromkeys(METRICS, 1.0)
    assert result.metrics["recall@10"] == 1.0
    assert 0.5 < result.metrics["mrr@10"] < 1
    assert [passage for passage, _ in result.run["q1"]][0] == "d1"
    assert set(result.seconds) == {"encode_passages", "encode_queries", "search"}
    assert encoder.calls == [("passages", CORPUS.texts, None), ("queries", ["apple pie", "pear tart"], None)]


def test_titles_and_instructions_reach_the_encoder():
    encoder = FakeEncoder()
    corpus = Corpus(CORPUS.ids, CORPUS.texts, ["T", "", ""])
    queries = Queries(QUERIES.ids, QUERIES.texts, ["find", None, None], [None] * 3)
    evaluate(encoder, corpus, queries, QRELS)
    assert [call[2] for call in encoder.calls] == [["T", "", ""], ["find", None]]


def test_given_vectors_are_used_instead_of_encoding():
    """Queries get as many components as the passages have."""
    encoder = FakeEncoder()
    vectors = np.eye(3, 7, dtype=np.float32)
    result = evaluate(encoder, CORPUS, QUERIES, QRELS, passage_vectors=vectors)
    assert [call[0] for call in encoder.calls] == ["queries"]
    assert result.counts["passages"] == 3 and result.seconds["encode_passages"] < 0.1


def test_the_explicit_view_reads_the_rationales_of_judged_queries():
    """A query that is left out needs none."""
    queries = Queries(QUERIES.ids, QUERIES.texts, [None] * 3, ["blue plum", "blue plum", None])
    result = evaluate(FakeEncoder(), CORPUS, queries, QRELS, explicit=True)
    assert [ranking[0][0] for ranking in result.run.values()] == ["d3", "d3"]
    with pytest.raises(UserError, match="--explicit: 1 of 2 judged queries .*'q2'"):
        lacking = Queries(QUERIES.ids, QUERIES.texts, [None] * 3, ["blue plum", "", None])
        evaluate(FakeEncoder(), CORPUS, lacking, QRELS, explicit=True)


def test_too_small_k_is_refused():
    with pytest.raises(ValueError, match="recall@100"):
        evaluate(FakeEncoder(), CORPUS, QUERIES, QRELS, k=10)


@pytest.fixture
def files(tmp_path):
    rows = [{"id": i, "text": t} for i, t in zip(CORPUS.ids, CORPUS.texts, strict=True)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"id": i, "text": t} for i, t in zip(QUERIES.ids, QUERIES.texts, strict=True)]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        "query-id\tcorpus-id\tscore",
        *(f"{q}\t{d}\t{g}" for q, grades in QRELS.items() for d, g in grades.items()),
    ]
    (tmp_path / "qrels.tsv").write_text("\n".join(lines))
    return tmp_path


def arguments(folder, *more):
    inputs = ("corpus.jsonl", "queries.jsonl", "qrels.tsv", "results.json")
    flags = zip(("--corpus", "--queries", "--qrels", "--out"), (str(folder / name) for name in inputs), strict=True)
    return ["--model", "some/model", *(word for pair in flags for word in pair), *more]


@pytest.fixture
def fake_module(monkeypatch):
    module = type(sys)("laser_dist.retrieval.encoder")
    module.LaserEncoder = FakeEncoder
    monkeypatch.setitem(sys.modules, "laser_dist.retrieval.encoder", module)
    return module


def test_command_writes_results_run_file_and_table(files, fake_module, capsys):
    assert main(arguments(files, "--steps", "5", "--run-file", str(files / "run.txt"))) == 0
    results = json.loads((files / "results.json").read_text())
    expected = evaluate(FakeEncoder(), CORPUS, QUERIES, QRELS)
    assert {name: results[name] for name in METRICS} == expected.metrics
    assert results["per_query"] == expected.per_query
    assert set(results["bm25"]) == set(METRICS) and set(results["bm25_per_query"]) == {"q1", "q2"}
    assert (results["view"], results["dim"]) == ("latent", 512)
    assert (results["queries"], results["passages"], results["queries_left_out"]) == (2, 3, 1)
    assert results["model"] == "some/model"
    assert results["encoder"] == {"model": "some/model", "steps": 5}
    assert len((files / "run.txt").read_text().splitlines()) == 6
    printed = capsys.readouterr().out
    assert "BM25" in printed and "ndcg@10" in printed and f"{expected.metrics['ndcg@10']:.4f}" in printed
    assert "1 without a relevant passage left out" in printed


def test_a_folder_in_beirs_layout(files, fake_module, capsys):
    """qrels/SPLIT.tsv, or the files of this project's own folders."""
    (files / "qrels").mkdir()
    (files / "qrels.tsv").rename(files / "qrels" / "test.tsv")
    flags = ["--model", "m", "--data", str(files), "--out", str(files / "out.json")]
    assert main(flags) == 0
    report = json.loads((files / "out.json").read_text())
    assert report["data"]["qrels"]["file"].endswith("qrels/test.tsv") and len(report["data"]["corpus"]["sha256"]) == 64
    assert report["ndcg@10"] == evaluate(FakeEncoder(), CORPUS, QUERIES, QRELS).metrics["ndcg@10"]
    with pytest.raises(UserError, match="no judgements of the split 'dev'.*--split can be test"):
        main([*flags, "--split", "dev"])
    (files / "dev_qrels.tsv").write_text("q9\td1\t1\n")
    (files / "dev_queries.jsonl").write_text('{"id": "q9", "text": "apple"}\n')
    assert main([*flags, "--split", "dev"]) == 0
    assert set(json.loads((files / "out.json").read_text())["per_query"]) == {"q9"}
    with pytest.raises(UserError, match="holds no corpus.jsonl"):
        main(["--model", "m", "--data", str(files / "qrels"), "--out", "o.json"])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "found none of them"),
        (["--corpus", "c", "--queries", "q"], "give --corpus, --queries and --qrels"),
        (
            ["--corpus", "c", "--queries", "q", "--qrels", "r", "--data", "d"],
            "found --corpus --queries --qrels and --data",
        ),
        (["--data", "d", "--task", "BRIGHT"], "found --data and --task"),
        (["--task", "BRIGHT", "--vectors", "v"], "not with --task"),
        (["--data", "d", "--task-data", "t"], "--task-data: goes with --task"),
        (["--data", "d", "--dim", "0"], "--dim 0: must be at least 1"),
        (["--data", "d", "--max-tokens", "7"], "--max-tokens 7: must be at least 8"),
        (["--task", "BRIGHT", "--split", "dev"], "--split: goes with --data"),
        (["--data", "nowhere"], "nowhere: holds no corpus.jsonl"),
    ],
)
def test_flags_that_do_not_go_together_are_named(flags, told):
    with pytest.raises(UserError, match=told):
        main(["--model", "m", "--out", "o.json", *flags])


def test_bm25_can_be_left_out(files, fake_module, capsys):
    assert main(arguments(files, "--no-bm25")) == 0
    assert "bm25" not in json.loads((files / "results.json").read_text())
    assert "BM25" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels.tsv"])
def test_files_are_checked_before_the_model_is_loaded(files, fake_module, monkeypatch, name):
    monkeypatch.setattr(fake_module.LaserEncoder, "from_pretrained", lambda *_, **__: pytest.fail("model was loaded"))
    with (files / name).open("a") as file:
        file.write("\n{broken\n")
    with pytest.raises(UserError, match=rf"{name}:\d+: "):
        main(arguments(files))
    assert not (files / "results.json").exists()


def test_output_must_not_be_a_folder(files):
    (files / "results.json").mkdir()
    with pytest.raises(UserError, match="--out .* is a folder"):
        main(arguments(files))


@pytest.mark.parametrize("command", ["evaluate", "encode", "search", "compare"])
def test_help_imports_no_torch(command):
    code = (
        "import sys, laser_dist.cli as c\n"
        f"try: c.main(['{command}', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert "Examples:" in shown.stdout
