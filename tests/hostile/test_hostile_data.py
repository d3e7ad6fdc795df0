"""Hostile shards, sources, recipes and servers: each is made here, given to what reads it, and must end in a refusal.

Nothing may be executed (a canary file never appears), and what it takes is bounded: memory by a limit of the process,
time by a deadline. `laser_dist.testing.hostile` says how cases run.
"""

import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from laser_dist.testing.hostile import Cases, command, run_cases

SHARDS, SOURCES, RECIPES, SERVERS = Cases(), Cases(), Cases(), Cases()
ROW = b'{"query": "q", "rationale": "r", "positives": [{"id": "p", "text": "t"}]}'
GIB = 2**30


# --- shards and manifests --------------------------------------------------------------------------------------------


def shard_set(folder: Path, content: bytes, examples: int = 1, name: str = "x.tar") -> Path:
    """A folder whose manifest (version 1: without offsets) vouches for this shard."""
    folder.mkdir(exist_ok=True)
    if name == "x.tar":
        (folder / name).write_bytes(content)
    shard = {"name": name, "examples": examples, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_manifest(folder, {"shards": [shard], "examples": examples})
    return folder


def write_manifest(folder: Path, changes: dict | None = None, text: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    table = {"version": 1, "source": "x", "examples": 1, "without_rationale": 0, "shards": []} | (changes or {})
    (folder / "manifest.json").write_text(json.dumps(table) if text is None else text)
    return folder


def tar(*members: tuple[str, bytes], change=None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if change:
                change(info)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def read_all(folder: Path, **options) -> None:
    """The folder as the trainer's loader reads it."""
    from laser_dist.config import DataConfig
    from laser_dist.data.streaming.sets import open_data
    from laser_dist.data.streaming.stream import ExampleStream

    config = DataConfig(train=str(folder), **options)
    skipped = config.max_skipped if config.on_error == "skip" else None
    stream = ExampleStream(open_data(config), seed=0, queries_per_rank=1, total_batches=1, max_skipped=skipped)
    list(stream)


def pickled_member(suffix: str):
    def run(folder: Path, bomb: bytes) -> None:
        read_all(shard_set(folder / "s", tar(("0.json", ROW), (f"0.{suffix}", bomb))))

    return run


for suffix in ("pyd", "pkl", "pickle", "pth", "npy", "txt"):
    SHARDS.add(f"a pickle as .{suffix} in a shard", "only .json members are read", pickled_member(suffix))


@SHARDS.case("a pickle instead of JSON", "is not UTF-8|not valid JSON")
def _(folder, bomb):
    read_all(shard_set(folder / "s", tar(("0.json", bomb))))


@SHARDS.case("a link to a file outside", "a link, a device")
def _(folder, bomb):
    def link(info):
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"

    read_all(shard_set(folder / "s", tar(("0.json", b""), change=link)))


@SHARDS.case("a hard link to a file outside", "a link, a device")
def _(folder, bomb):
    def link(info):
        info.type, info.linkname = tarfile.LNKTYPE, "../../etc/passwd"

    read_all(shard_set(folder / "s", tar(("0.json", b""), change=link)))


@SHARDS.case("a device in a shard", "a link, a device")
def _(folder, bomb):
    def device(info):
        info.type, info.devmajor, info.devminor = tarfile.CHRTYPE, 1, 5

    read_all(shard_set(folder / "s", tar(("0.json", b""), change=device)))


for name in ("../../escaped.json", "/tmp/escaped.json", "a/../b.json"):
    SHARDS.add(
        f"the member {name}",
        "members lie in no folder",
        lambda folder, bomb, name=name: read_all(shard_set(folder / "s", tar((name, ROW)))),
    )


@SHARDS.case("a sparse member of a terabyte", "a link, a device|holes|not a readable tar")
def _(folder, bomb):
    info = tarfile.TarInfo("0.json")
    info.size = 512
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,1"}
    info.pax_headers |= {"GNU.sparse.size": str(10**12), "GNU.sparse.name": "0.json", "GNU.sparse.numblocks": "1"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(b"x" * 512))
    read_all(shard_set(folder / "s", buffer.getvalue()))


@SHARDS.case("a gzip bomb called .tar", "not a readable tar")
def _(folder, bomb):
    read_all(shard_set(folder / "s", gzip.compress(tar(("0.json", b" " * 50_000_000)), 1)))


@SHARDS.case("a zip called .tar", "not a readable tar")
def _(folder, bomb):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("0.json", ROW)
    read_all(shard_set(folder / "s", buffer.getvalue()))


@SHARDS.case("a header that says the member has 8 GiB", "not a readable tar|holds 0 examples")
def _(folder, bomb):
    content = bytearray(tar(("0.json", ROW)))
    content[124:136] = b"77777777777\0"
    content[148:156] = b"        "
    content[148:156] = b"%06o\0 " % sum(content[:512])
    read_all(shard_set(folder / "s", bytes(content)))


@SHARDS.case("the same member twice", "its name occurs twice")
def _(folder, bomb):
    read_all(shard_set(folder / "s", tar(("0.json", ROW), ("0.json", ROW)), examples=2))


for name in ("../outside.tar", "/etc/passwd", "..", "a\\b.tar", "x.tar?token=1", "x\0.tar", "x\n.tar", ""):
    SHARDS.add(
        f"a manifest that names the shard {name!r}",
        "is not a file name",
        lambda folder, bomb, name=name: read_all(shard_set(folder / "s", tar(("0.json", ROW)), name=name)),
    )


@SHARDS.case("a manifest whose other files lie outside", "does not lie in the folder")
def _(folder, bomb):
    shard_set(folder / "s", tar(("0.json", ROW)))
    table = json.loads((folder / "s" / "manifest.json").read_text()) | {"files": {"../../etc/passwd": ""}}
    read_all(write_manifest(folder / "s", table))


MANIFESTS = {
    "nested a million deep": ("nested too deeply", "[" * 1_000_000),
    "of twelve million empty lists": ("more than 1,000,000 lists", "[" + "[]," * 12_000_000 + "[]]"),
    "with an integer of 100,000 digits": ("more than 4300 digits", '{"version": ' + "9" * 100_000 + "}"),
    "with NaN": ("NaN is no number", '{"version": 1, "examples": NaN}'),
    "with Infinity as a count": ("Infinity is no number", '{"version": 1, "examples": Infinity}'),
    "with a key twice": ("appears twice", '{"version": 1, "version": 2}'),
    "of a huge string": ("is damaged", '"' + "x" * 40_000_000 + '"'),
    "that is no UTF-8": ("is damaged", '{"version": "\udcff"}'),
}


def read_manifest_text(text: str):
    def run(folder: Path, bomb: bytes) -> None:
        (folder / "s").mkdir()
        (folder / "s" / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        read_all(folder / "s")

    return run


for name, (expected, text) in MANIFESTS.items():
    SHARDS.add(f"a manifest {name}", expected, read_manifest_text(text))


@SHARDS.case("a manifest with counts that are no numbers", "is damaged")
def _(folder, bomb):
    shard = {"name": "x.tar", "examples": True, "bytes": -1, "sha256": "0" * 64}
    read_all(write_manifest(folder / "s", {"shards": [shard]}))


@SHARDS.case("a manifest of 10 GB", "bytes, but at most")
def _(folder, bomb):
    write_manifest(folder / "s")
    os.truncate(folder / "s" / "manifest.json", 10 * GIB)
    read_all(folder / "s")


@SHARDS.case("a manifest that is a pipe", "no plain file")
def _(folder, bomb):
    (folder / "s").mkdir()
    os.mkfifo(folder / "s" / "manifest.json")
    read_all(folder / "s")


@SHARDS.case("a manifest that never ends", "no plain file")
def _(folder, bomb):
    (folder / "s").mkdir()
    (folder / "s" / "manifest.json").symlink_to("/dev/zero")
    read_all(folder / "s")


@SHARDS.case("a shard that grew to 10 GB", "10,737,418,240 bytes, but at most")
def _(folder, bomb):
    shard_set(folder / "s", tar(("0.json", ROW)))
    os.truncate(folder / "s" / "x.tar", 10 * GIB)
    read_all(folder / "s", on_error="skip")


@SHARDS.case("a shard that never ends", "no plain file")
def _(folder, bomb):
    shard_set(folder / "s", tar(("0.json", ROW)))
    (folder / "s" / "x.tar").unlink()
    (folder / "s" / "x.tar").symlink_to("/dev/zero")
    read_all(folder / "s", on_error="skip")


ROWS = {
    "nested deeply": ("nested too deeply", b'{"query": ' + b"[" * 100_000),
    "with a number of a million digits": ("more than 4300 digits", b'{"query": ' + b"1" * 1_000_000 + b"}"),
    "with a field twice": ("appears twice", b'{"query": "a", "query": "b"}'),
    "with NaN": ("NaN is no number", b'{"query": "a", "score": NaN}'),
    "longer than any text": ("at most 8,388,608 are read", b'{"query": "' + b"x" * 9_000_000 + b'"}'),
    "of two million empty lists": ("more than 1,000,000 lists", b'{"query": [' + b"[]," * 2_000_000 + b"[]]}"),
    "with half of a surrogate pair": ("half of a surrogate pair", b'{"query": "\\ud83d", "positives": []}'),
    "with a NUL": ("NUL", b'{"query": "a\\u0000b", "positives": [{"text": "t"}]}'),
}
for name, (expected, row) in ROWS.items():
    SHARDS.add(
        f"a row {name}",
        expected,
        lambda folder, bomb, row=row: read_all(shard_set(folder / "s", tar(("0.json", row)))),
    )


@SHARDS.case("prepare --check of a sparse member", "damaged|cut off", code=1)
def _(folder, bomb):
    info = tarfile.TarInfo("000000000.json")
    info.size = 512
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,1"}
    info.pax_headers |= {"GNU.sparse.size": str(10**12), "GNU.sparse.name": "000000000.json"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(b"x" * 512))
    command("prepare", "--check", shard_set(folder / "s", buffer.getvalue()), "--workers", 1)


# --- sources of rows -------------------------------------------------------------------------------------------------


def prepare(folder: Path, source: object) -> None:
    command("prepare", "--source", source, "--out", folder / "out", "--workers", 1)


def lines(folder: Path, content: bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


for name, (expected, row) in ROWS.items():
    words = "longer than 8 MiB" if "longer" in name else expected
    SOURCES.add(f"prepare: a row {name}", words, lambda f, bomb, row=row: prepare(f, lines(f, row + b"\n")))


@SOURCES.case("a gzip bomb", "unpacks to more than 200 times its size")
def _(folder, bomb):
    path = folder / "rows.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(b" " * 2**20)
    prepare(folder, path)


@SOURCES.case("a zstd bomb", "unpacks to more than 200 times its size")
def _(folder, bomb):
    import pyarrow

    with pyarrow.CompressedOutputStream(str(folder / "rows.jsonl.zst"), "zstd") as file:
        for _ in range(100):
            file.write(b" " * 2**20)
    prepare(folder, folder / "rows.jsonl.zst")


@SOURCES.case("gzip that is none", "cannot be read")
def _(folder, bomb):
    prepare(folder, lines(folder, bomb, "rows.jsonl.gz"))


@SOURCES.case("a Parquet file with a pickle in its schema", "no layout has these fields|positives")
def _(folder, bomb):
    import pyarrow
    import pyarrow.parquet

    marks = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": bomb}
    schema = pyarrow.schema([pyarrow.field("query", pyarrow.binary(), metadata=marks)])
    pyarrow.parquet.write_table(pyarrow.table([[b"q"]], schema=schema), folder / "rows.parquet")
    prepare(folder, folder / "rows.parquet")


def parquet(folder: Path) -> bytearray:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([json.loads(ROW)] * 100)
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    return bytearray((folder / "rows.parquet").read_bytes())


@SOURCES.case("a Parquet file whose footer lies about its length", "cannot be read as Parquet")
def _(folder, bomb):
    content = parquet(folder)
    content[-8:-4] = b"\xff\xff\xff\x7f"
    prepare(folder, lines(folder, bytes(content), "rows.parquet"))


@SOURCES.case("a Parquet file with noise in its footer", "cannot be read as Parquet|no layout")
def _(folder, bomb):
    content = parquet(folder)
    for place in range(len(content) - 400, len(content) - 8, 7):
        content[place] ^= 0xA5
    prepare(folder, lines(folder, bytes(content), "rows.parquet"))


@SOURCES.case("a saved data set that names a file outside", "does not lie in its folder")
def _(folder, bomb):
    (folder / "saved").mkdir()
    (folder / "saved" / "dataset_info.json").write_text("{}")
    (folder / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../../etc/passwd"}]}))
    prepare(folder, folder / "saved")


@SOURCES.case("a saved data set of noise", "cannot be loaded")
def _(folder, bomb):
    (folder / "saved").mkdir()
    (folder / "saved" / "dataset_info.json").write_text("{}")
    (folder / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    (folder / "saved" / "a.arrow").write_bytes(b"ARROW1\0\0" + b"\xff\xff\xff\x7f" * 64)
    prepare(folder, folder / "saved")


@SOURCES.case("a data set that is a script", "a folder without rows")
def _(folder, bomb):
    (folder / "script").mkdir()
    (folder / "script" / "script.py").write_text(f"import pickle; pickle.loads({bomb!r})")
    prepare(folder, folder / "script")


for place in ("pipe:{touch}", "file:///etc/passwd", "http://127.0.0.1:1/x.jsonl", "{touch}|"):
    SOURCES.add(
        f"the source {place}",
        "does not exist",
        lambda f, bomb, place=place: prepare(f, place.format(touch=f"touch {f / 'canary'}")),
    )


@SOURCES.case("a corpus with a line of 10 GB", "the line is longer than 8 MiB")
def _(folder, bomb):
    from laser_dist.retrieval.collection import read_corpus

    os.truncate(lines(folder, b'{"id": "'), 10 * GIB)
    read_corpus(folder / "rows.jsonl")


@SOURCES.case("a corpus nested deeply", "nested too deeply")
def _(folder, bomb):
    from laser_dist.retrieval.collection import read_corpus

    read_corpus(lines(folder, b'{"id": "1", "text": ' + b"[" * 100_000 + b"\n"))


@SOURCES.case("queries with half of a surrogate pair", "not valid JSON.*surrogates not allowed")
def _(folder, bomb):
    from laser_dist.retrieval.collection import read_queries

    read_queries(lines(folder, b'{"id": "1", "text": "\\ud83d"}\n'))


@SOURCES.case("qrels with a line of 10 GB", "the line is longer than 8 MiB")
def _(folder, bomb):
    from laser_dist.retrieval.collection import read_qrels

    os.truncate(lines(folder, b"q1"), 10 * GIB)
    read_qrels(folder / "rows.jsonl")


for grade in (b"9" * 5000, b"9" * 30, b"-" + b"9" * 30):
    SOURCES.add(
        f"qrels with a grade of {len(grade)} digits",
        "is not a whole number|is beyond",
        lambda f, bomb, grade=grade: __import__("laser_dist.retrieval.collection", fromlist=["read_qrels"]).read_qrels(
            lines(f, b"q\tp\t" + grade + b"\n")
        ),
    )


@SOURCES.case("a name that would turn a line around and ring the bell", r"\\u202e.*\\x07")
def _(folder, bomb):
    prepare(folder, lines(folder, b"{}\n", "a\u202eb\a.jsonl"))


# --- recipes and configs ---------------------------------------------------------------------------------------------


def train(folder: Path, recipe: str | bytes | None = None, *flags: object) -> None:
    path = folder / "recipe.toml"
    if recipe is not None:
        path.write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
    command("train", path, "--model.name", "x/y", "--output", folder / "out", *flags)


TOML = {
    "nested deeply": ("nested too deeply", "a = " + "[" * 100_000),
    "with a number of 10,000 digits": ("is not valid TOML", "seed = " + "9" * 10_000),
    "that is no UTF-8": ("is not valid TOML", b"seed = 1 # \xff"),
    "with NUL": ("is not valid TOML", 'output = "a\0b"'),
    "with half of a surrogate pair": ("is not valid TOML", 'output = "\\ud83d"'),
    "that includes another": ("unknown key", 'include = "/etc/passwd"'),
    "with a template that reads attributes": ("filled in", '[text]\nquery_template = "{query.__class__}{query}"'),
    "with a template of a gigabyte": ("without : or !", '[text]\nquery_template = "{query:>999999999}"'),
    "with a key twice": ("is not valid TOML", "seed = 1\nseed = 2"),
    "with nan": ("must be in|finite", "[optimizer]\nlearning_rate = nan"),
    "with a billion steps of thinking": ("must be from 1 to", "[thinking]\nsteps = 1000000000"),
}
for name, (expected, text) in TOML.items():
    RECIPES.add(f"a recipe {name}", expected, lambda f, bomb, text=text: train(f, text))


@RECIPES.case("a recipe of 10 GB", "bytes, but at most")
def _(folder, bomb):
    (folder / "recipe.toml").touch()
    os.truncate(folder / "recipe.toml", 10 * GIB)
    train(folder)


@RECIPES.case("a recipe that is a pipe", "no plain file")
def _(folder, bomb):
    os.mkfifo(folder / "recipe.toml")
    train(folder)


for place in ("pipe:{touch}", "file:///etc/passwd", "pipe://{touch}", "zip://x::http://127.0.0.1", "data://x"):
    for key in ("train", "mix"):

        def place_in_config(folder, bomb, place=place, key=key):
            place = place.format(touch=f"touch {folder / 'canary'}")
            train(folder, f'[data]\ntrain = "{place}"' if key == "train" else f'[data]\nmix = {{"{place}" = 1.0}}')

        RECIPES.add(f"data.{key} = {place}", r"http\(s\)://|does not exist", place_in_config)


DS_CONFIGS = {
    "nested deeply": ("nested too deeply", "[" * 1_000_000),
    "with NaN": ("NaN is no number", '{"zero_optimization": {"stage": NaN}}'),
    "with a number of 10,000 digits": ("4300 digits", '{"steps_per_print": ' + "9" * 10_000 + "}"),
    "with a key twice": ("appears twice", '{"bf16": {}, "bf16": {}}'),
}


def with_ds_config(text: str):
    def run(folder: Path, bomb: bytes) -> None:
        shard_set(folder / "s", tar(("0.json", ROW)))
        (folder / "ds.json").write_text(text)
        train(folder, "", "--data.train", folder / "s", "--train.deepspeed", folder / "ds.json")

    return run


for name, (expected, text) in DS_CONFIGS.items():
    RECIPES.add(f"a DeepSpeed config {name}", expected, with_ds_config(text))


# --- servers ---------------------------------------------------------------------------------------------------------


@contextmanager
def serving(answer) -> Iterator[str]:
    """The address of a server whose every answer is `answer(handler)`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if length := int(self.headers.get("Content-Length") or 0):
                self.rfile.read(length)
            try:
                answer(self)
            except OSError:  # the client has heard enough
                self.close_connection = True

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, content: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def send_without_end(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(4096):  # 4 GiB
        handler.wfile.write(b" " * 2**20)


def from_server(answer):
    def run(folder: Path, bomb: bytes) -> None:
        with serving(answer) as url:
            read_all(url, cache=str(folder / "cache"), attempts=1, timeout=10.0)

    return run


def annotate(answer):
    def run(folder: Path, bomb: bytes) -> None:
        source = lines(folder, b'{"query": "q", "positives": [{"text": "t"}]}\n')
        with serving(answer) as url:
            arguments = ("--source", source, "--out", folder / "out.jsonl", "--model", "m", "--base-url", url)
            command("annotate", *arguments, "--retries", 0, "--timeout", 20)

    return run


def gzip_bomb(handler):
    packer = zlib.compressobj(1, wbits=31)
    content = b"".join(packer.compress(b" " * 2**20) for _ in range(600)) + packer.flush()
    send(handler, content, Content_Encoding="gzip")


SERVERS.add(
    "a redirect to a file", "redirects|file://", from_server(lambda h: send(h, b"", 302, Location="file:///etc/passwd"))
)
SERVERS.add("a redirect without end", "cannot be fetched", from_server(lambda h: send(h, b"", 302, Location=h.path)))
SERVERS.add("a manifest of 600 MB in a small gzip answer", "more bytes come than it may have", from_server(gzip_bomb))
SERVERS.add("a model's answer without end", "endless answer", annotate(send_without_end))
SERVERS.add("a model's answer of 600 MB in a small gzip answer", "endless answer", annotate(gzip_bomb))
SERVERS.add("a model's answer nested deeply", "unreadable answer", annotate(lambda h: send(h, b"[" * 1_000_000)))
SERVERS.add(
    "a model's answer that is a redirect",
    "redirects elsewhere",
    annotate(lambda h: send(h, b"", 307, Location="file:///etc/passwd")),
)


@SERVERS.case("a shard without end", "more bytes come than it may have")
def _(folder, bomb):
    shard_set(folder / "s", tar(("0.json", ROW)))

    def answer(handler):
        if handler.path.endswith("manifest.json"):
            return send(handler, (folder / "s" / "manifest.json").read_bytes())
        return send_without_end(handler)

    from_server(answer)(folder, bomb)


for here, there in (
    ("https://93.184.216.34/a", "http://169.254.169.254/latest/meta-data"),
    ("https://93.184.216.34/a", "https://127.0.0.1/a"),
    ("http://93.184.216.34/a", "http://[::1]/a"),
    ("http://93.184.216.34/a", "//10.0.0.1/a"),
    ("https://93.184.216.34/a", "http://93.184.216.35/a"),
    ("http://93.184.216.34/a", "ftp://93.184.216.35/a"),
):

    def redirected(folder, bomb, here=here, there=there):
        from laser_dist.data.streaming.redirects import Redirected, check_redirect
        from laser_dist.errors import UserError

        check_redirect("https://93.184.216.34/a", "https://151.101.0.1/b")  # as hubs do
        try:
            check_redirect(here, there)
        except Redirected as error:
            raise UserError(str(error)) from error

    SERVERS.add(f"a redirect from {here} to {there}", "it redirects", redirected)


GROUPS = {"shards": SHARDS, "sources": SOURCES, "recipes": RECIPES, "servers": SERVERS}


def run_groups(rank: int, world_size: int, folder: str) -> list[str]:
    return [problem for group, cases in GROUPS.items() for problem in run_cases(cases, Path(folder) / group)]


def test_every_case_ends_in_a_refusal(tmp_path):
    from laser_dist.testing import run_distributed

    [problems] = run_distributed(run_groups, 1, str(tmp_path), timeout=540)
    assert not problems, "\n".join(problems)


def test_the_bomb_works(tmp_path):
    """Or no canary would prove anything."""
    from laser_dist.testing.hostile import make_bomb

    pickle.loads(make_bomb(tmp_path / "canary"))
    assert (tmp_path / "canary").exists()
