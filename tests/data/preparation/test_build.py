"""What an interruption leaves, and that the work goes on behind it, to the same bytes."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from laser_dist.data.preparation import partial
from laser_dist.data.preparation.prepare import main
from laser_dist.errors import UserError


def rows(count: int) -> list[str]:
    """Lines with everything that is counted: repeated ids and queries, missing rationales, defects, blank lines."""
    lines = []
    for i in range(count):
        row = {
            "query_id": f"q{i % (count - 5)}",
            "query": f"Query {i % (count // 2)}",
            "rationale": "" if i % 9 == 4 else f"one\n\ntwo {i}",
            "positives": [{"id": f"p{i}", "text": "yes " * (i % 50 + 1)}],
            "negatives": [{"id": f"n{i % 10}", "text": f"no {i % 10}"}],
        }
        lines.append("{broken" if i % 23 == 7 else "" if i % 17 == 3 else json.dumps(row))
    return lines


OPTIONS = ["--duplicates", "drop", "--missing-rationale", "drop", "--on-error", "skip", "--dev-share", "0.2"]


@pytest.fixture
def sources(tmp_path):
    paths = []
    for name, count in (("a", 40), ("b", 22)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(rows(count)).replace(': "q', f': "{name}q'))
        paths.append(str(path))
    return paths


def arguments(tmp_path, sources, out="out", shard_examples=7):
    return ["--source", *sources, "--out", str(tmp_path / out), "--shard-examples", str(shard_examples), *OPTIONS]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hidden(tmp_path):
    return [path for path in tmp_path.iterdir() if path.name.startswith(".")]


class FullDisk:
    """Takes so many writes, and half of the next."""

    def __init__(self, monkeypatch, writes: int) -> None:
        self.left, self.write = writes, partial._write_synced
        monkeypatch.setattr(partial, "_write_synced", self)

    def __call__(self, file, content: bytes) -> None:
        if self.left == 0:
            self.write(file, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= 1
        self.write(file, content)


def test_a_full_disk_at_any_write_is_explained_and_overcome(tmp_path, sources, monkeypatch, capsys):
    main(arguments(tmp_path, sources, "whole"))
    whole, writes, kept = contents(tmp_path / "whole"), 0, set()
    while True:
        with monkeypatch.context() as patch:
            FullDisk(patch, writes)
            try:
                main([*arguments(tmp_path, sources), "--workers", "1"])
            except UserError as error:
                message = str(error)
            else:
                break
        assert "no space left" in message and "needed" in message and "same command again" in message
        assert not (tmp_path / "out").exists()
        capsys.readouterr()
        assert main([*arguments(tmp_path, sources), "--workers", "1"]) == 0
        kept.add("continuing" in capsys.readouterr().err)
        assert contents(tmp_path / "out") == whole and not hidden(tmp_path)
        for path in sorted((tmp_path / "out").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (tmp_path / "out").rmdir()
        writes += 1
    assert writes > 20 and kept == {True, False}  # some failed before the first shard was done, most did not


def test_what_is_needed_is_estimated(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"query": f"q{i}", "rationale": "r", "pos": ["x" * 5000]}) for i in range(2000)]
    path.write_text("\n".join(lines))
    FullDisk(monkeypatch, 20)
    with pytest.raises(UserError, match=r"4 MB are written and about \d+ MB more needed") as error:
        main(["--source", str(path), "--out", str(tmp_path / "out"), "--shard-examples", "100", "--workers", "1"])
    # Of 11 MB in all; that of the chunk under way counts as not read.
    assert 7 <= int(str(error.value).split("about ")[1].split(" MB")[0]) <= 11


def test_a_changed_source_or_setting_starts_over_and_says_so(tmp_path, sources, monkeypatch, capsys):
    for change in (["--dev-share", "0.3"], []):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="no space"):
            FullDisk(patch, 12)
            main([*arguments(tmp_path, sources), "--overwrite"])
        if not change:
            with open(sources[0], "a") as file:
                file.write('\n{"query": "new", "rationale": "r", "pos": ["yes"]}')
        expected = arguments(tmp_path, sources, f"whole{len(change)}") + change
        main([*expected[:-2], *change] if change else expected)
        capsys.readouterr()
        main([*arguments(tmp_path, sources), *change, "--overwrite"])
        assert "starting over" in capsys.readouterr().err
        assert contents(tmp_path / "out") == contents(tmp_path / f"whole{len(change)}")


def test_a_damaged_shard_of_the_interrupted_run_is_made_again(tmp_path, sources, monkeypatch):
    main(arguments(tmp_path, sources, "whole"))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="no space"):
        FullDisk(patch, 20)
        main(arguments(tmp_path, sources))
    shard = tmp_path / ".out.partial/shard-000001.tar"
    shard.write_bytes(shard.read_bytes().replace(b"yes", b"yet", 1))
    main(arguments(tmp_path, sources))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_ctrl_c_keeps_finished_shards_or_leaves_nothing(tmp_path, sources, monkeypatch, capsys):
    main(arguments(tmp_path, sources, "whole"))
    commit = partial.PartialSet.commit
    for shards in (0, 3):

        def interrupted(self, *values, shards=shards, **named):
            if len(self.shards) == shards:
                raise KeyboardInterrupt
            commit(self, *values, **named)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(partial.PartialSet, "commit", interrupted)
            main(arguments(tmp_path, sources))
        assert ("kept: 3 finished shards" in capsys.readouterr().err) == bool(hidden(tmp_path)) == bool(shards)
    main(arguments(tmp_path, sources))
    assert "in 3 shards" in capsys.readouterr().err
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_processes_do_not_write_one_folder(tmp_path, sources):
    first = partial.PartialSet(tmp_path / "out", {"who": "first"})
    with pytest.raises(UserError, match="another process is writing"):
        main(arguments(tmp_path, sources))
    first.close()
    assert main(arguments(tmp_path, sources)) == 0


def test_killed_processes_lose_no_finished_shard(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows(3000)))
    options = arguments(tmp_path, [str(path)], shard_examples=20) + ["--max-skipped", "1000"]
    command = [sys.executable, "-m", "laser_dist.cli", "prepare", *options]
    rng, journal, done = random.Random(0), tmp_path / ".out.state/journal.jsonl", 0
    for _ in range(2):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            target = done + rng.randint(3, 30)
            while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") <= target):
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            told = process.stderr.read()
        assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"
        assert (f"in {done} shards" in told) == (done > 0)
        assert not (tmp_path / "out").exists()
        done = journal.read_bytes().count(b"\n") - 1
        assert len(list((tmp_path / ".out.partial").glob("*.tar"))) - done in (0, 1)
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert f"in {done} shards" in told
    main([*options, "--out", str(tmp_path / "whole"), "--workers", "1"])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and not hidden(tmp_path)
