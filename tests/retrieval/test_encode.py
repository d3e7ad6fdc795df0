"""Encoding a corpus to disk: the same bytes however often it was interrupted, and nothing half-done is ever loaded."""

import json
import sys
import zlib

import numpy as np
import pytest

from laser_dist.errors import UserError
from laser_dist.retrieval import encode
from laser_dist.retrieval.encode import discard, encode_corpus, load_vectors, main, weights_hash


class FakeEncoder:
    """A vector per text from its hash. `stop_after` calls it is interrupted."""

    dim = 8

    def __init__(self, model="m", stop_after=None):
        self.model, self.stop_after, self.batches = model, stop_after, []

    @classmethod
    def from_pretrained(cls, folder, steps=None, device=None, dtype=None):
        return cls(folder)

    def description(self):
        return {"model": self.model, "steps": 3, "targets": ("a", "b")}

    def encode_passages(self, texts, *, titles=None, progress=False):
        if self.stop_after is not None and len(self.batches) >= self.stop_after:
            raise KeyboardInterrupt
        self.batches.append(texts)
        joined = [f"{title}|{text}" for title, text in zip(titles or [""] * len(texts), texts, strict=True)]
        rows = [np.random.default_rng(zlib.crc32(text.encode())).normal(size=self.dim) for text in joined]
        return np.array([row / np.linalg.norm(row) for row in rows], np.float32)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    rows = [{"id": f"d{i}", "text": "word " * (i * 7 % 11 + 1), "title": f"t{i}"} for i in range(23)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    assert set(contents(folder)) == {"vectors.npy", "ids.json", "manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["passages"], manifest["dim"], manifest["dtype"]) == (23, 8, "float32")
    assert len(manifest["corpus"]["sha256"]) == 64


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_interrupted_and_continued_gives_the_same_bytes(corpus, tmp_path, stop_after, dtype):
    whole = encode_corpus(FakeEncoder(), corpus, tmp_path / "whole", chunk=5, dtype=dtype)
    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(FakeEncoder(stop_after=stop_after), corpus, parts, chunk=5, dtype=dtype)
    with pytest.raises(UserError):
        load_vectors(parts)
    if stop_after:
        with (parts / "vectors.partial.npy").open("ab") as file:
            file.write(b"half a row")  # torn off while the next chunk was written
    encoder = FakeEncoder()
    encode_corpus(encoder, corpus, parts, chunk=5, dtype=dtype)
    assert len(encoder.batches) == 5 - stop_after
    assert contents(parts) == contents(whole)


@pytest.mark.parametrize("failing", ["ids.json", "manifest.json"])
def test_interrupted_while_finishing(corpus, tmp_path, monkeypatch, failing):
    write_json = encode.write_json

    def interrupted(path, value):
        if path.name == failing:
            raise KeyboardInterrupt
        write_json(path, value)

    monkeypatch.setattr(encode, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(FakeEncoder(), corpus, tmp_path / "out", chunk=5)
    with pytest.raises(UserError, match="is not finished"):
        load_vectors(tmp_path / "out")
    monkeypatch.undo()
    encoder = FakeEncoder()
    encode_corpus(encoder, corpus, tmp_path / "out", chunk=5)
    assert encoder.batches == []
    assert len(load_vectors(tmp_path / "out")[0]) == 23


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
    corpus.write_text(corpus.read_text().replace("t22", "t99"))
    with pytest.raises(UserError, match="another corpus:"):
        encode_corpus(FakeEncoder(), corpus, out, chunk=5)
    assert contents(out) == before


def test_lost_rows_are_not_filled_with_zeros(corpus, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(FakeEncoder(stop_after=2), corpus, out, chunk=5)
    (out / "vectors.partial.npy").write_bytes((out / "vectors.partial.npy").read_bytes()[:200])
    with pytest.raises(UserError, match="shorter than"):
        encode_corpus(FakeEncoder(), corpus, out, chunk=5)


def test_vectors_that_are_not_finite_are_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeEncoder, "encode_passages", lambda self, texts, titles: np.full((len(texts), 8), np.nan))
    with pytest.raises(ValueError, match="not finite"):
        encode_corpus(FakeEncoder(), corpus, tmp_path / "out")


def test_a_finished_folder_is_refused_and_discarded_on_demand(corpus, tmp_path):
    folder = encode_corpus(FakeEncoder(), corpus, tmp_path / "out")
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="--overwrite"):
        encode_corpus(FakeEncoder(), corpus, folder)
    discard(folder)
    assert set(contents(folder)) == {"mine.txt"}


@pytest.mark.parametrize("damage", ["ids", "vectors", "missing", "manifest"])
def test_damaged_folders_are_refused(corpus, tmp_path, damage):
    folder = encode_corpus(FakeEncoder(), corpus, tmp_path / "out")
    if damage == "ids":
        (folder / "ids.json").write_text('["d0"]')
    elif damage == "vectors":
        (folder / "vectors.npy").write_bytes((folder / "vectors.npy").read_bytes()[:-4])
    elif damage == "missing":
        (folder / "vectors.npy").unlink()
    else:
        (folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        load_vectors(folder)


def test_weights_hash_sees_the_weights_and_nothing_else(tmp_path):
    assert weights_hash(tmp_path / "absent") is None
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = weights_hash(tmp_path)
    (tmp_path / "README.md").write_text("text")
    assert weights_hash(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert weights_hash(tmp_path) != before


def test_what_is_no_folder_of_vectors(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="is no folder of vectors"):
            load_vectors(folder)


def test_command(corpus, tmp_path, monkeypatch, capsys):
    module = type(sys)("laser_dist.retrieval.encoder")
    module.LaserEncoder, module.model_folder = FakeEncoder, str
    monkeypatch.setitem(sys.modules, "laser_dist.retrieval.encoder", module)
    command = ["--model", "m", "--corpus", str(corpus), "--out", str(tmp_path / "out"), "--dtype", "float16"]
    assert main(command) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert load_vectors(tmp_path / "out")[1].dtype == np.float16
    monkeypatch.setattr(FakeEncoder, "from_pretrained", lambda *_, **__: pytest.fail("model was loaded"))
    with pytest.raises(UserError, match="--overwrite"):
        main(command)
    corpus.write_text("{broken\n")
    with pytest.raises(UserError, match="corpus.jsonl:1"):
        main([*command, "--overwrite"])
    assert len(load_vectors(tmp_path / "out")[0]) == 23
    monkeypatch.setattr(FakeEncoder, "from_pretrained", classmethod(lambda cls, *_, **__: cls("other")))
    corpus.write_text('{"id": "a", "text": "x"}\n')
    assert main([*command, "--overwrite"]) == 0
    assert load_vectors(tmp_path / "out")[0] == ["a"]
