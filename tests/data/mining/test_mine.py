"""Mining: the rules one by one, then the command with BM25 and with tiny encoders, whole, sharded and interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laser_dist.data import sample_folder
from laser_dist.data.mining import task as mining
from laser_dist.data.mining.mine import main
from laser_dist.data.mining.negatives import REASONS, Candidate, KnownPositives, Rules, normalised, overlap, select
from laser_dist.data.mining.scorers import Bm25, Positives
from laser_dist.data.schema import Example, Passage, decode_example
from laser_dist.errors import UserError
from laser_dist.retrieval.bm25 import bm25_run
from laser_dist.retrieval.collection import Corpus, read_corpus, read_queries
from laser_dist.testing import tiny_model_folder

RULES = dict(
    negatives=3, ranks=(1, 9), max_score_ratio=float("inf"), margin=None, reference="highest", max_overlap=0.8,
    pick="top", seed=0, positive_scores_only=False,
)  # fmt: skip
POSITIVE = "Ice floats on water because its crystal holds the molecules apart, so that it is less dense."


def example(query="why does ice float", query_id="q", positives=None):
    positives = [Passage("p", POSITIVE)] if positives is None else positives
    return Example(query_id=query_id, query=query, rationale="", positives=tuple(positives))


def candidates(*passages, scores=None):
    passages = [p if isinstance(p, Passage) else Passage(f"c{i}", p) for i, p in enumerate(passages)]
    scores = scores or [1 - i / 100 for i in range(len(passages))]
    return [Candidate(p, i + 1, s) for i, (p, s) in enumerate(zip(passages, scores, strict=True))]


def texts(picked):
    return [candidate.passage.text for candidate in picked]


@pytest.mark.parametrize(
    ("passage", "reason"),
    [
        (Passage("p", "the id of the positive"), "positive of this row"),
        (Passage("x", "  ICE floats on water, because its crystal holds the molecules apart so that it is less dense"),
         "positive of this row"),
        (Passage("other", "no matter what"), "positive of the same query"),
        (Passage("x", "Text of the OTHER row's positive."), "positive of the same query"),
        (Passage("judged", "relevant by a judge"), "relevant in the qrels"),
        (Passage("x", "Why does ice float?"), "same text as the query"),
        (Passage("x", POSITIVE + " Really."), "near-duplicate of a positive"),
        (Passage("x", "a first one!"), "already a negative"),
        (Passage("c0", "an id that was taken"), "already a negative"),
    ],
)  # fmt: skip
def test_what_is_left_out_and_why(passage, reason):
    known = KnownPositives({"q": {"judged": 1, "not": 0}})
    known.add(example("Why does ice float??", positives=[Passage("other", "Text of the other row's positive")]))
    given = candidates("A first one", passage, Passage("not", "Judged not to be relevant"))
    picked, excluded = select(example(), given, [1.0], Rules(**RULES), known)
    assert texts(picked) == ["A first one", "Judged not to be relevant"]
    assert excluded == {reason: 1} and reason in REASONS


@pytest.mark.parametrize(
    ("change", "positives", "kept"),
    [
        ({}, [1.0], 4),
        ({"max_score_ratio": 0.95}, [1.0], 3),  # 0.94 and below; 0.96 is too near
        ({"max_score_ratio": 0.9}, [1.0], 2),
        ({"margin": 0.2}, [1.0], 1),
        ({"margin": 0.2, "max_score_ratio": 0.95}, [1.0], 1),  # the stricter counts
        ({"max_score_ratio": 0.95}, [0.5, 1.0], 3),
        ({"max_score_ratio": 0.95, "reference": "lowest"}, [0.5, 1.0], 1),
        ({"max_score_ratio": 0.95, "reference": "mean"}, [0.7, 1.0], 1),
        ({"max_score_ratio": 0.95}, [-0.21], 0),  # 0.95 × -0.21 would lie above the positive and let -0.2 through
    ],
)
def test_scores_near_the_positive(change, positives, kept):
    given = candidates(*"abcd", scores=[0.96, 0.94, 0.85, -0.2])
    picked, excluded = select(example(), given, positives, Rules(**RULES | {"negatives": 9} | change), KnownPositives())
    assert len(picked) == kept
    assert excluded == ({"scores too near the positive": 4 - kept} if kept < 4 else {})


def test_bm25_leaves_out_what_shares_no_word():
    given = candidates("a", "b", scores=[0.5, 0.0])
    assert len(select(example(), given, [0.0], Rules(**RULES), KnownPositives())[0]) == 2
    picked, excluded = select(
        example(), given, [0.0], Rules(**RULES | {"positive_scores_only": True}), KnownPositives()
    )
    assert texts(picked) == ["a"] and excluded == {"scores 0": 1}


def test_top_takes_the_best_and_sample_draws_by_seed_and_query():
    given = candidates(*(f"text {i}" for i in range(50)))
    picked, excluded = select(example(), given, [1.0], Rules(**RULES), KnownPositives())
    assert [c.rank for c in picked] == [1, 2, 3] and excluded == {"not needed": 47}

    def draw(query_id, seed):
        rules = Rules(**RULES | {"pick": "sample", "seed": seed})
        return [c.rank for c in select(example(query_id=query_id), given, [1.0], rules, KnownPositives())[0]]

    assert draw("q", 0) == draw("q", 0) == sorted(draw("q", 0))
    assert len({tuple(draw(q, s)) for q in "qr" for s in (0, 1)}) == 4
    drawn = Counter(rank for i in range(2000) for rank in draw(f"q{i}", 0))
    assert set(drawn) == set(range(1, 51)) and max(drawn.values()) < 1.5 * 120  # 120 expected of each


def test_overlap_is_of_shingles():
    assert overlap("a b c d", "A, b: c d!") == 1
    assert overlap("a b c d", "a b c e") == 1 / 3
    assert overlap("yes", "no") == 0 and overlap("yes", "yes indeed") == 0.5
    assert overlap("!!!", "???") == 0 and normalised("ﬁne  Straße!") == "fine strasse"


words = st.lists(st.sampled_from(["ice", "Ice", "water", "sky", "blue", "!"]), min_size=1, max_size=5).map(" ".join)
passages = st.builds(Passage, st.sampled_from("abcdefghij"), words)


@settings(max_examples=300, deadline=None)
@given(
    positives=st.lists(passages, min_size=1, max_size=3),
    others=st.lists(passages, min_size=1, max_size=3),
    found=st.lists(passages, max_size=12),
    existing=st.lists(passages, max_size=2),
    query=words,
    ratio=st.sampled_from([0.5, 0.95, float("inf")]),
    pick=st.sampled_from(["top", "sample"]),
)
def test_no_negative_is_ever_a_positive(positives, others, found, existing, query, ratio, pick):
    asked = example(query, positives=positives)
    known = KnownPositives()
    known.add(asked)
    known.add(example(query.upper(), positives=others))
    rules = Rules(**RULES | {"max_score_ratio": ratio, "pick": pick})
    given = candidates(*found) if found else []
    picked, excluded = select(asked, given, [0.97] * len(positives), rules, known, existing)
    assert len(picked) + sum(excluded.values()) == len(given) and set(excluded) <= set(REASONS)
    assert len(picked) <= 3 and [c.rank for c in picked] == sorted(c.rank for c in picked)
    relevant = [*positives, *others]
    for candidate in picked:
        assert candidate.passage.id not in {p.id for p in relevant} | {p.id for p in existing}
        assert normalised(candidate.passage.text) not in {normalised(p.text) for p in (*relevant, *existing)}
        assert candidate.score < ratio * 0.97
    assert len({normalised(c.passage.text) for c in picked}) == len(picked) == len({c.passage.id for c in picked})


def test_bm25_ranks_as_the_baseline_does():
    corpus, queries = read_corpus(sample_folder() / "corpus.jsonl"), read_queries(sample_folder() / "dev_queries.jsonl")
    baseline = bm25_run(corpus, queries, k=50)
    examples = [example(text, query_id, ()) for query_id, text in zip(queries.ids, queries.texts, strict=True)]
    results = Bm25(corpus, Positives(corpus, [])).search(examples, 50)
    for query, found in zip(queries.ids, results, strict=True):
        pairs = zip(found.rows, found.scores, strict=True)
        assert [(corpus.ids[row], score) for row, score in pairs if score > 0] == baseline[query]
    outside = [Passage("new", "drops skate on a hot pan")]
    scorer = Bm25(corpus, Positives(corpus, outside))
    found = scorer.search([example("drops on a hot pan", positives=outside)], len(corpus) + 9)[0]
    assert len(found.rows) == len(corpus), "a positive from outside the corpus is no candidate"
    assert found.positives[0] > max(found.scores)


def test_bm25_without_a_known_word_scores_everything_0():
    corpus, positive = Corpus(["a"], ["the"], [""]), Passage("a", "the")
    found = Bm25(corpus, Positives(corpus, [positive])).search([example("und", positives=[positive])], 5)[0]
    assert (found.rows, found.scores, found.positives) == ([0], [0.0], [0.0])


# The command


def row(n: int, **change) -> dict:
    topic = ["ice", "sky", "bread", "rust"][n % 4]
    base = {"query_id": f"q{n}", "query": f"why does {topic} behave like case {n}", "rationale": "one\n\ntwo"}
    return base | {"positives": [{"id": f"d{n}", "text": f"{topic} behaves so by reason {n}"}], "kind": n} | change


@pytest.fixture
def files(tmp_path):
    """A source of 30 rows and a corpus of 120 passages, their positives among them."""
    corpus = [{"id": f"d{n}", "text": row(n)["positives"][0]["text"]} for n in range(30)]
    corpus += [{"id": f"x{n}", "text": f"why ice and case {n}"} for n in range(30)]
    corpus += [{"id": f"y{n}", "text": f"a sky case behaves {n * n}", "title": "Note"} for n in range(60)]
    write(tmp_path / "corpus.jsonl", corpus)
    write(tmp_path / "rows.jsonl", [row(n) for n in range(30)])
    return tmp_path


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mine(folder: Path, *arguments, out="mined.jsonl", corpus=True) -> Path:
    flags = ["--source", str(folder / "rows.jsonl"), "--out", str(folder / out)]
    flags += ["--corpus", str(folder / "corpus.jsonl")] * corpus
    assert main([*flags, *arguments]) == 0
    return folder / out


BM25 = ["--method", "bm25", "--ranks", "2", "60", "--negatives", "5"]


def test_bm25_end_to_end_and_into_prepare(files, capsys):
    out = mine(files, *BM25)
    rows = read(out)
    assert [r["query_id"] for r in rows] == [f"q{n}" for n in range(30)]
    assert all(len(r["negatives"]) == 5 and r["kind"] == n for n, r in enumerate(rows))
    ids = {r["id"]: r for r in read(files / "corpus.jsonl")}
    for r in rows:
        decode_example(json.dumps(r).encode(), "x")
        assert r["positives"][0]["id"] not in {n["id"] for n in r["negatives"]}
        assert all(ids[n["id"]].get("title", "") == n.get("title", "") for n in r["negatives"])
    statistics = json.loads((files / "mined.jsonl.stats.json").read_text())
    assert statistics["negatives"] + sum(statistics["excluded"].values()) == 30 * 59  # all of the window, once
    assert 2 <= statistics["mean_rank"] <= 60 and statistics["queries_with_fewer"] == 0
    assert sum(statistics["rank_histogram"]["counts"]) == 150
    assert (files / "mined.jsonl.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in files.iterdir() if "mined" in p.name) == [
        "mined.jsonl", "mined.jsonl.png", "mined.jsonl.stats.json"
    ]  # fmt: skip
    told = capsys.readouterr().out
    assert "30 rows, 150 negatives" in told and "mean rank" in told
    from laser_dist.data.preparation.prepare import main as prepare

    assert prepare(["--source", str(out), "--out", str(files / "shards")]) == 0


def test_existing_negatives_are_replaced_or_kept(files):
    own = [{"id": "own", "text": "written by hand"}, {"id": "y3", "text": "a sky case behaves 9", "title": "Note"}]
    write(files / "rows.jsonl", [row(1, negative_passages=[{"docid": n["id"], **n} for n in own])])
    replaced = read(mine(files, *BM25, out="a.jsonl"))[0]
    assert len(replaced["negatives"]) == 5 and "own" not in {n["id"] for n in replaced["negatives"]}
    kept = read(mine(files, *BM25, "--existing", "keep", "--pick", "top", out="b.jsonl"))[0]
    assert kept["negatives"][:2] == own and len({n["id"] for n in kept["negatives"]}) == 7
    assert "negative_passages" not in kept


def test_without_a_corpus_the_sources_own_passages_are_searched(files):
    rows = read(mine(files, "--method", "bm25", "--ranks", "1", "30", "--negatives", "3", corpus=False))
    assert all(n["id"].startswith("d") and n["id"] != f"d{i}" for i, r in enumerate(rows) for n in r["negatives"])
    write(files / "rows.jsonl", [row(0), row(1, positives=[{"id": "d0", "text": "another"}])])
    with pytest.raises(UserError, match=r"rows.jsonl:2: passage id 'd0' has another text"):
        mine(files, *BM25, out="b.jsonl", corpus=False)


def test_qrels_are_obeyed_and_have_to_match(files):
    qrels = files / "qrels.tsv"
    qrels.write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q1\ty{n}\t1\n" for n in range(60)))
    found = read(mine(files, *BM25, "--qrels", str(qrels)))[1]["negatives"]
    assert found and not any(n["id"].startswith("y") for n in found)
    qrels.write_text("nobody\ty1\t1\n")
    with pytest.raises(UserError, match="no query_id of the source is in it"):
        mine(files, *BM25, "--qrels", str(qrels), out="b.jsonl")


def test_too_few_are_named(files, capsys):
    mine(files, "--method", "bm25", "--ranks", "1", "9", "--negatives", "9", "--max-score-ratio", "0.01")
    statistics = json.loads((files / "mined.jsonl.stats.json").read_text())
    assert statistics["queries_with_fewer"] == 30 == statistics["queries_without"]
    told = capsys.readouterr().out
    assert "30 queries got fewer than 9 (q0, q1, q2, ...), 30 of them have none" in told
    assert "(scores too near the positive)" in told


def test_rows_without_negatives_are_dropped_when_asked(files, capsys):
    """They stop training in the step that draws one, unless data.negatives is 0."""
    write(files / "rows.jsonl", [row(n, query="zebra" if n < 3 else row(n)["query"]) for n in range(30)])
    assert not read(mine(files, *BM25, out="kept.jsonl"))[0]["negatives"]
    capsys.readouterr()
    out = mine(files, *BM25, "--without-negatives", "drop", out="dropped.jsonl")
    assert [r["query_id"] for r in read(out)] == [f"q{n}" for n in range(3, 30)]
    told = capsys.readouterr().out
    assert "27 rows" in told and "3 of them have none and were dropped" in told


def test_parts_and_shards_do_not_change_a_byte(files, capsys):
    whole = mine(files, *BM25).read_bytes()
    assert mine(files, *BM25, "--chunk", "7", out="a.jsonl").read_bytes() == whole
    for shard in ("2/3", "3/3", "1/3"):
        capsys.readouterr()
        assert not (files / "b.jsonl").exists()
        mine(files, *BM25, "--chunk", "7", "--shard", shard, out="b.jsonl")
    assert (files / "b.jsonl").read_bytes() == whole
    a, b = (json.loads((files / f"{name}.jsonl.stats.json").read_text()) for name in "ab")
    assert a == b


def test_an_interrupted_run_keeps_its_parts(files, monkeypatch):
    whole = mine(files, *BM25).read_bytes()
    made, write_part = [], mining._write_part

    def failing(task, scorer, path, rows):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(path.name)
        write_part(task, scorer, path, rows)

    monkeypatch.setattr(mining, "_write_part", failing)
    with pytest.raises(KeyboardInterrupt):
        mine(files, *BM25, "--chunk", "5", out="a.jsonl")
    assert not (files / "a.jsonl").exists()
    with pytest.raises(UserError, match="another negatives, seed: give that command again"):
        mine(files, *BM25[:-1], "4", "--seed", "1", "--chunk", "5", out="a.jsonl")
    with pytest.raises(UserError, match="another source"):
        mine(files, *BM25, "--limit", "29", "--chunk", "5", out="a.jsonl")
    made.clear()
    monkeypatch.setattr(mining, "_write_part", lambda *a: (made.append(a[2].name), write_part(*a)))
    assert mine(files, *BM25, "--chunk", "5", out="a.jsonl").read_bytes() == whole
    assert made == [f"part-00000{n}.jsonl" for n in (3, 4, 5)]


def test_a_killed_process_continues_to_the_same_bytes(files):
    whole = mine(files, *BM25, "--chunk", "1").read_bytes()
    flags = [*BM25, "--chunk", "1", "--corpus", str(files / "corpus.jsonl"), "--out", str(files / "a.jsonl")]
    slow = (
        "import sys, time; from laser_dist.data.mining import task as mining\n"
        "from laser_dist.data.mining.mine import main\n"
        "make = mining._write_part\n"
        "mining._write_part = lambda *a: (time.sleep(0.05), make(*a))\n"
        f"main({[*flags, '--source', str(files / 'rows.jsonl')]!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], env=os.environ | {"OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 60
    while len(list((files / "a.jsonl.work").glob("part-*"))) < 8:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (files / "a.jsonl").exists()
    assert mine(files, *BM25, "--chunk", "1", out="a.jsonl").read_bytes() == whole
    assert not (files / "a.jsonl.work").exists()


def test_a_full_disk_keeps_the_parts(files, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mining.Report, "add", full)
    with pytest.raises(UserError, match=r"mined.jsonl: No space left on device; finished parts are kept"):
        mine(files, *BM25)
    monkeypatch.undo()
    monkeypatch.setattr(mining, "_write_part", full)  # nothing is left to make
    assert len(read(mine(files, *BM25))) == 30
    (files / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory|File exists"):
        mine(files, *BM25, out="file/mined.jsonl")


def test_overwrite(files):
    mine(files, *BM25)
    with pytest.raises(UserError, match=r"mined.jsonl exists: choose another name"):
        mine(files, *BM25)
    before = (files / "mined.jsonl").read_bytes()
    assert mine(files, *BM25, "--seed", "1", "--overwrite").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either --method bm25 or --model"),
        (["--method", "bm25", "--model", "x"], "give either"),
        ([*BM25, "--out", "mined.json"], "name of a .jsonl file"),
        ([*BM25, "--ranks", "0", "9"], "--ranks 0 9"),
        ([*BM25, "--ranks", "9", "2"], "--ranks 9 2"),
        ([*BM25, "--ranks", "1", "4"], "fewer ranks than --negatives 5"),
        ([*BM25, "--negatives", "0"], "--negatives 0: must be at least 1"),
        ([*BM25, "--max-score-ratio", "nan"], "--max-score-ratio nan"),
        ([*BM25, "--margin", "-1"], "--margin -1.0"),
        ([*BM25, "--max-overlap", "0"], "--max-overlap 0.0"),
        ([*BM25, "--shard", "0/2"], "--shard 0/2: write it as 1/4"),
        ([*BM25, "--shard", "3/2"], "--shard 3/2"),
        ([*BM25, "--shard", "1/2", "--overwrite"], "--overwrite would remove"),
        ([*BM25, "--vectors", "v"], "--vectors belongs to --model"),
        ([*BM25, "--source", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--model", "./nowhere"], "nowhere: this folder does not exist"),
    ],
)
def test_wrong_arguments(files, arguments, words):
    before = sorted(files.iterdir())
    with pytest.raises(UserError, match=words):
        mine(files, *arguments)
    assert sorted(files.iterdir()) == before


def test_defects_of_the_rows_come_before_the_work(files):
    write(files / "rows.jsonl", [row(0), row(1, positives=[]), row(2, query="")])
    with pytest.raises(UserError, match=r'rows.jsonl:2: "positives" is empty[^$]*rows.jsonl:3: "query" is empty'):
        mine(files, *BM25)


def test_without_matplotlib_there_is_no_plot_and_a_word_about_it(files, monkeypatch, capsys):
    from laser_dist.data.mining import report as mining_report

    monkeypatch.setattr(mining_report, "find_spec", lambda name: None)
    mine(files, *BM25)
    assert "pip install 'laser-dist[plots]'" in capsys.readouterr().out
    assert not (files / "mined.jsonl.png").exists()


# Encoders


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def foreign(tiny, tmp_path_factory):
    """A sentence-transformers folder that is not ours."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    folder = tmp_path_factory.mktemp("foreign")
    transformer = modules.Transformer(str(tiny))
    pooling = modules.Pooling(transformer.get_embedding_dimension(), "mean")
    SentenceTransformer(modules=[transformer, pooling], prompts={"query": "find: "}).save(str(folder))
    return folder


DENSE = ["--ranks", "1", "60", "--negatives", "5", "--pick", "top", "--device", "cpu"]


def scores_of(encoder, folder, n):
    asked, corpus = row(n), read(folder / "corpus.jsonl")
    query = encoder.encode_queries([asked["query"]])[0]
    passages = encoder.encode_passages([c["text"] for c in corpus], titles=[c.get("title", "") for c in corpus])
    return {c["id"]: float(score) for c, score in zip(corpus, passages @ query, strict=True)}


def expected_negatives(scores, positive, ratio):
    limit = scores[positive] - (1 - ratio) * abs(scores[positive])
    ranked = sorted(scores, key=lambda key: -scores[key])[:60]
    return [key for key in ranked if key != positive and scores[key] < limit][:5]


def test_our_encoder_with_the_filter_against_the_positive(files, tiny):
    from laser_dist import LaserEncoder

    rows = read(mine(files, "--model", str(tiny), *DENSE, "--max-overlap", "1"))
    encoder = LaserEncoder.from_pretrained(tiny, device="cpu")
    for n in (0, 7, 29):
        scores = scores_of(encoder, files, n)
        assert [p["id"] for p in rows[n]["negatives"]] == expected_negatives(scores, f"d{n}", 0.95)
    assert any(len(r["negatives"]) == 5 for r in rows)


def test_a_model_of_sentence_transformers(files, foreign):
    from sentence_transformers import SentenceTransformer

    rows = read(mine(files, "--model", str(foreign), *DENSE, "--max-overlap", "1", "--max-score-ratio", "inf"))
    model = SentenceTransformer(str(foreign), device="cpu")
    corpus = read(files / "corpus.jsonl")
    joined = [f"{c.get('title', '')} {c['text']}".strip() for c in corpus]
    passages = model.encode(joined, normalize_embeddings=True)
    query = model.encode("find: " + row(3)["query"], normalize_embeddings=True)
    ranked = [corpus[i]["id"] for i in np.argsort(-(passages @ query))]
    assert [p["id"] for p in rows[3]["negatives"]] == [i for i in ranked if i != "d3"][:5]


def test_vectors_are_kept_reused_and_checked(files, tiny, tmp_path, monkeypatch):
    vectors = files / "vectors"
    first = mine(files, "--model", str(tiny), *DENSE, "--vectors", str(vectors)).read_bytes()
    made = (vectors / "vectors.npy").stat().st_mtime_ns
    second = mine(files, "--model", str(tiny), *DENSE, "--vectors", str(vectors), out="b.jsonl").read_bytes()
    assert first == second and (vectors / "vectors.npy").stat().st_mtime_ns == made
    other = tiny_model_folder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="vectors are of another weights"):
        mine(files, "--model", str(other), *DENSE, "--vectors", str(vectors), out="c.jsonl")
    write(files / "corpus.jsonl", read(files / "corpus.jsonl")[:-1])
    with pytest.raises(UserError, match="vectors are of another corpus"):
        mine(files, "--model", str(tiny), *DENSE, "--vectors", str(vectors), out="d.jsonl")


def test_vectors_of_encode_are_taken(files, tiny):
    from laser_dist.retrieval.encode import main as encode

    flags = [
        "--model",
        str(tiny),
        "--corpus",
        str(files / "corpus.jsonl"),
        "--out",
        str(files / "v"),
        "--device",
        "cpu",
    ]
    assert encode(flags) == 0
    plain = mine(files, "--model", str(tiny), *DENSE).read_bytes()
    assert mine(files, "--model", str(tiny), *DENSE, "--vectors", str(files / "v"), out="b.jsonl").read_bytes() == plain


def test_a_positive_outside_the_corpus_is_scored_but_not_found(files, tiny):
    inside = read(mine(files, "--model", str(tiny), *DENSE, "--max-overlap", "1"))
    write(files / "corpus.jsonl", [r for r in read(files / "corpus.jsonl") if r["id"] != "d7"])
    outside = read(mine(files, "--model", str(tiny), *DENSE, "--max-overlap", "1", out="b.jsonl"))
    assert outside[7]["negatives"] == inside[7]["negatives"]
    assert not any(n["id"] == "d7" for r in outside for n in r["negatives"])


def test_an_interruption_of_encoder_mining_changes_no_byte(files, tiny, monkeypatch):
    flags = ["--model", str(tiny), *DENSE, "--chunk", "8"]
    whole = mine(files, *flags).read_bytes()
    write_part = mining._write_part

    def failing(task, scorer, path, rows):
        if "000002" in path.name:
            raise KeyboardInterrupt
        write_part(task, scorer, path, rows)

    monkeypatch.setattr(mining, "_write_part", failing)
    with pytest.raises(KeyboardInterrupt):
        mine(files, *flags, out="a.jsonl")
    monkeypatch.setattr(mining, "_write_part", write_part)
    shutil.rmtree(files / "a.jsonl.work" / "vectors")  # made again, the same
    assert mine(files, *flags, out="a.jsonl").read_bytes() == whole


def test_processes_that_share_the_work_encode_once_and_write_the_same(files, tiny):
    whole = mine(files, "--model", str(tiny), *DENSE, "--chunk", "4", out="a.jsonl").read_bytes()
    flags = ["--source", str(files / "rows.jsonl"), "--corpus", str(files / "corpus.jsonl"), "--chunk", "4"]
    flags += ["--out", str(files / "b.jsonl"), "--model", str(tiny), *DENSE]
    command = [sys.executable, "-m", "laser_dist.cli", "mine", *flags, "--shard"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, shard], env=env, **pipe) for shard in ("1/2", "2/2")]
    told = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert (files / "b.jsonl").read_bytes() == whole
    assert sum("encode " in text for text in told) == 1, told
    assert sum("mean rank" in text for text in told) == 1, told


def test_help_is_quick_and_has_examples():
    code = (
        "import sys; from laser_dist.data.mining.mine import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: sys.exit(bool({'torch', 'numpy', 'bm25s'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "laser-dist mine --source" in done.stdout
