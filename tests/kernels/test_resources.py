"""The kernels compile for Hopper without a GPU: no spills, shared memory within the limit, tensor cores in use."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "kernels" / "benchmarks" / "resources.py"


# Of each kernel: as training uses it, in the widest type, and with all that can be asked of it.
SOME = (
    *(f"{kernel}, {kind}" for kernel in ("statistics", "score_gradients") for kind in (
        "bf16, P 4096", "fp32, P 4096", "bf16, P 4096, margin, two temperatures, running shift, ragged D")),
    "latent attention forward, bf16, 2 queries a head of 128",
    "latent attention backward, bf16, 2 queries a head of 128",
)  # fmt: skip


@pytest.mark.parametrize("only", [SOME, pytest.param((), marks=pytest.mark.long)], ids=["some", "all"])
def test_variants_compile_for_sm_90_without_spills(tmp_path, only):
    """What the interpreter accepts, the compiler may not: types that change in a loop, names that change their type."""
    if not importlib.util.find_spec("triton"):
        pytest.skip("needs triton: pip install 'laser-dist[kernels]'")
    out = tmp_path / "resources.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")  # compile, whatever was compiled before
    command = [sys.executable, str(SCRIPT), "--out", str(out), *(["--only", *only] if only else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["variant"] for row in rows] == list(only) if only else len(rows) > 20
    for row in rows:
        assert row["spilled_bytes"] == 0, row
        assert row["shared_bytes"] <= 227 * 1024, row
        if "latent attention" not in row["variant"]:  # 16 queries a tile are too few for wgmma, and memory is its limit
            assert row["wgmma"] == ("fp32" not in row["variant"]), row
