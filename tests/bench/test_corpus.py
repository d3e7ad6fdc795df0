"""The benchmark of a large corpus, in small: killed, continued on two ranks, compared, searched."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from laser_dist.bench import corpus
from laser_dist.bench.corpus import FILES, Settings, main, measure
from laser_dist.errors import UserError
from laser_dist.testing.commands import popen


@pytest.mark.slow
def test_killed_and_continued(tmp_path, capsys, monkeypatch):
    """Encoded by forked processes, whose peak is also that of what they were forked from."""
    forked = SimpleNamespace(Popen=popen, run=subprocess.run, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(corpus, "subprocess", forked)
    out = tmp_path / "corpus.json"
    flags = ["--passages", "1500", "--chunk", "64", "--kills", "1", "--queries", "20", "--scratch", str(tmp_path)]
    assert main([*flags, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert set(result["sha256"]) == set(FILES) and result["bytes"] == 128 + 1500 * 48 * 4
    assert [run["ranks"] for run in result["killed"]] == [1, 2] and result["killed"][1]["killed_at"] is None
    assert result["search"]["queries"] == 20 and result["whole"]["peak_mib"] > 50
    assert "the same bytes" in " ".join(capsys.readouterr().out.split())
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.json"]


def test_other_bytes_are_not_reported(tmp_path, monkeypatch):
    def encode(settings, folder, out, **_):
        (folder / out).mkdir(exist_ok=True)
        for name in FILES:
            (folder / out / name).write_text(f"{out}" if name == "vectors.npy" else "same")
        return {}

    monkeypatch.setattr(corpus, "_encode", encode)
    with pytest.raises(UserError, match="vectors.npy has other bytes: nothing is reported"):
        measure(Settings(passages=10, chunk=2, kills=1), tmp_path)


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--passages", "0"], "--passages 0"),
        (["--kills", "3", "--passages", "100", "--chunk", "50"], "--kills 3: must be fewer than the chunks, 2"),
        (["--ranks", "0"], "--ranks 0"),
        (["--words", "0", "3"], "--words 0 3"),
    ],
)
def test_wrong_settings_are_refused(flags, complaint):
    with pytest.raises(UserError, match=complaint):
        main(flags)
