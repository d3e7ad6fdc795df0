"""A file of rows is checked once, read by ranges, and never trusted to be what it was."""

import json
import os

import pytest

from laser_dist.errors import UserError
from laser_dist.retrieval.rows import Ids, index_rows, open_index


def write(path, rows, end="\n"):
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode())
    return path


def passages(count):
    return [{"id": f"d{i}", "text": f"text {i}\u2028é" * (i % 4 + 1), "title": "t" * (i % 2)} for i in range(count)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_any_range_of_rows_is_read(tmp_path, end, bom):
    rows = passages(11)
    path = write(tmp_path / "c.jsonl", rows, end)
    path.write_bytes(bom + path.read_bytes().removesuffix(b"\n"))
    index = index_rows(path, tmp_path / "index", "passages")
    assert index.rows == 11 and open_index(tmp_path / "index") == index
    for first, last in ((0, 11), (0, 1), (4, 9), (10, 11)):
        expected = [(row["text"], row["title"]) for row in rows[first:last]]
        assert index.read(path, tmp_path / "index", first, last) == expected


def test_queries_come_with_their_instruction(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"id": 1, "text": "a"}, {"id": "2", "text": "b", "instruction": "Find it"}])
    index = index_rows(path, tmp_path / "index", "queries")
    assert index.read(path, tmp_path / "index", 0, 2) == [("a", None), ("b", "Find it")]


def test_ids_are_a_sequence_on_disk(tmp_path):
    names = ["a", "b c", "zeile\nzwei", "é\u2028", '"', "7"]
    rows = [{"id": 7 if name == "7" else name, "text": "x"} for name in names]
    index_rows(write(tmp_path / "c.jsonl", rows), tmp_path / "index", "passages")
    ids = Ids(tmp_path / "index")
    assert ids == names and list(ids) == names and ids != names[:-1] and ids != [*names[:-1], "8"]
    assert (ids[-1], ids[1:3], ids[len(ids) - 1]) == ("7", names[1:3], "7")
    assert ids.index("é\u2028") == 3 and "absent" not in ids
    for row in (6, -7):
        with pytest.raises(IndexError):
            ids[row]


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{broken", ":3: not valid JSON"),
        ("[1]", ":3: a JSON list"),
        ('{"text": "x"}', ":3: id is missing"),
        ('{"id": true, "text": "x"}', ":3: id is missing"),
        ('{"id": "x", "text": " "}', ":3: text is missing or empty"),
        ('{"id": "x", "text": 5}', ":3: text is a int"),
        ('{"id": "d1", "text": "x"}', r":3: id 'd1' was used on an earlier line \(2\)"),
        ('{"id": "x", "text": "\udcff"}', ":3: not UTF-8"),
    ],
)
def test_defects_are_named_and_leave_no_index(tmp_path, line, complaint):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in passages(2)))
    path.write_bytes(path.read_bytes() + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(UserError, match=complaint):
        index_rows(path, tmp_path / "index", "passages")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl"]


def test_no_rows_and_no_file(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match="the file is empty"):
        index_rows(tmp_path / "empty.jsonl", tmp_path / "index", "passages")
    with pytest.raises(UserError, match="cannot be read"):
        index_rows(tmp_path / "absent.jsonl", tmp_path / "index", "passages")
    assert not (tmp_path / "index").exists()


def test_ids_whose_hashes_collide_are_no_duplicates(tmp_path, monkeypatch):
    """The check compares hashes first; equal hashes of different ids must not be taken for equal ids."""
    import laser_dist.retrieval.rows as rows

    monkeypatch.setattr(rows, "hash", lambda _: 1, raising=False)
    path = write(tmp_path / "c.jsonl", passages(5))
    assert index_rows(path, tmp_path / "index", "passages").rows == 5
    write(path, [*passages(5), {"id": "d3", "text": "x"}])
    with pytest.raises(UserError, match="'d3'"):
        index_rows(path, tmp_path / "index", "passages")


def test_an_index_is_kept_for_the_same_bytes_only(tmp_path):
    path, folder = write(tmp_path / "c.jsonl", passages(5)), tmp_path / "index"
    index_rows(path, folder, "passages")
    made = (folder / "rows.offsets").stat().st_ino
    os.utime(path, ns=(1, 1))
    kept = index_rows(path, folder, "passages")
    assert (folder / "rows.offsets").stat().st_ino == made and kept.modified_ns == 1
    path.write_bytes(path.read_bytes().replace(b"text 4", b"text 5"))
    assert index_rows(path, folder, "passages").sha256 != kept.sha256
    assert index_rows(path, folder, "queries").what == "queries"
    (folder / "ids.offsets").unlink()
    assert index_rows(path, folder, "queries").rows == 5 and len(Ids(folder)) == 5


def test_a_file_that_changes_is_noticed(tmp_path):
    path, folder = write(tmp_path / "c.jsonl", passages(5)), tmp_path / "index"
    index = index_rows(path, folder, "passages")
    os.utime(path, ns=(1, 1))
    index.check_unchanged(path)  # the date alone is no change
    path.write_bytes(path.read_bytes().replace(b"text 4", b"text 5"))
    with pytest.raises(UserError, match="changed while it was encoded"):
        index.check_unchanged(path)
    path.write_bytes(path.read_bytes().replace(b"\n", b" ", 1))
    with pytest.raises(UserError):
        index.read(path, folder, 0, 3)
