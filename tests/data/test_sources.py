import json

import pytest

from laser_dist.data.sources import read_source
from laser_dist.errors import UserError

ROWS = [{"query": f"q{i}\u2028ü", "positives": [{"id": f"p{i}", "text": "t"}]} for i in range(5)]


def _write(path, lines):
    path.write_bytes(b"\n".join(lines))
    return str(path)


def test_jsonl_skips_blank_lines_but_counts_them(tmp_path):
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
    source = _write(tmp_path / "a.jsonl", [b"\xef\xbb\xbf" + lines[0], b"", b"  \r", *lines[1:], b""])
    read = list(read_source(source))
    assert [row for _, row in read] == ROWS
    assert [where for where, _ in read] == [f"{source}:{n}" for n in (1, 4, 5, 6, 7)]


@pytest.mark.parametrize(("line", "words"), [(b'{"a": 1,}', "not valid JSON"), (b'{"a": "\xe9"}', "not UTF-8")])
def test_a_broken_line_is_named(tmp_path, line, words):
    source = _write(tmp_path / "a.jsonl", [b"{}", line])
    with pytest.raises(UserError, match=f"a.jsonl:2: .*{words}"):
        list(read_source(source))


def test_parquet_file_and_folder(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = __import__("pyarrow").Table.from_pylist(ROWS)
    for name in ("b", "a"):
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    file = str(tmp_path / "a.parquet")
    assert list(read_source(file)) == [(f"{file}:{n}", row) for n, row in enumerate(ROWS, 1)]
    assert [row for _, row in read_source(str(tmp_path))] == ROWS + ROWS
    assert next(iter(read_source(str(tmp_path))))[0] == f"{file}:1"
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="a.parquet cannot be read as Parquet"):
        list(read_source(file))


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(str(tmp_path / "many"))
    datasets.DatasetDict(test=data).save_to_disk(str(tmp_path / "odd"))
    for name in ("one", "many"):
        assert [row for _, row in read_source(str(tmp_path / name))] == ROWS
    with pytest.raises(UserError, match="splits test but no train"):
        list(read_source(str(tmp_path / "odd")))


def test_a_hub_id_is_streamed(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: calls.append((name, options)) or ROWS)
    assert next(iter(read_source("org/name"))) == ("org/name:1", ROWS[0])
    assert calls == [("org/name", {"split": "train", "streaming": True})]

    def fail(name, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match='"org/name" is no file here.*offline'):
        list(read_source("org/name"))


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/where/at/all", "a/b/c.parquet", "data.csv"])
def test_what_looks_like_a_file_is_not_looked_up_on_the_hub(name, monkeypatch):
    monkeypatch.setattr("laser_dist.data.sources._read_hub", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="does not exist"):
        list(read_source(name))


def test_files_and_folders_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("query\n")
    with pytest.raises(UserError, match="this kind of file is not read"):
        list(read_source(str(tmp_path / "a.csv")))
    with pytest.raises(UserError, match="without .parquet files"):
        list(read_source(str(tmp_path)))
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="already holds prepared shards"):
        list(read_source(str(tmp_path)))
