import hashlib
import json
import subprocess
import sys
import tarfile

import pytest

from laser_dist.data import sample_folder
from laser_dist.data.preparation.convert import query_key
from laser_dist.data.preparation.prepare import main
from laser_dist.data.shards import load_manifest, read_shard
from laser_dist.errors import UserError
from laser_dist.retrieval.collection import read_collection
from laser_dist.testing.tiny import tiny_model_folder


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
    assert "380 examples in 4 shards" in captured.out
    table = {tuple(line.split()[:2]): line.split()[2:] for line in captured.out.splitlines() if "  " in line}
    assert table["text", "unit"] == ["count", "mean", "p50", "p95", "p99", "max"]
    assert table["query", "characters"][0] == "380" and table["rationale", "segments"][1].startswith("3.")
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


def test_every_repetition_of_an_id_is_named_in_full(tmp_path, source):
    """A dictionary by id kept the last one only, and left bare places of the others."""
    path = source(*(row(0, query=f"query {i}") for i in range(4)))
    with pytest.raises(UserError) as error:
        main(["--source", path, "--out", str(tmp_path / "out")])
    assert str(error.value).count("was already used at") == 3
    assert all("was already used at" in line for line in str(error.value).splitlines() if "train.jsonl" in line)


def test_overwriting_never_takes_other_files_along(tmp_path, source):
    out = tmp_path / "out"
    arguments = ["--source", source(row(0), row(1)), "--out", str(out)]
    assert main(arguments) == 0
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds notes.txt, which --overwrite would delete"):
        main([*arguments, "--overwrite"])
    assert (out / "notes.txt").read_text() == "mine"


def test_misspelled_negatives_are_not_lost_without_a_word(tmp_path, source):
    wrong = row(0)
    wrong["negatves"] = wrong.pop("negatives", [{"id": "n", "text": "other"}])
    with pytest.raises(UserError, match="negatves"):
        main(["--source", source(wrong), "--out", str(tmp_path / "out")])


def prepare(tmp_path, *arguments, out="out"):
    assert main([*arguments, "--out", str(tmp_path / out)]) == 0
    return load_manifest(tmp_path / out)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts(folder):
    return [example for shard in load_manifest(folder).shards for example in read_shard(folder, shard)]


def test_the_same_input_gives_the_same_bytes_for_any_number_of_workers(tmp_path, source):
    rows = [row(i % 900, query=f"query {i % 700}", rationale="r " * (i % 7)) for i in range(1000)]
    path = source(*rows, "{broken", row(1001, positives=[]))
    arguments = ["--source", path, "--duplicates", "drop", "--missing-rationale", "drop", "--on-error", "skip"]
    arguments += ["--dev-share", "0.1", "--shard-examples", "64"]
    for workers in ("1", "2", "3"):
        prepare(tmp_path, *arguments, "--workers", workers, out=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")
    assert {"skipped.jsonl", "dev/qrels.tsv", "manifest.json"} < contents(tmp_path / "1").keys()


@pytest.mark.parametrize("share", [["--dev-share", "0.2"], ["--dev-queries", "20"]])
def test_the_dev_split_is_by_query_and_evaluates(tmp_path, source, share, capsys):
    # Every query is asked three times, in other letters and spaces, with other answers.
    forms = ("Why  is it {}?", "why is it {}?", "WHY IS IT {}?\u00a0")
    rows = [row(3 * i + k, query=form.format(i)) for i in range(100) for k, form in enumerate(forms)]
    manifest = prepare(tmp_path, "--source", source(*rows), *share)
    names = ("corpus.jsonl", "queries.jsonl", "qrels.tsv")
    corpus, queries, qrels = read_collection(*(tmp_path / "out/dev" / name for name in names))
    held_out = {query_key(text) for text in queries.texts}
    kept = {query_key(json.loads(text)["query"]) for text in texts(tmp_path / "out")}
    assert not held_out & kept and len(held_out | kept) == 100
    assert len(held_out) == 20 if "--dev-queries" in share else 10 < len(held_out) < 30
    assert (len(queries), len(corpus)) == (3 * len(held_out), 6 * len(held_out))
    assert (manifest.dev.queries, manifest.dev.passages) == (len(queries), len(corpus))
    assert manifest.examples == 300 - len(queries)
    assert set(queries.rationales) == {"one\n\ntwo"} and qrels["q" + queries.ids[0][1:]] == {
        "p" + queries.ids[0][1:]: 1
    }
    assert main(["--check", str(tmp_path / "out")]) == 0


def test_a_query_is_held_out_in_every_data_set(tmp_path, source):
    rows = [row(i) for i in range(200)]
    for name, some in (("a", rows), ("b", rows[::-2])):
        prepare(tmp_path, "--source", source(*some, name=f"{name}.jsonl"), "--dev-share", "0.2", out=name)
    a, b = ({json.loads(line)["id"] for line in (tmp_path / name / "dev/queries.jsonl").open()} for name in "ab")
    assert b == a & {r["query_id"] for r in rows[::-2]} and len(b) > 5


def test_too_few_queries_for_a_dev_split(tmp_path, source):
    path = source(row(0), row(1))
    for arguments, words in (
        (["--dev-queries", "2"], "only 2 distinct"),
        (["--dev-share", "0.0001"], "--dev-queries N"),
    ):
        with pytest.raises(UserError, match=words):
            main(["--source", path, *arguments, "--out", str(tmp_path / "out")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.jsonl"]


def test_one_passage_id_with_two_texts_cannot_be_judged(tmp_path, source):
    rows = [row(i, negatives=[{"id": "shared", "text": f"text {i}"}]) for i in range(40)]
    with pytest.raises(UserError, match='train.jsonl:.*passage id "shared" is used for two texts'):
        main(["--source", source(*rows), "--dev-share", "0.5", "--out", str(tmp_path / "out")])


def test_a_query_asked_before_is_counted_and_may_be_left_out(tmp_path, source, capsys):
    path = source(row(0), row(1, query="Query  0"), row(2, query="\uff51uery 0"), row(3))
    assert prepare(tmp_path, "--source", path).examples == 4
    assert "queries asked before: 2 (keep)" in capsys.readouterr().out
    manifest = prepare(tmp_path, "--source", path, "--duplicate-queries", "drop", out="dropped")
    assert manifest.dropped == {"duplicate query": 2}
    with pytest.raises(UserError, match="train.jsonl:2: this query was asked before: .*--duplicate-queries drop"):
        main(["--source", path, "--duplicate-queries", "error", "--out", str(tmp_path / "error")])


def test_contradictory_negatives_stop_it_or_are_left_out(tmp_path, source, capsys):
    negatives = [{"id": "n", "text": "no"}, {"id": "p0", "text": "same id"}, {"id": "m", "text": "yes"}]
    path = source(row(0, negatives=negatives), row(1))
    with pytest.raises(UserError, match=r"train.jsonl:1: negatives\[1\].*also a positive"):
        main(["--source", path, "--out", str(tmp_path / "out")])
    assert prepare(tmp_path, "--source", path, "--contradictions", "drop").examples == 2
    assert "left out: 2 negatives that are positives" in capsys.readouterr().out
    assert [p["id"] for p in json.loads(texts(tmp_path / "out")[0])["negatives"]] == ["n"]


def test_an_absurd_length_stops_it_or_is_left_out(tmp_path, source):
    path = source(row(0), row(1, negatives=[{"id": "n", "text": "x" * 101}]))
    arguments = ["--source", path, "--max-characters", "100"]
    with pytest.raises(UserError, match=":2: a negative has 101 characters, more than .* 100: .*--too-long drop"):
        main([*arguments, "--out", str(tmp_path / "out")])
    assert prepare(tmp_path, *arguments, "--too-long", "drop").dropped == {"too long": 1}


BAD = {
    "wrong type": json.dumps(row(90, query=5)),
    "no JSON": "{broken",
    "empty text": json.dumps(row(91, positives=[{"text": " "}])),
    "NUL": json.dumps(row(92, query="a\0b")),
    "repeated id": json.dumps(row(1)),
    "contradiction": json.dumps(row(93, negatives=[{"id": "p93", "text": "x"}])),
    "no rationale": json.dumps(row(94, rationale="")),
    "long integer": '{"query": ' + "9" * 5000 + "}",
    "half a surrogate": '{"query": "\\ud83d", "positives": [{"text": "t"}]}',
    "too long": json.dumps(row(95, query="x" * 300_000)),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_is_skipped_and_reported(tmp_path, source, bad):
    path = source(row(0), row(1), BAD[bad], row(2))
    with pytest.raises(UserError, match="train.jsonl:3"):
        main(["--source", path, "--out", str(tmp_path / "stopped")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.jsonl"]
    manifest = prepare(tmp_path, "--source", path, "--on-error", "skip")
    assert manifest.examples == 3 and manifest.dropped == {"wrong, see skipped.jsonl": 1}
    [skipped] = map(json.loads, (tmp_path / "out/skipped.jsonl").open(encoding="utf-8"))
    assert (skipped["file"], skipped["row"]) == (path, 3) and skipped["reason"].startswith(f"{path}:3: ")
    assert main(["--check", str(tmp_path / "out")]) == 0


def test_the_first_row_may_be_the_bad_one(tmp_path, source):
    path = source({"query": "no passages"}, row(0))
    with pytest.raises(UserError, match='train.jsonl:1: "positives" is missing'):
        main(["--source", path, "--out", str(tmp_path / "out")])
    assert prepare(tmp_path, "--source", path, "--on-error", "skip").examples == 1


def test_triplets_and_a_beir_folder_become_examples(tmp_path, source):
    triplets = source({"anchor": "q", "positive": "yes", "negative_1": "no", "negative_2": "nor"})
    manifest = prepare(tmp_path, "--source", triplets, "--missing-rationale", "keep")
    [text] = map(json.loads, texts(tmp_path / "out"))
    assert manifest.sources[0].layout == "triplets" and manifest.without_rationale == 1
    assert [p["text"] for p in text["negatives"]] == ["no", "nor"]
    sample = sample_folder()
    beir = tmp_path / "beir"
    beir.mkdir()
    for name, copy in (
        ("corpus.jsonl",) * 2,
        ("dev_queries.jsonl", "queries.jsonl"),
        ("dev_qrels.tsv", "train_qrels.tsv"),
    ):
        (beir / copy).write_bytes((sample / name).read_bytes())
    manifest = prepare(tmp_path, "--source", str(beir), out="from_beir")
    assert (manifest.examples, manifest.sources[0].layout, manifest.without_rationale) == (40, "beir", 0)


def test_bytes_that_are_not_utf8_are_skipped_and_reported(tmp_path, source):
    path = source(row(0), row(1))
    with open(path, "ab") as file:
        file.write(b'{"query": "caf\xe9"}\n')
    assert prepare(tmp_path, "--source", path, "--on-error", "skip").examples == 2
    assert "not UTF-8" in (tmp_path / "out/skipped.jsonl").read_text()


def test_more_bad_rows_than_allowed_stop_it_and_all_are_listed(tmp_path, source):
    path = source(row(0), *["{"] * 5, row(1))
    with pytest.raises(UserError, match=r"4 rows are bad, more than .* 3; the last: .*:5: .*out.skipped.jsonl"):
        main(["--source", path, "--on-error", "skip", "--max-skipped", "3", "--out", str(tmp_path / "out")])
    report = tmp_path / "out.skipped.jsonl"
    assert [json.loads(line)["row"] for line in report.open()] == [2, 3, 4, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.skipped.jsonl", "train.jsonl"]


def test_the_manifest_says_where_everything_comes_from(tmp_path, source):
    a, b = source(row(0), row(1), name="a.jsonl"), source(*map(row, range(2, 9)), name="b.jsonl")
    manifest = prepare(
        tmp_path, "--source", a, b, "--weight", "3", "0.5", "--licence", "mit", "cc0-1.0", "--limit", "6"
    )
    assert [(s.name, s.rows, s.examples, s.weight, s.licence) for s in manifest.sources] == [
        (a, 2, 2, 3.0, "mit"),
        (b, 4, 4, 0.5, "cc0-1.0"),
    ]
    assert [source.sha256 for source in manifest.sources] == [
        hashlib.sha256(open(path, "rb").read()).hexdigest() for path in (a, b)
    ]
    # No shard mixes sources, so that training can weigh them.
    assert [(shard.source, shard.examples) for shard in manifest.shards] == [(0, 2), (1, 4)]
    assert manifest.settings["limit"] == 6 and manifest.created_with.startswith("laser-dist ")
    assert manifest.lengths["query"]["words"] == {"count": 6, "mean": 2.0, "p50": 2, "p95": 2, "p99": 2, "max": 2}


def test_tokens_are_counted_with_a_tokenizer(tmp_path, source):
    path, tiny_tokenizer = source(row(0), row(1)), str(tiny_model_folder(tmp_path / "model"))
    for workers in ("1", "2"):
        arguments = ["--source", path, "--tokenizer", tiny_tokenizer, "--workers", workers]
        lengths = prepare(tmp_path, *arguments, out=workers).lengths
        assert lengths["query"]["tokens"]["count"] == 2 and lengths["query"]["tokens"]["mean"] > 1
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    with pytest.raises(UserError, match="--tokenizer .*nowhere"):
        main(["--source", path, "--tokenizer", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])


def test_ids_that_look_like_paths_stay_text(tmp_path, source):
    rows = [row(i, query_id=f"../../escape{i}", positives=[{"id": "/etc/passwd", "text": "t"}]) for i in range(30)]
    prepare(tmp_path, "--source", source(*rows), "--dev-share", "0.3")
    assert {name.split("/")[0] for name in contents(tmp_path / "out")} == {"dev", "manifest.json", "shard-000000.tar"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "train.jsonl"]
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        assert all(member.name[:9].isdigit() for member in tar.getmembers())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --source FILE and --out FOLDER"),
        (["--source", "a.jsonl"], "--out"),
        (["--source", "a.jsonl", "--out", "o", "--shard-examples", "0"], "--shard-examples 0: must be at least 1"),
        (["--source", "a.jsonl", "--out", "o", "--limit", "-1"], "--limit -1"),
        (["--check", "o", "--out", "o"], "--check verifies"),
        (["--check", "nowhere"], "cannot be read"),
        (["--source", "a.jsonl", "a.jsonl", "--out", "o"], "given twice"),
        (["--source", "a.jsonl", "--out", "o", "--weight", "1", "2"], "2 values for 1 sources"),
        (["--source", "a.jsonl", "--out", "o", "--weight", "-1"], "above 0"),
        (["--source", "a.jsonl", "--out", "o", "--weight", "nan"], "above 0"),
        (["--source", "a.jsonl", "--out", "o", "--dev-share", "1"], "below 1"),
        (["--source", "a.jsonl", "--out", "o", "--dev-share", "0.1", "--dev-queries", "3"], "two ways"),
        (["--source", "a.jsonl", "--out", "o", "--fields", "querry=q"], 'Did you mean "query"'),
        (["--source", "a.jsonl", "--out", "o", "--workers", "0"], "--workers 0"),
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
        "import sys; from laser_dist.data.preparation.prepare import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "laser-dist prepare --check shards/" in done.stdout
