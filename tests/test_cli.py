"""The front door: help is quick, wrong input gets one message, and a reader may leave."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from laser_dist import cli
from laser_dist.bench import BENCHMARKS

ROOT = Path(__file__).parents[1]
ALL = [[name] for name in cli.COMMANDS] + [["bench", name] for name in BENCHMARKS]

# One process, which forks for each command: what a command imports is its own.
_HELPS = """
import io, json, os, sys, time
import tyro, rich.console  # what nearly all of them need, once; neither is heavy
from laser_dist.cli import main
for words in json.loads(sys.argv[1]):
    if os.fork():
        os.wait()
        continue
    out, sys.stdout, code = sys.stdout, io.StringIO(), None
    began = time.process_time()
    try:
        code = main([*words, "--help"])
    except SystemExit as stop:
        code = stop.code
    seconds = time.process_time() - began
    heavy = sorted({"torch", "transformers", "deepspeed", "datasets", "matplotlib"} & set(sys.modules))
    print(json.dumps([words, code, heavy, seconds, sys.stdout.getvalue()]), file=out, flush=True)
    os._exit(0)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "100"}


def test_help_of_every_command_is_quick_and_has_examples() -> None:
    """Quick: nothing heavy is imported. Seconds of CPU are bounded far above what they are (about 0.2)."""
    done = subprocess.run(
        [sys.executable, "-c", _HELPS, json.dumps(ALL)], env=environment(), capture_output=True, text=True, timeout=300
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [words for words, *_ in told] == ALL, done.stderr[-3000:]
    wrong = [words for words, code, heavy, _, _ in told if code != 0 or heavy]
    assert not wrong, [(words, code, heavy) for words, code, heavy, _, _ in told if words in wrong]
    assert not [words for words, *_, text in told if "laser-dist" not in text or "xample" not in text]
    assert max(seconds for *_, seconds, _ in told) < 10


# What must stand before a flag can be unknown: tyro tells what is missing first.
REQUIRED = {
    "report": ["runs/first"],
    "search": ["--vectors", "v"],
    "explain": ["--model", "m", "--query", "q"],
    "replay": ["runs/first/alarms/step-000001"],
    "study": ["study.toml"],
    "dataset": ["entailmentbank", "--source", "s", "--out", "o"],
    "export": ["runs/first", "--out", "o"],
}
FLAGS = {
    "train": "--optimizer.learning-rate",
    "launch": "--max-restarts",
    "quickstart": "--max-steps",
    "doctor": "--output",
    "report": "--against",
    "compare": "--metric",
    "plan": "--lora-rank",
    "export": "--dtype",
}


@pytest.mark.parametrize("words", [words for words in ALL if words != ["bench"]], ids=" ".join)
def test_a_misspelt_flag_is_answered_with_the_right_one(words: list[str], capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    flag = FLAGS.get(words[0], "--out")
    wrong = flag[:-1] + "x" + flag[-1]
    try:
        code = cli.main([*words, *REQUIRED.get(words[0], []), wrong, "1"])
    except SystemExit as stop:
        code = stop.code
    told = capsys.readouterr().err
    assert code == 2
    assert re.search(rf"{flag}\b", told) and wrong in told


def test_misspelt_benchmark(capsys) -> None:
    assert cli.main(["bench", "stp"]) == 2
    assert 'Did you mean "step"?' in capsys.readouterr().err


def test_misspelt_command(capsys) -> None:
    assert cli.main(["trian"]) == 2
    told = capsys.readouterr()
    assert 'unknown command "trian". Did you mean "train"?' in told.err and told.out == ""


def test_version_and_no_command(capsys) -> None:
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.startswith("laser-dist ")
    assert cli.main([]) == 2 and "usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["--help"], ["bench", "--help"], ["train", "--help"], ["launch", "--help"]], ids=" ".join
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error(words: list[str], unbuffered: str) -> None:
    """`laser-dist train --help | head -1`: the pipe is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "laser_dist.cli", *words],
        env=environment() | {"PYTHONUNBUFFERED": unbuffered},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_failure_is_told_also_when_the_reader_has_left() -> None:
    """Output that nobody reads must not turn an error into silence."""
    code = (
        "import sys; from laser_dist import cli\n"
        "class Module:\n"
        "    def main(_):\n"
        "        sys.stdout.write('unread'); raise RuntimeError('a real one')\n"
        "sys.modules['laser_dist.fake'] = Module\n"
        "cli.run('laser_dist.fake', [])"
    )
    reading, writing = os.pipe()
    os.close(reading)
    buffered = environment() | {"PYTHONUNBUFFERED": ""}  # or the pipe would break before the error
    done = subprocess.run([sys.executable, "-c", code], env=buffered, stdout=writing, stderr=-1, text=True)
    os.close(writing)
    assert "RuntimeError: a real one" in done.stderr and done.returncode not in (0, 141)


def test_another_broken_pipe_is_an_error(monkeypatch) -> None:
    class Module:
        @staticmethod
        def main(_: list[str]) -> int:
            raise BrokenPipeError("a program that we started has gone")

    monkeypatch.setitem(sys.modules, "laser_dist.fake", Module)
    with pytest.raises(BrokenPipeError):
        cli.run("laser_dist.fake", [])


@pytest.mark.parametrize(
    "words, told",
    [
        ("train {r} --output {file}", "output = .*file.*is a file: choose another"),
        ("train {r} --output {file}/below", "output = .*is a file: choose another"),
        ("train --output o {r}", "the recipe stands first: laser-dist train .*r.toml"),
        ("train {folder} --output o", "cannot be read .Is a directory.: give a TOML file"),
        ("launch --num_gpus two {r} --output o", "--num_gpus two: must be a whole number"),
        ("launch --hostfile {binary} {r} --output o", "--hostfile .*binary: cannot be read as UTF-8"),
        ("plan --model 4B --gpu h100 --out {file}/below", "file/below.*: Not a directory: check the path"),
        ("evaluate --model m --data d --out {file}/r.json", "--out .*is a file: choose another folder"),
        ("compare {binary} {binary} --bm25", "twice|not even text"),
        ("compare {binary} --bm25", "not even text"),
        ("quickstart --max-steps 0", "--max-steps 0: must be at least 1"),
        ("quickstart --out {file}", "--out .*is a file"),
        ("report {folder} --out {folder}", "--out .*is a folder"),
        ("doctor {folder}/none.toml", "none.toml does not exist"),
        ("bench nope", 'unknown benchmark "nope"'),
    ],
)
def test_wrong_input_gets_one_message(words: str, told: str, tmp_path: Path, capsys, monkeypatch) -> None:
    """What was a traceback, an unclear word of a library, or minutes of work before the message."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/manifest.json").write_text("{}")
    (tmp_path / "r.toml").write_text(
        '\ufeff[model]\nname = "m"\n[data]\ntrain = "shards"\n'
    )  # with a mark, as from Windows
    names = {name: str(tmp_path / name) for name in ("file", "folder", "binary")} | {"r": "r.toml"}
    try:
        code = cli.main(words.format(**names).split())
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code in (1, 2) and re.search(told, said), said
    assert "Traceback" not in said and len(said) < 2500


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch) -> None:
    class Module:
        error: OSError = FileNotFoundError(2, "No such file", "somewhere")

        @classmethod
        def main(cls, _: list[str]) -> int:
            raise cls.error

    monkeypatch.setitem(sys.modules, "laser_dist.fake", Module)
    assert cli.run("laser_dist.fake", []) == 1
    monkeypatch.setenv("LASER_DIST_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        cli.run("laser_dist.fake", [])
    monkeypatch.delenv("LASER_DIST_TRACEBACK")
    Module.error = OSError(9, "Bad file descriptor")
    with pytest.raises(OSError, match="Bad file descriptor"):
        cli.run("laser_dist.fake", [])
