"""The rehearsal changes no number, and finds what would have failed at the end of the run."""

import contextlib
import itertools
import json
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from laser_dist.bench.killed_runs import prepare
from laser_dist.errors import UserError
from laser_dist.testing import run_distributed, tiny_model_folder


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, 16 training examples, and a dev set of 12 passages."""
    root = tmp_path_factory.mktemp("rehearsal")
    tiny_model_folder(root / "model", tied=True)
    prepare(root)
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()[:12]]
    texts = [{"id": f"d{i}", "text": row["positives"][0]["text"]} for i, row in enumerate(rows)]
    asked = [{"id": f"q{i}", "text": row["query"]} for i, row in enumerate(rows[:4])]
    for name, lines in (("corpus", texts), ("queries", asked)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(4)))
    return root


def flags(root: Path, output: Path, stage: int, rehearse: str) -> list[str]:
    values = {
        "--output": output, "--model.name": root / "model", "--data.train": root / "shards", "--data.workers": 0,
        "--train.max-steps": 3, "--train.queries-per-rank": 2, "--optimizer.learning-rate": 1e-2,
        "--train.deepspeed": "zero3-test" if stage == 3 else f"zero{stage}", "--rehearse": rehearse,
        "--model.dtype": "bfloat16" if stage == 2 else "float32", "--checkpoint.every": 0,
        "--evaluation.corpus": root / "corpus.jsonl", "--evaluation.queries": root / "queries.jsonl",
        "--evaluation.qrels": root / "qrels.tsv",
    }  # fmt: skip
    lora = ["--model.lora-rank", "4", "--model.lora-dropout", "0.3"] if stage in (1, 3) else []
    return [*(str(x) for pair in values.items() for x in pair), *lora, "--launch.no-preflight"]


def rehearsed_and_not(rank: int, world_size: int, root: Path, folder: Path, stage: int) -> dict[str, list]:
    return {mode: trained(flags(root, folder / mode, stage, mode)) for mode in ("off", "on")}


def trained(arguments: list[str]) -> list:
    """After each step: hashes of states and of the generator, and examples."""
    import hashlib

    import torch

    from laser_dist import rehearsal
    from laser_dist.bench.nursery import digest
    from laser_dist.distributed.collectives import bytes_received
    from laser_dist.ds_config import resolve
    from laser_dist.recipe import load_config
    from laser_dist.trainer import Trainer

    rehearsal._export = lambda saved, out: 1  # a process of its own, tested below
    bytes_received()  # of another run in this process
    config = load_config(arguments)
    trainer = Trainer(config, resolve(config.train.deepspeed, config))
    step, following, seen = trainer.step, trainer._next, []

    def next_batch(batches):
        loaded, chunks = following(batches)
        seen.append(loaded.packed.query_ids)
        return loaded, chunks

    def recorded(number, batches):
        values = step(number, batches)
        generator = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        seen.append((digest(trainer.engine), generator, values["loss/total"], trainer.position))
        return values

    trainer._next, trainer.step = next_batch, recorded
    trainer.fit()
    return [*seen, digest(trainer.engine), trainer.engine.ds.global_steps]


@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rehearsed_run_is_the_same_run(setting: Path, tmp_path: Path, stage: int) -> None:
    """Bit for bit: parameters, optimizer, generator, examples, losses and files. Dropout shows the generator."""
    for found in run_distributed(rehearsed_and_not, 2, setting, tmp_path, stage, timeout=250):
        assert found["on"] == found["off"]
    logs = {mode: [json.loads(line) for line in (tmp_path / mode / "metrics.jsonl").open()] for mode in found}
    timed = ("time/", "speed/", "memory/", "ranks/")
    for row, other in zip(logs["on"], logs["off"], strict=True):
        assert row.keys() == other.keys()
        assert [name for name in row if row[name] != other[name] and not name.startswith(timed)] == []
    left = {mode: sorted(path.name for path in (tmp_path / mode).rglob("*") if path.is_file()) for mode in found}
    assert [name for name in left["on"] if "tfevents" not in name] == [n for n in left["off"] if "tfevents" not in n]
    assert not (tmp_path / "on/.rehearsal").exists()


def failing(rank: int, world_size: int, arguments: list[str]) -> tuple[list[str], list[str], bool]:
    """Errors of rehearsals that each meet one fault, what is said meanwhile, and whether anything was left."""
    from laser_dist import rehearsal
    from laser_dist.distributed import checkpoint, disk
    from laser_dist.ds_config import resolve
    from laser_dist.observability.console import TrainingProgress
    from laser_dist.recipe import load_config
    from laser_dist.trainer import Trainer

    config = load_config(arguments)
    trainer = Trainer(config, resolve(config.train.deepspeed, config))
    trainer.fit()
    trainer.progress, trainer.total_steps = TrainingProgress(3, 0, enabled=True), 100
    heard, said = [], []
    trainer.progress.say = said.append
    usage = namedtuple("usage", "free")

    def attempt(module, name, fault):
        kept = getattr(module, name)
        setattr(module, name, fault)
        try:
            rehearsal.Rehearsal(trainer, 0)(1, {"time/forward": 2.0})
        except UserError as error:
            heard.append(str(error))
        finally:
            setattr(module, name, kept)

    def refuse(error):
        def fault(*_, **__):
            raise error

        return fault

    rehearsal.subprocess.run = lambda *_, **__: namedtuple("done", "returncode stderr")(2, "error: cannot be merged\n")
    attempt(rehearsal, "_available_memory", lambda: 1000)
    attempt(rehearsal, "evaluate", refuse(MemoryError()))
    attempt(rehearsal, "evaluate", refuse(UserError("no judged query")))
    attempt(disk.shutil, "disk_usage", lambda _: usage(400_000 if rank == 0 else 10**12))
    attempt(checkpoint, "save_file", refuse(OSError(30, "Read-only file system")) if rank else checkpoint.save_file)
    sums, numbers = rehearsal._sums, itertools.count()
    attempt(rehearsal, "_sums", lambda engine: [(next(numbers), 0)] if rank else sums(engine))
    attempt(rehearsal, "evaluate", rehearsal.evaluate)  # no fault but the export's
    rehearsal.Rehearsal(trainer, 5)(6, {"time/forward": 1e9})  # a resumed run: nothing happens
    return heard, said, rehearsal.Rehearsal(trainer, 0).folder.exists()


def test_what_would_fail_at_the_end_is_named_at_the_beginning(setting: Path, tmp_path: Path) -> None:
    """On all ranks alike, also where one of them alone fails; and nothing is left behind."""
    arguments = flags(setting, tmp_path / "run", 3, "on")
    first, second = run_distributed(failing, 2, [*arguments, "--train.max-steps", "1"], timeout=200)
    heard, said, left = first
    assert heard == second[0] and not left
    memory, oom, judged, disk, read_only, sums, export = heard
    assert "rehearsal, evaluate: vectors of 12 passages take" in memory and "evaluation.corpus" in memory
    assert "rehearsal, evaluate: out of memory" in oom
    assert "rehearsal, evaluate: no judged query" in judged
    assert "rehearsal, disk: the run takes" in disk and "checkpoint.keep = 2, the best one and the one being" in disk
    assert "rehearsal, save: " in read_only and "rank 1: [Errno 30] Read-only file system" in read_only
    assert "rehearsal, load: parameters or optimizer states differ" in sums
    assert "rehearsal, export: rank 0: cannot be merged" in export
    assert all("--rehearse off" in message for message in heard)
    assert any(line.startswith("rehearsal: save ") for line in said)


@pytest.mark.parametrize(
    ("mode", "start", "step", "seconds", "expected"),
    [
        ("auto", 0, 1, 9e9, False),  # the first step tells little of the others
        ("auto", 0, 2, 10, False),
        ("auto", 0, 2, 40, True),
        ("auto", 0, 3, 40, False),
        ("on", 0, 1, 0.1, True),
        ("on", 0, 2, 40, False),
        ("on", 10, 11, 40, False),
        ("off", 0, 1, 9e9, False),
        ("on", 0, 100, 40, False),
    ],
)
def test_when_it_is_due(tmp_path, monkeypatch, mode, start, step, seconds, expected) -> None:
    from types import SimpleNamespace

    from laser_dist.config import RunConfig
    from laser_dist.rehearsal import Rehearsal

    done: list[int] = []
    config = replace(RunConfig(), output=str(tmp_path), rehearse=mode)
    say = SimpleNamespace(say=lambda line: None)
    trainer = SimpleNamespace(config=config, total_steps=100, progress=say, doing=contextlib.nullcontext)
    monkeypatch.setattr(Rehearsal, "_rehearse", lambda self, step, line: done.append(step))
    Rehearsal(trainer, start)(step, {"time/forward": seconds, "loss/total": 1e9})  # type: ignore[arg-type]
    assert done == ([step] if expected else [])
