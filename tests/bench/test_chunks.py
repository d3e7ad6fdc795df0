"""`bench chunks` runs the trainer's engine, and reports nothing when chunks change the numbers."""

import dataclasses
import json
from pathlib import Path

import pytest

from laser_dist.bench import chunks
from laser_dist.cli import main
from laser_dist.testing import run_distributed, tiny_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def measured(rank: int, world_size: int, folder: Path, budgets: list[int]) -> list[chunks.Outcome]:
    settings = chunks.Settings(model=str(folder), queries=6, layers=1)
    return [chunks.measure(settings, budget) for budget in budgets]


def test_a_measurement_runs_in_chunks_and_agrees_with_all_at_once(folder):
    whole, chunked = run_distributed(measured, 1, folder, [0, 3000])[0]
    assert whole.chunks == 1 and chunked.chunks >= 2 and whole.tokens == chunked.tokens
    chunks._check(chunked, whole)
    assert chunked.gradient_norm > 0 and chunked.seconds > 0 and chunked.peak_gib >= chunked.base_gib > 0
    assert chunked.vectors_gib == whole.vectors_gib > 0


def outcome(**changes: object) -> chunks.Outcome:
    environment = {"device": "CPU", "torch": "2"}
    return dataclasses.replace(chunks.Outcome(4, 9000, 1.5, 2.5, 1.0, 0.5, 0.75, 0.001, environment), **changes)


def test_the_table_and_the_file_hold_every_variant(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chunks, "_in_a_process", lambda settings, queries, budget: outcome(tokens=queries))
    out = tmp_path / "chunks.json"
    arguments = ["--model", str(folder), "--queries", "40", "--chunk-tokens", "3000", "--out", str(out)]
    assert main(["bench", "chunks", *arguments]) == 0
    variants = json.loads(out.read_text())["variants"]
    assert len(variants) == 5 and list(variants)[-1] == "40 queries at once"
    assert all(name in capsys.readouterr().out for name in list(variants)[:1])


@pytest.mark.parametrize("change", [{"loss": 1.6}, {"gradient_norm": float("nan")}])
def test_chunks_that_change_the_numbers_are_not_reported(folder, monkeypatch, capsys, change):
    def measure(settings, queries, budget):
        return outcome(**change) if budget else outcome()

    monkeypatch.setattr(chunks, "_in_a_process", measure)
    assert main(["bench", "chunks", "--model", str(folder), "--queries", "40", "--chunk-tokens", "3000"]) == 2
    told = capsys.readouterr()
    assert "nothing is reported" in told.err and "peak GiB" not in told.out


def test_a_batch_that_needs_no_chunks_is_refused(folder, capsys):
    assert main(["bench", "chunks", "--model", str(folder), "--queries", "2", "--chunk-tokens", "90000"]) == 2
    assert "more --queries" in capsys.readouterr().err
