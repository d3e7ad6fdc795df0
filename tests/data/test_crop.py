"""`laser-dist crop`: what a query keeps of its passage, and that its rows go all the way into shards."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laser_dist.data.crop import crop, main
from laser_dist.data.mining.mine import main as mine
from laser_dist.data.preparation.prepare import main as prepare
from laser_dist.errors import UserError

TEXTS = [
    "ice floats on water because its crystal is open",
    "water is densest at four degrees and lakes freeze from above",
    "bread rises because yeast makes gas in the dough",
    "rust is iron with oxygen and water in it",
    "a short one",
]


@pytest.fixture
def corpus(tmp_path):
    rows = [{"id": f"p{n}", "text": text} | ({"title": "Ice"} if n == 0 else {}) for n, text in enumerate(TEXTS)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@given(st.integers(4, 90), st.floats(0.1, 0.9), st.integers(0, 3))
def test_a_query_is_a_share_of_the_words_in_their_order(length, most, seed):
    words = [f"w{number}" for number in range(length)]
    kept = crop("p", " ".join(words), (0.05, most), 40, seed).split()
    places = [words.index(word) for word in kept]
    assert places == sorted(set(places)) and places[-1] - places[0] < 40
    assert 3 <= len(kept) <= max(3, round(min(length, 40) * most))


def test_a_query_depends_on_seed_and_id_only(corpus, tmp_path):
    main(["--corpus", str(corpus), "--out", str(tmp_path / "all.jsonl")])
    main(["--corpus", str(corpus), "--out", str(tmp_path / "two.jsonl"), "--limit", "2"])
    main(["--corpus", str(corpus), "--out", str(tmp_path / "other.jsonl"), "--seed", "1"])
    first, two, other = (rows_of(tmp_path / f"{name}.jsonl") for name in ("all", "two", "other"))
    assert first[:2] == two and [row["query"] for row in first] != [row["query"] for row in other]


def test_short_passages_are_left_out_and_counted(corpus, tmp_path, capsys):
    main(["--corpus", str(corpus), "--out", str(tmp_path / "crops.jsonl")])
    assert [row["query_id"] for row in rows_of(tmp_path / "crops.jsonl")] == [f"crop-p{n}" for n in range(4)]
    assert "left out: 1 passages with fewer than 4 words" in capsys.readouterr().out


def test_into_shards(corpus, tmp_path):
    crops, mined = tmp_path / "crops.jsonl", tmp_path / "mined.jsonl"
    main(["--corpus", str(corpus), "--out", str(crops)])
    flags = ["--method", "bm25", "--ranks", "1", "4", "--negatives", "1", "--without-negatives", "drop"]
    assert mine(["--source", str(crops), "--corpus", str(corpus), "--out", str(mined), *flags]) == 0
    assert rows_of(mined)[0]["positives"] == [{"id": "p0", "text": TEXTS[0], "title": "Ice"}]
    assert prepare(["--source", str(mined), "--missing-rationale", "keep", "--out", str(tmp_path / "shards")]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keep", "0.8", "0.4"], "--keep 0.8 0.4"),
        (["--keep", "0.5", "1.5"], "--keep 0.5 1.5"),
        (["--max-words", "2"], "--max-words 2"),
        (["--limit", "0"], "--limit 0"),
        (["--out", "crops.txt"], "crops.txt: give the name of a .jsonl file"),
    ],
)
def test_wrong_arguments(corpus, tmp_path, arguments, words):
    with pytest.raises(UserError, match=words):
        main(["--corpus", str(corpus), "--out", str(tmp_path / "crops.jsonl"), *arguments])


def test_nothing_is_written_where_nothing_fits(corpus, tmp_path):
    corpus.write_text(json.dumps({"id": "p", "text": "氷は水に浮く"}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="no passage has 4 words"):
        main(["--corpus", str(corpus), "--out", str(tmp_path / "crops.jsonl")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl"]


def test_an_older_file_is_replaced_only_when_asked(corpus, tmp_path):
    flags = ["--corpus", str(corpus), "--out", str(tmp_path / "crops.jsonl")]
    main(flags)
    with pytest.raises(UserError, match="--overwrite"):
        main(flags)
    assert main([*flags, "--overwrite"]) == 0
