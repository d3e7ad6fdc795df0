import json
import subprocess
import sys

import pytest

from laser_dist.data import sample_folder
from laser_dist.data.prepare import main
from laser_dist.data.shards import load_manifest
from laser_dist.errors import UserError


def row(i: int, **change) -> dict:
    base = {
        "query_id": f"q{i}",
        "query": f"query {i}",
        "rationale": "one\n\ntwo",
        "positives": [{"id": f"p{i}", "text": "yes"}],
        "negatives": [{"id": f"n{i}", "text": "no"}],
    }
    return base | change


@pytest.fixture
def source(tmp_path):
    def write(*rows, name="train.jsonl"):
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return str(path)

    return write


def test_prepare_and_check_the_sample(tmp_path, capsys):
    out = tmp_path / "shards"
    arguments = ["--source", str(sample_folder() / "train.jsonl"), "--out", str(out), "--shard-examples", "100"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "380 examples in 4 shards" in captured.out and "segments per rationale: 3." in captured.out
    assert captured.err == ""  # no progress bar where there is no terminal
    assert load_manifest(out).examples == 380
    assert main(["--check", str(out)]) == 0
    assert "all as written" in capsys.readouterr().out


def test_the_sample_is_complete():
    names = {path.name for path in sample_folder().iterdir()}
    assert names >= {"train.jsonl", "dev.jsonl", "corpus.jsonl", "queries.jsonl", "qrels.tsv", "README.md"}
    corpus = {json.loads(line)["id"] for line in (sample_folder() / "corpus.jsonl").open(encoding="utf-8")}
    for qrels, queries, count in (("qrels.tsv", "queries.jsonl", 80), ("dev_qrels.tsv", "dev_queries.jsonl", 40)):
        judged = [line.split("\t") for line in (sample_folder() / qrels).read_text().splitlines()[1:]]
        asked = {json.loads(line)["id"] for line in (sample_folder() / queries).open(encoding="utf-8")}
        assert len(asked) == count and {judgement[0] for judgement in judged} == asked
        assert {judgement[1] for judgement in judged} <= corpus


def test_several_sources_both_ways_and_a_limit(tmp_path, source):
    a, b, c = (source(row(i), row(i + 10), name=f"{i}.jsonl") for i in range(3))
    assert main(["--source", a, b, "--source", c, "--limit", "5", "--out", str(tmp_path / "out")]) == 0
    manifest = load_manifest(tmp_path / "out")
    assert manifest.examples == 5 and manifest.source == f"{a}, {b}, {c}"


def test_bad_rows_stop_it_and_several_are_named(tmp_path, source):
    path = source(row(0), row(1, query=""), row(2), row(3, positives=[]), row(4, rationale=5), "{broken")
    with pytest.raises(UserError) as error:
        main(["--source", path, "--out", str(tmp_path / "out")])
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{n}" for n in (2, 4, 5, 6)]
    assert '"query" is empty' in lines[0] and '"positives" is empty' in lines[1] and '"rationale"' in lines[2]
    assert not (tmp_path / "out").exists()


def test_it_gives_up_after_five_defects(tmp_path, source):
    path = source(*(row(i, query=None) for i in range(9)))
    with pytest.raises(UserError, match="there may be more") as error:
        main(["--source", path, "--out", str(tmp_path / "out")])
    assert str(error.value).count('"query" is missing') == 5


def test_missing_rationales(tmp_path, source, capsys):
    path = source(row(0), row(1, rationale=""), row(2), row(3, rationale=" "))
    arguments = ["--source", path, "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"2 row\(s\) have no rationale, the first is .*train.jsonl:2:"):
        main(arguments)
    assert main([*arguments, "--missing-rationale", "drop"]) == 0
    assert load_manifest(tmp_path / "out").dropped == {"no rationale": 2}
    assert "left out: 2 (no rationale)" in capsys.readouterr().out
    assert main([*arguments, "--missing-rationale", "keep", "--overwrite"]) == 0
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.examples, manifest.without_rationale, manifest.dropped) == (4, 2, {})


def test_repeated_ids_name_both_lines(tmp_path, source):
    path = source(row(0), row(1), row(0, query="other"))
    arguments = ["--source", path, "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"train.jsonl:3: \"query_id\" 'q0' was already used at .*train.jsonl:1"):
        main(arguments)
    assert main([*arguments, "--duplicates", "drop"]) == 0
    assert load_manifest(tmp_path / "out").dropped == {"duplicate query_id": 1}


def test_check_finds_damage_that_keeps_the_size(tmp_path, source):
    out = tmp_path / "out"
    main(["--source", source(*map(row, range(6))), "--out", str(out), "--shard-examples", "2"])
    for name in ("shard-000000.tar", "shard-000002.tar"):
        (out / name).write_bytes((out / name).read_bytes().replace(b"query", b"quart"))
    with pytest.raises(UserError, match="2 of 3 shards are damaged") as error:
        main(["--check", str(out)])
    assert "shard-000000.tar" in str(error.value) and "shard-000002.tar" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --source FILE and --out FOLDER"),
        (["--source", "a.jsonl"], "--out"),
        (["--source", "a.jsonl", "--out", "o", "--shard-examples", "0"], "--shard-examples 0: must be at least 1"),
        (["--source", "a.jsonl", "--out", "o", "--limit", "-1"], "--limit -1"),
        (["--check", "o", "--out", "o"], "--check verifies"),
        (["--check", "nowhere"], "does not exist"),
        (["--source", "nowhere.jsonl", "--out", "o"], "nowhere.jsonl does not exist"),
    ],
)
def test_wrong_arguments(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        main(arguments)
    assert list(tmp_path.iterdir()) == []


def test_help_does_not_import_torch():
    code = (
        "import sys; from laser_dist.data.prepare import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "laser-dist prepare --check shards/" in done.stdout
