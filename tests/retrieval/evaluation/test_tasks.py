"""mteb's own task classes on local datasets of the hub's layout: our numbers, mteb's and trec_eval's are the same."""

import json

import datasets
import huggingface_hub
import numpy as np
import pytest
import pytrec_eval

from laser_dist.errors import UserError
from laser_dist.retrieval.collection import read_collection
from laser_dist.retrieval.encoder import LaserEncoder
from laser_dist.retrieval.evaluation.command import main
from laser_dist.retrieval.evaluation.evaluate import evaluate
from laser_dist.testing.tiny import tiny_model_folder

mteb = pytest.importorskip("mteb")
from laser_dist.retrieval.evaluation.mteb_adapter import LaserMteb, task_instructions  # noqa: E402
from laser_dist.retrieval.evaluation.tasks import SETS, find_tasks, load_task, run_task, summary  # noqa: E402

WORDS = "ice water density crystal sky blue light air wave scatter query passage helps answer short long".split()


def text(seed, length):
    return " ".join(np.random.default_rng(seed).choice(WORDS, length))


PASSAGES = [{"_id": f"d{i}", "text": text(i, 8), "title": text(100 + i, 2) if i % 3 else ""} for i in range(30)]
QUERIES = [{"_id": f"q{i}", "text": text(200 + i, 5)} for i in range(6)]
QRELS = [{"query-id": f"q{i}", "corpus-id": f"d{j}", "score": 1 + (j % 2)} for i in range(6) for j in range(i, 30, 7)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("model"), chat_template=True)


@pytest.fixture(scope="module")
def encoder(model):
    return LaserEncoder.from_pretrained(model)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def hub_folder(folder, configs):
    """A dataset repository as on the hub: {config: {split: rows}} as JSON lines, declared in README.md."""
    lines = ["---", "configs:"]
    folder.mkdir()
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            name = f"{config}-{split}.jsonl"
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
            lines += [f"  - split: {split}", f"    path: {name}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


@pytest.fixture
def browse_comp(tmp_path):
    """Two subsets, as BrowseComp-Plus has; in the second every query has one relevant passage less."""
    fewer = [row for row in QRELS if row["corpus-id"] != f"d{row['query-id'][1:]}"]
    configs = {}
    for subset, qrels in (("gold_only", QRELS), ("gold_and_evidence", fewer)):
        configs |= {f"{subset}-corpus": {"test": PASSAGES}, f"{subset}-queries": {"test": QUERIES}}
        configs[f"{subset}-qrels"] = {"test": qrels}
    return hub_folder(tmp_path / "BrowseCompPlusRetrieval", configs)


def test_ndcg_is_mtebs_evaluates_and_trec_evals(browse_comp, encoder, tmp_path):
    """BrowseComp-Plus, mteb's class and loader. Titles and instructions reach the model alike on both ways."""
    (task,) = find_tasks("BrowseComp-Plus", browse_comp)
    result = run_task(LaserMteb(encoder, name="tiny", revision="1"), task)
    assert result["instruction"] == task.metadata.prompt["query"]
    assert set(result["subsets"]) == {"gold_only", "gold_and_evidence"}

    files = [tmp_path / name for name in ("corpus.jsonl", "queries.jsonl", "qrels.tsv")]
    files[0].write_text("".join(json.dumps(row) + "\n" for row in PASSAGES))
    asked = [row | {"instruction": result["instruction"]} for row in QUERIES]
    files[1].write_text("".join(json.dumps(row) + "\n" for row in asked))
    files[2].write_text("".join(f"{r['query-id']}\t{r['corpus-id']}\t{r['score']}\n" for r in QRELS))
    ours = evaluate(encoder, *read_collection(*files))
    theirs = result["subsets"]["gold_only"]
    for metric in ("ndcg@10", "recall@10", "recall@100"):
        assert theirs[metric] == pytest.approx(ours.metrics[metric], abs=1e-5)  # mteb rounds to five digits
        mean = np.mean([values[metric] for values in theirs["per_query"].values()])
        assert mean == pytest.approx(ours.metrics[metric], abs=1e-9)
    assert 0 < ours.metrics["ndcg@10"] < 1

    judgements = {q["_id"]: {r["corpus-id"]: r["score"] for r in QRELS if r["query-id"] == q["_id"]} for q in QUERIES}
    run = {query: dict(ranking) for query, ranking in ours.run.items()}
    independent = pytrec_eval.RelevanceEvaluator(judgements, {"ndcg_cut.10"}).evaluate(run)
    trec_eval = np.mean([values["ndcg_cut_10"] for values in independent.values()])
    assert theirs["ndcg@10"] == pytest.approx(trec_eval, abs=1e-5)


def test_followir_p_mrr(tmp_path, encoder):
    """Core17, mteb's class: re-ranking of given passages, narratives behind the query, p-MRR by FollowIR's formula."""
    narratives = {
        f"{q}-{kind}": text(seed, 12)
        for q, base in (("1", 300), ("2", 310))
        for kind, seed in (("og", base), ("changed", base + 1))
    }
    ranked = [f"d{i}" for i in range(20)]
    folder = hub_folder(
        tmp_path / "Core17InstructionRetrieval",
        {
            "corpus": {"test": PASSAGES},
            "queries": {"test": [{"_id": query, "text": text(int(query[0]), 4)} for query in narratives]},
            "default": {
                "test": [{"query-id": q, "corpus-id": f"d{i}", "score": 1} for q in narratives for i in (3, 5, 9)]
            },
            "instruction": {"test": [{"query-id": q, "instruction": n} for q, n in narratives.items()]},
            "top_ranked": {"test": [{"query-id": q, "corpus-ids": ranked} for q in narratives]},
            "qrel_diff": {
                "qrel_diff": [{"query-id": "1", "corpus-ids": ["d3", "d5"]}, {"query-id": "2", "corpus-ids": ["d9"]}]
            },
        },
    )
    (task,) = find_tasks("Core17InstructionRetrieval", folder)
    result = run_task(LaserMteb(encoder, name="tiny", revision="1"), task)
    assert result["main_metric"] == "p-MRR"
    assert result["instruction"] == encoder.card.text.instruction  # mteb has none for this task

    passages = encoder.encode_passages([p["text"] for p in PASSAGES[:20]], titles=[p["title"] for p in PASSAGES[:20]])
    queries = encoder.encode_queries(
        [f"{text(int(query[0]), 4)} {narrative}" for query, narrative in narratives.items()]
    )
    order = [[ranked[i] for i in np.argsort(-row)] for row in queries @ passages.T]
    ranks = {query: {d: r for r, d in enumerate(found, 1)} for query, found in zip(narratives, order, strict=True)}

    def change(query, passage):
        before, after = ranks[f"{query}-og"][passage], ranks[f"{query}-changed"][passage]
        return after / before - 1 if before >= after else 1 - before / after

    expected = ((change("1", "d3") + change("1", "d5")) / 2 + change("2", "d9")) / 2
    (row,) = result["subsets"].values()
    assert row["p-mrr"] == row["main_score"] == pytest.approx(expected, abs=1e-6)
    assert expected != 0
    assert summary({"Core17InstructionRetrieval": result})["p-mrr"] == row["p-mrr"]


@pytest.fixture
def bright(tmp_path):
    """One domain; for the first query its best passage is excluded, as BRIGHT excludes what a post was written from."""
    passages = [{"id": p["_id"], "content": p["text"]} for p in PASSAGES]
    examples = [
        {
            "id": str(i),
            "query": text(400 + i, 6),
            "gold_ids": [f"d{i}", f"d{i + 9}"],
            "gold_ids_long": ["N/A"],
            "excluded_ids": ["N/A"],
        }
        for i in range(4)
    ]
    examples[0]["query"], examples[0]["excluded_ids"] = passages[20]["content"], ["d20"]
    return hub_folder(tmp_path / "BRIGHT", {"documents": {"biology": passages}, "examples": {"biology": examples}})


def test_bright_by_the_command(bright, model, tmp_path, capsys, monkeypatch):
    out = tmp_path / "bright.json"
    arguments = [
        "--model",
        str(model),
        "--task",
        "BrightBiologyRetrieval",
        "--task-data",
        str(bright),
        "--out",
        str(out),
    ]
    seen = []
    encode = LaserEncoder.encode_queries
    monkeypatch.setattr(LaserEncoder, "encode_queries", lambda *a, **kw: seen.append(kw) or encode(*a, **kw))
    assert (
        main([*arguments, "--max-tokens", "100", "--steps", "2", "--dim", "24", "--plot", str(tmp_path / "b.png")]) == 0
    )
    report = json.loads(out.read_text())
    assert set(seen[0]["instructions"]) == {
        "Given a Biology post, retrieve relevant passages that help answer the post."
    }
    task = report["tasks"]["BrightBiologyRetrieval"]
    assert task["instruction"] == seen[0]["instructions"][0]
    assert (report["dim"], report["encoder"]["thinking"]["steps"]) == (24, 2)
    assert {report["encoder"]["text"][f"max_{kind}_tokens"] for kind in ("query", "passage")} == {100}
    assert report["ndcg@10"] == pytest.approx(task["subsets"]["default"]["ndcg@10"]) and 0 < report["ndcg@10"] < 1
    assert set(report["per_query"]) == {f"BrightBiologyRetrieval/default/{i}" for i in range(4)}
    assert report["weights"] and report["tasks_left"] == 0
    assert "BrightBiologyRetrieval/default" in capsys.readouterr().out
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_bright_leaves_out_excluded_passages(bright, encoder, tmp_path):
    """A query that is a passage word for word finds it, unless the task excludes it: then it is not in the run."""
    (task,) = find_tasks("BrightBiologyRetrieval", bright)
    model = LaserMteb(encoder, name="tiny", revision="1")
    mteb.evaluate(model, task, cache=None, prediction_folder=tmp_path / "runs", show_progress_bar=False)
    (file,) = (tmp_path / "runs").iterdir()
    run = json.loads(file.read_text())["default"]["standard"]
    assert "d20" not in run["0"] and len(run["0"]) == 29
    assert "d20" in run["1"]


def test_an_interrupted_benchmark_continues(bright, model, encoder, tmp_path, monkeypatch):
    """Tasks that are finished are not run again, unless model or settings are others."""
    from laser_dist.retrieval.evaluation import benchmark

    ran = []

    def fake(model, task):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(task.metadata.name)
        return {
            "subsets": {"default": dict.fromkeys(("ndcg@10", "mrr@10"), 0.5) | {"per_query": {"q": {"ndcg@10": 0.5}}}}
        }

    monkeypatch.setattr(benchmark, "run_task", fake)
    monkeypatch.setattr(benchmark, "load_task", lambda task: None)
    arguments = ["--model", str(model), "--task", "FollowIR", "--out", str(tmp_path / "f.json")]
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    assert ran == list(SETS["FollowIR"][:2])
    assert json.loads((tmp_path / "f.json").read_text())["tasks_left"] == 1
    ran.clear()
    assert main(arguments) == 0
    assert ran == ["Core17InstructionRetrieval"]
    ran.clear()
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--steps", "5"])
    assert ran == list(SETS["FollowIR"][:2])


def test_sets_and_instructions_name_tasks_that_mteb_has():
    names = [name for names in SETS.values() for name in names]
    assert [len(SETS[name]) for name in ("BRIGHT", "BRIGHT-long", "FollowIR", "BrowseComp-Plus")] == [12, 8, 3, 1]
    assert {mteb.get_task(name).metadata.name for name in names} == set(names)
    assert set(task_instructions()) == {*SETS["BRIGHT"], *SETS["BRIGHT-long"]}


def test_mistakes_are_named(tmp_path, model, encoder):
    with pytest.raises(UserError, match="mteb .* has no such task.*Did you mean"):
        find_tasks("BrightBiologyRetrival", None)
    with pytest.raises(UserError, match="give a retrieval task"):
        find_tasks("STS12", None)
    with pytest.raises(UserError, match="does not exist"):
        find_tasks("BRIGHT", tmp_path / "nowhere")
    (task,) = find_tasks("NFCorpus", None)
    with pytest.raises(UserError, match="mteb/nfcorpus .* cannot be loaded.*--task-data"):
        load_task(task)
    arguments = ["--model", str(model), "--task", "BRIGHT", "--out", str(tmp_path / "o.json")]
    with pytest.raises(UserError, match="not with --task"):
        main([*arguments, "--explicit"])
    with pytest.raises(UserError, match="cannot be loaded"):
        main([*arguments, "--task-data", str(tmp_path)])


def test_mtebs_cache_tells_settings_apart(model):
    """mteb caches results by name, revision and experiment: K = 1 must not be answered with K = 3's numbers."""
    metas = [
        LaserMteb.from_pretrained(model, steps=steps, dim=dim).mteb_model_meta
        for steps, dim in ((1, None), (3, None), (3, 16))
    ]
    assert len({hash(meta) for meta in metas}) == 3
    assert len({meta.revision for meta in metas}) == 1 and len(metas[0].revision) == 64


def test_passages_without_text_are_encoded(encoder):
    """Some of mteb's corpora have empty passages, which the encoder refuses."""
    batch = {"text": ["T", "a b", ""], "body": [" ", "b", ""], "title": ["T", "a", ""]}
    vectors = LaserMteb(encoder, name="tiny", revision="1").encode([batch], task_metadata=None, prompt_type=None)
    expected = encoder.encode_passages(["T", "b", "-"], titles=["", "a", ""])
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
