"""`laser-dist explain` as users run it: console, JSON, Markdown, PNG, TensorBoard; and what it refuses."""

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from laser_dist import LaserEncoder
from laser_dist.cli import main
from laser_dist.config import ThinkingConfig
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.retrieval.encode import encode_corpus, weights_hash
from laser_dist.retrieval.encoder import LaserEncoder as Loaded
from laser_dist.testing import tiny_model_folder

QUERY, OTHER = "why does ice | float *on* water?", "why is the sky\nblue?"
RATIONALE = "Density.\n\nIce is less dense, $5 < $6."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("model"), architecture="qwen3", chat_template=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [{"id": f"d{i}", "title": f"t{i}", "text": f"water\tand ice,\nnumber {i} " * (i % 4 + 1)} for i in range(23)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def vectors(model, corpus, tmp_path_factory):
    encoder = LaserEncoder.from_pretrained(model, device="cpu")
    return encode_corpus(encoder, corpus, tmp_path_factory.mktemp("v") / "vectors", weights=weights_hash(model))


def explain(model, *arguments):
    return main(["explain", "--model", str(model), "--device", "cpu", *map(str, arguments)])


def test_everything_is_written(model, corpus, tmp_path, capsys):
    out = tmp_path / "new" / "explained"
    queries = ["--query", QUERY, "--query", OTHER, "--rationale", RATIONALE, "--rationale", ""]
    assert explain(model, *queries, "--corpus", corpus, "--out", out, "--tensorboard", "--projector-passages", 7) == 0
    told = capsys.readouterr().out
    assert "soft token" in told and "d1" in told and "segments, cosines" in told
    written = json.loads((out / "explanation.json").read_text())
    first, second = written["queries"]
    assert [soft["leads_to_state"] for soft in first["soft_tokens"]] == [2, 3]
    assert all(len(soft["top"]) == 8 for soft in first["soft_tokens"])
    assert np.array(first["segments"]["cosine_KM"]).shape == (3, 2) and "segments" not in second
    _check_nearest(model, corpus, first)
    markdown = (out / "explanation.md").read_text()
    assert r"ice \| float \*on\* water" in markdown
    for line in (line for line in markdown.splitlines() if line.startswith("|")):
        assert line.replace(r"\|", "").count("|") in (3, 5, 6), line  # id, tokens, ranks or segments
    for number in (1, 2):
        assert (out / f"query-{number}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    _check_tensorboard(out / "tensorboard", written["queries"])


def _check_nearest(model, corpus, explained):
    encoder = LaserEncoder.from_pretrained(model, device="cpu")
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    passages = encoder.encode_passages([row["text"] for row in rows], titles=[row["title"] for row in rows])
    scores = passages @ encoder.encode_queries([QUERY])[0]
    found = explained["nearest"][-1]
    assert found["of"] == "vector" and len(found["passages"]) == 5
    np.testing.assert_allclose([p["cosine"] for p in found["passages"]], np.sort(scores)[::-1][:5], atol=1e-5)
    for passage in found["passages"]:
        assert scores[int(passage["id"][1:])] == pytest.approx(passage["cosine"], abs=1e-5)
        assert rows[passage["row"]]["id"] == passage["id"]
        assert passage["text"].startswith(f"{rows[passage['row']]['title']} water")


def _check_tensorboard(folder, queries):
    events = EventAccumulator(str(folder)).Reload().Tags()
    assert set(events["images"]) == {"explain/query-1", "explain/query-2"}
    assert {"explain/query-1/text_summary", "explain/query-2/text_summary"} <= set(events["tensors"])
    config = (folder / "projector_config.pbtxt").read_text()
    (metadata_file,) = folder.rglob("metadata.tsv")
    (tensor_file,) = folder.rglob("tensors.tsv")
    for path in (metadata_file, tensor_file):
        assert path.relative_to(folder).as_posix() in config
    header, *metadata = [line.split("\t") for line in metadata_file.read_text().splitlines()]
    matrix = np.loadtxt(tensor_file, delimiter="\t")
    assert header == ["kind", "query", "text"] and all(len(row) == 3 for row in metadata)
    assert matrix.shape == (len(metadata), 48)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, atol=1e-5)
    near = {p["row"] for query in queries for found in query["nearest"] for p in found["passages"]}
    spread = set(np.linspace(0, 22, 7).astype(int).tolist())
    kinds = [row[0] for row in metadata]
    assert kinds.count("passage") == len(near | spread)
    assert kinds.count("query") == 2 and kinds.count("segment") == 2 and kinds.count("explicit view") == 1
    assert sum(kind.startswith("state") for kind in kinds) == 6


def test_encoded_vectors_give_what_the_corpus_gives(model, corpus, vectors, tmp_path):
    ways = {"a": ["--corpus", corpus], "b": ["--vectors", vectors, "--corpus", corpus], "c": ["--vectors", vectors]}
    found = {}
    for name, way in ways.items():
        assert explain(model, "--query", QUERY, *way, "--no-png", "--out", tmp_path / name) == 0
        found[name] = json.loads((tmp_path / name / "explanation.json").read_text())["queries"][0]["nearest"]
        assert not list((tmp_path / name).glob("*.png"))
    assert "text" not in found["c"][0]["passages"][0]
    for other in ("b", "c"):
        for ours, theirs in zip(found["a"], found[other], strict=True):
            cosines = [[p["cosine"] for p in one["passages"]] for one in (ours, theirs)]
            np.testing.assert_allclose(*cosines, atol=1e-5)


@pytest.mark.parametrize("convention, soft_tokens", [("official", 0), ("paper", 1)])
def test_one_step(tmp_path, capsys, convention, soft_tokens):
    """Official K = 1 has nothing to show, which must be said and must not break the chart."""
    model = tiny_model_folder(tmp_path / "model")
    RetrieverCard(thinking=ThinkingConfig(steps=1, convention=convention)).save(model)
    assert explain(model, "--query", QUERY, "--out", tmp_path / "out") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert ("there is no soft token" in told) == (soft_tokens == 0)
    (query,) = json.loads((tmp_path / "out" / "explanation.json").read_text())["queries"]
    assert len(query["soft_tokens"]) == soft_tokens and (tmp_path / "out" / "query-1.png").is_file()


def test_an_explanation_is_replaced_only_on_request(model, tmp_path, capsys):
    out = tmp_path / "out"
    assert explain(model, "--query", QUERY, "--query", OTHER, "--out", out) == 0
    (out / "mine.txt").write_text("keep")
    assert explain(model, "--query", OTHER, "--out", out) == 2
    assert "--overwrite" in capsys.readouterr().err and (out / "query-2.png").is_file()
    assert explain(model, "--query", OTHER, "--out", out, "--overwrite", "--show", "tokens", "--top", 3) == 0
    assert (out / "mine.txt").is_file() and not (out / "query-2.png").exists()
    (query,) = json.loads((out / "explanation.json").read_text())["queries"]
    assert query["query"] == OTHER and len(query["soft_tokens"][0]["top"]) == 3


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "--query: give at least one"),
        (["--query", " "], "--query 1: is empty"),
        (["--query", "a", "--query", "b", "--rationale", "c"], "1 for 2 queries: give one per query"),
        (["--query", "a", "--show", "segments"], "--show segments: compares with a written rationale"),
        (["--query", "a", "--rationale", "\n", "--show", "segments"], "--show segments"),
        (["--query", "a", "--show", "passages"], "--corpus FILE or --vectors FOLDER"),
        (["--query", "a", "--top", "0"], "--top 0"),
        (["--query", "a", "--steps", "0"], "--steps 0"),
        (["--query", "a", "--tensorboard"], "--out FOLDER"),
        (["--query", "a", "--corpus", "absent.jsonl"], "this file does not exist"),
        (["--query", "a", "--vectors", "absent"], "is no folder of vectors"),
    ],
)
def test_user_mistakes(model, monkeypatch, capsys, arguments, told):
    monkeypatch.setattr(Loaded, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    assert explain(model, *arguments) == 2
    assert told in capsys.readouterr().err


def test_unknown_model(tmp_path, capsys):
    assert explain(tmp_path / "absent", "--query", QUERY) == 2
    assert "this folder does not exist" in capsys.readouterr().err


def test_broken_corpus_is_told_before_the_model_is_loaded(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Loaded, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "a", "text": "x"}\n{"id": "b", "text": ""}\n')
    assert explain(model, "--query", QUERY, "--corpus", corpus) == 2
    assert "corpus.jsonl:2" in capsys.readouterr().err


def test_vectors_of_something_else_are_refused(model, corpus, vectors, tmp_path, monkeypatch, capsys):
    """They would be ranked by accident, and look like an insight."""
    other = tiny_model_folder(tmp_path / "other", architecture="qwen3", chat_template=True, seed=1)
    monkeypatch.setattr(Loaded, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    assert explain(other, "--query", QUERY, "--vectors", vectors) == 2
    assert "give the model that made the vectors" in capsys.readouterr().err
    assert explain(model, "--query", QUERY, "--vectors", vectors, "--steps", 5) == 2
    assert "thinking.steps 3, not 5" in capsys.readouterr().err
    changed = tmp_path / "corpus.jsonl"
    changed.write_text(corpus.read_text().replace("number 7", "number 8"))
    assert explain(model, "--query", QUERY, "--vectors", vectors, "--corpus", changed) == 2
    assert "another corpus" in capsys.readouterr().err
