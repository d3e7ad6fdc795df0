"""Every command in the documentation and in help texts is one that works.

Three tiers, and a command that fits none of them fails:

- RUN: given in a folder with a small set and a tiny model, as it stands or with the flags that PLUS adds.
- parse: the command's own parser takes it. For laser_dist's commands this holds in all tiers.
- OTHERS: programs that are not ours; what they start, if it is ours, is parsed.
"""

import contextlib
import functools
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from laser_dist import cli
from laser_dist.data import sample_folder
from laser_dist.testing import run_commands, tiny_model_folder

ROOT = Path(__file__).parents[2]

# Commands that are given as they stand, in this order, by the words they begin with; where they are documented.
RUN = (
    "laser-dist prepare --source train.jsonl --dev-share 0.02 --out shards/",
    "laser-dist prepare --check shards/",
    "laser-dist doctor --json",
    "laser-dist plan --model Qwen/Qwen3-8B --gpus 8 --out plan/",
    "laser-dist plan --model 4B --gpus 1 --gpu rtx4090 --lora-rank 64 --out plan/",
    "laser-dist inspect shards/ --out inspection/",
    "laser-dist train launchers/recipes/qwen3-0.6b.toml --data.train shards/ --output runs/first",
    "laser-dist report runs/first",
    "laser-dist evaluate --model runs/first --corpus corpus.jsonl --queries queries.jsonl --qrels qrels.tsv",
    "laser-dist export runs/first --out model/",
    "laser-dist encode --model model/ --corpus corpus.jsonl --out vectors",
    "laser-dist search --vectors vectors --model model/ --queries queries.jsonl --out run.trec --index hnsw",
    'laser-dist explain --model model/ --query "why does ice float?" --corpus corpus.jsonl --out explained/',
    "laser-dist compare results.json --bm25",
    "laser-dist mine --source rows.jsonl --corpus corpus.jsonl --out mined.jsonl --method bm25",
)  # fmt: skip
PLUS = {
    "doctor": "--port 0",
    "evaluate": "--out results.json",
    "inspect": "--model tiny",
    "train": "--model.name tiny --model.dtype float32 --train.max-steps 2 --train.queries-per-rank 2 "
    "--train.deepspeed zero0 --data.workers 0 --text.max-query-tokens 64 --text.max-explicit-tokens 128 "
    "--text.max-passage-tokens 64 --checkpoint.every 0",
}
OTHERS = ("git", "cd", "export", "tensorboard", "scontrol", "scancel", ".venv/bin/pre-commit", "make", "nice", "salloc")


class Parsed(Exception):
    """The command's parser took its arguments; nothing was run."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands are parsed and given: the names that the documentation uses exist here."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("launchers", "kernels", "tests", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("recipe.toml", "plan/recipe.toml"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "launchers/recipes/qwen3-0.6b.toml", folder / name)
    (folder / "hosts").write_text("localhost slots=2\n")
    (folder / "rationale.txt").write_text("First, density.\n")
    return folder


@pytest.fixture(scope="module")
def stocked(place: Path) -> Path:
    """With a tiny model and a small set."""
    tiny_model_folder(place / "tiny")
    rows = [json.loads(line) for line in (sample_folder() / "train.jsonl").read_text().splitlines()[:60]]
    for name in ("train.jsonl", "rows.jsonl"):
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    passages = {p["id"]: p for row in rows for p in row["positives"] + row["negatives"]}
    (place / "corpus.jsonl").write_text("".join(json.dumps(p) + "\n" for p in passages.values()))
    queries = [{"id": row["query_id"], "text": row["query"]} for row in rows[:6]]
    (place / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    judged = "".join(f"{row['query_id']}\t{row['positives'][0]['id']}\t1\n" for row in rows[:6])
    (place / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return place


@pytest.fixture
def parse(place: Path, monkeypatch: pytest.MonkeyPatch):
    """Give a command to its own parser, in `place`; what it says if it refuses is raised."""
    real = tyro.cli

    def only_parse(target, *args, **kwargs):
        if inspect.isfunction(target):  # tyro would call it
            original = target
            target = functools.wraps(original)(lambda *_, **__: None)
        real(target, *args, **kwargs)
        raise Parsed

    def check(arguments: list[str]) -> None:
        told = io.StringIO()
        try:
            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
                code = cli.main(arguments)
        except Parsed:
            return
        except SystemExit as stop:
            code = stop.code
        assert code == 0, told.getvalue()  # --help and --version end so, too

    monkeypatch.setattr(tyro, "cli", only_parse)
    monkeypatch.chdir(place)
    return check


def test_no_documented_command_is_unknown(documented, parse, place: Path) -> None:
    """Its flags exist, its values are of the right kind, its recipe can be read; scripts and targets exist."""
    assert len(documented) > 120
    wrong = []
    for command in documented:
        try:
            _accept(list(command.words), parse, place)
        except AssertionError as error:
            wrong.append(f"{command.where}: {command.text}\n  {str(error).strip()}")
    assert not wrong, "\n".join(wrong)


def _accept(words: list[str], parse, place: Path) -> None:
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]  # variables set for one command
    words = words[: words.index(">")] if ">" in words else words
    if "&&" in words:
        cut = words.index("&&")
        _accept(words[cut + 1 :], parse, place)
        words = words[:cut]
    program, *rest = words
    if program == "laser-dist":
        if rest[:1] not in (["COMMAND"], ["bench", "NAME"]) and rest != ["bench"] and len(rest) > 1:
            parse([*rest, "x"] if rest[-1] == "--out" else rest)  # the prose leaves values out
        else:
            assert rest[0] in ("COMMAND", "--version", *cli.COMMANDS), "no such command"
    elif program in ("deepspeed", "torchrun"):
        at = next(i for i, word in enumerate(rest) if word.startswith("laser_dist."))
        _known_to(program, rest[: at + 1])
        parse([{"laser_dist.train": "train", "laser_dist.retrieval.encode": "encode"}[rest[at]], *rest[at + 1 :]])
    elif program.startswith(("launchers/", "./launchers/")) or program in ("sbatch", "salloc"):
        script = next(i for i, word in enumerate(words) if "launchers/" in word and "recipes" not in word)
        assert os.access(ROOT / words[script], os.X_OK) or words[script].endswith(".slurm"), "no such script"
        if words[script].endswith("train.sh"):
            parse(["launch", *words[script + 1 :]])
        elif words[script].endswith("train.slurm"):
            parse(["train", *[word for word in words[script + 1 :] if word != "recipe.toml"]])
    elif program == "python":
        target = next(word for word in rest if word.endswith(".py"))
        assert (ROOT / target).is_file(), "no such file"
        if not target.startswith("tests/"):
            source = "".join(path.read_text() for path in (ROOT / target).parent.glob("*.py"))
            missing = [word for word in rest if word.startswith("--") and word.split("=")[0] not in source]
            assert not missing, f"{target} has no {missing}"
    elif program == "make":
        assert all(
            re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in rest if "=" not in target
        )
    elif program == "nice":
        _accept(rest, parse, place)
    else:
        assert program in OTHERS, "fits no tier: add a rule for it, or mend it"


@functools.cache
def _options(program: str) -> str:
    name = {"deepspeed": "deepspeed.launcher.runner", "torchrun": "torch.distributed.run"}[program]
    return subprocess.run([sys.executable, "-m", name, "--help"], capture_output=True, text=True, timeout=120).stdout


def _known_to(program: str, words: list[str]) -> None:
    missing = [word for word in words if word.startswith("-") and word.split("=")[0] not in _options(program)]
    assert not missing, f"{program} has no {missing}"


def test_what_is_run_is_documented(documented) -> None:
    """A command of RUN that vanished from the documentation is not needed here either."""
    texts = [command.text for command in documented]
    gone = [line for line in RUN if not any(t.startswith(shlex.join(shlex.split(line))) for t in texts)]
    assert not gone


@pytest.mark.slow
def test_commands_do_what_they_say(stocked: Path) -> None:
    """From rows to an explained query, in one folder, with the commands of the documentation."""
    commands = [[*shlex.split(line)[1:], *shlex.split(PLUS.get(line.split()[1], ""))] for line in RUN]
    for done in run_commands(commands, cwd=stocked, env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}):
        # The doctor may find something wrong with the machine that the tests run on.
        right = (0, 1) if done.args[0] == "doctor" else (0,)
        assert done.returncode in right, f"{shlex.join(done.args)}\n{done.stdout[-1500:]}{done.stderr[-1500:]}"
    for name in ("runs/first/run.html", "plan/recipe.toml", "results.json", "model/config.json", "run.trec"):
        assert (stocked / name).stat().st_size > 0, name
