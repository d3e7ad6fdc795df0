import dataclasses
import hashlib
import io
import itertools
import json
import pickle
import tarfile
from array import array

import pytest

from laser_dist.data import shards
from laser_dist.data.manifest import encode_manifest
from laser_dist.data.schema import Example, Passage, decode_example
from laser_dist.data.shards import Manifest, Shard, load_manifest, read_members, read_shard, write_shards
from laser_dist.errors import UserError


def example(i: int, rationale: str = "because\n\nso") -> Example:
    return Example(f"q{i}", f"query {i} ü", rationale, (Passage(f"p{i}", "yes " * i + "."),), (Passage(f"n{i}", "no"),))


def write(folder, count=100, **options):
    return write_shards((example(i) for i in range(count)), folder, source="test", **options)


def test_what_is_written_is_read(tmp_path):
    manifest = write(tmp_path / "out", 25, shard_examples=10, dropped={"no rationale": 2})
    assert load_manifest(tmp_path / "out") == manifest
    assert [shard.examples for shard in manifest.shards] == [10, 10, 5]
    assert (manifest.examples, manifest.without_rationale, manifest.dropped) == (25, 0, {"no rationale": 2})
    texts = [text for shard in manifest.shards for text in read_shard(tmp_path / "out", shard)]
    assert [decode_example(text, "here") for text in texts] == [example(i) for i in range(25)]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_offsets_lead_to_every_example(tmp_path):
    manifest = write(tmp_path / "out", 25, shard_examples=10)
    found = []
    for shard in manifest.shards:
        content = (tmp_path / "out" / shard.name).read_bytes()
        for start, end in itertools.pairwise(shard.offsets):
            with tarfile.open(fileobj=io.BytesIO(content[start:end])) as tar:
                [member] = tar.getmembers()
                found.append(decode_example(tar.extractfile(member).read(), "here"))
    assert found == [example(i) for i in range(25)]


def test_version_1_is_read_as_before(tmp_path):
    manifest = write(tmp_path / "out", 5)
    table = json.loads(encode_manifest(manifest))
    shards = [{k: s[k] for k in ("name", "examples", "bytes", "sha256")} for s in table["shards"]]
    old = {"source": "a, b", "examples": 5, "without_rationale": 0, "shards": shards, "dropped": {}, "version": 1}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(old))
    read = load_manifest(tmp_path / "out")
    assert (read.version, read.source, read.examples, len(read.shards[0].offsets)) == (1, "a, b", 5, 0)
    assert len(read_shard(tmp_path / "out", read.shards[0])) == 5


def test_missing_rationales_are_counted(tmp_path):
    manifest = write_shards([example(0), example(1, rationale="")], tmp_path / "out", source="test")
    assert manifest.without_rationale == 1


def test_the_same_examples_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, 25, shard_examples=10)
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert a == b and len(a) == 4


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, UserError])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    def interrupted():
        yield from map(example, range(15))
        raise error("stop")

    with pytest.raises(error):
        write_shards(interrupted(), tmp_path / "out", source="test", shard_examples=10)
    assert list(tmp_path.iterdir()) == []


def test_remains_of_a_killed_write_are_cleaned(tmp_path):
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "shard-000009.tar").write_bytes(b"half")
    write(tmp_path / "out", 3)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["manifest.json", "out", "shard-000000.tar"]


def test_occupied_folders(tmp_path):
    out = tmp_path / "out"
    write(out, 3)
    with pytest.raises(UserError, match="not empty.*--overwrite"):
        write(out, 4)
    with pytest.raises(RuntimeError):  # a failing overwrite keeps the old set
        write_shards(map(_fail, range(1)), out, source="test", overwrite=True)
    assert load_manifest(out).examples == 3
    write(out, 4, overwrite=True)
    assert load_manifest(out).examples == 4
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="would delete"):
        write(tmp_path, 4, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        write(tmp_path / "precious.txt", 4, overwrite=True)
    (tmp_path / "empty").mkdir()
    assert write(tmp_path / "empty", 2).examples == 2


def _fail(i):
    raise RuntimeError(i)


def test_no_example_and_repeated_ids_are_refused(tmp_path):
    with pytest.raises(UserError, match="no example"):
        write(tmp_path / "out", 0)
    with pytest.raises(UserError, match='"q1" repeats: examples 2 and 4'):
        write_shards(map(example, (0, 1, 2, 1)), tmp_path / "out", source="test")
    assert list(tmp_path.iterdir()) == []


def _flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


# Of these eight, a stock reader reports only the two cuts inside a payload; the others give fewer or altered rows.
DAMAGE = {
    "cut between members": lambda content, half: content[:half],
    "cut in a header": lambda content, half: content[: half + 100],
    "cut in a payload": lambda content, half: content[: half + 512 + 40],
    "cut in the last payload": lambda content, half: content[: content.rstrip(b"\0").__len__() - 5],
    "bit in an early header": lambda content, half: _flip(content, 1024 + 3),
    "bit in a middle header": lambda content, half: _flip(content, half + 3),
    "1 KiB zeroed": lambda content, half: content[:half] + bytes(1024) + content[half + 1024 :],
    "bit in a payload": lambda content, half: _flip(content, half + 512 + 20),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_before_any_row(tmp_path, damage):
    out = tmp_path / "out"
    [shard] = write(out).shards
    path = out / shard.name
    intact = path.read_bytes()
    with tarfile.open(path) as tar:
        half = tar.getmembers()[50].offset
    path.write_bytes(DAMAGE[damage](intact, half))
    assert path.read_bytes() != intact
    with pytest.raises(UserError, match=f"{shard.name} is damaged.*laser-dist prepare"):
        read_shard(out, shard)
    if "cut" in damage:  # seen already when the folder is opened
        with pytest.raises(UserError, match=f"{shard.name} has .* bytes, the manifest says"):
            load_manifest(out)


def _shard_of(folder, members: dict[str, bytes], examples: int) -> Shard:
    """A tar file with these members and a manifest entry whose hash is right: made on purpose, not by damage."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    content = buffer.getvalue()
    (folder / "made.tar").write_bytes(content)
    return Shard("made.tar", examples, len(content), hashlib.sha256(content).hexdigest())


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["__0__", "noending"])
def test_members_without_an_ending_are_refused(tmp_path, name):
    """WebDataset passes over them without a word."""
    with pytest.raises(UserError, match="only .json members"):
        read_shard(tmp_path, _shard_of(tmp_path, {"0.json": b"{}", name: b""}, 1))


@pytest.mark.parametrize("suffix", ["pickle", "pyd", "pkl", "pth", "json.pyd", "txt"])
def test_other_members_are_refused_and_pickles_not_run(tmp_path, suffix):
    marker = tmp_path / "executed"
    bomb = pickle.dumps(_Bomb(marker))
    for members in ({f"0.{suffix}": bomb}, {"0.json": b"{}", f"0.{suffix}": bomb}):
        with pytest.raises(UserError, match="only .json members"):
            read_shard(tmp_path, _shard_of(tmp_path, members, 1))
    assert not marker.exists()
    pickle.loads(bomb).close()
    assert marker.exists()  # the bomb itself works


@pytest.mark.parametrize(
    ("members", "examples"),
    [({"0.json": b"{}"}, 2), ({"0.json": b"{}", "1.json": b"{}"}, 1)],
)
def test_the_count_must_be_the_manifests(tmp_path, members, examples):
    with pytest.raises(UserError, match="the manifest says"):
        read_shard(tmp_path, _shard_of(tmp_path, members, examples))


def test_no_tar_and_no_file(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"text")
    with pytest.raises(UserError, match="not a readable tar"):
        read_shard(tmp_path, Shard("x.tar", 1, 4, hashlib.sha256(b"text").hexdigest()))
    with pytest.raises(UserError, match="cannot be read"):
        read_shard(tmp_path, Shard("y.tar", 1, 4, ""))


def _edit(manifest: Manifest, **change) -> str:
    return json.dumps(json.loads(encode_manifest(manifest)) | change)


def test_a_wrong_manifest_is_refused(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="does not exist.*laser-dist prepare"):
        load_manifest(out)
    manifest = write(out, 3)
    [shard] = json.loads(encode_manifest(manifest))["shards"]
    wrong = {
        "version 99": _edit(manifest, version=99),
        "do not add up": _edit(manifest, examples=4),
        "not a file name": _edit(manifest, shards=[shard | {"name": "../out/shard-000000.tar"}]),
        "damaged": "{",
        "is damaged": "[]",
        "unexpected": _edit(manifest, shards=[shard | {"extra": 1}]),
        "TypeError": _edit(manifest, examples="3", shards=[shard | {"examples": "3"}]),
        "offsets of": _edit(manifest, shards=[shard | {"offsets": shard["offsets"][:-1]}]),
        "do not fit": _edit(manifest, shards=[shard | {"offsets": [0, 9**9, 512, 1024]}]),
        "OverflowError": _edit(manifest, shards=[shard | {"offsets": [9**99]}]),
        "not listed": _edit(manifest, sources=[]),
        "does not lie in": _edit(manifest, files={"../secret": ""}),
        "is missing": _edit(manifest, shards=[shard | {"name": "shard-000001.tar"}]),
    }
    for words, text in wrong.items():
        (out / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=words):
            load_manifest(out)


def test_a_shard_is_read_where_the_manifest_says_and_scanned_where_that_does_not_fit(tmp_path, monkeypatch):
    """The scan takes many times as long, but alone decides what is refused: places that fit must give what it gives."""
    [shard] = write(tmp_path / "out", 25).shards
    members = read_members(tmp_path / "out", shard)
    assert members == read_members(tmp_path / "out", dataclasses.replace(shard, offsets=array("q")))
    scans, scan = [], shards._scan
    monkeypatch.setattr(shards, "_scan", lambda content, place: scans.append(place) or scan(content, place))
    assert read_members(tmp_path / "out", shard) == members and not scans
    shifted = array("q", [offset + 512 for offset in shard.offsets])
    merged = array("q", [*shard.offsets[:3], *shard.offsets[4:]])
    shorter = shard.offsets[:-1]
    for offsets in (shifted, merged, shorter, array("q", [0, 10**9]), array("q", range(26))):
        scans.clear()
        assert read_members(tmp_path / "out", dataclasses.replace(shard, offsets=offsets)) == members and scans
