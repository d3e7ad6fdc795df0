"""The benchmarks of kernels/benchmarks at tiny sizes: what a row says, and that nothing wrong gets one."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "kernels" / "benchmarks"
SMALL = ["--queries", "6", "--passages", "300", "--width", "24", "--steps", "2", "--world", "2", "--repeats", "2"]

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory need Linux")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script as a module, its measurements in this process so that a test can change what is measured."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        script = importlib.import_module(name)

        def in_this_process(_: str, job: dict[str, Any]) -> dict[str, Any]:
            return json.loads(json.dumps(script.work(json.loads(json.dumps(job)))))

        monkeypatch.setattr(script, "in_a_process", in_this_process, raising=False)
        return script

    return load


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_measurement_in_its_own_process(tmp_path):
    """The command as users run it."""
    out = tmp_path / "new" / "rows.jsonl"
    command = [sys.executable, str(FOLDER / "alignment.py"), *SMALL, "--implementations", "chunked", "--out", str(out)]
    # As a script finds the files beside it, unless this variable says not to, as it does while tests run.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command += ["--repeats", "1", "--forward-only"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (row,) = rows(out)
    assert row["implementation"] == "chunked" and row["pass"] == "forward" and row["repeats"] == 1
    assert row["speedup_over_eager_fp32"] is None  # it was not measured in this run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_have_their_fields(dtype, load, tmp_path):
    out = tmp_path / "rows.jsonl"
    chosen = ["eager_fp32", "eager_bf16", "liger", "all_rows", "chunked"]
    assert load("alignment").main([*SMALL, "--dtype", dtype, "--implementations", *chosen, "--out", str(out)]) == 0
    written = rows(out)
    assert [(row["pass"], row["implementation"]) for row in written] == [
        (which, name) for which in ("forward", "forward+backward") for name in chosen
    ]
    for row in written:
        assert (row["B"], row["N"], row["D"], row["K"], row["W"]) == (6, 300, 24, 2, 2)
        assert row["torch"] == torch.__version__ and row["device"] and row["date"] and row["threads"]
        assert 0 < row["p20_s"] <= row["p50_s"] <= row["p80_s"] and row["tflops"] > 0 and row["repeats"] == 2
        assert row["peak_extra_bytes"] >= 0 and (row["gradient_bytes"] > 0) == (row["pass"] != "forward")
        if row["implementation"] == "eager_bf16":
            assert row["gate_tolerance"] is None and row["gate_error"] > 1e-3
        else:
            assert row["gate_error"] <= row["gate_tolerance"]
    assert written[0]["speedup_over_eager_fp32"] == 1


@pytest.mark.parametrize("factor", [1.001, float("nan")], ids=["a little", "not a number"])
def test_a_red_gate_has_no_row(factor, load, tmp_path, monkeypatch, capsys):
    """Of the implementation that is wrong; the others keep theirs, and the exit code says that something is wrong."""
    benchmark, out = load("alignment"), tmp_path / "rows.jsonl"
    known = benchmark.IMPLEMENTATIONS
    wrong = benchmark.Implementation("wrong", lambda *a: known["eager_fp32"].loss(*a) * factor, lambda s: 0)
    monkeypatch.setitem(known, "chunked", wrong)
    options = ["--implementations", "eager_fp32", "chunked", "--out", str(out)]
    assert benchmark.main([*SMALL, *options]) == 1
    assert {row["implementation"] for row in rows(out)} == {"eager_fp32"}
    assert "off the float64 reference" in capsys.readouterr().err


def test_an_inexact_implementation_needs_a_right_formula(load, tmp_path, monkeypatch):
    benchmark, out = load("alignment"), tmp_path / "rows.jsonl"
    inexact = benchmark.IMPLEMENTATIONS["eager_bf16"]
    wrong = benchmark.Implementation("wrong", inexact.loss, lambda s: 0, formula=lambda r: inexact.formula(r) * 1.001)
    monkeypatch.setitem(benchmark.IMPLEMENTATIONS, "eager_bf16", wrong)
    assert benchmark.main([*SMALL, "--implementations", "eager_bf16", "--out", str(out)]) == 1
    assert not rows(out)


def test_what_would_not_fit_is_not_run(load, tmp_path, capsys):
    benchmark, out = load("alignment"), tmp_path / "rows.jsonl"
    sizes = ["--queries", "1024", "--passages", "1048576", "--width", "1024", "--memory-gib", "12"]
    options = ["--implementations", "eager_fp32", "all_rows", "--forward-only", "--out", str(out)]
    assert benchmark.main([*sizes, *options]) == 0
    for row, needed in zip(rows(out), (140.0, 1077.0), strict=True):  # GiB
        assert row["not_run"].endswith(" of 12.0 GiB") and "p50_s" not in row
        assert float(row["not_run"].split()[2]) == pytest.approx(needed, rel=0.05)
    assert "not run: would take" in capsys.readouterr().out


def test_the_published_scheme_needs_as_many_passages_as_rows(load, tmp_path):
    benchmark, out = load("alignment"), tmp_path / "rows.jsonl"
    options = ["--world", "64", "--implementations", "all_rows", "triton", "--out", str(out), "--forward-only"]
    assert benchmark.main([*SMALL, *options]) == 0
    reasons = ["64 ranks of 6 queries have more than 300 passages", "needs an NVIDIA GPU"]
    found = [row.get("not_run") for row in rows(out)]
    assert found == reasons if not torch.cuda.is_available() else found[:1] == reasons[:1]


def test_useful_work_does_not_depend_on_the_implementation(load):
    """At K = 3 16 B N D forward and 20 B N D backward; what is computed twice, or for other ranks, does not count."""
    benchmark = load("alignment")
    shape = benchmark.Shape(B=2, N=3, D=5, K=3, W=8, itemsize=4)
    assert benchmark.useful_flops(shape, "forward") == 16 * 2 * 3 * 5
    assert benchmark.useful_flops(shape, "forward+backward") == 36 * 2 * 3 * 5


@pytest.mark.parametrize(
    "options, message",
    [
        (["--implementations", "fast"], "--implementations fast: choose from eager_fp32"),
        (["--dtype", "int8"], "--dtype int8: choose from float32, bfloat16"),
        (["--passages", "0"], "--passages: must be at least 1"),
    ],
)
def test_unknown_options_are_named(options, message, load, capsys):
    assert load("alignment").main(options) == 2
    assert message in capsys.readouterr().err


def test_a_plot_is_drawn(load, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "rows.png"
    chosen = ["--implementations", "eager_fp32", "chunked", "triton"]
    assert load("alignment").main([*SMALL, "--passages", "100", "300", *chosen, "--plot", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_nothing_is_measured_in_vain(load, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert load("alignment").main([*SMALL, "--plot", str(tmp_path / "rows.png")]) == 2
    shown = capsys.readouterr()
    assert "pip install matplotlib" in shown.err and not shown.out


SMALL_TOKENS = ["--rows", "5", "--vocabulary", "300", "--width", "16", "--repeats", "2"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_soft_tokens_three_ways(dtype, load, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert load("soft_token").main([*SMALL_TOKENS, "--dtype", dtype, "--out", str(out)]) == 0
    assert [row["way"] for row in rows(out)] == ["plain", "checkpoint", "streamed"]
    for row in rows(out):
        assert (row["R"], row["V"], row["D"], row["dtype"]) == (5, 300, 16, dtype)
        assert row["p50_s"] > 0 and row["peak_extra_bytes"] >= 0 and row["gate_error"] >= 0


def test_wrong_soft_tokens_have_no_row(load, tmp_path, monkeypatch, capsys):
    benchmark, out = load("soft_token"), tmp_path / "rows.jsonl"
    right = benchmark.soft_token
    monkeypatch.setattr(
        benchmark, "soft_token", lambda way, *a, **k: right(way, *a, **k) * (1.001 if way == "streamed" else 1)
    )
    assert benchmark.main([*SMALL_TOKENS, "--out", str(out)]) == 1
    assert not rows(out) and "streamed" in capsys.readouterr().err


def test_streamed_soft_tokens_report_the_same_entropy(load):
    benchmark = load("soft_token")
    state_RD, embedding = benchmark._inputs(7, 1037, 16, torch.float64, torch.device("cpu"))
    expected = benchmark.SoftToken(embedding)(state_RD @ embedding.weight.T)
    found = benchmark.StreamedSoftToken.apply(state_RD, embedding.weight, 100)
    torch.testing.assert_close(found, expected)
