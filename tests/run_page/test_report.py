"""The page of a run: made of what is there, whatever it is, and safe to open."""

import json
import math
import random
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from laser_dist.cli import main
from laser_dist.errors import UserError
from laser_dist.observability.metrics import HEALTHY, SCALARS
from laser_dist.run_page.charts import line_chart, number, thinned
from laser_dist.run_page.read import read_run
from laser_dist.run_page.report import page_at_end, write_page


def make_run(folder: Path, *, steps: int = 50, **config: object) -> Path:
    folder.mkdir(parents=True)
    draw = random.Random(0)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            row = {name: draw.random() for name in SCALARS} | {"train/positive_mean_rank": 5.0, "loss/total": 9 / step}
            file.write(json.dumps({"step": step, **row}) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({"step": step, "dev/ndcg@10": step / steps}) + "\n")
    rows = [{"event": "start", "time": 1e9, "ready": 9.0, "step": 0, "ranks": 2}]
    rows += [{"step": s, "time": 1e9 + 9 + s, "train": 0.8, "data": 0.2} for s in range(1, steps + 1)]
    rows += [{"event": "end", "time": 1e9 + 9 + steps, "step": steps, "how": "finished"}]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"name": "some/model", "lora_rank": 8} | config
    text = "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items())
    (folder / "config.toml").write_text(f'output = "{folder}"\n[model]\n{text}')
    return folder


class Checker(HTMLParser):
    """Fails for tags that do not close in order, and for whatever would be loaded or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list) -> None:
        assert tag not in ("script", "img", "link", "iframe", "object"), tag
        for name, value in attributes:
            assert not name.startswith("on") and name not in ("src", "href"), (tag, name, value)
        if tag not in ("meta", "th"):  # which need no end
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def text_of(page: Path) -> str:
    checker = Checker()
    checker.feed(page.read_text(encoding="utf-8"))
    assert not checker.open
    return checker.text


def test_every_scalar_says_what_is_healthy() -> None:
    assert set(HEALTHY) == set(SCALARS)
    assert all(len(range_.text) > 0 for range_ in HEALTHY.values())
    assert all(r.low is None or r.high is None or r.low <= r.high for r in HEALTHY.values())


def test_page_shows_curves_time_scalars_and_configuration(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    assert main(["report", str(run)]) == 0
    text = text_of(run / "run.html")
    for shown in ("train/gradient_norm", "Dev set", "data wait", "59.0 s", "67.8%", "some/model", "finished"):
        assert shown in text, shown
    assert all(HEALTHY[name].text in text for name in SCALARS)


def test_difference_to_another_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other", lora_rank=16, revision="v2")
    assert main(["report", str(one), "--against", str(other), "--out", str(tmp_path / "page.html")]) == 0
    assert "page.html" in capsys.readouterr().out and not (one / "run.html").exists()
    text = text_of(tmp_path / "page.html")
    part = text[text.index("What differs") : text.index("Configuration of")]
    assert "model.lora_rank" in part and "model.revision" in part and "unset" in part
    assert "model.name" not in part and "output" not in part
    assert (tmp_path / "page.html").read_text().count('class="line c0 other"') > 5


def test_alarms(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(51, 61):
            file.write(json.dumps({"step": step, "data/prompts_cut": 0.9, "loss/total": math.nan}) + "\n")
    (run / "quarantine.jsonl").write_text('{"shard": "s/a.tar", "reason": "damaged"}\n')
    (run / "launch/attempt-1").mkdir(parents=True)
    (run / "launch/attempt-1/rank-00001.json").write_text('{"rank": 1, "host": "b", "code": 1, "reason": "lost"}')
    (run / "launch/attempt-1/rank-00000.json").write_text('{"rank": 0, "host": "a", "code": 0}')
    (run / "alarms/step-000003").mkdir(parents=True)
    (run / "alarms/step-000003/alarm.json").write_text('{"rule": "row norm", "step": 3, "reason": "0 on rank 1"}')
    verdict = {"rank": 1, "host": "b", "step": 3, "phase": "backward", "kind": "hung", "cause": "in a collective"}
    (run / "launch/attempt-1/verdict.json").write_text(json.dumps(verdict))
    text = text_of(write_page(run))
    alarms = text[text.index("Alarms") : text.index("Attempts")]
    for said in (
        "0.9 in the last tenth",
        "loss/total",
        "s/a.tar",
        "rank 1, b: lost",
        "step 3, row norm: 0 on rank 1",
        "hung",
    ):
        assert said in alarms, said
    assert "rank 0, a" not in alarms


@pytest.mark.parametrize(
    "file, content",
    [
        ("metrics.jsonl", b'{"step": 1, "loss/total": 2.0}\n{"step": 2, "lo'),
        ("metrics.jsonl", b"\x00\xff\xfe binary\n[1, 2]\n" + b"[" * 100_000 + b"\n"),
        ("metrics.jsonl", b""),
        ("ledger.jsonl", b'{"event": "start"}\nnull\n{"step": 1e400, "time": 3}\n'),
        ("ledger.jsonl", b""),
        ("config.toml", b"not = [toml"),
        ("launch/verdict.json", b"[]"),
        ("alarms/step-1/x.json", b"{"),
        ("quarantine.jsonl", b"\xff\n"),
    ],
)
def test_damaged_files_still_give_a_page(tmp_path: Path, file: str, content: bytes) -> None:
    run = make_run(tmp_path / "one", steps=3)
    (run / file).parent.mkdir(parents=True, exist_ok=True)
    (run / file).write_bytes(content)
    assert "one" in text_of(write_page(run))


def test_nothing_that_a_run_wrote_becomes_part_of_the_page(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=y>"
    run = make_run(tmp_path / "one", name=hostile)
    (run / "quarantine.jsonl").write_text(json.dumps({"reason": hostile}) + "\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 51, f"loss/{hostile}": 1.0}) + "\n")
    assert hostile in text_of(write_page(run))
    assert "Content-Security-Policy" in (run / "run.html").read_text()


def test_ten_thousand_steps(tmp_path: Path) -> None:
    """Quick enough to be written whenever a run ends (the bound is far above what it takes), and small."""
    run = make_run(tmp_path / "long", steps=10_000)
    began = time.process_time()
    page = write_page(run)
    assert time.process_time() - began < 20
    assert page.stat().st_size < 1_500_000
    told = subprocess.run(
        [sys.executable, "-c", "import sys, laser_dist.run_page.report; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
    )
    assert told.stdout.strip() == "False"


@pytest.mark.parametrize(
    "give, told",
    [
        (lambda p: p / "none", "no such folder"),
        (lambda p: p / "runs", r"Did you mean .*runs/one"),
        (lambda p: p / "runs/one/checkpoints", r"Did you mean .*runs/one"),
        (lambda p: p / "runs/one/metrics.jsonl", "no such folder"),
    ],
)
def test_what_is_no_run(tmp_path: Path, give, told: str) -> None:
    make_run(tmp_path / "runs/one", steps=2)
    (tmp_path / "runs/one/checkpoints").mkdir()
    with pytest.raises(UserError, match=told):
        read_run(give(tmp_path))


def test_where_the_page_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path / "one", steps=2)
    for out in (tmp_path, tmp_path / "one/metrics.jsonl/page.html"):
        assert main(["report", str(run), "--out", str(out)]) == 2
        assert "Traceback" not in (told := capsys.readouterr().err) and "--out" in told


def test_a_page_that_fails_does_not_fail_the_run(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr("laser_dist.run_page.report.render", lambda *_: 1 / 0)
    with page_at_end(make_run(tmp_path / "one", steps=2)):
        pass
    assert "no run.html: ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setattr("laser_dist.run_page.report.LARGEST_AT_END", 10)
    with page_at_end(tmp_path / "one"):
        pass
    assert "laser-dist report" in capsys.readouterr().err and not (tmp_path / "one/run.html").exists()
    with pytest.raises(KeyError), page_at_end(tmp_path / "nothing"):
        raise KeyError  # what ended the run stays
    assert capsys.readouterr().err == ""


def test_thinning_keeps_spikes_and_order() -> None:
    points = [(step, 0.0) for step in range(10_000)]
    points[7_123] = (7_123, 50.0)
    kept = thinned(points)
    assert (
        len(kept) <= 602
        and (7_123, 50.0) in kept
        and kept == sorted(kept)
        and (kept[0], kept[-1]) == (points[0], points[-1])
    )


@pytest.mark.parametrize("values", [[0.0], [1.0, 1.0], [-3.0, 5.0], [1e-9, 1e9], [1e-300, 2e-300], [5e300, -5e300]])
@pytest.mark.parametrize("log", [False, True])
def test_charts_of_any_values_stay_inside_their_frame(values: list[float], log: bool) -> None:
    drawn = line_chart({"x": list(enumerate(values))}, {}, unit="s", log=log)
    ys = [float(y) for y in re.findall(r"[\d.]+,([-\d.einfa]+)", re.findall(r'points="([^"]*)"', drawn)[0])]
    assert len(ys) == len(values) and all(0 <= y <= 190 for y in ys)


@pytest.mark.parametrize(
    "value, shown", [(0.0, "0"), (12345.6, "12,346"), (1.23456, "1.235"), (1e-7, "1e-07"), (2.5e9, "2.5e+09")]
)
def test_numbers(value: float, shown: str) -> None:
    assert number(value) == shown
