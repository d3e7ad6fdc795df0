"""`prepare --check` names every defect: shard, member, reason."""

import hashlib
import io
import json
import os
import tarfile
import time

import pytest

from laser_dist.data.manifest import encode_manifest, parse_manifest
from laser_dist.data.preparation.prepare import main
from laser_dist.errors import UserError


@pytest.fixture
def folder(tmp_path):
    lines = [
        json.dumps({"query_id": f"q{i}", "query": f"why {i}", "rationale": "r" if i % 5 else "", "pos": [f"yes {i}"]})
        for i in range(60)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{broken"]))
    options = ["--missing-rationale", "keep", "--on-error", "skip", "--dev-share", "0.2", "--shard-examples", "10"]
    main(["--source", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), *options])
    return tmp_path / "out"


def check(folder, capsys, workers="1"):
    capsys.readouterr()
    code = main(["--check", str(folder), "--workers", workers])
    out = capsys.readouterr().out
    return code, [line.removeprefix(f"{folder}/") for line in out.splitlines()]


def rewrite(folder, change):
    """A manifest that somebody edited."""
    path = folder / "manifest.json"
    table = json.loads(path.read_bytes())
    change(table)
    path.write_text(json.dumps(table))


def repack(folder, number, edit):
    """A shard with other members and a manifest that fits it: made on purpose, not by damage."""
    path = folder / f"shard-{number:06d}.tar"
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    buffer, offsets = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in edit(members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            offsets.append(tar.offset)
            tar.addfile(info, io.BytesIO(content))
        offsets.append(tar.offset)
    content = buffer.getvalue()
    path.write_bytes(content)
    values = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "offsets": offsets}
    rewrite(folder, lambda table: table["shards"][number].update(values))


def test_a_whole_folder_is_whole(folder, capsys):
    code, lines = check(folder, capsys)
    assert code == 0 and "all as written" in lines[0]


@pytest.mark.parametrize("workers", ["1", "3"])
def test_every_damaged_shard_is_named(folder, capsys, workers):
    first, second, third = (folder / f"shard-{number:06d}.tar" for number in range(3))
    first.write_bytes(first.read_bytes().replace(b'"why', b'"whx', 1))
    second.write_bytes(second.read_bytes()[:2000])
    third.unlink()
    code, lines = check(folder, capsys, workers)
    found = [tuple(line.split(": ", 1)) for line in lines]
    assert code == 1 and [name for name, _ in found] == [first.name, *[second.name] * (len(found) - 2), third.name]
    assert "sha256 differs" in found[0][1] and "2,000 bytes, the manifest says" in found[1][1]
    assert "cannot be read (No such file" in found[-1][1]


def test_every_bad_member_is_named(folder, capsys):
    def edit(members):
        members[2] = members[2][0], b'{"query": 5}'
        members[4] = members[4][0], b"\x80\x04pickle"
        members[6] = "000000006.pkl", members[6][1]
        members[8] = "../000000008.json", members[8][1]
        return members

    repack(folder, 0, edit)
    code, lines = check(folder, capsys)
    assert code == 1 and [line.split(": ")[1] for line in lines] == [
        "000000002.json",
        "000000004.json",
        "000000006.pkl",
        "../000000008.json",
    ]
    assert '"query" must be a string' in lines[0] and "not UTF-8" in lines[1] and "should be 000000006.json" in lines[2]


def test_a_query_id_in_two_shards_is_named(folder, capsys):
    with tarfile.open(folder / "shard-000000.tar") as tar:
        text = tar.extractfile("000000003.json").read()
    repack(folder, 2, lambda members: [(members[0][0], text), *members[1:]])
    code, lines = check(folder, capsys)
    assert code == 1 and lines == ["shard-000002.tar: 1 query ids occur before"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update(without_rationale=0), "lack a rationale, not 0"),
        (lambda t: t["lengths"]["query"]["words"].update(mean=1.5), "lengths are not those"),
        (lambda t: t["sources"][0].update(examples=7), "examples of the sources"),
        (lambda t: t["dev"].update(queries=1), "dev: "),
        (lambda t: t["files"].update({"dev/qrels.tsv": "0" * 64}), "dev/qrels.tsv: sha256 differs"),
        (lambda t: t["files"].update({"dev/more.tsv": "0" * 64}), "dev/more.tsv: is missing"),
        (lambda t: t["files"].pop("skipped.jsonl"), "skipped.jsonl: is not in the manifest"),
        (lambda t: t["shards"][1]["offsets"].__setitem__(1, 1500), "shard-000001.tar: examples lie elsewhere"),
    ],
)
def test_every_claim_of_the_manifest_is_checked(folder, capsys, change, words):
    rewrite(folder, change)
    code, lines = check(folder, capsys)
    assert code == 1 and len(lines) == 1 and words in lines[0]


def test_version_1_is_checked_for_what_it_claims(folder, capsys):
    def downgrade(table):
        shards = [{k: s[k] for k in ("name", "examples", "bytes", "sha256")} for s in table["shards"]]
        kept = {name: table[name] for name in ("examples", "without_rationale", "dropped")}
        table.clear()
        table.update(kept, source="a.jsonl", shards=shards, version=1)

    rewrite(folder, downgrade)
    for path in (folder / "dev").iterdir():
        path.unlink()
    (folder / "dev").rmdir()
    (folder / "skipped.jsonl").unlink()
    assert check(folder, capsys)[0] == 0
    shard = folder / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"yes", b"yet"))
    assert check(folder, capsys)[0] == 1


def test_without_a_manifest_there_is_nothing_to_check(folder):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        main(["--check", str(folder)])
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="no complete set"):
        main(["--check", str(folder)])


def test_a_member_that_claims_to_be_huge_takes_no_memory(folder, capsys):
    path = folder / "shard-000000.tar"
    header = tarfile.TarInfo("000000000.json")
    header.size = 2**40
    content = header.tobuf(tarfile.GNU_FORMAT) + bytes(512)
    path.write_bytes(content)
    values = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite(folder, lambda table: table["shards"][0].update(values, offsets=[*range(10), len(content)]))
    code, lines = check(folder, capsys)
    assert code == 1 and any("shard-000000.tar" in line and "unexpected end" in line for line in lines), lines


def test_links_and_folders_in_a_shard_are_not_followed(folder, capsys, tmp_path):
    (tmp_path / "secret").write_text(json.dumps({"query": "secret", "pos": ["x"]}))
    path = folder / "shard-000000.tar"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("000000000.json")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        tar.addfile(link)
    path.write_bytes(buffer.getvalue())
    code, lines = check(folder, capsys)
    assert code == 1 and any("no plain file" in line for line in lines)


def test_the_manifest_survives_its_own_encoding(folder):
    raw = (folder / "manifest.json").read_bytes()
    assert encode_manifest(parse_manifest(raw, "here")) == raw
    assert json.loads(raw)["shards"][0]["offsets"][0] == 0


def test_a_named_pipe_is_not_waited_for(folder, capsys):
    os.mkfifo(folder / "dev" / "pipe")
    began = time.monotonic()
    code, lines = check(folder, capsys)
    assert code == 1 and lines == ["dev/pipe: is not in the manifest"] and time.monotonic() - began < 30
