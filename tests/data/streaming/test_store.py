"""Shards behind HTTP and S3: real servers on this machine, that fail in all the ways servers fail."""

import errno
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from laser_dist.config import DataConfig
from laser_dist.data.manifest import Shard
from laser_dist.data.schema import Example, Passage
from laser_dist.data.shards import load_manifest, write_shards
from laser_dist.data.streaming import store as store_module
from laser_dist.data.streaming.sets import open_data
from laser_dist.data.streaming.store import RemoteOptions, RemoteStore
from laser_dist.data.streaming.stream import ExampleStream, plain_errors
from laser_dist.errors import UserError
from laser_dist.testing import run_distributed
from laser_dist.testing.faulty_server import FaultyServer

EXAMPLES = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "shards"
    rows = (Example(f"q{i}", f"query {i} " * 50, "", (Passage(f"p{i}", "x"),)) for i in range(EXAMPLES))
    write_shards(rows, out, source="test", shard_examples=5)
    return out


@pytest.fixture
def server(folder):
    server = FaultyServer(folder)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(store_module, "LONGEST_PAUSE", 0.01)


def remote(server: FaultyServer, cache: Path, **options) -> RemoteStore:
    return RemoteStore(server.url, RemoteOptions(cache, **{"timeout": 0.5, "attempts": 3} | options))


def ids(data, *, workers: int = 0, world_size: int = 1, start: int = 0, **options) -> list[str]:
    streams = [
        ExampleStream(
            data,
            seed=1,
            queries_per_rank=4 // world_size,
            total_batches=(2 * EXAMPLES - start) // 4,
            start=start,
            rank=rank,
            world_size=world_size,
            shuffle_shards=3,
            **options,
        )
        for rank in range(world_size)
    ]
    ranks = [list(plain_errors(DataLoader(s, batch_size=None, num_workers=workers))) for s in streams]
    return [example.query_id for micro in zip(*ranks, strict=True) for batch in micro for _, example in batch.items]


FAULTS = ("500", "503", "429", "truncated", "reset", "stall", "stall within", "altered")


@pytest.mark.parametrize("fault", [*FAULTS, "trickle"])
def test_a_fault_that_passes_is_retried(folder, server, tmp_path, fault):
    shard = load_manifest(folder).shards[0]
    server.faults[shard.name] = [fault, fault]
    content = remote(server, tmp_path).read_verified(shard)
    assert content == (folder / shard.name).read_bytes()
    assert server.requests[shard.name] == 3


@pytest.mark.parametrize(
    ("fault", "words", "requests"),
    [
        ("500", "the server answered 500", 3),
        ("truncated", "ClientPayloadError", 3),
        ("reset", "ClientPayloadError|ClientOSError|ConnectionReset", 3),
        ("stall", "next to nothing, came for 0.5 s", 3),
        ("trickle", "next to nothing, came for 0.5 s", 3),
        ("altered", "its sha256 differs from the manifest's", 3),
        ("404", "it does not exist", 1),
        ("410", "the server answered 410", 1),
        ("401", "access is denied", 1),
        ("403", "access is denied", 1),
    ],
)
def test_a_lasting_fault_ends_in_a_message_with_address_cause_and_remedy(
    folder, server, tmp_path, fault, words, requests
):
    shard = load_manifest(folder).shards[0]
    server.faults[shard.name] = [fault] * 9
    started = time.monotonic()
    with pytest.raises(UserError, match=words) as error:
        remote(server, tmp_path).read_verified(shard)
    assert time.monotonic() - started < 8
    assert str(error.value).startswith(f"{server.url}/{shard.name} cannot be fetched: ")
    assert "Check the address" in str(error.value)
    assert server.requests[shard.name] == requests
    assert not list(tmp_path.glob("*.t*")) and not list(tmp_path.glob(".*"))  # nothing half fetched is left


def test_http_with_faults_gives_the_ids_of_the_disk(folder, server, tmp_path):
    """Two epochs over a server that fails the first requests of every file, each in another way; and a resume."""
    for i, shard in enumerate(load_manifest(folder).shards):
        server.faults[shard.name] = [FAULTS[i % len(FAULTS)], FAULTS[(i + 3) % len(FAULTS)]]
    server.faults["manifest.json"] = ["503", "truncated"]
    config = DataConfig(train=server.url, cache=str(tmp_path), timeout=0.5)
    expected = ids(folder)
    assert ids(open_data(config)) == expected
    assert all(count == 3 for name, count in server.requests.items()), "a shard was fetched again in the second epoch"
    assert ids(open_data(config), world_size=2, workers=2, start=28) == expected[28:]


@pytest.fixture(scope="module")
def s3():
    """A real S3-compatible server; its address. Credentials come from the environment, as for any store."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3, folder, monkeypatch):
    """The shards as s3://... of that server."""
    import s3fs

    for name, value in {
        "AWS_ACCESS_KEY_ID": "an-id",
        "AWS_SECRET_ACCESS_KEY": "a-secret-nobody-may-see",
        "AWS_ENDPOINT_URL": s3,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    filesystem = s3fs.S3FileSystem()
    if not filesystem.exists("bucket"):
        filesystem.mkdir("bucket")
        filesystem.put(str(folder), "bucket/sets/first", recursive=True)
    yield "s3://bucket/sets/first"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2)])
def test_s3_gives_the_ids_of_the_disk(folder, bucket, tmp_path, world_size, workers):
    config = DataConfig(train=bucket, cache=str(tmp_path))
    assert ids(open_data(config), world_size=world_size, workers=workers) == ids(folder)
    assert len(list(tmp_path.glob("*.tar"))) == 12


def test_s3_names_what_is_missing_and_no_secret(bucket, tmp_path, monkeypatch):
    for place, words in ((f"{bucket}/no", "does not exist"), ("s3://other/set", "does not exist|answered")):
        with pytest.raises(UserError, match=words) as error:
            open_data(DataConfig(train=place, cache=str(tmp_path), attempts=2))
        assert place in str(error.value) and "a-secret" not in str(error.value)


def test_a_mixture_of_disk_http_and_s3_is_that_of_the_disk(folder, server, bucket, tmp_path):
    def mix(*places):
        return ids(open_data(DataConfig(mix=dict(zip(places, (3.0, 2.0, 1.0), strict=True)), cache=str(tmp_path))))

    assert mix(str(folder), server.url, bucket) == mix(str(folder), f"{folder}/", f"{folder}/.")


def test_a_server_that_dies_for_good_stops_a_run_or_costs_its_shard(folder, server, tmp_path):
    shard = load_manifest(folder).shards[5]
    server.faults[shard.name] = ["404"] * 99
    config = DataConfig(train=server.url, cache=str(tmp_path), timeout=0.5, attempts=2)
    with pytest.raises(UserError, match=f"{server.url}/{shard.name} cannot be fetched: it does not exist"):
        ids(open_data(config), workers=2)
    got, expected = ids(open_data(config), max_skipped=0.1), ids(folder)
    lost = {f"q{i}" for i in range(25, 30)}
    assert not lost & set(got)
    assert all(a == b or b in lost for a, b in zip(got, expected, strict=True))


def test_a_missing_package_is_said_at_once(server, tmp_path, monkeypatch):
    """The advice to install it was caught, retried, and lost."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'laser-dist\\[remote\\]'"):
        open_data(DataConfig(train=server.url, cache=str(tmp_path)))


def test_processes_of_one_machine_fetch_a_shard_once(folder, server, tmp_path):
    shard = load_manifest(folder).shards[0]
    server.faults[shard.name] = ["stall"]  # so that all others arrive while the first one waits
    arguments = (server.url, str(tmp_path), shard)
    assert run_distributed(sizes_on_a_rank, 3, *arguments, timeout=60) == [[shard.bytes] * 2] * 3
    assert server.requests[shard.name] == 2  # the stall, and the one that came through


def sizes_on_a_rank(rank: int, world_size: int, url: str, cache: str, shard: Shard) -> list[int]:
    store = RemoteStore(url, RemoteOptions(Path(cache), timeout=1.5))
    return [len(store.read_verified(shard)) for _ in range(2)]


def test_who_waited_for_a_failing_fetch_fails_with_it(folder, server, tmp_path):
    shard = load_manifest(folder).shards[0]
    server.faults[shard.name] = ["stall"] * 99

    def fetch(_):
        with pytest.raises(UserError, match="came for 0.5 s"):
            remote(server, tmp_path, attempts=2).read_verified(shard)

    started = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(fetch, range(6)))
    assert time.monotonic() - started < 5 and server.requests[shard.name] == 2
    server.faults.clear()  # a later attempt starts afresh
    assert remote(server, tmp_path).read_verified(shard)


def test_a_copy_that_rotted_is_fetched_again(folder, server, tmp_path):
    shard, store = load_manifest(folder).shards[0], remote(server, tmp_path)
    content = store.read_verified(shard)
    copy = tmp_path / f"{shard.sha256}.tar"
    copy.write_bytes(content[:-1] + b"\1")
    assert store.read_verified(shard) == content == copy.read_bytes()
    assert server.requests[shard.name] == 2


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.lists(st.integers(0, 11), max_size=30), room=st.integers(1, 5))
def test_the_cache_keeps_what_was_used_last_within_its_size(folder, server, tmp_path_factory, wanted, room):
    cache, shards = tmp_path_factory.mktemp("cache"), load_manifest(folder).shards
    size = max(shard.bytes for shard in shards)
    store = remote(server, cache, cache_bytes=room * size + size // 2)
    recent: list[str] = []
    for number in wanted:
        shard = shards[number]
        store.read_verified(shard)
        recent = [*(name for name in recent if name != shard.sha256), shard.sha256][-room:]
        assert {path.stem for path in cache.glob("*.tar")} == set(recent)


def test_what_killed_processes_left_in_the_cache_goes(folder, server, tmp_path):
    old, fresh = tmp_path / ".x.tar.1.tmp", tmp_path / ".y.tar.2.tmp"
    old.touch()
    fresh.touch()
    os.utime(old, (0, 0))
    shard = load_manifest(folder).shards[0]
    remote(server, tmp_path).read_verified(shard)
    assert fresh.is_file() and not old.exists()


def test_a_full_disk_is_told_from_a_failing_server(folder, server, tmp_path, monkeypatch):
    shard, store = load_manifest(folder).shards[0], remote(server, tmp_path)

    class Full:
        def get_file(self, url, path, callback):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RemoteStore, "_filesystem", lambda self: Full())
    with pytest.raises(UserError, match=rf"the cache {tmp_path} cannot be used \(No space left.*data.cache_gib"):
        store.read_verified(shard)
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_stops_a_run_that_skips_damage(folder, server, tmp_path, monkeypatch, workers):
    """It would cost one shard after the other, none of which is damaged."""
    data = open_data(DataConfig(train=server.url, cache=str(tmp_path)))

    def full(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RemoteStore, "_download", full)
    with pytest.raises(UserError) as error:
        ids(data, workers=workers, max_skipped=0.9)
    assert str(error.value).startswith(f"the cache {tmp_path} cannot be used (No space left on device)")


def test_a_cache_that_is_a_file_is_refused(folder, server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the cache .*/file cannot be used"):
        open_data(DataConfig(train=server.url, cache=str(tmp_path / "file")))


def test_a_cache_smaller_than_two_windows_is_refused_before_the_run(folder, server, tmp_path):
    with pytest.raises(UserError, match="data.cache_gib = 1e-05: two windows of data.shuffle_shards = 16"):
        open_data(DataConfig(train=server.url, cache=str(tmp_path), cache_gib=1e-5))
    open_data(DataConfig(train=str(folder), cache_gib=1e-5))  # folders need no cache


def test_a_local_folder_is_read_where_it_is(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ids(open_data(DataConfig(train=str(folder))))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("https://me:hunter2@host/x", "https://host/x comes with a password"),
        ("https://host/x?X-Amz-Signature=hunter2", "comes with a password, a query"),
        ("s3://bucket/x#hunter2", "fragment"),
        ("ftp://me:hunter2@host/x", "http.s.:// and s3:// only"),
        ("pipe://hunter2", "http.s.:// and s3:// only"),
        ("file:///etc/hunter2", "http.s.:// and s3:// only"),
    ],
)
def test_addresses_with_secrets_or_of_other_kinds_are_refused_without_repeating_them(place, words):
    for config in (DataConfig(train=place), DataConfig(mix={place: 1.0})):
        for refuse in (config.validate, lambda config=config: open_data(config)):
            with pytest.raises(UserError, match=words) as error:
                refuse()
            assert "hunter2" not in str(error.value)


def test_a_manifest_cannot_lead_out_of_the_cache(folder, server, tmp_path):
    table = json.loads((folder / "manifest.json").read_text())
    table["shards"][0]["sha256"] = "../../outside"
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    (hostile / "manifest.json").write_text(json.dumps(table))
    server.folder = hostile
    with pytest.raises(UserError, match="manifest.json is damaged"):
        open_data(DataConfig(train=server.url, cache=str(tmp_path / "cache")))
