"""Asking for every missing rationale once: what a row asks, which answers are there already, and the workers."""

import asyncio
import hashlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from laser_dist.data.advance import progress_bar
from laser_dist.data.annotation.chat import ChatClient, Unanswered
from laser_dist.data.annotation.journal import Journal
from laser_dist.data.annotation.prompts import render_prompt
from laser_dist.data.annotation.rationales import NoRationale, quotes, rationale_of
from laser_dist.data.schema import Example
from laser_dist.data.sources.read import read_examples
from laser_dist.errors import UserError

if TYPE_CHECKING:
    from laser_dist.data.annotation.annotate import AnnotateConfig


@dataclass
class Job:
    """The rows, the request that each makes, and the key under which its answer is found again."""

    config: "AnnotateConfig"
    template: str
    extra: dict[str, Any]
    rows: int = 0
    kept: int = 0
    ids: dict[str, str] = field(default_factory=dict)  # key -> query_id, of every row that needs a rationale

    def read(self) -> Iterator[tuple[dict[str, Any], Example]]:
        """Rows as they are, and as examples. Raises UserError, which may name several defects."""
        for _, row, example in read_examples(self.config.source, self.config.limit):
            yield row, example

    def wanted(self, example: Example) -> bool:
        return self.config.overwrite or not example.rationale

    def check(self) -> Example | None:
        """Read everything once, before anything is asked; returns the first example that needs a rationale."""
        first = None
        for row, example in self.read():
            self.rows += 1
            if not self.wanted(example):
                self.kept += 1
                continue
            first = first or example
            self.ids[self.key(example)] = example.query_id
            json_line(row, example.query_id)
        if not self.rows:
            raise UserError(f"source {self.config.source} has no rows")
        return first

    def request(self, example: Example, *, more: int = 1) -> dict[str, Any]:
        """The body of a request; `more` times as many answer tokens as configured."""
        body: dict[str, Any] = {"model": self.config.model}
        body["messages"] = [{"role": "user", "content": render_prompt(self.template, example)}]
        body[self.config.max_tokens_field] = self.config.max_tokens * more
        if self.config.temperature is not None:
            body["temperature"] = self.config.temperature
        return body | self.extra

    def key(self, example: Example) -> str:
        """Of id, prompt, model and settings: all that an answer depends on.

        The address is left out, because a model may move; and the longest answer, because only whole ones count.
        """
        body = self.request(example)
        del body[self.config.max_tokens_field]
        text = json.dumps([example.query_id, body], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Asking:
    """The requests of one call. Workers take rows from one iterator, so that no more are under way than workers."""

    def __init__(self, job: Job, journal: Journal):
        self.job, self.journal = job, journal
        self.failures = 0
        self.taken: set[str] = set()

    def left(self) -> int:
        """Rows still without an answer."""
        return sum(not is_done(self.journal, key) for key in self.job.ids)

    async def run(self, base_url: str, key: str | None) -> None:
        """Ask for all that is left; the journal has every outcome. Raises UserError where the run must stop."""
        config = self.job.config
        pending = self._pending()
        client = ChatClient(base_url, key, timeout=config.timeout, retries=config.retries)
        async with client:
            with progress_bar("asking", len(self.job.ids), len(self.job.ids) - self.left()) as advance:
                # One alone first: what is wrong with address, key or model then costs one request and not many.
                if first := next(pending, None):
                    await self._work(client, iter([first]), advance)
                try:
                    async with asyncio.TaskGroup() as workers:
                        for _ in range(config.concurrency):
                            workers.create_task(self._work(client, pending, advance))
                except BaseExceptionGroup as group:
                    raise group.exceptions[0] from None
                finally:
                    self._say_retries(client)

    def _pending(self) -> Iterator[Example]:
        for _, example in self.job.read():
            if not self.job.wanted(example):
                continue
            key = self.job.key(example)
            if key not in self.taken and not is_done(self.journal, key):
                self.taken.add(key)
                yield example

    async def _work(self, client: ChatClient, pending: Iterator[Example], advance: Callable[[], None]) -> None:
        for example in pending:
            await self._one(client, example)
            advance()

    async def _one(self, client: ChatClient, example: Example) -> None:
        """Ask, judge, and write the outcome to the journal."""
        record: dict[str, Any] = {"query_id": example.query_id, "prompt_tokens": 0, "completion_tokens": 0}
        try:
            for more in (1, 2):
                answer = await client.ask(self.job.request(example, more=more))
                record["prompt_tokens"] += answer.prompt_tokens
                record["completion_tokens"] += answer.completion_tokens
                try:
                    record["rationale"] = rationale_of(answer, example.query)
                    record["quotes_positive"] = quotes(record["rationale"], example.positives)
                    break
                except NoRationale as error:
                    if error.reason != "truncated" or more == 2:
                        record["failure"] = error.reason
                        break
        except Unanswered as error:
            record |= {"failure": error.reason, "detail": error.detail}
        self.journal.append(self.job.key(example), record)
        if "failure" in record:
            self._count_failure(record)

    def _count_failure(self, record: dict[str, Any]) -> None:
        self.failures += 1
        if self.failures > self.job.config.max_failures:
            why = ": ".join(filter(None, (record["failure"], record.get("detail"))))
            raise UserError(
                f"stopped: {self.failures} rows ended without a rationale (--max-failures "
                f"{self.job.config.max_failures}), the last, {record['query_id']}, for this reason: {why}. "
                "Finished answers are kept: the same command continues and asks for these rows again"
            )

    def _say_retries(self, client: ChatClient) -> None:
        if client.counts:
            what = ", ".join(f"{count} × {reason}" for reason, count in client.counts.most_common())
            print(f"tried again: {what}", file=sys.stderr)


async def until_signalled(asking: Asking, base_url: str, key: str | None) -> int | None:
    """`asking.run`, which SIGINT and SIGTERM end; returns the exit code then, else None."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None, "runs inside asyncio.run"
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        await asking.run(base_url, key)
    except asyncio.CancelledError:
        if not received:
            raise
        left = asking.left()
        print(f"interrupted, {left:,} left; finished answers are kept: the same command continues", file=sys.stderr)
        return 128 + received[0]
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    return None


def is_done(journal: Journal, key: str) -> bool:
    """Whether the newest answer is a rationale; failures are asked for again."""
    record = journal.get(key)
    return record is not None and "rationale" in record


def json_line(row: dict[str, Any], query_id: str) -> str:
    """A row as it stands in a JSONL file; UserError for values that JSON has no form for."""
    try:
        return json.dumps(row, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"row {query_id!r}: cannot be written as JSON ({error}): leave that column out") from None
