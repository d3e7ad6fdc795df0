import json
from pathlib import Path

import pytest

from laser_dist.bench import BENCHMARKS, reliability
from laser_dist.bench.reliability import PARTS, TESTS, Part
from laser_dist.cli import main


def test_what_held_stays_and_what_did_not_is_run_again(tmp_path: Path, monkeypatch, capsys) -> None:
    quick = ("faults", "--list", "--only", "killed | save")
    good = Part("help is there", ("faults", "--list"), quick, r"killed \| save")
    bad = Part("values are checked", ("killed-runs", "--kills", "0"), ("killed-runs", "--kills", "0"), "kills")
    monkeypatch.setattr(reliability, "PARTS", {"good": good, "bad": bad})
    command = ["bench", "reliability", "--out", str(tmp_path), "--quick"]
    assert main(command) == 1
    table = (tmp_path / "reliability.md").read_text()
    assert r"| help is there | `faults --list --only killed \| save` | yes | killed \| save, step 4 \| rank 1" in table
    assert "| values are checked | `killed-runs --kills 0` | no |  |" in table
    assert "--kills 0: must be at least 1" in (tmp_path / "bad.log").read_text()
    capsys.readouterr()
    held = json.loads((tmp_path / "bad.held.json").read_text()) | {"code": 0}
    (tmp_path / "bad.held.json").write_text(json.dumps(held))
    assert main(command) == 0 and "laser-dist bench" not in capsys.readouterr().out


def test_parts_are_benchmarks_or_tests_that_exist(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for part in PARTS.values():
        name, *rest = part.quick
        assert all((TESTS / path).exists() for path in rest) if name == "pytest" else name in BENCHMARKS
    assert main(["bench", "reliability", "--out", str(tmp_path), "--only", "fautls"]) == 2
    assert "faults" in capsys.readouterr().err
