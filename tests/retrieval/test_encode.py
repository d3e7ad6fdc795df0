"""Encoding a corpus to disk: the same bytes however often it was interrupted and on however many processes."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from laser_dist import LaserEncoder
from laser_dist.errors import UserError
from laser_dist.retrieval.encode import encode_corpus, main, weights_hash
from laser_dist.retrieval.vectors import load_vectors
from laser_dist.testing import RankFailed, run_distributed, tiny_model_folder


class FakeEncoder:
    """A vector per text from its hash. `stop_after` calls it is interrupted."""

    dim = 8

    def __init__(self, model="m", stop_after=None):
        self.model, self.stop_after, self.batches = model, stop_after, []

    def description(self):
        return {"model": self.model, "steps": 3, "targets": ("a", "b")}

    def encode_passages(self, texts, *, titles):
        return self._encode(texts, titles)

    def encode_queries(self, texts, *, instructions):
        return self._encode(texts, instructions)

    def _encode(self, texts, others):
        if self.stop_after is not None and len(self.batches) >= self.stop_after:
            raise KeyboardInterrupt
        self.batches.append(texts)
        joined = [f"{other}|{text}" for other, text in zip(others, texts, strict=True)]
        rows = [np.random.default_rng(zlib.crc32(text.encode())).normal(size=self.dim) for text in joined]
        return np.array([row / np.linalg.norm(row) for row in rows], np.float32)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    rows = [{"id": f"d{i}", "text": "word " * (i * 7 % 11 + 1), "title": f"t{i}"} for i in range(23)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("tiny"))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folder_holds_the_vectors_in_corpus_order(corpus, tmp_path):
    encoder = FakeEncoder()
    folder = encode_corpus(encoder, corpus, tmp_path / "a" / "out", chunk=5)
    ids, vectors = load_vectors(folder)
    assert ids == [f"d{i}" for i in range(23)]
    assert isinstance(vectors, np.memmap) and (vectors.shape, vectors.dtype) == ((23, 8), np.float32)
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    expected = FakeEncoder().encode_passages([r["text"] for r in rows], titles=[r["title"] for r in rows])
    np.testing.assert_array_equal(vectors, expected)
    assert list(map(len, encoder.batches)) == [5, 5, 5, 5, 3]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["rows"], manifest["dim"], manifest["dtype"], manifest["what"]) == (23, 8, "float32", "passages")
    assert len(manifest["corpus"]["sha256"]) == 64


def test_queries_are_encoded_as_queries(tmp_path):
    path = tmp_path / "queries.jsonl"
    path.write_text('{"id": "a", "text": "x"}\n{"id": "b", "text": "y", "instruction": "How"}\n')
    ids, vectors = load_vectors(encode_corpus(FakeEncoder(), path, tmp_path / "out", what="queries"))
    np.testing.assert_array_equal(vectors, FakeEncoder().encode_queries(["x", "y"], instructions=[None, "How"]))
    assert ids == ["a", "b"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_interrupted_and_continued_gives_the_same_bytes(corpus, tmp_path, stop_after, dtype):
    whole = encode_corpus(FakeEncoder(), corpus, tmp_path / "whole", chunk=5, dtype=dtype)
    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(FakeEncoder(stop_after=stop_after), corpus, parts, chunk=5, dtype=dtype)
    with pytest.raises(UserError, match="is not finished"):
        load_vectors(parts)
    encoder = FakeEncoder()
    encode_corpus(encoder, corpus, parts, chunk=5, dtype=dtype)
    assert len(encoder.batches) == 5 - stop_after
    assert contents(parts) == contents(whole)


def test_work_on_something_else_is_not_continued(corpus, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(FakeEncoder(stop_after=2), corpus, out, chunk=5)
    before = contents(out)
    with pytest.raises(UserError, match="another encoder:"):
        encode_corpus(FakeEncoder(model="other"), corpus, out, chunk=5)
    with pytest.raises(UserError, match="another weights:"):
        encode_corpus(FakeEncoder(), corpus, out, chunk=5, weights="retrained")
    with pytest.raises(UserError, match="another dtype, chunk:"):
        encode_corpus(FakeEncoder(), corpus, out, chunk=6, dtype="float16")
    assert contents(out) == before
    corpus.write_text(corpus.read_text().replace("t22", "t99"))
    with pytest.raises(UserError, match="another corpus:"):
        encode_corpus(FakeEncoder(), corpus, out, chunk=5)


def test_vectors_that_are_not_finite_are_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeEncoder, "_encode", lambda self, texts, _: np.full((len(texts), 8), np.nan))
    with pytest.raises(ValueError, match="not finite"):
        encode_corpus(FakeEncoder(), corpus, tmp_path / "out")


def test_the_encoder_s_complaint_names_the_rows(corpus, tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("texts[3]: its vector is not finite")

    monkeypatch.setattr(FakeEncoder, "_encode", refuse)
    with pytest.raises(UserError, match=r"corpus.jsonl, rows 1 to 10: texts\[3\]"):
        encode_corpus(FakeEncoder(), corpus, tmp_path / "out", chunk=10)


def test_a_corpus_that_changes_meanwhile_is_not_finished(corpus, tmp_path, monkeypatch):
    encode = FakeEncoder._encode

    def changing(self, texts, others):
        corpus.write_text(corpus.read_text().replace("t22", "t99"))
        return encode(self, texts, others)

    monkeypatch.setattr(FakeEncoder, "_encode", changing)
    with pytest.raises(UserError, match="changed while it was encoded"):
        encode_corpus(FakeEncoder(), corpus, tmp_path / "out")
    with pytest.raises(UserError, match="is not finished"):
        load_vectors(tmp_path / "out")


def test_weights_hash_sees_the_weights_and_nothing_else(tmp_path):
    assert weights_hash(tmp_path / "absent") is None
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = weights_hash(tmp_path)
    (tmp_path / "README.md").write_text("text")
    assert weights_hash(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert weights_hash(tmp_path) != before


def test_command(corpus, tmp_path, monkeypatch, capsys, tiny):
    out = tmp_path / "out"
    command = ["--model", str(tiny), "--corpus", str(corpus), "--out", str(out), "--device", "cpu"]
    flags = ["--dtype", "float16", "--dim", "16", "--steps", "2", "--batch-tokens", "50", "--model-dtype", "float32"]
    assert main([*command, *flags]) == 0
    assert str(out) in capsys.readouterr().out
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    encoder = LaserEncoder.from_pretrained(tiny, device="cpu", steps=2, dim=16)
    expected = encoder.encode_passages([r["text"] for r in rows], titles=[r["title"] for r in rows])
    ids, vectors = load_vectors(out)
    assert vectors.dtype == np.float16 and ids[5] == "d5"
    np.testing.assert_allclose(vectors, expected, atol=1e-3)

    monkeypatch.setattr(LaserEncoder, "from_pretrained", lambda *_, **__: pytest.fail("model was loaded"))
    for wrong, complaint in (("--chunk", "at least 1"), ("--batch-tokens", "at least 1")):
        with pytest.raises(UserError, match=complaint):
            main([*command, "--overwrite", wrong, "0"])
    with pytest.raises(UserError, match="--overwrite"):
        main(command)
    corpus.write_text("{broken\n")
    with pytest.raises(UserError, match="corpus.jsonl:1"):
        main([*command, "--overwrite"])
    assert len(load_vectors(out)[0]) == 23  # what was there stays until there is something to replace it
    monkeypatch.undo()
    corpus.write_text('{"id": "a", "text": "x"}\n')
    assert main([*command, "--overwrite"]) == 0
    assert load_vectors(out)[0] == ["a"] and not (out / "index").exists()


def _encode_on_ranks(rank, world_size, command):
    return main(command)


def start(command):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    code = "import sys; from laser_dist.cli import run; sys.exit(run('laser_dist.retrieval.encode', sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", code, *command], env=env, stderr=subprocess.DEVNULL)


def test_killed_and_continued_on_other_ranks_gives_the_same_bytes(tmp_path, tiny):
    """SIGKILL in the middle, then two ranks: what one process makes at one go."""
    path = tmp_path / "corpus.jsonl"
    rows = [{"id": f"d{i}", "text": "ice floats on water " * (i * 7 % 11 + 1)} for i in range(600)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--model", str(tiny), "--corpus", str(path), "--device", "cpu", "--chunk", "16", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    killed = tmp_path / "killed"
    process = start([*command, str(killed)])
    while not (killed / "done.bin").is_file() or sum((killed / "done.bin").read_bytes()) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = sum((killed / "done.bin").read_bytes())
    assert 3 <= before < 38 and not (killed / "manifest.json").exists()
    assert run_distributed(_encode_on_ranks, 2, [*command, str(killed)]) == [0, 0]
    assert contents(killed) == contents(tmp_path / "whole")


def test_a_user_s_mistake_ends_every_rank(tmp_path, tiny):
    """Rank 0 finds it; the others waited for ever for what it would have told them."""
    (tmp_path / "corpus.jsonl").write_text('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n')
    command = ["--model", str(tiny), "--corpus", str(tmp_path / "corpus.jsonl"), "--out", str(tmp_path / "out")]
    with pytest.raises(RankFailed, match=r"corpus.jsonl:2: id 'a'|rank 1 of 2 failed"):
        run_distributed(_encode_on_ranks, 2, command, timeout=60)
