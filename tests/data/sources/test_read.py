import gzip
import json
import pickle
from types import SimpleNamespace

import pytest

from laser_dist.data.sources import chunks
from laser_dist.data.sources.read import open_source, read_source
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
    (tmp_path / "README.md").write_text("---\ntask: x\nlicense: cc-by-sa-4.0\n---\nlicense: wrong\n")
    assert open_source(str(tmp_path)).licence() == "cc-by-sa-4.0"
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


class FakeStream(list):
    def skip(self, number):
        return FakeStream(self[number:])


def test_a_hub_id_is_streamed_at_the_revision_of_its_card(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []
    card = SimpleNamespace(sha="abc123", card_data={"license": "cc-by-4.0"})
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name: calls.append(name) or card)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *names, **options: calls.append((names, options)) or FakeStream(ROWS)
    )
    assert list(read_source("org/name:subset"))[1] == ("org/name:subset:2", ROWS[1])
    # No trust_remote_code: data sets that come as a script are refused by `datasets`.
    options = {"split": "train", "streaming": True, "revision": "abc123"}
    assert calls == ["org/name", (("org/name", "subset"), options)]
    source = open_source("org/name")
    assert source.identity() == {"revision": "abc123"} and source.licence() == "cc-by-4.0"
    assert [chunk.first for chunk in source.chunks(skip=3)] == [4]

    class Unreachable(Exception):
        """Clients have errors of their own kind."""

    def fail(*names, **options):
        raise Unreachable("Dataset scripts are no longer supported, but found name.py\nand so on")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match='"org/name" is no file here.*scripts are no longer supported'):
        list(read_source("org/name"))


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/where/at/all", "a/b/c.parquet", "data.csv"])
def test_what_looks_like_a_file_is_not_looked_up_on_the_hub(name, monkeypatch):
    monkeypatch.setattr("laser_dist.data.sources.hub.Hub", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="does not exist"):
        list(read_source(name))


def test_files_and_folders_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("query\n")
    with pytest.raises(UserError, match="this kind of file is not read"):
        list(read_source(str(tmp_path / "a.csv")))
    with pytest.raises(UserError, match="is a folder without rows"):
        list(read_source(str(tmp_path)))
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="already holds prepared shards"):
        list(read_source(str(tmp_path)))


def _compressed(path):
    import pyarrow

    raw = "".join(json.dumps(row) + "\n" for row in ROWS * 100).encode()
    if path.suffix == ".gz":
        half = raw.index(b"\n", len(raw) // 2) + 1
        path.write_bytes(gzip.compress(raw[:half]) + gzip.compress(raw[half:]))  # as `cat a.gz b.gz` makes it
    elif path.suffix == ".zst":
        path.write_bytes(pyarrow.compress(raw, codec="zstd", asbytes=True))
    else:
        path.write_bytes(raw)
    return str(path)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_compressed_lines_are_lines_and_a_cut_file_is_named(tmp_path, suffix):
    source = _compressed(tmp_path / f"a.{suffix}")
    read = list(read_source(source))
    assert [row for _, row in read] == ROWS * 100 and read[499][0] == f"{source}:500"
    if suffix != "jsonl":
        content = (tmp_path / f"a.{suffix}").read_bytes()
        (tmp_path / f"a.{suffix}").write_bytes(content[: len(content) * 2 // 3])
        with pytest.raises(UserError, match=f"a.{suffix} cannot be read.*is it complete"):
            list(read_source(source))


def _make(kind, folder):
    if kind == "files":
        (folder / "in").mkdir()
        for name in ("b", "a"):
            _write(folder / "in" / f"{name}.jsonl", [json.dumps(row).encode() for row in ROWS * 60])
        return str(folder / "in")
    if kind == "parquet":
        table = __import__("pyarrow").Table.from_pylist(ROWS * 120)
        __import__("pyarrow.parquet").parquet.write_table(table, folder / "a.parquet", row_group_size=170)
        return str(folder / "a.parquet")
    if kind == "saved":
        __import__("datasets").Dataset.from_list(ROWS * 120).save_to_disk(str(folder / "saved"))
        return str(folder / "saved")
    return _beir(folder / "beir", 600)


@pytest.mark.parametrize("kind", ["files", "parquet", "saved", "beir"])
@pytest.mark.parametrize("skip", [0, 1, 255, 256, 299, 300, 599, 600])
def test_a_source_starts_at_any_row_with_the_same_numbers(tmp_path, kind, skip):
    source = open_source(_make(kind, tmp_path))

    def rows(skip):
        return [(c.file, number, row) for c in source.chunks(skip) for number, row in c.decoded()]

    whole = rows(0)
    assert len(whole) == 600 and rows(skip) == whole[skip:]
    shares = [chunk.share for chunk in source.chunks()]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("kind", ["files", "saved", "beir"])
def test_the_identity_follows_the_content(tmp_path, kind):
    source = _make(kind, tmp_path)
    before = open_source(source).identity()
    assert before == open_source(source).identity() and len(before["sha256"]) == 64
    changed = next(path for path in sorted(tmp_path.rglob("*")) if path.suffix in (".jsonl", ".arrow", ".parquet"))
    changed.write_bytes(changed.read_bytes().replace(b"q1", b"q7", 1).replace(b"text 1", b"text 7", 1))
    assert open_source(source).identity() != before


def test_a_parquet_text_that_is_not_utf8_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    raw = pyarrow.array([b"good", b"caf\xe9", b"good"], pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    __import__("pyarrow.parquet").parquet.write_table(pyarrow.table({"query": texts}), tmp_path / "a.parquet")
    [chunk] = open_source(str(tmp_path / "a.parquet")).chunks()
    (_, first), (number, bad), (_, last) = chunk.decoded()
    assert first == last == {"query": "good"}
    assert number == 2 and isinstance(bad, UserError) and "a.parquet:2: a text is not UTF-8" in str(bad)


def test_a_line_without_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "MAX_LINE", 100)
    source = _write(tmp_path / "a.jsonl", [b"{}", b'"' + b"x" * 1000 + b'"', b'{"a": 1}', b""])
    [chunk] = open_source(source).chunks()
    assert max(map(len, chunk.rows)) <= 101
    (_, first), (number, long), (last, row) = chunk.decoded()
    assert isinstance(long, UserError) and "a.jsonl:2: the line is longer" in str(long)
    assert (first, number, last, row) == ({}, 2, 3, {"a": 1})


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_in_columns_stay_bytes_and_scripts_in_folders_are_not_run(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    marker = tmp_path / "executed"
    bomb = pickle.dumps(_Bomb(marker))
    table = pyarrow.table({"query": [bomb], "positives": [[{"id": "p", "text": "t"}]]})
    __import__("pyarrow.parquet").parquet.write_table(table, tmp_path / "a.parquet")
    [(_, row)] = read_source(str(tmp_path / "a.parquet"))
    assert row["query"] == bomb
    script = tmp_path / "folder" / "folder.py"
    script.parent.mkdir()
    script.write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(UserError, match="folder without rows"):
        list(read_source(str(script.parent)))
    with pytest.raises(UserError, match="this kind of file is not read"):
        list(read_source(str(script)))
    assert not marker.exists()


def _beir(folder, count=3, **files):
    (folder / "qrels").mkdir(parents=True)
    contents = {
        "corpus.jsonl": [{"_id": f"d{i}", "title": "T", "text": f"text {i}"} for i in range(2 * count)],
        "queries.jsonl": [{"_id": f"q{i}", "text": f"query {i}", "rationale": "r"} for i in range(count)],
    }
    for name, rows in contents.items():
        _write(folder / name, [json.dumps(row).encode() for row in files.get(name, rows)])
    judged = [f"q{i}\td{2 * i}\t1\nq{i}\td{2 * i + 1}\t0" for i in range(count)]
    (folder / "qrels/train.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *files.get("qrels", judged)]))
    return str(folder)


def test_a_beir_folder_joins_its_three_files(tmp_path):
    source = _beir(tmp_path / "beir", qrels=["q2\td0\t2", "q2\td3\t0", "q0\td1\t1", "q1\td2\t0"])
    rows = dict(read_source(source))
    assert list(rows) == [f"{source}/queries.jsonl:1", f"{source}/queries.jsonl:3"]  # q1 has no positive
    row = rows[f"{source}/queries.jsonl:3"]
    assert (row["query_id"], row["query"], row["rationale"]) == ("q2", "query 2", "r")
    assert row["positives"] == [{"id": "d0", "title": "T", "text": "text 0"}]
    assert [passage["id"] for passage in row["negatives"]] == ["d3"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"qrels": ["q0\td99\t1"]}, "lacks 1 judged passages: d99"),
        ({"qrels": ["q9\td0\t1"]}, "1 queries with a positive are not in .*queries.jsonl: q9"),
        ({"qrels": ["q0 d0"]}, "2 columns"),
        ({"corpus.jsonl": [{"_id": "d0", "text": "a"}, {"_id": "d0", "text": "b"}], "qrels": ["q0\td0\t1"]}, "earlier"),
    ],
)
def test_a_beir_folder_that_does_not_fit_together_is_refused(tmp_path, files, words):
    with pytest.raises(UserError, match=words):
        list(read_source(_beir(tmp_path / "beir", **files)))


def test_test_judgements_are_not_trained_on(tmp_path):
    source = _beir(tmp_path / "beir")
    (tmp_path / "beir/qrels/train.tsv").rename(tmp_path / "beir/qrels.tsv")
    with pytest.raises(UserError, match="no qrels/train.tsv"):
        list(read_source(source))
