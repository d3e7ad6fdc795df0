"""Nothing half-done, foreign or damaged is ever loaded as vectors, nor overwritten."""

import json
import shutil
from collections import namedtuple

import numpy as np
import pytest

from laser_dist.errors import UserError
from laser_dist.retrieval.rows import index_rows
from laser_dist.retrieval.vectors import INDEX, Unfinished, discard, load_vectors, refuse_finished, refuse_foreign

IDENTITY = {"format": 2, "rows": 7, "dim": 3, "dtype": "float32", "chunk": 3, "encoder": {"steps": 3}}


@pytest.fixture
def unfinished(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": "x"}) + "\n" for i in range(7)))
    index_rows(path, tmp_path / "out" / INDEX, "passages")
    vectors = Unfinished(tmp_path / "out", IDENTITY)
    vectors.start()
    return vectors


def rows(first, last):
    return np.arange(first * 3, last * 3, dtype=np.float32).reshape(-1, 3)


def finish(unfinished, order=(2, 0, 1)):
    for chunk in order:
        unfinished.write(chunk, rows(*unfinished.rows_of(chunk)))
    unfinished.finish()
    return unfinished.folder


def test_chunks_come_in_any_order(unfinished):
    folder = finish(unfinished)
    ids, vectors = load_vectors(folder)
    assert ids == [f"d{i}" for i in range(7)] and isinstance(vectors, np.memmap) and not vectors.flags.writeable
    np.testing.assert_array_equal(vectors, rows(0, 7))
    assert {path.name for path in folder.iterdir()} == {"vectors.npy", "ids.jsonl", "ids.offsets", "manifest.json"}


def test_a_chunk_counts_only_once_its_vectors_are_on_disk(unfinished, monkeypatch):
    """Noted first and written second, a kill between the two would leave zeros in a finished file."""
    import laser_dist.retrieval.vectors as module

    write, written = module._write, []
    monkeypatch.setattr(module, "_write", lambda path, *rest: (written.append(path.name), write(path, *rest)))
    unfinished.write(1, rows(3, 6))
    assert written == ["vectors.partial.npy", "done.bin"] and unfinished.done().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="2 chunks are missing"):
        unfinished.finish()


@pytest.mark.parametrize("wrong", [np.zeros((2, 3)), np.zeros((3, 4)), np.full((3, 3), np.nan)])
def test_wrong_vectors_are_not_written(unfinished, wrong):
    with pytest.raises(ValueError, match="the encoder gave"):
        unfinished.write(0, wrong)
    assert not unfinished.done().any()


def test_other_work_and_lost_files_are_not_continued(unfinished):
    unfinished.start()
    for key, value in {"dim": 4, "chunk": 2, "encoder": {"steps": 4}}.items():
        with pytest.raises(UserError, match=f"another {key}:"):
            Unfinished(unfinished.folder, {**IDENTITY, key: value}).start()
    for name in ("vectors.partial.npy", "done.bin"):
        whole = (unfinished.folder / name).read_bytes()
        (unfinished.folder / name).write_bytes(whole[:-1])
        with pytest.raises(UserError, match=f"{name} has not the size"):
            unfinished.start()
        (unfinished.folder / name).write_bytes(whole)


@pytest.mark.parametrize("name", ["vectors.partial.npy", "ids.jsonl", "ids.offsets", "progress.json", "done.bin"])
def test_interrupted_while_finishing(unfinished, monkeypatch, name, tmp_path):
    """Whatever file was to be renamed or removed next, the same command does the rest."""
    from pathlib import Path

    def stopping(method):
        real = getattr(Path, method)

        def call(self, *args, **kwargs):
            if self.name == name:
                raise KeyboardInterrupt
            return real(self, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for method in ("replace", "unlink"):
            patch.setattr(Path, method, stopping(method))
        with pytest.raises(KeyboardInterrupt):
            finish(unfinished)
    if not (unfinished.folder / "manifest.json").is_file():
        with pytest.raises(UserError, match="is not finished"):
            load_vectors(unfinished.folder)
        index_rows(tmp_path / "c.jsonl", unfinished.folder / INDEX, "passages")
        unfinished.start()
        unfinished.finish()
    ids, vectors = load_vectors(unfinished.folder)
    np.testing.assert_array_equal(vectors, rows(0, 7))
    assert len(ids) == 7


def test_a_disk_without_room_is_told_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100))
    with pytest.raises(UserError, match="GB are free"):
        Unfinished(tmp_path, IDENTITY).start()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["ids", "offsets", "vectors", "missing", "manifest", "format", "rows"])
def test_damaged_folders_are_refused(unfinished, damage):
    folder = finish(unfinished)
    manifest = json.loads((folder / "manifest.json").read_text())
    if damage in ("ids", "offsets", "vectors"):
        path = folder / {"ids": "ids.jsonl", "offsets": "ids.offsets", "vectors": "vectors.npy"}[damage]
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "missing":
        (folder / "vectors.npy").unlink()
    else:
        changed = {"manifest": {}, "format": {**manifest, "format": 1}, "rows": {**manifest, "rows": 8}}[damage]
        (folder / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="is damaged.*--overwrite"):
        load_vectors(folder)
    refuse_foreign(folder)  # so --overwrite mends it


def test_what_is_no_folder_of_vectors(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="is no folder of vectors"):
            load_vectors(folder)


def test_files_of_others_are_left_alone(tmp_path):
    """A folder of shards has a manifest.json, too: --overwrite deleted it."""
    (tmp_path / "manifest.json").write_text('{"format_version": 1, "shards": []}')
    for refuse in (refuse_foreign, refuse_finished):
        with pytest.raises(UserError, match="something else than vectors"):
            refuse(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "vectors.npy").write_bytes(b"mine")
    with pytest.raises(UserError, match="was made by something else"):
        refuse_finished(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        refuse_foreign(tmp_path / "file")


def test_a_finished_folder_is_refused_and_discarded_on_demand(unfinished):
    folder = finish(unfinished)
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="--overwrite"):
        refuse_finished(folder)
    discard(folder)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
