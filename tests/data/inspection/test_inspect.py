"""`laser-dist inspect`: what it prints and writes, what it refuses, and that it reads as little as it may."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from laser_dist.cli import main
from laser_dist.data import shards as shards_module
from laser_dist.data.schema import Example, Passage
from laser_dist.data.shards import write_shards
from laser_dist.testing import tiny_model_folder

EXAMPLES = 24


def example(number: int) -> Example:
    rationale = "\n\n".join(
        ["The problem is density.", "Ice is less dense than water.", "So it floats."][: 1 + number % 3]
    )
    passages = (
        Passage(f"p{number}", f"Ice {number} holds its molecules apart."),
        Passage(f"n{number}", f"Lake {number}."),
    )
    made = Example(f"q{number}", f"{number}: why does ice float?", rationale, passages[:1], passages[1:])
    return replace(made, query="<b>why</b> does ice float?", rationale=rationale * 2) if number % 8 == 5 else made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model_folder(tmp_path_factory.mktemp("model"), architecture="qwen3", chat_template=True))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("data") / "shards"
    write_shards(map(example, range(EXAMPLES)), out, source="test", shard_examples=5)
    return str(out)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that were read."""
    names: list[str] = []
    original = shards_module.read_shard

    def spy(folder: object, shard: shards_module.Shard) -> list[bytes]:
        names.append(shard.name)
        return original(folder, shard)  # type: ignore[arg-type]

    monkeypatch.setattr(shards_module, "read_shard", spy)
    return names


def inspect_json(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    assert main(["inspect", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_prints_examples_and_the_findings_about_all(shards, model, capsys, opened):
    assert main(["inspect", shards, "--model", model, "--show", "2"]) == 0
    told = capsys.readouterr().out
    assert told.count("latent view of the query") == 2 and "example q0" in told and "example q23" in told
    assert "24 examples" in told and "M < K = 3: 15 rationales (62.5%)" in told
    assert "HTML" in told and "3 rows (12.50%) show at least one sign" in told
    assert "repeated query" in told and "\x1b" not in told
    assert opened == [f"shard-{n:06d}.tar" for n in range(5)], "each shard once"


def test_json_is_one_value_with_the_examples(shards, model, capsys):
    report = inspect_json(capsys, shards, "--model", model)
    assert report["examples"] == report["read"] == EXAMPLES
    assert report["lengths"]["passage"]["texts"] == 2 * EXAMPLES
    html = next(rule for rule in report["suspicious"]["rules"] if rule["name"] == "HTML")
    assert html["rows"] == 3 and html["examples"] == ["q5", "q13", "q21"] and "tags" in html["statement"]
    (shown,) = report["shown"]
    assert shown["query_id"] == "q0"
    assert sum(p["tokens"] for p in shown["rows"][0]["parts"]) == shown["rows"][0]["tokens"]


def test_the_recipe_decides_and_flags_override_it(shards, model, tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[model]\nname = "{model}"\n[thinking]\nsteps = 2\n'
        "[text]\nmax_query_tokens = 40\nmax_explicit_tokens = 50\nmax_passage_tokens = 64\n"
    )
    report = inspect_json(capsys, shards, "--recipe", str(recipe), "--text.max-passage-tokens", "30")
    assert [row["limit"] for row in report["lengths"].values()] == [40, None, 50, 30]
    assert report["lengths"]["query"]["cut_share"] == 1 and report["lengths"]["passage"]["cut_share"] == 0.5
    assert report["thinking"]["steps"] == 2 and report["tokenizer"] == model
    assert any(part["kind"] == "cut off" for part in report["shown"][0]["rows"][0]["parts"])


def test_a_contrastive_recipe_needs_no_rationale(model, tmp_path, capsys):
    write_shards([replace(example(0), rationale="")], tmp_path / "shards", source="test")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[model]\nname = "{model}"\n[objective]\nexplicit_weight = 0.0\noutput_weight = 0.0\ntrajectory_weight = 0.0\n'
    )
    report = inspect_json(capsys, str(tmp_path / "shards"), "--recipe", str(recipe))
    assert report["segments"]["rationales"] == 0
    assert [row["title"].split()[0] for row in report["shown"][0]["rows"]] == ["latent", "positive", "negative"]
    assert main(["inspect", str(tmp_path / "shards"), "--recipe", str(recipe)]) == 0


def test_one_example_by_id_reads_no_further_than_it(shards, model, capsys, opened):
    assert main(["inspect", shards, "--model", model, "--example", "q7"]) == 0
    told = capsys.readouterr().out
    assert "example q7" in told and "Suspicious" not in told and opened == ["shard-000000.tar", "shard-000001.tar"]
    assert main(["inspect", shards, "--model", model, "--example", "q99"]) == 2
    assert 'has the query_id "q99"' in capsys.readouterr().err


def test_a_sample_is_always_the_same_and_reads_only_its_shards(shards, model, capsys, opened):
    reports = [inspect_json(capsys, shards, "--model", model, "--sample", "3", "--show", "9") for _ in range(2)]
    ids = [[shown["query_id"] for shown in report["shown"]] for report in reports]
    assert ids[0] == ids[1] and len(set(ids[0])) == reports[0]["read"] == 3 and reports[0]["examples"] == EXAMPLES
    assert len(opened) == 2 * len({int(name[1:]) // 5 for name in ids[0]})
    assert inspect_json(capsys, shards, "--model", model, "--sample", "999")["read"] == EXAMPLES


def test_charts_and_tensorboard_hold_the_findings(shards, model, tmp_path, capsys):
    out = tmp_path / "new" / "report"
    arguments = ["inspect", shards, "--model", model, "--out", str(out), "--show", "2"]
    assert main(arguments) == 0
    report = json.loads((out / "report.json").read_text())
    for name in ("lengths.png", "segments.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG") and (out / name).stat().st_size > 10_000
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {"inspect/lengths", "inspect/segments"} and len(tags["tensors"]) == 2
    for field in ("query", "rationale", "query + rationale", "passage"):
        histogram = events.Histograms(f"inspect/tokens/{field.replace(' + ', '_and_')}")[0].histogram_value
        found = report["lengths"][field]
        assert histogram.num == sum(histogram.bucket) == found["texts"] and histogram.max == found["max"]
        assert histogram.sum / histogram.num == pytest.approx(found["mean"])
    assert events.Scalars("inspect/fewer_segments_than_steps")[0].value == 0.625
    assert b"why does ice float" in events.Tensors("inspect/example_0/text_summary")[0].tensor_proto.string_val[0]
    assert sorted(path.name for path in out.parent.iterdir()) == ["report"], "nothing else is left"

    assert main(arguments) == 2 and "not empty" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    (out / "thesis.tex").write_text("years of work")
    assert main([*arguments, "--overwrite"]) == 2 and "thesis.tex" in capsys.readouterr().err
    assert (out / "thesis.tex").exists()


def test_a_report_that_cannot_be_written_leaves_the_old_one(shards, model, tmp_path, monkeypatch, capsys):
    from laser_dist.data.inspection import report as report_module

    arguments = ["inspect", shards, "--model", model, "--out", str(tmp_path / "report")]
    assert main(arguments) == 0

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_module, "_write_tensorboard", full)
    assert main([*arguments, "--overwrite"]) == 2 and "No space left" in capsys.readouterr().err
    assert (tmp_path / "report" / "report.json").is_file() and len(list(tmp_path.iterdir())) == 1


def test_without_matplotlib_out_is_refused_before_anything_is_read(
    shards, model, tmp_path, monkeypatch, capsys, opened
):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    assert main(["inspect", shards, "--model", model, "--out", str(tmp_path / "report")]) == 2
    assert "pip install 'laser-dist[plots]'" in capsys.readouterr().err and not opened
    assert main(["inspect", shards, "--model", model]) == 0, "without --out it is not needed"


def test_suspicious_rows_fail_a_pipeline_that_asks_for_it(shards, model, capsys):
    assert main(["inspect", shards, "--model", model, "--fail-on-suspicious", "0.125"]) == 0
    assert main(["inspect", shards, "--model", model, "--fail-on-suspicious", "0.1"]) == 1
    assert "12.50% of the rows are suspicious, more than the 10.00% allowed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the folder of shards first"),
        (["SHARDS", "--show", "-1"], "--show -1: must be 0 or more"),
        (["SHARDS", "--sample", "0"], "--sample 0: must be at least 1"),
        (["SHARDS", "--fail-on-suspicious", "5"], "is a share of the rows"),
        (["SHARDS", "--example", "q1", "--sample", "3"], "--example shows one example and measures nothing"),
        (["SHARDS", "--recipe", "missing.toml"], "recipe missing.toml does not exist"),
        (["missing/"], "missing/"),
        (["SHARDS", "--text.max-explicit-tokens", "100"], "must exceed text.max_query_tokens"),
        (["SHARDS", "--out", "FILE"], "is a file"),
    ],
)
def test_mistakes_are_told_in_one_message(shards, model, tmp_path, capsys, arguments, message):
    (tmp_path / "file").touch()
    filled = [{"SHARDS": shards, "FILE": str(tmp_path / "file")}.get(argument, argument) for argument in arguments]
    assert main(["inspect", *filled, "--model", model]) == 2
    told = capsys.readouterr()
    assert message in told.err and "Traceback" not in told.err and told.out == ""


def test_needs_a_model(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", shards]) == 2
    assert "--model NAME_OR_FOLDER, or --recipe FILE" in capsys.readouterr().err


def test_a_damaged_shard_is_named(shards, model, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in Path(shards).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    path = copy / "shard-000002.tar"
    path.write_bytes(path.read_bytes().replace(b"molecules", b"molecuIes"))
    assert main(["inspect", str(copy), "--model", model]) == 2
    assert f"shard {path} is damaged" in capsys.readouterr().err


def test_help_is_quick_and_shows_examples():
    code = (
        "import sys; from laser_dist.cli import main\n"
        "try: main(['inspect', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    seconds = []  # of its own, whatever else the machine does
    for _ in range(2):  # the first writes byte code
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        env = os.environ | {"COLUMNS": "120"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "laser-dist inspect shards/ --recipe recipe.toml" in done.stdout and done.stdout.endswith("[]\n")
    assert min(seconds) < 1
