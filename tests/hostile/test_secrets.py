"""Ten planted secrets: no output, log, config, event file, card, checkpoint or message shows one, in any encoding."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from laser_dist.config import RunConfig
from laser_dist.errors import UserError
from laser_dist.launch import outcome
from laser_dist.launch.environment import write_environment
from laser_dist.redaction import check_address, find_secret, hide, shown
from laser_dist.testing import run_commands, tiny_model_folder
from laser_dist.testing.faulty_server import FaultyServer

ENVIRONMENT = {
    "HF_TOKEN": "hf_PlantedSecretPlantedSecretPlanted1",
    "OPENAI_API_KEY": "sk-planted-secret/with+signs=planted-2",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDSECRET003",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+of+amazon/planted/secret4",
    "AWS_SESSION_TOKEN": "plantedsessiontokenplantedsessiontoken5",
    "WANDB_API_KEY": "plantedwandbkeyplantedwandbkeyplanted6",
}
PASSWORD, SIGNATURE, PROXY, MIRROR = "plantedpassword7", "plantedsignature8", "plantedproxy9", "plantedmirror10"
SECRETS = [*ENVIRONMENT.values(), PASSWORD, SIGNATURE, PROXY, MIRROR]
PRESIGNED = f"https://host.invalid/shards?X-Amz-Expires=60&X-Amz-Signature={SIGNATURE}"
WITH_PASSWORD = f"https://me:{PASSWORD}@host.invalid/shards"


def leaked(content: bytes) -> list[str]:
    """The secrets that bytes hold, as they are or encoded in the usual ways."""
    found = []
    for secret in SECRETS:
        forms = {secret.encode(), quote(secret, safe="").encode(), base64.b64encode(secret.encode()).rstrip(b"=")}
        forms |= {json.dumps(secret)[1:-1].encode(), repr(secret)[1:-1].encode()}
        found += [secret] * any(form in content for form in forms)
    return found


def leaked_files(folder: Path) -> list[tuple[str, list[str]]]:
    found = [
        (str(path), leaked(str(path).encode() + path.read_bytes())) for path in folder.rglob("*") if path.is_file()
    ]
    return [(name, secrets) for name, secrets in found if secrets]


def planted_environment() -> dict[str, str]:
    proxy = {"HTTP_PROXY": f"http://me:{PROXY}@127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    return {**ENVIRONMENT, **proxy, "HF_HUB_OFFLINE": "1"}


def run(folder: Path, *arguments: object, module: str = "laser_dist.cli") -> tuple[int, bytes]:
    """Exit code and all output of a command with the secrets in its environment."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | planted_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    return done.returncode, done.stdout


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


RECIPES = {
    "a presigned set": f'[data]\ntrain = "{PRESIGNED}"',
    "a presigned mixture": f'[data]\nmix = {{"{PRESIGNED}" = 1.0, "x" = 1.0}}',
    "a password": f'[data]\ntrain = "{WITH_PASSWORD}"',
    "a password for S3": f'[data]\ntrain = "s3://me:{PASSWORD}@bucket/x"',
    "a key as output": f'output = "{ENVIRONMENT["HF_TOKEN"]}"',
    "a key of the environment in a path": f'output = "runs/{ENVIRONMENT["WANDB_API_KEY"]}"',
    "a password in the model": f'[model]\nname = "https://me:{PASSWORD}@hub.invalid/x"',
    "a signature in a file": f'[evaluation]\ncorpus = "{PRESIGNED}"',
    "a wrong address": f'[data]\ntrain = "https:/host/x?X-Amz-Signature={SIGNATURE}"',
    "an unknown key": f'[data]\ntrian = "{PRESIGNED}"',
    "a wrong kind": f'[data]\nshuffle = "{PRESIGNED}"',
    "no TOML": f'[data]\ntrain = "{PRESIGNED}',
}


@pytest.mark.parametrize("command", ["train", "launch"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(command, name, tmp_path, monkeypatch, capfd):
    from laser_dist.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPES[name])
    flags = [] if "output" in RECIPES[name] else ["--output", "out"]
    flags += [] if "name =" in RECIPES[name] else ["--model.name", "x/y"]
    assert main([command, "recipe.toml", *flags]) == 2
    (tmp_path / "recipe.toml").unlink()
    told = capfd.readouterr()
    assert told.err.startswith("error: ") and not leaked((told.out + told.err).encode())
    assert not leaked_files(tmp_path)


COMMANDS = [
    ("train", "--data.trian", PRESIGNED),
    ("train", "--seed", PRESIGNED),
    ("train", "--output", "o", "--model.name", "x/y", "--data.train", PRESIGNED),
    ("train", WITH_PASSWORD),
    ("prepare", "--source", PRESIGNED, "--out", "o"),
    ("prepare", "--source", WITH_PASSWORD, "--out", "o"),
    ("inspect", PRESIGNED, "--model", "x"),
    ("annotate", "--source", "x.jsonl", "--out", "a.jsonl", "--model", "m", "--base-url", WITH_PASSWORD),
    ("annotate", "--source", "x.jsonl", "--out", "a.jsonl", "--model", "m", "--base-url", PRESIGNED),
    ("annotate", "--source", "x.jsonl", "--out", "a.jsonl", "--model", "m", "--base-url", f"me:{PASSWORD}@host/v1"),
    ("encode", "--model", PRESIGNED, "--corpus", "c.jsonl", "--out", "v"),
    ("export", WITH_PASSWORD, "--out", "e"),
    ("plan", "--model", WITH_PASSWORD),
    ("bench", "damage", "--rounds", PRESIGNED),
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda a: " ".join(a)[:40])
def test_a_secret_on_the_command_line_is_not_repeated(arguments, tmp_path, monkeypatch, capfd):
    from laser_dist.cli import main

    monkeypatch.chdir(tmp_path)
    try:
        code = main(list(arguments))
    except SystemExit as error:
        code = error.code
    told = capfd.readouterr()
    assert code not in (0, None) and "Traceback" not in told.err
    assert not leaked((told.out + told.err).encode()), told
    assert not leaked_files(tmp_path)


def test_what_a_library_raises_is_shown_without_secrets(tmp_path):
    """An exception of an HTTP client quotes the address, one of S3's the request with its headers."""
    (tmp_path / "failing.py").write_text(
        "def main(arguments):\n    import os\n    raise RuntimeError(f'GET {arguments} {dict(os.environ)}')\n"
    )
    code = "import sys; sys.path.insert(0, '.'); from laser_dist.cli import run; sys.exit(run('failing', sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, PRESIGNED, WITH_PASSWORD],
        cwd=tmp_path,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
    )
    assert done.returncode == 1 and b"RuntimeError" in done.stderr
    assert not leaked(done.stderr + done.stdout)


def test_outcomes_hold_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv(outcome.ATTEMPT, "1")
    with pytest.raises(ValueError), outcome.reported(tmp_path):
        raise ValueError(f"{PRESIGNED} {WITH_PASSWORD} {ENVIRONMENT['HF_TOKEN']} \ud800\x1b[2J")
    assert "host.invalid" in (tmp_path / "launch" / "attempt-1" / "rank-00000.json").read_text()
    assert not leaked_files(tmp_path)


def test_other_hosts_get_no_secret(tmp_path, monkeypatch):
    """What is exported shows in the process list of every host."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", f"https://me:{MIRROR}@mirror.invalid")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    for launcher in ("pdsh", "openmpi", "slurm"):
        write_environment(tmp_path / "env", {}, Path("/bin"), launcher=launcher)
        assert not leaked_files(tmp_path) and (launcher == "slurm" or "NCCL_DEBUG" in (tmp_path / "env").read_text())


def test_redirects_and_answers_of_a_server_show_no_secret(tmp_path):
    """A hub's answer is a redirect to a presigned address; what then fails may quote it."""
    from laser_dist.config import DataConfig
    from laser_dist.data.streaming.sets import open_data

    server = FaultyServer(tmp_path)
    server.answer = lambda request: (  # type: ignore[method-assign]
        request.send_response(302),
        request.send_header("Location", f"http://127.0.0.1:9/x?X-Amz-Signature={SIGNATURE}"),
        request.send_header("Content-Length", "0"),
        request.end_headers(),
    )
    try:
        with pytest.raises(UserError) as error:
            open_data(DataConfig(train=server.url, cache=str(tmp_path / "cache"), attempts=1, timeout=5.0))
    finally:
        server.close()
    assert not leaked(str(error.value).encode()) and not leaked_files(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"GET {PRESIGNED}, then", "GET https://host.invalid/shards?[hidden] then"),
        (f"'{WITH_PASSWORD}'", "'https://[hidden]@host.invalid/shards'"),
        ("https://host/plain: it does not exist", "https://host/plain: it does not exist"),
        ("token=abc&x=1", "token=[hidden]&x=1"),
        (f"key {ENVIRONMENT['AWS_SECRET_ACCESS_KEY']}!", "key [AWS_SECRET_ACCESS_KEY]!"),
        ("hf_anotherkeyanotherkeyanotherkey1", "[hidden]"),
        (
            "seed = 1: must be a number; see http(s):// and s3://",
            "seed = 1: must be a number; see http(s):// and s3://",
        ),
    ],
)
def test_hide(text, expected):
    assert hide(text) == expected


def test_what_a_terminal_would_obey_is_spelt_out():
    assert shown("a\x1b[2J\u202eb\ud800\x07\n\tü") == "a\\x1b[2J\\u202eb\\ud800\\x07\n\tü"


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "KEYBOARD_LAYOUT", "MONKEY"])
def test_not_every_variable_is_a_secret(name, monkeypatch):
    monkeypatch.setenv(name, "runs/first-attempt")
    assert find_secret("runs/first-attempt") is None and hide("runs/first-attempt") == "runs/first-attempt"


@pytest.mark.parametrize("place", ["https://[::1/x", "https://host:port/x", "https://"])
def test_an_address_that_is_none_is_said_plainly(place):
    if place == "https://":
        return check_address(place)
    with pytest.raises(UserError, match="is no address"):
        check_address(place)


def test_texts_may_hold_addresses():
    from dataclasses import replace

    config = RunConfig(output="o")
    text = replace(config.text, instruction="See https://example.org/?q=1")
    replace(config, text=text)._refuse_secrets()


@pytest.mark.slow
def test_a_whole_run_leaks_nothing(tmp_path):
    """prepare, two steps of training, export and evaluation, all with the secrets in the environment."""
    work = tmp_path / "work"
    work.mkdir()
    positives = [[{"id": f"p{n}", "text": f"{n} reasons"}] for n in range(8)]
    rows = [{"query": f"why {n}?", "rationale": "Ice.", "positives": positives[n]} for n in range(8)]
    tables = {
        "rows.jsonl": rows,
        "corpus.jsonl": [row["positives"][0] for row in rows],
        "queries.jsonl": [{"id": f"q{n}", "text": f"why {n}?"} for n in range(8)],
    }
    for name, table in tables.items():
        (work / name).write_text("".join(json.dumps(row) + "\n" for row in table))
    (work / "qrels.tsv").write_text("".join(f"q{n}\tp{n}\t1\n" for n in range(8)))
    tiny_model_folder(work / "model")
    files = ("--corpus", "corpus.jsonl", "--queries", "queries.jsonl", "--qrels", "qrels.tsv")
    dev = [part.replace("--", "--evaluation.") for part in files]
    train = ("train", "--model.name", "model", "--model.dtype", "float32", "--data.train", "shards", "--output", "run")
    short = ("--data.negatives", "0", "--train.queries-per-rank", "2", "--train.max-steps", "2")
    commands = [
        ["prepare", "--source", "rows.jsonl", "--out", "shards", "--workers", "1"],
        [*train, *short, *dev, "--train.deepspeed", "zero1"],
        ["export", "run", "--out", "exported"],
        ["evaluate", "--model", "exported", *files, "--out", "results.json"],
    ]
    for done in run_commands(commands, cwd=work, env=planted_environment()):
        assert done.returncode == 0, done.stderr[-3000:]
        assert not leaked((done.stdout + done.stderr).encode()), done.args
    assert (work / "run" / "config.toml").is_file() and list(work.rglob("*tfevents*")) and list(work.rglob("*.pt"))
    assert not leaked_files(tmp_path)
