import json
from pathlib import Path

import pytest
import torch

from laser_dist.bench import step
from laser_dist.cli import main
from laser_dist.testing import tiny_model_folder
from laser_dist.testing.published import PublishedStep


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), architecture="qwen3", chat_template=True)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure here, so that what a test replaces is what runs."""

    def measure(settings: step.Settings, variant: str, first: step.Outcome | None) -> step.Outcome:
        return step.measure(settings, variant, first and (first.loss, first.gradient_norm))

    monkeypatch.setattr(step, "_in_a_process", measure)


def test_compares_steps_that_agree(folder, tmp_path, capsys, monkeypatch):
    """The first in a process of its own, as all are; the others here, without the seconds that importing takes."""
    apart = step._in_a_process

    def measure(settings: step.Settings, variant: str, first: step.Outcome | None) -> step.Outcome:
        if first is None:
            return apart(settings, variant, first)
        return step.measure(settings, variant, (first.loss, first.gradient_norm))

    monkeypatch.setattr(step, "_in_a_process", measure)
    out = tmp_path / "new" / "step.json"
    assert main(["bench", "step", "--model", str(folder), "--queries", "2", "--repeats", "1", "--out", str(out)]) == 0
    result, told = json.loads(out.read_text()), capsys.readouterr().out
    variants = result["variants"]
    assert list(variants) == list(step.VARIANTS) and all(name in told for name in variants)
    assert torch.__version__ in told and result["settings"]["queries"] == "2"
    assert [row["sweeps"] for row in variants.values()] == [3, 2 * 3 + 1, 3, 2 * 3 + 1]
    for name, row in variants.items():
        assert 0 < row["p20_s"] == row["p50_s"] == row["p80_s"] and row["peak_gib"] > 0
        assert row["loss"] == pytest.approx(variants["ours"]["loss"], rel=step.LOSS_TOLERANCE)
        assert (row["ratio"] == 1) == name.startswith("ours")
    # K = 3, 2 queries and 4 passages: two soft tokens per row, and no pads.
    ours, published = variants["ours"], variants["published"]
    assert ours["layer_tokens"] == result["packed_tokens"] + 2 * 6 and ours["head_tokens"] == 2 * 6
    assert published["head_tokens"] == published["layer_tokens"] > ours["layer_tokens"]
    assert variants["published, checkpointing"]["layer_tokens"] > 2 * published["layer_tokens"] - ours["layer_tokens"]
    for key in ("layer_tokens", "head_tokens"):
        assert variants["ours, checkpointing"][key] == ours[key]


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_reports_nothing_when_a_loss_is_wrong(folder, tmp_path, monkeypatch, one_process, capsys, wrong):
    right = PublishedStep.views
    monkeypatch.setattr(PublishedStep, "views", lambda *a: (v := right(*a))._replace(teacher_BD=v.teacher_BD * wrong))
    out = tmp_path / "step.json"
    assert main(["bench", "step", "--model", str(folder), "--queries", "2", "--repeats", "1", "--out", str(out)]) != 0
    told = capsys.readouterr()
    assert not out.exists() and "p50" not in told.out and told.out == ""
    assert "published: its loss is" in told.err


def test_reports_nothing_when_a_gradient_is_wrong(folder, monkeypatch, one_process, capsys):
    """A loss alone would not show it."""
    right = PublishedStep.views
    monkeypatch.setattr(PublishedStep, "views", lambda *a: (v := right(*a))._replace(passage_PD=v.passage_PD.detach()))
    assert main(["bench", "step", "--model", str(folder), "--queries", "2", "--repeats", "1"]) != 0
    told = capsys.readouterr()
    assert told.out == "" and "gradient norm" in told.err


def test_needs_a_backbone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "step"]) == 2
    assert "laser-dist quickstart" in capsys.readouterr().err


def test_failure_of_a_variants_process_is_told(tmp_path, capsys):
    assert main(["bench", "step", "--model", str(tmp_path / "missing")]) == 2
    assert "this folder does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, code", [([], 2), (["--help"], 0), (["stepp"], 2)])
def test_usage(arguments, code, capsys):
    assert main(["bench", *arguments]) == code
    told = capsys.readouterr()
    assert "laser-dist bench step" in told.out + told.err


def test_bad_value(capsys):
    assert main(["bench", "step", "--repeats", "0"]) == 2
    assert "--repeats = 0: must be at least 1" in capsys.readouterr().err
