"""The latency benchmark: it reports what it measured, and nothing when the ways of encoding disagree."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from laser_dist.bench import latency, latency_report, latency_variants
from laser_dist.bench.latency import PASS, REWRITE, Cell, Settings, Timed
from laser_dist.bench.latency_variants import SIZES, Variants, load_lm
from laser_dist.cli import main
from laser_dist.model.retriever import LaserRetriever
from laser_dist.testing import tiny_model_folder
from laser_dist.testing.published import PublishedStep

SMALL = ["--lengths", "5", "9", "--batches", "1", "3", "--steps", "1", "3", "--repeats", "2"]
SMALL += ["--rewrite-tokens", "3", "--rewrite-lengths", "9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), architecture="qwen3")


@pytest.fixture
def variants(folder: Path) -> Variants:
    return Variants(load_lm(Settings(model=str(folder))))


@pytest.fixture(autouse=True)
def small_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast memory is read is not what is tested."""
    monkeypatch.setattr(latency_variants, "_read_bytes_per_second", lambda device: 1e9)


def test_measures_and_reports(folder, tmp_path, capsys):
    out, plot = tmp_path / "new" / "latency.json", tmp_path / "new" / "latency.png"
    assert main(["bench", "latency", "--model", str(folder), *SMALL, "--out", str(out), "--plot", str(plot)]) == 0
    result, told = json.loads(out.read_text()), capsys.readouterr().out
    assert [(cell["batch"], cell["length"]) for cell in result["cells"]] == [(1, 5), (1, 9), (3, 5), (3, 9)]
    for cell in result["cells"]:
        rewritten = [REWRITE] if cell["length"] == 9 else []
        assert list(cell["variants"]) == [PASS, "K = 1", "K = 3", *rewritten]
        for name, row in cell["variants"].items():
            assert row["calls"] == (1 if name == REWRITE else 2)
            assert 0 < row["wall_s"]["p20"] <= row["wall_s"]["p50"] <= row["wall_s"]["p80"] <= row["wall_s"]["p95"]
            assert name != PASS or row["ratio"] == {"p20": 1, "p50": 1, "p80": 1, "p95": 1}
    assert len(result["agreement"]) == 5 and max(result["agreement"].values()) <= latency_variants.TOLERANCE
    assert 0 <= result["rounding"] < 1e-3 and torch.__version__ in told and "K = 3" in told
    # Two layers, an LM head and a table, tied, in float32.
    layer = 48 * (64 + 2 * 32) + 64 * 48 + 3 * 48 * 96 + 2 * 48 + 2 * 16
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size * 48
    assert result["step_traffic"]["layer_bytes"] == 2 * layer * 4
    assert result["step_traffic"]["vocabulary_bytes"] == 2 * vocabulary * 4
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_variants_are_one_set_of_weights(variants):
    """A copy would double the memory, and could differ."""
    theirs = dict(variants.plain.named_parameters())
    assert all(parameter is theirs[name] for name, parameter in variants.retriever.lm.named_parameters())
    assert variants.plain.config._attn_implementation == "sdpa" != variants.retriever.lm.config._attn_implementation
    variants.to(torch.float64)
    assert variants.one_pass(variants.rows([4])).dtype == variants.laser(variants.rows([4]), 2).dtype == np.float64


def test_rewriting_is_greedy_generation_and_one_pass(folder, variants):
    """Against a loop without a cache. An end token must not make a rationale shorter, nor its time."""
    variants.to(torch.float64)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    eos = lm.config.eos_token_id
    lm.get_output_embeddings().weight.data[eos] += 5  # the likeliest token by far, were it allowed
    variants.plain.get_output_embeddings().weight.data[eos] += 5
    (row,) = variants.rows([7])
    longer = list(row)
    for _ in range(4):
        logits = lm(input_ids=torch.tensor([longer])).logits[0, -1]
        logits[eos] = -math.inf
        longer.append(int(logits.argmax()))
    assert variants.generate([row], 4)[0].tolist() == longer
    np.testing.assert_array_equal(variants.rewrite([row], 4), variants.one_pass([longer]))


def _ungreedy(right):
    def generate(self, rows, tokens):
        found = right(self, rows, tokens)
        found[:, -1] = (found[:, -1] + 1) % self.plain.config.vocab_size
        return found

    return generate


def _batch_matters(right):
    def forward(self, batch):
        views = right(self, batch)
        return views._replace(passage_PD=views.passage_PD * (1.001 if len(views.passage_PD) == 1 else 1))

    return forward


def _steps_matter(right):
    def think(self, batch):
        hidden, thoughts, entropy = right(self, batch)
        return hidden, thoughts + 1e-2 * (thoughts.shape[1] - 1), entropy

    return think


WRONG = {
    "alone": (LaserRetriever, "forward", _batch_matters),
    "first K of more": (LaserRetriever, "think", _steps_matter),
    "published": (
        PublishedStep,
        "views",
        lambda right: lambda *a: (v := right(*a))._replace(query_BD=v.query_BD * 1.001),
    ),
    "one encoder pass": (Variants, "one_pass", lambda right: lambda self, rows: right(self, rows) * np.float64("nan")),
    "generated": (Variants, "generate", _ungreedy),
}


@pytest.mark.parametrize("what", WRONG)
def test_reports_nothing_when_ways_disagree(folder, tmp_path, monkeypatch, capsys, what):
    owner, name, wrong = WRONG[what]
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    monkeypatch.setattr(latency, "_measure", lambda *a: pytest.fail("was timed"))
    out = tmp_path / "latency.json"
    assert main(["bench", "latency", "--model", str(folder), *SMALL, "--out", str(out)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and not out.exists() and what in told.err and "nothing is reported" in told.err


def test_ratios_are_taken_within_a_round():
    """A machine that is three times slower in one round must not change them."""
    rounds = [{PASS: Timed(s, s), "K = 3": Timed(1.5 * s, 1.2 * s)} for s in (0.1, 0.3, 0.2)]
    rounds[0][REWRITE] = Timed(10.0, 5.0)
    row = latency_report.summarise(Cell(1, 5, rounds))["variants"]
    assert row["K = 3"]["ratio"] == pytest.approx(dict.fromkeys(("p20", "p50", "p80", "p95"), 1.5))
    assert row["K = 3"]["cpu_ratio"]["p50"] == pytest.approx(1.2)
    assert row["K = 3"]["wall_s"]["p50"] == pytest.approx(0.3)
    assert row[REWRITE]["calls"] == 1 and row[REWRITE]["ratio"]["p50"] == pytest.approx(100)


@pytest.mark.parametrize("cpu, device, clock", [(0.19, "cpu", "wall"), (0.1, "cpu", "cpu"), (0.1, "cuda", "wall")])
def test_a_busy_machine_is_noticed(cpu, device, clock):
    """Wall time then ranks the other work: 8 steps took 0.6 of one pass. A process that waits for a GPU is not busy."""
    cells = [latency_report.summarise(Cell(1, 5, [{PASS: Timed(0.2, cpu)}]))]
    assert latency_report.trusted_clock(cells, device) == clock


def test_the_order_alternates(variants, monkeypatch):
    """Or whatever comes first would always find the machine cold."""
    order = []
    for name in ("one_pass", "laser", "rewrite"):
        monkeypatch.setattr(Variants, name, lambda self, rows, n=None, name=name: order.append((name, n)))
    settings = Settings(steps=(1, 2), batches=(1,), lengths=(4,), repeats=3, rewrite_tokens=6, rewrite_lengths=(4,))
    list(latency._measure(variants, settings, torch.device("cpu")))
    calls = [("one_pass", None), ("laser", 1), ("laser", 2)]
    assert order == [*calls, ("rewrite", 2), *calls, ("rewrite", 6), *calls[::-1], *calls]


@pytest.mark.parametrize(
    "name, parameters", [("qwen3-0.6b", 596_049_920), ("qwen3-4b", 4_022_468_096), ("qwen3-8b", 8_190_735_360)]
)
def test_named_sizes_are_the_real_ones(name, parameters):
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES[name]))
    assert sum(p.numel() for p in lm.parameters()) == parameters


def test_random_weights_of_a_config(folder, tmp_path, capsys):
    """Nothing but the config is needed: no weights, no tokenizer."""
    config = tmp_path / "config.json"
    config.write_bytes((folder / "config.json").read_bytes())
    one = load_lm(Settings(random_weights=str(config), layers=1))
    assert len(one.get_decoder().layers) == 1
    assert main(["bench", "latency", "--random-weights", str(tmp_path), *SMALL, "--batches", "1"]) == 0
    assert "random weights" in " ".join(capsys.readouterr().out.split())  # lines break where the terminal ends


@pytest.mark.parametrize("content, told", [("{", "is no JSON"), ('{"model_type": "vit"}', "makes no causal LM")])
def test_configs_that_cannot_be_used(tmp_path, content, told, capsys):
    config = tmp_path / "config.json"
    config.write_text(content)
    assert main(["bench", "latency", "--random-weights", str(config)]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--random-weights", "qwen3-0.6"], 'Did you mean "qwen3-0.6b"?'),
        (["--random-weights", "qwen3-0.6b", "--model", "x"], "exclude each other"),
        (["--model", "x", "--steps", "0"], "--steps 0: must be different numbers, each at least 1"),
        (["--model", "x", "--lengths", "8", "8"], "--lengths 8 8: must be different"),
        (["--model", "x", "--repeats", "0"], "--repeats 0"),
        (["--model", "x", "--rewrite-repeats", "9"], "--rewrite-repeats 9: must be from 0 to --repeats = 7"),
        (["--model", "x", "--rewrite-tokens", "-1"], "--rewrite-tokens -1"),
        (["--model", "x", "--rewrite-lengths", "100"], "--rewrite-lengths 100: is not one of --lengths"),
        (["--model", "x", "--out", "."], "is a folder"),
        (["--model", "./absent"], "this folder does not exist"),
        (["--model", "x", "--device", "cuda:7"], "torch sees"),
    ],
)
def test_user_mistakes(arguments, told, capsys):
    assert main(["bench", "latency", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_needs_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "latency"]) == 2
    assert "--random-weights qwen3-0.6b" in capsys.readouterr().err
