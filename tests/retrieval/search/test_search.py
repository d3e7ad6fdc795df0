"""The command, with a tiny model: what it finds, and vectors that are not the model's."""

import json
import shutil

import numpy as np
import pytest

from laser_dist.cli import main
from laser_dist.retrieval.encode import encode_corpus, weights_hash
from laser_dist.retrieval.encoder import LaserEncoder
from laser_dist.testing.tiny import tiny_model_folder

WORDS = "ice water density crystal sky blue light air wave scatter query passage helps answer".split()


def text(seed, length=6):
    return " ".join(np.random.default_rng(seed).choice(WORDS, length))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, a corpus, its vectors, queries and their vectors; tests only read it."""
    folder = tmp_path_factory.mktemp("made")
    model = tiny_model_folder(folder / "model")
    rows = [{"id": f"d{i}", "text": text(i), "title": "on ice" if i % 2 else ""} for i in range(300)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"id": f"q{i}", "text": text(1000 + i), "instruction": "find it" if i == 1 else None} for i in range(4)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = LaserEncoder.from_pretrained(model)
    for what, file, out in (("passages", "corpus.jsonl", "vectors"), ("queries", "queries.jsonl", "query_vectors")):
        encode_corpus(encoder, folder / file, folder / out, what=what, weights=weights_hash(model))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "made")


def ask(folder, *more, model="model", out="run.trec"):
    flags = ["--vectors", str(folder / "vectors"), "--out", str(folder / out)]
    return ["search", *flags, *(["--model", str(folder / model)] if model else []), *map(str, more)]


def ranked(path):
    run = {}
    for line in path.read_text().splitlines():
        query, _, passage, *_ = line.split()
        run.setdefault(query, []).append(passage)
    return run


def test_finds_what_the_encoder_finds(folder, capsys):
    assert main(ask(folder, "--queries", folder / "queries.jsonl", "--k", 20, "--json", folder / "run.json")) == 0
    encoder = LaserEncoder.from_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    passages = encoder.encode_passages([r["text"] for r in rows], titles=[r["title"] for r in rows])
    instructions = [None, "find it", None, None]
    queries = encoder.encode_queries([text(1000 + i) for i in range(4)], instructions=instructions)
    expected = np.argsort(-(queries @ passages.T), axis=1, kind="stable")[:, :20]
    run = ranked(folder / "run.trec")
    assert run == {f"q{i}": [f"d{row}" for row in rows] for i, rows in enumerate(expected.tolist())}
    as_json = json.loads((folder / "run.json").read_text())
    assert {query: [passage for passage, _ in pairs] for query, pairs in as_json.items()} == run
    assert "4 queries against 300 passages" in capsys.readouterr().out


def test_encoded_queries_and_indexes_find_the_same(folder, capsys):
    by_query_vectors = ["--query-vectors", folder / "query_vectors", "--k", 5]
    assert main(ask(folder, "--queries", folder / "queries.jsonl", "--k", 5)) == 0
    for number, kind in enumerate(("exact", "flat", "hnsw")):
        assert main(ask(folder, *by_query_vectors, "--index", kind, model=None, out=f"{number}.trec")) == 0
        assert ranked(folder / f"{number}.trec") == ranked(folder / "run.trec"), kind
    assert main(ask(folder, *by_query_vectors, "--index", "ivfpq", "--nprobe", 1, "--candidates", 5, model=None)) == 0
    out = capsys.readouterr().out
    assert "flat: 100.00% of the 5 best of exact search, on 4 queries" in out
    assert "ivfpq: 100.00%" not in out  # one cell of seven
    assert (folder / "vectors" / "hnsw.index").is_dir()


def test_a_query_from_the_command_line_is_shown_with_texts(folder, capsys):
    arguments = ask(folder, "--query", text(7), "--query", "[bold]x", "--corpus", folder / "corpus.jsonl", "--k", 2)
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    best = ranked(folder / "run.trec")["1"]
    assert len(best) == 2 and all(passage in shown for passage in best)
    assert "[bold]x" in shown  # not taken for the console's markup
    assert text(int(best[0][1:])).split()[0] in shown


def test_another_models_vectors_are_refused(folder, capsys, monkeypatch):
    """Vectors of two models are not comparable, yet their products would rank something."""
    tiny_model_folder(folder / "other", seed=1)
    monkeypatch.setattr(LaserEncoder, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    assert main(ask(folder, "--queries", folder / "queries.jsonl", model="other")) == 2
    told = capsys.readouterr().err
    assert weights_hash(folder / "model")[:12] in told and weights_hash(folder / "other")[:12] in told
    assert main(ask(folder, "--queries", folder / "queries.jsonl", "--steps", 5)) == 2
    assert "thinking.steps 3, not 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "give --queries, --query or --query-vectors: found none"),
        (("--query", "x", "--queries", "q.jsonl"), "found --queries and --query"),
        (("--query", " "), "--query: is empty"),
        (("--query", "x", "--k", "0"), "--k 0: must be at least 1"),
        (("--queries", "nowhere.jsonl"), "nowhere.jsonl: cannot be read"),
        (("--query-vectors", "{}/vectors"), "holds encoded passages: encode the queries with --what queries"),
        (("--query", "x", "--vectors", "{}/query_vectors"), "holds encoded queries"),
        (("--queries", "{}/queries.jsonl", "--corpus", "c.jsonl"), "--corpus: is for printing"),
        (("--query", "x", "--vectors", "{}"), "is no folder of vectors"),
        (("--query", "x", "--out", "{}"), "is a folder"),
        (("--query", "x", "--nlist", "4", "--index", "hnsw"), "--nlist: goes with --index ivfpq, not with hnsw"),
        (("--query", "x", "--candidates", "9"), "--candidates: goes with --index flat, hnsw or ivfpq, not with exact"),
        (("--query", "x", "--rebuild-index"), "exact search has no index"),
        (("--query-vectors", "{}/query_vectors", "--steps", "2"), "are encoded already"),
    ],
)
def test_mistakes_are_named_before_the_model_is_loaded(folder, capsys, monkeypatch, flags, told):
    monkeypatch.setattr(LaserEncoder, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    assert main(ask(folder, *(flag.format(folder) for flag in flags))) == 2
    assert told in capsys.readouterr().err


def test_model_and_out_are_asked_for(folder, capsys):
    assert main(ask(folder, "--query", "x", model=None)) == 2
    assert "--model: give the model that made the vectors" in capsys.readouterr().err
    assert main(["search", "--vectors", "v", "--query-vectors", "w"]) == 2
    assert "--out: name the run file" in capsys.readouterr().err
