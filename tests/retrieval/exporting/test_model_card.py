"""The model card says how a model was made and what was measured, to strangers: nothing invented, nothing private."""

import dataclasses
import json
import shutil

import pytest
from huggingface_hub import ModelCard

from laser_dist.config import DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, RunConfig, ThinkingConfig
from laser_dist.data.manifest import Manifest, Shard, Source, encode_manifest
from laser_dist.errors import UserError
from laser_dist.recipe import to_toml
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.retrieval.export import export
from laser_dist.retrieval.exporting.origin import origin_of
from laser_dist.testing import tiny_model_folder

SECRET = "s3cr3t"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("backbone") / f"{SECRET}-home" / "tiny")


@pytest.fixture
def run(tmp_path, backbone):
    """The folder of a run as training leaves it, with its newest checkpoint's model folder."""
    run = tmp_path / SECRET / "run"
    model = run / "checkpoints" / "step-000020" / "model"
    shutil.copytree(backbone, model)
    RetrieverCard(backbone=str(backbone), thinking=ThinkingConfig(steps=2)).save(model)
    (run / "checkpoints" / "latest").write_text("step-000020\n")
    state = {"step": 20, "world_size": 2, "stage": 3, "fingerprint": "x", "metric": 0.25}
    (model.parent / "trainer.json").write_text(json.dumps(state))
    rows = [{"step": 10, "dev/ndcg@10": 0.1}, {"step": 20, "loss/total": 1.0}, {"step": 20, "dev/ndcg@10": 0.25}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2')
    shards = tmp_path / SECRET / "shards"
    shards.mkdir()
    sources = (
        Source("org/data:subset", examples=7, revision="abc", licence="cc-by-4.0"),
        Source(f"/home/{SECRET}/rows.jsonl", examples=3),
    )
    shard = Shard("a.tar", 10, 100, "0" * 64)
    manifest = Manifest(10, 0, (shard,), sources, version=2)
    offsets = dataclasses.replace(shard, offsets=shard.offsets.__class__("q", range(11)))
    (shards / "manifest.json").write_bytes(encode_manifest(dataclasses.replace(manifest, shards=(offsets,))))
    config = RunConfig(
        output=str(run),
        model=ModelConfig(name=str(backbone), dtype="float32"),
        thinking=ThinkingConfig(steps=2),
        data=DataConfig(mix={str(shards): 2.0, f"s3://{SECRET}:{SECRET}@bucket/{SECRET}/far": 1.0}, cache=f"/{SECRET}"),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        objective=ObjectiveConfig(output_weight=2.5),
    )
    (run / "config.toml").write_text(to_toml(config))
    return run


def result_file(path, **changes):
    values = {
        "ndcg@10": 0.4567,
        "recall@100": 1.0,
        "mrr@10": 0.5,
        "bm25": {"ndcg@10": 0.125, "recall@100": 0.25, "mrr@10": 0.0},
        "queries": 80,
        "passages": 1000,
        "model": f"/home/{SECRET}/run",
        "encoder": {"thinking": {"steps": 6, "convention": "official"}, "parameters": 1},
        "seconds": {"search": 1.0},
    }
    path.write_text(json.dumps(values | changes))
    return path


def test_the_card_tells_the_run_and_no_secret(run, tmp_path):
    folder = export(run, out=tmp_path / "my-model", results=(result_file(tmp_path / "sample.json"),)).folder
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert SECRET not in text
    assert "20 optimizer steps on 2 ranks, ZeRO-3." in text
    assert "| org/data:subset | 7 | cc-by-4.0 |\n| rows.jsonl | 3 | not recorded |\n| far | not recorded |" in text
    assert "learning_rate = 0.0003" in text and "output_weight = 2.5" in text and "[thinking]\nsteps = 2" in text
    assert "lora" not in text and "train =" not in text
    assert "chosen: ndcg@10 0.2500." in text
    assert "| set | queries | passages | K | ndcg@10 | recall@100 | mrr@10 |\n|---|---|---|---|---|---|---|\n" in text
    assert "| sample | 80 | 1000 | 6 | 0.4567 | 1.0000 | 0.5000 |\n| BM25 on the same files | | | | 0.1250 |" in text
    assert "\n\n\n\n" not in text


def test_the_hub_can_read_the_front_matter(run, tmp_path):
    folder = export(run, out=tmp_path / "my-model", results=(result_file(tmp_path / "sample.json"),)).folder
    data = ModelCard.load(folder / "README.md").data
    assert (data.library_name, data.model_name, data.datasets) == ("sentence-transformers", "my-model", ["org/data"])
    assert data.base_model is None  # a folder of ours means nothing there
    found = {
        result.metric_name: (result.dataset_name, result.metric_type, result.metric_value)
        for result in data.eval_results
    }
    assert found["ndcg@10"] == ("sample (K = 6)", "ndcg_at_10", 0.4567) and len(found) == 3
    # Without results there is no list of them, which the hub would refuse without a name.
    plain = ModelCard.load(export(run, out=tmp_path / "plain").folder / "README.md").data
    assert plain.eval_results is None and "model-index" not in plain.to_dict()


def test_a_model_folder_without_its_run_says_less(run, tmp_path):
    model = shutil.copytree(run / "checkpoints" / "step-000020" / "model", tmp_path / "model")
    text = (export(model, out=tmp_path / "out").folder / "README.md").read_text(encoding="utf-8")
    assert "## Training" not in text and "## Evaluation" not in text


def test_a_config_of_another_version_is_told_as_it_stands(run):
    path = run / "config.toml"
    path.write_text(path.read_text().replace("[objective]", "[objective]\nfrom_the_future = 1"))
    assert "from_the_future = 1" in origin_of(run / "checkpoints" / "step-000020" / "model").settings


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.toml", "x = [", "config.toml.*not valid TOML"),
        ("checkpoints/step-000020/trainer.json", "[1]", "trainer.json.*cannot be read"),
        ("../shards/manifest.json", "{}", "manifest.json"),
    ],
)
def test_what_is_damaged_is_named(run, name, content, message):
    (run / name).write_text(content)
    with pytest.raises(UserError, match=message):
        origin_of(run / "checkpoints" / "step-000020" / "model")


@pytest.mark.parametrize(
    "content, message",
    [
        ("no json", "cannot be read as JSON"),
        ("[]", "cannot be read as JSON"),
        ('{"accuracy": 1}', "holds no metric"),
        ('{"ndcg@10": 1, "encoder": {"backbone": "other"}}', "backbone 'other'"),
        ('{"ndcg@10": 1, "encoder": {"thinking": {"convention": "paper"}}}', "convention 'paper'"),
    ],
)
def test_results_that_are_none_or_another_model_s_are_refused(run, tmp_path, content, message):
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(UserError, match=f"{file}.*{message}"):
        export(run, out=tmp_path / "out", results=(file,))
    with pytest.raises(UserError, match="missing.json"):
        export(run, out=tmp_path / "out", results=(tmp_path / "missing.json",))
    assert not (tmp_path / "out").exists()
