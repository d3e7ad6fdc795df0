"""The loader benchmark: it reports what it measured, and nothing when the loaders disagree."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from laser_dist.bench import loader, loader_report
from laser_dist.bench.loader import Passed, Settings
from laser_dist.bench.pages import cached_share, evict, warm
from laser_dist.bench.synthetic import MeanTokens, paper_examples
from laser_dist.cli import main
from laser_dist.config import ModelConfig
from laser_dist.data.schema import Example, Passage
from laser_dist.data.shards import write_shards
from laser_dist.data.streaming import plain_loaders
from laser_dist.model.backbone import load_tokenizer
from laser_dist.testing import tiny_model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), architecture="qwen3", chat_template=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 examples, which no batch size used here divides; several positives and negatives each."""
    out = tmp_path_factory.mktemp("data") / "shards"

    def passages(kind: str, number: int) -> tuple[Passage, ...]:
        return tuple(Passage(f"{kind}{number}-{i}", f"{kind} {i} " + "ice " * (1 + i + number % 5)) for i in range(3))

    examples = (
        Example(f"q{n}", f"why {n}?", "Water.\n\nIce floats. " * (1 + n % 4), passages("p", n), passages("n", n))
        for n in range(26)
    )
    write_shards(examples, out, source="test", shard_examples=4)
    return out


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the test process stays as it was."""
    for name in ("HF_DATASETS_OFFLINE", "WDS_SECURE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


def test_all_loaders_are_measured_and_reported(model, shards, tmp_path, capsys, here):
    out = tmp_path / "new" / "loader.json"
    arguments = ["--model", str(model), "--data", str(shards), "--queries", "4", "--workers", "2", "--rounds", "1"]
    assert main(["bench", "loader", *arguments, "--out", str(out)]) == 0
    result, told = json.loads(out.read_text()), capsys.readouterr().out
    assert result["examples"] == 26 and len(result["loaders"]) == 3 * 2
    assert {(row["loader"], row["cold"]) for row in result["loaders"]} == {
        (name, cold) for name in loader.LOADERS for cold in (True, False)
    }
    for row in result["loaders"]:
        assert 0 < row["tokens_per_second_per_worker"]["p50"] == pytest.approx(row["tokens_per_second"]["p50"] / 2)
        assert row["tokens_per_cpu_second"]["p50"] > 0 and row["first_batch_seconds"]["p50"] > 0
        share = row["cached_share_before"]  # a file system in memory keeps "cold" files too: told, not hidden
        assert share in (None, 1.0) or (row["cold"] and share < 0.1)
    assert torch.__version__ in told and "worker(s) feed one GPU" in told and "computed, not measured" in told
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.parent.iterdir()) == ["loader.json", "loader.png"]


def test_rounds_take_turns_in_reverse_order(model, shards, monkeypatch, capsys):
    turns = []

    def record(load, name, workers, cold, cached):
        turns.append((name, workers, cold))
        batches = list(load(0))
        tokens = sum(len(batch.tokens_T) for batch in batches)
        return Passed(name, workers, cold, 1.0, 0.1, sum(b.queries for b in batches), tokens, 1.0, cached)

    monkeypatch.setattr(loader, "_time", record)
    settings = Settings(model=str(model), data=shards, workers=(1,), rounds=2, queries=4)
    folder, text = loader.prepare(settings, shards.parent)
    _, passes = loader.run_all(settings, folder, text)
    order = list(loader.LOADERS)
    assert [name for name, _, _ in turns] == order * 2 + order[::-1] * 2
    assert [cold for _, _, cold in turns] == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3
    assert len(passes) == 12


@pytest.mark.parametrize("name", ["webdataset_batches", "datasets_batches"])
@pytest.mark.parametrize(
    "wrong", ["drops an example", "repeats an example", "repeats the last one", "cuts a token", "another text"]
)
def test_nothing_is_reported_when_a_loader_yields_something_else(
    model, shards, tmp_path, monkeypatch, capsys, here, name, wrong
):
    """A pass's last example was repeated unseen: plain pipelines shuffle, so that this failed one time in some."""
    right, seen = getattr(plain_loaders, name), []

    def spoil(examples: list[Example]) -> list[Example]:
        seen.extend(examples)
        if wrong == "repeats the last one":
            return [*examples, examples[-1]] if len(seen) == 26 else examples
        number = (
            [example.query_id for example in examples].index("q7")
            if any(e.query_id == "q7" for e in examples)
            else None
        )
        if number is None:
            return examples
        if wrong == "drops an example":
            return examples[:number] + examples[number + 1 :]
        if wrong == "repeats an example":
            return [*examples, examples[number]]
        query = "why 7" if wrong == "cuts a token" else "why 8?"
        return [replace(e, query=query) if e.query_id == "q7" else e for e in examples]

    def load(files, pack, **options):
        return right(files, lambda examples: pack(spoil(list(examples))), **options)

    monkeypatch.setattr(plain_loaders, name, load)
    out = tmp_path / "loader.json"
    arguments = ["--model", str(model), "--data", str(shards), "--rounds", "1", "--out", str(out)]
    assert main(["bench", "loader", *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == "" and not out.exists() and "nothing is reported" in told.err
    assert ("comes twice" if wrong == "repeats the last one" else "q7") in told.err


def test_a_timed_pass_that_yields_something_else_is_not_reported(model, shards, monkeypatch):
    timed = loader._time

    def lose(load, name, workers, cold, cached):
        done = timed(load, name, 0, cold, cached)
        return replace(done, tokens=done.tokens - (name == "datasets"))

    monkeypatch.setattr(loader, "_time", lose)
    settings = Settings(model=str(model), data=shards, workers=(1,), rounds=1, queries=4)
    with pytest.raises(loader.UserError, match="datasets: with 1 workers it yields other examples"):
        loader.run_all(settings, *loader.prepare(settings, shards.parent))


def test_cold_files_are_out_of_the_page_cache_and_warm_ones_in_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 * 2**20))
    if warm([path]) is None:
        pytest.skip("this system does not tell what is cached")
    assert warm([path]) == cached_share([path]) == 1
    kept = evict([path])
    if kept == 1:
        pytest.skip("this file system keeps its pages in memory")
    assert kept == cached_share([path]) == 0, "asking what is cached must not read the file"


def test_synthetic_examples_have_the_lengths_they_should(model):
    tokenizer = load_tokenizer(ModelConfig(name=str(model)))
    mean = MeanTokens(query=200, rationale=600, passage=300)
    examples = list(paper_examples(150, 2, tokenizer, mean))
    assert examples == list(paper_examples(150, 2, tokenizer, mean)) and len({e.query for e in examples}) == 150

    def average(texts: list[str]) -> float:
        return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts) / len(texts)

    assert average([e.query for e in examples]) == pytest.approx(mean.query, rel=0.1)
    assert average([e.rationale for e in examples]) == pytest.approx(mean.rationale, rel=0.1)
    passages = [p.text for e in examples for p in (*e.positives, *e.negatives)]
    assert len(passages) == 450 and average(passages) == pytest.approx(mean.passage, rel=0.1)
    assert sum("\n\n" in e.rationale for e in examples) > len(examples) / 2, "rationales have segments"


def row(tokens_per_second: float, workers: int) -> dict:
    return {"loader": "ours", "workers": workers, "tokens_per_second_per_worker": {"p50": tokens_per_second / workers}}


def test_a_gpu_asks_for_the_flops_of_the_formula():
    """One 1,024-token row and two 512-token passages on Qwen3-0.6B: 2,054 tokens with K = 3."""
    settings = Settings(mfu=0.5, gpu_tflops=1000)
    gpu = loader_report.gpu_demand(settings, [[1024, 512, 512]], [row(30_000, 1), row(40_000, 2)])
    linear = 6 * 0.44e9 * 2054
    attention = 3 * 2 * 2048 * 28 * (1024**2 + 2 * 512**2)
    assert gpu["tflop_per_example"] == pytest.approx((linear + attention) / 1e12)
    assert gpu["tflop_per_example"] == pytest.approx(6.0, rel=0.02)
    assert gpu["examples_per_second"] == pytest.approx(500 / gpu["tflop_per_example"])
    assert gpu["tokens_per_second"] == pytest.approx(2048 * gpu["examples_per_second"])
    assert gpu["worker_tokens_per_second"] == 20_000, "the slowest condition decides"
    assert gpu["workers"] == -(-gpu["tokens_per_second"] // 20_000)
    assert gpu["workers_at_peak"] == -(-2 * gpu["tokens_per_second"] // 20_000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers 0: give numbers from 1 up"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--mfu", "1.5"], "--mfu 1.5: is a share"),
        (["--gpu-tflops", "nan"], "--gpu-tflops nan: must be"),
        (["--negatives", "-1"], "--negatives -1"),
        (["--paper-lengths", "--data", "x"], "not both"),
        (["--out", "."], "give the name of a JSON file"),
        (["--data", "missing"], "missing"),
        (["--data", "SHARDS", "--workers", "9"], "has 7 shards, too few for 9 workers"),
    ],
)
def test_mistakes_are_told_in_one_message(model, shards, capsys, here, arguments, message):
    arguments = [str(shards) if argument == "SHARDS" else argument for argument in arguments]
    assert main(["bench", "loader", "--model", str(model), *arguments]) == 2
    told = capsys.readouterr()
    assert message in told.err and "Traceback" not in told.err and told.out == ""


def test_needs_a_tokenizer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "loader"]) == 2
    assert "laser-dist quickstart" in capsys.readouterr().err
