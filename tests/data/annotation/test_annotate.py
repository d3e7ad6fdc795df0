"""Annotating against a real HTTP server that misbehaves on command, and what ends up on disk."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from laser_dist.data.annotation import chat
from laser_dist.data.annotation.annotate import main
from laser_dist.data.schema import decode_example
from laser_dist.errors import UserError

KEY = "sk-test/5ecret-0123456789"
GOOD = "The problem is what number {n} needs.\n\nFacts about {n} would help.\n\nA draft: it depends on {n} and more."


class Misbehaving(ThreadingHTTPServer):
    """Answers "query N"; `script[N]` lists what it does on each attempt before it answers well."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.asked, self.bodies, self.headers = {}, Counter(), [], []
        self.delay, self.now, self.most, self.times = 0.0, 0, 0, []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that gave up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        n = int(re.search(r"query (\d+)", body["messages"][0]["content"])[1])
        with server.lock:
            attempt = server.asked[n]
            server.asked[n] += 1
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.times.append((n, time.monotonic()))
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            time.sleep(server.delay)
            steps = server.script.get(n, ())
            step = steps[attempt] if attempt < len(steps) else "good"
            getattr(self, f"do_{step[0]}" if isinstance(step, tuple) else f"do_{step}")(
                n, *(step[1:] if isinstance(step, tuple) else ())
            )
        finally:
            with server.lock:
                server.now -= 1

    def send(self, status, body, **headers):
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_say(self, n, content, finish="stop", **message):
        choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
        self.send(200, json.dumps({"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 7}}))

    def do_good(self, n):
        self.do_say(n, GOOD.format(n=n))

    def do_status(self, n, status, message="no", **headers):
        self.send(status, json.dumps({"error": {"message": message}}), **headers)

    def do_busy(self, n, seconds):
        self.do_status(n, 429, "slow down", Retry_After=seconds)

    def do_refusal_field(self, n):
        self.do_say(n, None, refusal="I will not")

    def do_redirect(self, n):
        self.send(307, "", Location=f"{self.server.url}/elsewhere")

    def do_garbage(self, n):
        self.send(200, "<html>not JSON</html>")

    def do_shapeless(self, n):
        self.send(200, '{"choices": []}')

    def do_surrogate(self, n):
        self.send(200, '{"choices": [{"message": {"content": "half \\ud83d of a pair"}, "finish_reason": "stop"}]}')

    def do_cut(self, n):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"choices": [{"mess')
        self.close_connection = True

    def do_hang(self, n):
        time.sleep(1.2)
        self.close_connection = True

    def do_drip(self, n):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(12):  # each byte in time, the whole never
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.1)
        self.close_connection = True

    def do_leak(self, n):
        self.do_status(n, 400, f"you sent {self.headers['Authorization']}")


@pytest.fixture
def server():
    server = Misbehaving()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def row(n: int, **change) -> dict:
    return {"query_id": f"q{n}", "query": f"query {n}", "positives": [{"id": f"p{n}", "text": f"text {n}"}]} | change


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def annotate(tmp_path, server):
    """Annotate rows; returns (exit code, rows written)."""
    out = tmp_path / "out.jsonl"

    def run(rows, *arguments):
        source = write(tmp_path / "rows.jsonl", rows)
        code = main([*f"--source {source} --out {out} --model m --base-url {server.url}".split(), *arguments])
        return code, read(out) if out.exists() else None

    run.out, run.report = out, out.with_name("out.jsonl.report.json")
    run.journal = out.with_name("out.jsonl.journal.jsonl")
    return run


def test_every_row_once_in_order_and_rows_with_a_rationale_untouched(annotate, server, capsys):
    given = row(3, rationale="mine", extra={"ü": [1]})
    code, rows = annotate([row(0), row(1), row(2, instruction="Find it"), given, *map(row, range(4, 40))])
    assert code == 0 and [r["query_id"] for r in rows] == [f"q{n}" for n in range(40)]
    assert rows[3] == given and rows[2] == row(2, instruction="Find it", rationale=GOOD.format(n=2))
    assert server.asked == dict.fromkeys(set(range(40)) - {3}, 1)
    assert all(decode_example(json.dumps(r).encode(), "x").rationale for r in rows)
    report = json.loads(annotate.report.read_text())
    assert (report["rows"], report["kept"], report["annotated"], report["failed"]) == (40, 1, 39, {})
    assert (report["prompt_tokens"], report["completion_tokens"], report["mean_segments"]) == (390, 273, 3.0)
    assert "390 in, 273 out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("steps", "reasons"),
    [
        ([("status", n) for n in (500, 502, 503, 529)], ("500", "502", "503", "529")),
        ([("status", 408), ("status", 429)], ("408", "429")),
        (["cut", "cut"], ("cut short", "cut short")),
        (["garbage", "shapeless", "surrogate"], ("unreadable answer",) * 3),
        (["hang"], ("time-out",)),
        (["drip"], ("time-out",)),
    ],
)
def test_passing_trouble_is_tried_again(annotate, server, steps, reasons, capsys):
    server.script = {1: steps, 3: steps}
    code, rows = annotate([row(n) for n in range(5)], "--timeout", "0.5")
    assert code == 0 and [r["rationale"] for r in rows] == [GOOD.format(n=n) for n in range(5)]
    assert server.asked == {0: 1, 1: len(steps) + 1, 2: 1, 3: len(steps) + 1, 4: 1}
    told = re.findall(r"(\d+) × ([\w -]+)", capsys.readouterr().err)
    assert {reason: int(count) for count, reason in told} == {r: 2 * n for r, n in Counter(reasons).items()}


def test_retry_after_is_honoured_by_all_workers(annotate, server):
    server.script, server.delay = {1: [("busy", "1")]}, 0.02
    annotate([row(n) for n in range(30)], "--concurrency", "2")
    refused = next(t for n, t in server.times if n == 1)
    early = sum(0 < t - refused < 0.95 for _, t in server.times)
    assert early <= 4, "others asked on, beyond what was under way"
    assert server.asked[1] == 2


def test_a_date_and_nonsense_in_retry_after():
    assert chat._retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert 50 < chat._retry_after(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))) <= 60
    assert chat._retry_after("soon") is chat._retry_after(None) is chat._retry_after("nan") is None
    assert chat._retry_after("2.5") == 2.5


def test_a_retry_after_of_hours_stops(annotate, server):
    server.script = {2: [("busy", "7200")]}
    with pytest.raises(UserError, match="come back in 7200 s"):
        annotate([row(n) for n in range(5)])


def test_concurrency_is_a_bound_and_is_used(annotate, server):
    server.delay = 0.05
    annotate([row(n) for n in range(40)], "--concurrency", "7")
    assert server.most == 7


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (("say", "I'm sorry, but I can't help with that."), "refused"),
        (("say", "As an AI language model I have no opinion."), "refused"),
        ("refusal_field", "refused"),
        (("say", "", "content_filter"), "refused"),
        (("say", "   \n"), "empty"),
        (("say", "<think>all of it</think>\n"), "empty"),
        (("say", "<think>never ends"), "truncated"),
        (("say", "Query 1!"), "echo"),
        (("status", 400, "too long"), "status 400"),
    ],
)
def test_an_answer_that_is_no_rationale_leaves_the_row_as_it_was(annotate, server, step, reason, capsys):
    server.script = {1: [step] * 2}
    code, rows = annotate([row(0), row(1), row(2)])
    assert code == 0 and rows[1] == row(1)
    assert rows[0]["rationale"] and rows[2]["rationale"]
    assert json.loads(annotate.report.read_text())["failed_ids"] == {reason: ["q1"]}
    assert f"without a rationale: 1 × {reason}" in capsys.readouterr().out


def test_what_failed_is_asked_for_again_and_nothing_else(annotate, server):
    server.script = {1: [("say", "I cannot help.")]}
    annotate([row(0), row(1)])
    code, rows = annotate([row(0), row(1)])
    assert code == 0 and rows[1]["rationale"] == GOOD.format(n=1)
    assert server.asked == {0: 1, 1: 2}
    report = json.loads(annotate.report.read_text())
    assert report["failed"] == {} and report["completion_tokens"] == 21  # the refusal was paid for too


@pytest.mark.parametrize(
    ("content", "rationale"),
    [
        ("<think>hidden\n\nthoughts</think>\n\nOne thing is this.\r\n\r\nTwo.", "One thing is this.\n\nTwo."),
        ("opened by the prompt</think> The rationale proper.", "The rationale proper."),
        ("I'm sorry to be long. " + "It matters. " * 40, ("I'm sorry to be long. " + "It matters. " * 40).strip()),
    ],
)
def test_what_becomes_of_an_answer(annotate, server, content, rationale):
    server.script = {0: [("say", content)]}
    assert annotate([row(0)])[1][0]["rationale"] == rationale


def test_a_cut_off_answer_is_asked_for_once_more_with_twice_the_tokens(annotate, server):
    server.script = {0: [("say", "cut o", "length")], 1: [("say", "cut o", "length")] * 2}
    _, rows = annotate([row(0), row(1)], "--max-tokens", "50")
    assert rows[0]["rationale"] == GOOD.format(n=0) and "rationale" not in rows[1]
    assert [body["max_tokens"] for body in server.bodies] == [50, 100, 50, 100]


def test_a_quoted_positive_is_counted(annotate, server, capsys):
    text = "Above the Leidenfrost point a cushion of vapour carries the drop."
    server.script = {0: [("say", f"I recall this. {text.upper()} So it is.")]}
    _, rows = annotate([row(0, positives=[{"id": "p", "text": text}]), row(1)])
    assert json.loads(annotate.report.read_text())["quote_a_positive"] == 1
    assert "1 rationales hold the text of a positive" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (("status", 401, "bad key"), "401: the key is missing or wrong.*bad key"),
        (("status", 403), "403: the key may not do this"),
        (("status", 404, "no such model"), "404: is --base-url right.*no such model"),
        ("redirect", "307: it redirects elsewhere"),
        (("status", 429, "insufficient_quota"), "no quota left"),
    ],
)
def test_trouble_that_stays_stops_at_the_first_request(annotate, server, step, words):
    server.script = {n: [step] * 9 for n in range(20)}
    with pytest.raises(UserError, match=words):
        annotate([row(n) for n in range(20)])
    assert server.asked == {0: 1} and not annotate.out.exists()


def test_a_key_that_is_withdrawn_stops_the_run_and_keeps_the_answers(annotate, server):
    server.script = {n: [("status", 401)] for n in range(10, 20)}
    with pytest.raises(UserError, match="401"):
        annotate([row(n) for n in range(20)], "--concurrency", "3")
    assert not annotate.out.exists() and len(read(annotate.journal)) >= 8
    server.script = {}
    assert annotate([row(n) for n in range(20)])[0] == 0
    assert max(server.asked[n] for n in range(8)) == 1


def test_no_server_and_no_api_are_told_apart(annotate, server):
    server.script = {0: ["garbage"] * 9}
    with pytest.raises(UserError, match="not one usable answer in 3 tries.*ending in /v1"):
        annotate([row(0)], "--retries", "2")
    with pytest.raises(UserError, match="no connection.*is the server up"):
        annotate([row(0)], "--base-url", "http://127.0.0.1:9/v1")
    assert not annotate.journal.exists()  # nothing came, nothing is left behind


def test_too_many_failures_stop_the_run(annotate, server):
    server.script = {n: [("status", 400, "temperature: not supported")] for n in range(1, 20)}
    with pytest.raises(UserError, match=r"4 rows ended without.*status 400: temperature: not supported.*kept"):
        annotate([row(n) for n in range(20)], "--max-failures", "3", "--concurrency", "1")
    assert server.asked == dict.fromkeys(range(5), 1)


def test_the_key_is_sent_and_nowhere_else(annotate, server, tmp_path, capfd):
    server.script = {1: ["leak"], 2: [("say", f"An answer with the key {KEY} in it, as a log would show.")]}
    server.script[3] = [("status", 500, f"Bearer {KEY}")]
    annotate([row(n) for n in range(5)])
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    with pytest.raises(UserError) as error:
        server.script = {7: [("status", 401, f"wrong key {KEY}")]}
        annotate([row(7)])
    told = str(error.value) + "".join(capfd.readouterr())
    told += "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in told and json.dumps(KEY)[1:-1] not in told and "[key]" in told


def test_no_key_is_sent_where_there_is_none(annotate, server, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY")
    annotate([row(0)])
    assert "Authorization" not in server.headers[0] and "no key is sent" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--key-variable", KEY], "--key-variable: not the name"),
        (["--key-variable", "abcdef123456"], "--key-variable: this environment variable is not set"),
        (["--base-url", f"http://me:{KEY.replace('/', '')}@host/v1"], "--base-url: holds a password"),
        (["--base-url", f"https://host/v1?key={KEY}"], "--base-url: holds a password or a query"),
    ],
)
def test_a_key_in_the_wrong_place_is_refused_without_showing_it(annotate, arguments, words):
    with pytest.raises(UserError, match=words) as error:
        annotate([row(0)], *arguments)
    assert "ecret" not in str(error.value) and "abcdef" not in str(error.value)


@pytest.mark.parametrize("key", ["two words", "zeilen\numbruch", "schlüssel"])
def test_a_key_that_no_header_may_hold_is_refused_without_showing_it(annotate, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="the key in the environment holds blanks") as error:
        annotate([row(0)])
    assert key not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--base-url", "localhost:8000"], "write it as http://host:8000/v1"),
        (["--concurrency", "0"], "--concurrency 0: must be at least 1"),
        (["--timeout", "nan"], "--timeout nan"),
        (["--price-in", "-1"], "--price-in -1.0"),
        (["--extra-body", "{"], "--extra-body: not valid JSON"),
        (["--extra-body", "[1]"], "write a JSON object"),
        (["--extra-body", '{"stream": true}'], '"stream" is set by annotate itself'),
        (["--prompt", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--source", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--out", "a.json"], "name of a .jsonl file"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_sent(annotate, server, arguments, words):
    with pytest.raises(UserError, match=re.escape(words)):
        annotate([row(0)], *arguments)
    assert not server.asked and not annotate.journal.exists()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("Think.", "{query} is missing"),
        ("{qeury}", 'unknown placeholder {qeury}.*Did you mean "query"'),
        ("{query.__class__}", "unknown placeholder"),
        ("{query!r}", "unknown placeholder"),
        ('Say {"a": 1} {query}', "unknown placeholder"),
        ("{query", "write {{ and }}"),
    ],
)
def test_a_prompt_is_checked_before_anything_is_sent(annotate, server, tmp_path, prompt, words):
    (tmp_path / "p.txt").write_text(prompt)
    with pytest.raises(UserError, match=words):
        annotate([row(0)], "--prompt", str(tmp_path / "p.txt"))
    assert not server.asked


def test_a_prompt_of_ones_own(annotate, server, tmp_path):
    (tmp_path / "p.txt").write_text('{instruction}: {query} as {{"json": 1}}\n')
    annotate([row(0, instruction="Find {it}")], "--prompt", str(tmp_path / "p.txt"))
    assert server.bodies[0]["messages"][0]["content"] == 'Find {it}: query 0 as {"json": 1}'


def test_settings_reach_the_server(annotate, server):
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    settings = "--temperature 0 --max-tokens 5 --max-tokens-field max_completion_tokens --extra-body".split()
    annotate([row(0)], *settings, json.dumps(extra))
    body = server.bodies[0]
    assert body.pop("messages")[0]["role"] == "user"
    assert body == {"model": "m", "temperature": 0, "max_completion_tokens": 5, **extra}


def test_another_model_or_prompt_asks_again_and_another_length_does_not(annotate, server):
    for arguments, asked in (
        ([], 1),
        (["--max-tokens", "9"], 1),
        (["--model", "other"], 2),
        (["--temperature", "1"], 3),
    ):
        annotate([row(0)], *arguments)
        assert server.asked[0] == asked
    annotate([row(0, query="query 0, reworded")])
    assert server.asked[0] == 4


def test_overwrite_replaces_and_keeps_what_it_could_not_replace(annotate, server):
    server.script = {1: [("say", "I can't.")]}
    _, rows = annotate([row(0, reasoning_query="old"), row(1, rationale="old")], "--overwrite")
    assert rows == [row(0, reasoning_query=GOOD.format(n=0)), row(1, rationale="old")]


def test_limit_and_dry_run(annotate, server, capsys):
    arguments = ["--limit", "2", "--dry-run", "--price-in", "1000", "--price-out", "1000", "--max-tokens", "500"]
    assert annotate([row(n) for n in range(9)], *arguments) == (0, None)
    told = capsys.readouterr().out
    assert "Query: query 0" in told and "essential problem" in told and "2 to ask for" in told
    assert not server.asked and not annotate.journal.exists()
    tokens = int(re.search(r"about (\d+) prompt tokens", told)[1])
    assert f"{tokens / 1000:.4f} for prompts, at most {(tokens + 1000) / 1000:.4f}" in told
    _, rows = annotate([row(n) for n in range(9)], "--limit", "2", "--price-in", "1000")
    assert len(rows) == 2 and json.loads(annotate.report.read_text())["cost"] == pytest.approx(0.02)
    _, rows = annotate([row(n) for n in range(9)])
    assert len(rows) == 9 and set(server.asked.values()) == {1}


def test_a_row_that_stands_twice_is_asked_for_once(annotate, server):
    server.delay = 0.1  # the second time is met while the first is under way
    _, rows = annotate([row(0), row(1), row(1)])
    assert [r["rationale"] for r in rows] == [GOOD.format(n=n) for n in (0, 1, 1)]
    assert server.asked == {0: 1, 1: 1}


def test_defects_are_named_before_anything_is_sent(annotate, server):
    with pytest.raises(UserError, match=r'rows.jsonl:2: "query" is empty') as error:
        annotate([row(0), row(1, query=""), row(2), row(3, positives=[])])
    assert "rows.jsonl:4" in str(error.value) and not server.asked


def test_a_file_of_somebody_else_is_not_replaced(annotate, server):
    annotate.out.write_text("mine\n")
    with pytest.raises(UserError, match="was not made by annotate"):
        annotate([row(0)])
    assert annotate.out.read_text() == "mine\n" and not server.asked


def test_a_damaged_journal_is_named_and_a_torn_end_is_mended(annotate, server):
    annotate([row(0), row(1)])
    whole = annotate.journal.read_bytes()
    annotate.journal.write_bytes(whole[:-9])
    assert annotate([row(0), row(1)])[0] == 0
    assert sum(server.asked.values()) == 3 and len(read(annotate.journal)) == 2
    annotate.journal.write_bytes(b"nonsense\n" + whole)
    with pytest.raises(UserError, match="journal.jsonl:1: damaged"):
        annotate([row(0), row(1)])


def test_a_full_disk_stops_with_a_whole_journal(annotate, server, monkeypatch):
    from laser_dist.data.annotation.journal import Journal

    with Journal(annotate.journal) as journal:
        journal.append("a", {"n": 1})

        class Full:
            def __init__(self, file):
                self.file = file

            def __getattr__(self, name):
                return getattr(self.file, name)

            def write(self, line):
                return self.file.write(line[:5])

        journal._file = Full(journal._file)
        with pytest.raises(UserError, match="No space left"):
            journal.append("b", {"n": 2})
    assert read(annotate.journal) == [{"key": "a", "n": 1}]


def test_a_result_that_cannot_be_written_keeps_the_answers(annotate, server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory|File exists"):
        annotate([row(0)], "--out", str(tmp_path / "file" / "out.jsonl"))
    assert not server.asked

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("laser_dist.data.annotation.asking.json_line", full)
    monkeypatch.setattr("laser_dist.data.annotation.asking.Job.check", lambda job: job.ids.update({"k": "q0"}))
    with pytest.raises(UserError, match=r"out.jsonl: No space left on device; finished answers are kept"):
        annotate([row(0)])
    assert [path.name for path in tmp_path.iterdir() if "out.jsonl" in path.name] == [annotate.journal.name]
    monkeypatch.undo()
    assert annotate([row(0)])[0] == 0 and server.asked == {0: 1}


def command(tmp_path, server, rows, *arguments):
    source = write(tmp_path / "rows.jsonl", rows)
    flags = f"--source {source} --out {tmp_path / 'out.jsonl'} --model m --base-url {server.url} --concurrency 4"
    return subprocess.Popen(
        [sys.executable, "-m", "laser_dist.cli", "annotate", *flags.split(), *arguments],
        env=os.environ | {"OPENAI_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def finished_in(journal: Path) -> set[str]:
    lines = journal.read_bytes().splitlines(True) if journal.exists() else []
    return {json.loads(line)["query_id"] for line in lines if line.endswith(b"\n")}


def check_nothing_repeated(server, before, finished):
    repeated = {f"q{n}" for n in before if server.asked[n] > before[n]}
    assert len(finished) >= 20 and not repeated & finished
    assert len(repeated) <= 4  # at most what was under way


def test_a_killed_process_continues_without_repeating(tmp_path, server):
    server.delay = 0.05
    rows = [row(n) for n in range(60)]
    journal = tmp_path / "out.jsonl.journal.jsonl"
    process = command(tmp_path, server, rows)
    wait_for(lambda: len(finished_in(journal)) >= 20)
    process.kill()
    told, _ = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL and KEY not in told and not (tmp_path / "out.jsonl").exists()
    finished = finished_in(journal)
    wait_for(lambda: server.now == 0)
    before = Counter(server.asked)
    again = command(tmp_path, server, rows)
    told, _ = again.communicate(timeout=60)
    assert again.returncode == 0, told
    assert [r["rationale"] for r in read(tmp_path / "out.jsonl")] == [GOOD.format(n=n) for n in range(60)]
    check_nothing_repeated(server, before, finished)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_and_what_is_finished_is_kept(annotate, server, capsys, number, code):
    server.delay = 0.02
    rows = [row(n) for n in range(60)]

    def send():
        wait_for(lambda: len(finished_in(annotate.journal)) >= 20)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    assert annotate(rows, "--concurrency", "4") == (code, None)
    finished = finished_in(annotate.journal)
    assert f"interrupted, {60 - len(finished)} left" in capsys.readouterr().err
    wait_for(lambda: server.now == 0)
    before = Counter(server.asked)
    assert [r["rationale"] for r in annotate(rows)[1]] == [GOOD.format(n=n) for n in range(60)]
    check_nothing_repeated(server, before, finished)


def test_two_runs_on_one_journal(annotate, server):
    from laser_dist.data.annotation.journal import Journal

    with Journal(annotate.journal), pytest.raises(UserError, match="in use by another run"):
        annotate([row(0)])
    assert not server.asked


def test_help_is_quick_and_has_examples():
    code = (
        "import sys; from laser_dist.data.annotation.annotate import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: sys.exit(bool({'torch', 'httpx2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "laser-dist annotate --source" in done.stdout


def test_another_source_never_replaces_the_rows_of_the_first(tmp_path, server):
    """Same --out, other rows: the first annotation was gone, its answers in the journal alone."""
    out = tmp_path / "out.jsonl"
    first, second = (write(tmp_path / name, [row(i) for i in range(n)]) for name, n in (("a.jsonl", 3), ("b.jsonl", 2)))
    flags = f"--out {out} --model m --base-url {server.url}".split()
    assert main(["--source", str(first), *flags]) == 0
    with pytest.raises(UserError, match="holds the rows of .*a.jsonl"):
        main(["--source", str(second), *flags])
    assert len(read(out)) == 3
    assert main(["--source", str(first), *flags]) == 0
