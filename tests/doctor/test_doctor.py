"""Every check finds what it is for: each fault is made, and the finding names it and a remedy."""

import dataclasses
import json
import os
import resource
import shutil
import socket
import time
from collections import namedtuple
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from laser_dist.cli import main
from laser_dist.config import RunConfig
from laser_dist.data import sample_folder
from laser_dist.data.preparation.prepare import main as prepare
from laser_dist.doctor import doctor, machine, network
from laser_dist.doctor.doctor import AFTER_GLOO, CHECKS, Arguments, context_of, examine
from laser_dist.doctor.finding import GIB, Context, failed, ok
from laser_dist.recipe import read_recipe
from laser_dist.testing import tiny_model_folder

Usage = namedtuple("Usage", "total used free")
Patch = pytest.MonkeyPatch
GOOD = {"right": True, "gb_per_second": 1.0}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, shards, a dev set and a recipe that names them."""
    root = tmp_path_factory.mktemp("doctor")
    tiny_model_folder(root / "model")
    lines = (sample_folder() / "train.jsonl").read_text().splitlines()[:20]
    (root / "train.jsonl").write_text("\n".join(lines) + "\n")
    prepare(["--source", str(root / "train.jsonl"), "--dev-queries", "3", "--out", str(root / "shards")])
    (root / "recipe.toml").write_text(
        f'output = "{root}/run"\n[model]\nname = "{root}/model"\n[data]\ntrain = "{root}/shards"\n[evaluation]\n'
        + "".join(f'{name} = "{root}/shards/dev/{file}"\n' for name, file in
                  (("corpus", "corpus.jsonl"), ("queries", "queries.jsonl"), ("qrels", "qrels.tsv")))
    )  # fmt: skip
    return root


def healthy(tmp_path: Path) -> Context:
    facts = {"gpu_count": 0, "cuda": None, "kernels_difference": 1e-6, "pickle": "refused", "right": True}
    return Context(tmp_path, port=0, facts=facts)


def changed(config: RunConfig, section: str, **values: object) -> RunConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def limits(soft: int, hard: int) -> Callable[[int], tuple[int, int]]:
    return lambda _: (soft, hard)


def no_space(patch: Patch, free: float) -> None:
    patch.setattr(shutil, "disk_usage", lambda _: Usage(int(free) * 2, int(free), int(free)))


def fail(error: BaseException) -> Callable:
    def raise_it(*_: object, **__: object) -> None:
        raise error

    return raise_it


def without(patch: Patch, name: str) -> None:
    real = metadata.version
    patch.setattr(metadata, "version", lambda n: fail(metadata.PackageNotFoundError(n))() if n == name else real(n))


def version(patch: Patch, name: str, number: str) -> None:
    real = metadata.version
    patch.setattr(metadata, "version", lambda n: number if n == name else real(n))
    patch.setattr(metadata, "requires", lambda _: [f"{name}>=2.11,<2.14", "rich>=14"])


def busy_port(context: Context, patch: Patch) -> None:
    taken = socket.socket()
    taken.bind(("", 0))
    taken.listen()
    context.port = taken.getsockname()[1]
    patch.setattr(context, "_keep", taken, raising=False)  # open until the check has run


def text_limits(patch: Patch, files: dict[str, str]) -> None:
    real = machine._read
    patch.setattr(machine, "_read", lambda path: files.get(path, "" if path.startswith("/sys/fs") else real(path)))


def dated(patch: Patch, seconds: float) -> None:
    real = Path.stat

    def stat(self: Path, **options: object) -> object:
        found = real(self, **options)
        if "doctor" not in self.name:
            return found
        return os.stat_result((*found[:8], found.st_mtime + seconds, *found[9:]))

    patch.setattr(Path, "stat", stat)


def read_other_bytes(patch: Patch) -> None:
    patch.setattr(Path, "read_bytes", lambda _: b"other")


def recipe_of(setting: Path, context: Context, section: str = "", **values: object) -> None:
    context.recipe = read_recipe(setting / "recipe.toml")
    if section:
        context.recipe = changed(context.recipe, section, **values)


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


# check, what is made wrong (context, monkeypatch, setting, tmp_path), status, words of the finding and its remedy.
FAULTS: list[tuple[str, Callable, str, str]] = [
    (
        "python",
        lambda c, m, s, t: m.setattr("platform.python_version_tuple", lambda: ("3", "10", "1")),
        "failed",
        "3.11 or newer",
    ),
    ("torch", lambda c, m, s, t: version(m, "torch", "2.9.1"), "failed", "2.9.1, wanted: pip install 'torch"),
    ("torch", lambda c, m, s, t: without(m, "torch"), "failed", "missing setup.sh"),
    ("deepspeed", lambda c, m, s, t: version(m, "deepspeed", "0.19.7"), "failed", "0.19.7 pip install"),
    ("transformers", lambda c, m, s, t: version(m, "transformers", "1.0"), "failed", "1.0 pip install"),
    ("packages", lambda c, m, s, t: version(m, "rich", "13.9"), "failed", "rich 13.9 (wanted: >=14)"),
    ("packages", lambda c, m, s, t: without(m, "peft"), "failed", "peft is missing"),
    ("compiler", lambda c, m, s, t: m.setattr(shutil, "which", lambda *_: None), "warning", "apt install g++"),
    (
        "environment",
        lambda c, m, s, t: m.setenv("CUDA_LAUNCH_BLOCKING", "1"),
        "warning",
        "CUDA_LAUNCH_BLOCKING=1 unset it",
    ),
    ("environment", lambda c, m, s, t: m.setenv("WORLD_SIZE", "4"), "warning", "WORLD_SIZE=4 unset it"),
    (
        "exported secrets",
        lambda c, m, s, t: [m.chdir(t), write(t / ".deepspeed_env", "HF_TOKEN=hf_x\n")],
        "warning",
        "HF_TOKEN hf auth login",
    ),
    (
        "exported secrets",
        lambda c, m, s, t: [m.chdir(t), write(t / ".deepspeed_env", "export A=1\n")],
        "failed",
        "NAME=value",
    ),
    (
        "memory",
        lambda c, m, s, t: text_limits(m, {"/proc/meminfo": "MemAvailable: 1048576 kB"}),
        "warning",
        "1.0 GiB end other programs",
    ),
    (
        "memory",
        lambda c, m, s, t: text_limits(
            m, {"/sys/fs/cgroup/memory.max": str(3 * GIB), "/sys/fs/cgroup/memory.current": "0"}
        ),
        "warning",
        "3.0 GiB limit of this container",
    ),
    ("shared memory", lambda c, m, s, t: no_space(m, 50e6), "failed", "--shm-size=8g"),
    ("shared memory", lambda c, m, s, t: no_space(m, 500e6), "warning", "--shm-size=8g"),
    (
        "shared memory",
        lambda c, m, s, t: m.setattr(machine, "SHARED_MEMORY", t / "none"),
        "warning",
        "does not exist mount",
    ),
    ("open files", lambda c, m, s, t: m.setattr(resource, "getrlimit", limits(256, 65536)), "failed", "256 ulimit -n"),
    ("open files", lambda c, m, s, t: m.setattr(resource, "getrlimit", limits(1024, 1024)), "warning", "limits.conf"),
    (
        "processes",
        lambda c, m, s, t: m.setattr(resource, "getrlimit", limits(100, 100)),
        "warning",
        "at most 100 ulimit -u",
    ),
    (
        "processes",
        lambda c, m, s, t: text_limits(m, {"/sys/fs/cgroup/pids.max": "64"}),
        "warning",
        "at most 64 --pids-limit",
    ),
    ("processors", lambda c, m, s, t: m.setenv("OMP_NUM_THREADS", "999"), "warning", "999 OMP_NUM_THREADS="),
    ("processors", lambda c, m, s, t: m.setattr(os, "getloadavg", lambda: (1e4, 0, 0)), "warning", "other programs"),
    ("clock", lambda c, m, s, t: m.setattr(time, "time", lambda: 3600.0), "failed", "1970 set-ntp"),
    ("clock", lambda c, m, s, t: dated(m, 90), "warning", "+90 set both clocks"),
    ("disk", lambda c, m, s, t: no_space(m, 0.5 * GIB), "failed", "0.5 GiB free --output"),
    ("disk", lambda c, m, s, t: no_space(m, 5 * GIB), "warning", "5.0 GiB"),
    ("disk", lambda c, m, s, t: [recipe_of(s, c), no_space(m, 1000)], "failed", "the first checkpoint would not fit"),
    (
        "durable files",
        lambda c, m, s, t: m.setattr(os, "fsync", fail(OSError(5, "Input/output error"))),
        "failed",
        "Input/output error another --output",
    ),
    (
        "durable files",
        lambda c, m, s, t: m.setattr(Path, "replace", fail(OSError(18, "Invalid cross-device link"))),
        "failed",
        "renamed",
    ),
    ("durable files", lambda c, m, s, t: read_other_bytes(m), "failed", "other bytes replace it"),
    (
        "durable files",
        lambda c, m, s, t: setattr(c, "output", Path(write(t / "file", "")) / "run"),
        "failed",
        "Not a directory",
    ),
    (
        "temporary files",
        lambda c, m, s, t: m.setattr(
            "tempfile.gettempdir", fail(FileNotFoundError(2, "No usable temporary directory"))
        ),
        "failed",
        "TMPDIR",
    ),
    ("temporary files", lambda c, m, s, t: no_space(m, 1e6), "warning", "TMPDIR"),
    (
        "shard cache",
        lambda c, m, s, t: m.setattr("fcntl.flock", fail(OSError(37, "No locks available"))),
        "warning",
        "No locks available data.cache",
    ),
    (
        "shard cache",
        lambda c, m, s, t: [
            recipe_of(s, c, "data", train="https://h/x"),
            m.setattr("fcntl.flock", fail(OSError(37, "No locks"))),
        ],
        "failed",
        "data.cache",
    ),
    ("hub cache", lambda c, m, s, t: no_space(m, 1e9), "warning", "HF_HOME"),
    (
        "host name",
        lambda c, m, s, t: m.setattr(socket, "gethostbyname", fail(socket.gaierror(-2, "not known"))),
        "warning",
        "/etc/hosts",
    ),
    ("port", lambda c, m, s, t: busy_port(c, m), "warning", "another process --master_port"),
    (
        "GPU",
        lambda c, m, s, t: m.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi"),
        "failed",
        "there is an NVIDIA GPU nvidia-smi",
    ),
    (
        "NCCL",
        lambda c, m, s, t: [
            c.facts.update(gpu_count=2),
            m.setattr(network, "_ranks", lambda *_: ([{"error": "no route"}], 1.0)),
        ],
        "failed",
        "no route NCCL_SOCKET_IFNAME",
    ),
    ("Triton", lambda c, m, s, t: [c.facts.update(gpus="H100"), without(m, "triton")], "failed", "laser-dist[kernels]"),
    (
        "locked memory",
        lambda c, m, s, t: [c.facts.update(gpus="H100"), m.setattr(resource, "getrlimit", limits(2**16, 2**16))],
        "warning",
        "ulimit -l unlimited",
    ),
    ("kernels", lambda c, m, s, t: c.facts.update(kernels_difference=0.5), "failed", "differ by 5.0e-01"),
    (
        "kernels",
        lambda c, m, s, t: [c.facts.pop("kernels_difference"), c.facts.update(kernels_error="No module")],
        "failed",
        "No module PYTHONPATH",
    ),
    (
        "shards run nothing",
        lambda c, m, s, t: m.setattr("laser_dist.data.shards.read_members", lambda *_: []),
        "failed",
        "was read stop using",
    ),
    ("checkpoints run nothing", lambda c, m, s, t: c.facts.update(pickle="ran"), "failed", "ran stop using"),
    ("remote code", lambda c, m, s, t: recipe_of(s, c, "model", trust_remote_code=True), "warning", "model.revision"),
    (
        "recipe",
        lambda c, m, s, t: setattr(c, "recipe_problem", 'unknown key "sead"'),
        "failed",
        "sead launchers/recipes",
    ),
    ("model", lambda c, m, s, t: recipe_of(s, c, "model", name=""), "failed", "names no model --model.name"),
    ("model", lambda c, m, s, t: recipe_of(s, c, "model", name="./none"), "failed", "does not exist save_pretrained"),
    (
        "model",
        lambda c, m, s, t: [
            t.joinpath("m").mkdir(),
            write(t / "m/config.json", "{"),
            recipe_of(s, c, "model", name=str(t / "m")),
        ],
        "failed",
        "config.json cannot be read",
    ),
    (
        "model",
        lambda c, m, s, t: [write(t / "m/config.json", "{}"), recipe_of(s, c, "model", name=str(t / "m"))],
        "failed",
        "no tokenizer",
    ),
    (
        "model",
        lambda c, m, s, t: [
            shutil.copytree(s / "model", t / "m"),
            write(t / "m/model.safetensors.index.json", '{"weight_map": {"a": "x.safetensors"}}'),
            recipe_of(s, c, "model", name=str(t / "m")),
        ],
        "failed",
        "lacks x.safetensors download",
    ),
    (
        "model",
        lambda c, m, s, t: [m.setenv("HF_HUB_OFFLINE", "1"), recipe_of(s, c, "model", name="no/such-model")],
        "failed",
        "not in the cache hf download",
    ),
    ("shards", lambda c, m, s, t: recipe_of(s, c, "data", train=str(t)), "failed", "manifest.json prepare --check"),
    (
        "shards",
        lambda c, m, s, t: [
            shutil.copytree(s / "shards", t / "d"),
            damage(t / "d"),
            recipe_of(s, c, "data", train=str(t / "d")),
        ],
        "failed",
        "damaged prepare --check",
    ),
    (
        "shards",
        lambda c, m, s, t: recipe_of(s, c, "train", queries_per_rank=1000),
        "failed",
        "one optimizer step takes 1000",
    ),
    (
        "rationales",
        lambda c, m, s, t: [unexplained(s, t / "d"), recipe_of(s, c, "data", train=str(t / "d"))],
        "failed",
        "no rationale laser-dist annotate",
    ),
    (
        "DeepSpeed config",
        lambda c, m, s, t: recipe_of(s, c, "train", deepspeed="zero9"),
        "failed",
        "zero9 ds_configs/README.md",
    ),
    (
        "DeepSpeed config",
        lambda c, m, s, t: recipe_of(s, c, "train", deepspeed=write(t / "ds.json", '{"gradient_cliping": 1}')),
        "failed",
        "gradient_clipping",
    ),
    (
        "dev set",
        lambda c, m, s, t: recipe_of(s, c, "evaluation", qrels=None),
        "failed",
        "corpus, queries only together",
    ),
    (
        "dev set",
        lambda c, m, s, t: recipe_of(s, c, "evaluation", qrels=write(t / "q.tsv", "a\tb\n")),
        "failed",
        "q.tsv mend",
    ),
    ("dev set", lambda c, m, s, t: recipe_of(s, c, "evaluation", corpus=str(t / "none")), "failed", "none"),
    (
        "dev set",
        lambda c, m, s, t: recipe_of(s, c, "evaluation", corpus=None, queries=None, qrels=None),
        "warning",
        "--dev-share",
    ),
    ("output", lambda c, m, s, t: setattr(c, "output", Path(write(t / "file", ""))), "failed", "is a file --output"),
    ("output", lambda c, m, s, t: (t / "checkpoints/step-000001").mkdir(parents=True), "warning", "--resume"),
]


def damage(folder: Path) -> None:
    shard = next(folder.glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)


def unexplained(setting: Path, out: Path) -> None:
    row = json.loads((setting / "train.jsonl").read_text().splitlines()[0])
    rows = [{**row, "rationale": "", "query_id": str(i)} for i in range(10)]
    source = write(out.parent / "bare.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    prepare(["--source", source, "--missing-rationale", "keep", "--out", str(out)])


@pytest.mark.parametrize("name, fault, status, told", FAULTS, ids=[f"{f[0]}: {f[3]}" for f in FAULTS])
def test_fault_is_found(name, fault, status, told, setting, tmp_path, monkeypatch) -> None:
    context = healthy(tmp_path)
    fault(context, monkeypatch, setting, tmp_path)
    finding = examine(context, (name,))[name]
    monkeypatch.undo()
    assert finding.status == status, finding
    assert finding.remedy
    said = f"{finding.found} {finding.remedy}"
    for part in told.split(" "):
        assert part in said, finding


def test_every_check_has_a_fault() -> None:
    # Nothing can be wrong with several hosts before there are some; gloo's faults are below.
    assert {name for name, *_ in FAULTS} | {"several hosts", "gloo"} == set(CHECKS)
    assert len(CHECKS) >= 20


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in ("gloo", *AFTER_GLOO)])
def test_healthy_machine_fails_nothing(name, setting, tmp_path) -> None:
    context = healthy(tmp_path)
    recipe_of(setting, context)
    finding = examine(context, (name,))[name]
    assert finding.status in ("ok", "warning", "skipped"), finding
    assert bool(finding.remedy) == (finding.status == "warning")


@pytest.mark.parametrize(
    "told, status, words",
    [
        ([{"error": "Connection refused"}, {}], "failed", "Connection refused GLOO_SOCKET_IFNAME"),
        ([{"right": False, "gb_per_second": 1.0}] * 2, "failed", "wrong do not train"),
        ([GOOD, {**GOOD, "deepspeed_error": "no ops"}], "failed", "no ops setup.sh"),
        ([GOOD, {**GOOD, "pickle": "refused"}], "ok", "2 processes summed over gloo"),
    ],
)
def test_what_the_loopback_may_say(told, status, words, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(network, "_ranks", lambda *_: (told, 1.0))
    finding = network.gloo(Context(tmp_path))
    assert finding.status == status and all(word in finding.found + finding.remedy for word in words.split(" "))


def test_ranks_that_die_or_hang_are_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(network.sys, "executable", "/bin/false")
    assert "without a word" in network.gloo(Context(tmp_path)).found
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\nexec sleep 600\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(network.sys, "executable", str(hanging))
    monkeypatch.setattr(network, "PATIENCE", 0.5)
    assert "no answer" in network.gloo(Context(tmp_path)).found


def test_a_check_that_breaks_is_a_failed_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(doctor.CHECKS, "python", fail(ImportError("broken\ntwo lines")))
    finding = examine(Context(tmp_path), ("python",))["python"]
    assert finding.status == "failed" and finding.found == "the check itself failed: ImportError: broken"


def test_command_and_its_exit_code(setting, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "examine", lambda context: {"a": ok("fine"), "b": failed("broken", "mend it")})
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "✓ a  fine" in told and "✗ b  broken" in told and "-> mend it" in told and "2 checks" in told
    assert main(["doctor", "--json"]) == 1
    table = json.loads(capsys.readouterr().out)
    assert table["failed"] == 1 and table["checks"]["b"] == {"status": "failed", "found": "broken", "remedy": "mend it"}
    monkeypatch.setattr(doctor, "examine", lambda context: {"a": ok("fine")})
    assert main(["doctor", str(setting / "recipe.toml")]) == 0
    capsys.readouterr()
    assert main(["doctor", "none.toml"]) == 2
    assert "none.toml does not exist" in capsys.readouterr().err


def test_what_is_checked(setting, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASTER_PORT", "12345")
    context = context_of(Arguments())
    assert (context.output, context.port, context.recipe) == (tmp_path, 12345, None)
    context = context_of(Arguments(recipe=setting / "recipe.toml", data="other", output=Path("o"), port=1))
    assert context.recipe is not None and context.recipe.data.train == "other"
    assert (context.output, context.port) == (Path("o"), 1)
    (tmp_path / "bad.toml").write_text("sead = 1")
    context = context_of(Arguments(recipe=tmp_path / "bad.toml"))
    assert context.recipe is None and 'Did you mean "seed"' in context.recipe_problem


def test_nothing_is_left_behind(setting, tmp_path) -> None:
    names = tuple(name for name in CHECKS if name not in ("gloo", *AFTER_GLOO))
    examine(healthy(tmp_path), names)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_real_ranks(tmp_path) -> None:
    """The loopback itself, and what its ranks report for the checks behind it."""
    found = examine(Context(tmp_path, port=0), ("gloo", "kernels", "checkpoints run nothing", "GPU"))
    assert found["gloo"].status == "ok", found["gloo"]
    assert found["kernels"].status == "ok", found["kernels"]
    assert found["checkpoints run nothing"].status == "ok", found
