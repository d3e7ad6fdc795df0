"""`laser-dist annotate`: writes the rationales that rows lack, with any OpenAI-compatible endpoint.

The source is read three times: to check every row, to ask, and to write the result. Only keys stay in memory.
Every answer goes to `OUT.journal.jsonl` the moment it is there, and the same command continues from it.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from laser_dist.errors import UserError, require
from laser_dist.reading import decode_json, read_object

if TYPE_CHECKING:
    from laser_dist.data.annotation.asking import Job
    from laser_dist.data.annotation.journal import Journal
    from laser_dist.data.schema import Example

HELP = """Write the rationales that are missing, with any OpenAI-compatible endpoint (vLLM, SGLang, a hosted one).

The key is read from an environment variable and is never written anywhere. Rows that have a rationale stay as they are.
An interrupted run continues with the same command, and so does one where some rows failed. Finished answers are in
OUT.journal.jsonl; tokens, costs and failures in OUT.report.json.

Examples:
  laser-dist annotate --source rows.jsonl --out annotated.jsonl --model Qwen/Qwen3-8B --base-url http://gpu:8000/v1 \
--extra-body '{"chat_template_kwargs": {"enable_thinking": false}}'
  laser-dist annotate --source rows.jsonl --out annotated.jsonl --model NAME --base-url https://HOST/v1 --dry-run
  laser-dist annotate --source rows.jsonl --out annotated.jsonl --model NAME --base-url https://HOST/v1 --limit 10 \
--price-in 0.15 --price-out 0.60
"""
_KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig:
    """What is asked of whom, how hard, and where the answers go."""

    source: str
    """A JSONL or Parquet file, a saved dataset folder, or a hub id."""
    out: Path
    """JSONL file to write: all rows, in the order of the source."""
    model: str
    """The model's name at the endpoint."""
    base_url: str
    """Address of the endpoint, mostly ending in /v1."""
    key_variable: str = _KEY_VARIABLE
    """Environment variable that holds the key. Without a key none is sent."""
    prompt: Path | None = None
    """Text file with the prompt: {query}, and {instruction} where wanted. Unset: LaSER's three parts."""
    max_tokens: int = 1024
    """Longest answer; one that is cut off is asked for once more with twice as many."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls it."""
    temperature: float | None = None
    """Unset: the endpoint's own."""
    extra_body: str = "{}"
    """JSON object of further fields for every request."""
    concurrency: int = 16
    """Requests under way at a time."""
    timeout: float = 180.0
    """Seconds that an answer may take."""
    retries: int = 6
    """Further tries after 408, 409, 425, 429, 5xx, a time-out, a lost connection or an unreadable answer."""
    max_failures: int = 20
    """Stop when more rows than this ended without a rationale."""
    price_in: float | None = None
    """Price of a million prompt tokens, for the report."""
    price_out: float | None = None
    """Price of a million answer tokens."""
    limit: int | None = None
    """Read only this many rows."""
    overwrite: bool = False
    """Also replace the rationales that rows have."""
    dry_run: bool = False
    """Send nothing; show the first prompt and how much there is to do."""

    def validate(self) -> None:
        """Raises UserError for values that do not fit, alone or together."""
        for name, least in (("max_tokens", 1), ("concurrency", 1), ("limit", 1), ("retries", 0), ("max_failures", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        for name in ("price_in", "price_out", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} {value}: must be a number from 0 on")
        if not 0 < self.timeout < float("inf"):
            raise UserError(f"--timeout {self.timeout}: must be a positive number of seconds")
        if self.out.suffix != ".jsonl" or self.out.is_dir():
            raise UserError(f"--out {self.out}: give the name of a .jsonl file")
        if self.out.exists() and not self.journal.exists():
            raise UserError(f"--out {self.out} exists and was not made by annotate: choose another name")
        try:
            made_from = read_object(self.report).get("source") if self.report.is_file() else None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.report} is damaged ({error}): remove it, or choose another --out") from None
        if made_from not in (None, self.origin):
            raise UserError(f"--out {self.out} holds the rows of {made_from}: choose another name")

    @property
    def origin(self) -> str:
        """The source, whatever folder the command is given in."""
        path = Path(self.source).expanduser()
        return str(path.absolute()) if path.exists() else str(self.source)

    @property
    def journal(self) -> Path:
        return self.out.with_name(f"{self.out.name}.journal.jsonl")

    @property
    def report(self) -> Path:
        return self.out.with_name(f"{self.out.name}.report.json")


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code. Raises UserError for wrong input, and where asking on is of no use."""
    import tyro

    config = tyro.cli(AnnotateConfig, args=arguments, prog="laser-dist annotate", description=HELP)
    config.validate()
    require("annotate", "httpx2", "tenacity", extra="annotate")
    from laser_dist.data.annotation.asking import Job
    from laser_dist.data.annotation.chat import check_base_url, read_key
    from laser_dist.data.annotation.journal import Journal
    from laser_dist.data.annotation.prompts import load_prompt

    base_url = check_base_url(config.base_url)
    key = read_key(config.key_variable, required=config.key_variable != _KEY_VARIABLE)
    job = Job(config, load_prompt(config.prompt), _extra(config))
    first = job.check()
    print(f"{config.source}: {job.rows:,} rows, {job.kept:,} keep their rationale, {len(job.ids):,} to ask for")
    if config.dry_run:
        return _dry_run(job, first)
    try:
        with Journal(config.journal) as journal:
            stopped = _ask_all(job, journal, base_url, key) if job.ids else None
            return stopped or _finish(job, journal)
    except OSError as error:
        where, what = error.filename or config.out, error.strerror or error
        raise UserError(f"{where}: {what}; finished answers are kept: the same command continues") from error


def _extra(config: AnnotateConfig) -> dict[str, Any]:
    try:
        extra = decode_json(config.extra_body)
    except ValueError as error:
        raise UserError(
            f"--extra-body: not valid JSON ({error}): write an object such as '{{\"top_p\": 0.9}}'"
        ) from None
    if not isinstance(extra, dict):
        raise UserError("--extra-body: write a JSON object such as '{\"top_p\": 0.9}'")
    for name in ("model", "messages", "stream", "n", "temperature", "max_tokens", "max_completion_tokens"):
        if name in extra:
            raise UserError(f'--extra-body: "{name}" is set by annotate itself: leave it out')
    return extra


def _dry_run(job: "Job", first: "Example | None") -> int:
    if first is None:
        return 0
    config = job.config
    prompt = sum(
        len(job.request(example)["messages"][0]["content"]) for _, example in job.read() if job.wanted(example)
    )
    lines = ["the first prompt:", "", job.request(first)["messages"][0]["content"], ""]
    lines.append(f"about {prompt // 4:,} prompt tokens (4 characters each) and at most {config.max_tokens} per answer")
    if config.price_in is not None or config.price_out is not None:
        most = _cost(config, prompt // 4, len(job.ids) * config.max_tokens)
        lines.append(f"about {_cost(config, prompt // 4, 0):.4f} for prompts, at most {most:.4f} with all answers")
    print("\n".join(lines))
    return 0


def _cost(config: AnnotateConfig, prompt_tokens: int, completion_tokens: int) -> float:
    return (prompt_tokens * (config.price_in or 0) + completion_tokens * (config.price_out or 0)) / 1e6


def _ask_all(job: "Job", journal: "Journal", base_url: str, key: str | None) -> int | None:
    """Ask for what the journal does not hold yet; None when done, an exit code when a signal ended it."""
    import asyncio

    import httpx2

    from laser_dist.data.annotation.asking import Asking, until_signalled

    host = httpx2.URL(base_url).host
    if key is None:
        print(f"no key is sent ({_KEY_VARIABLE} is not set)", file=sys.stderr)
    elif base_url.startswith("http://") and host not in ("localhost", "127.0.0.1", "::1"):
        print(f"warning: the key travels to {host} unencrypted (http)", file=sys.stderr)
    return asyncio.run(until_signalled(Asking(job, journal), base_url, key))


def _finish(job: "Job", journal: "Journal") -> int:
    """Write the rows with what the journal holds, and the report."""
    from laser_dist.data.annotation.asking import json_line
    from laser_dist.files import replacing, write_json

    with replacing(job.config.out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row, example in job.read():
            if job.wanted(example):
                record = journal.get(job.key(example))
                if record is None:
                    raise UserError(f"{job.config.source} changed while it was annotated: give the command again")
                row = _with_rationale(row, record)
            file.write(json_line(row, example.query_id))
    report = _report(job, journal)
    write_json(job.config.report, report)
    print(_summary(job.config, report))
    return int(bool(report["failed"]) and not report["annotated"])


def _with_rationale(row: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """The row with its rationale, under the name that the row has for it; as it was where there is none."""
    from laser_dist.data.schema import NAMES

    if "rationale" not in record:
        return row
    names = [name for name in NAMES["rationale"] if name in row] or ["rationale"]
    return row | dict.fromkeys(names, record["rationale"])


def _report(job: "Job", journal: "Journal") -> dict[str, Any]:
    from laser_dist.data.text import segment_last_characters

    failures: dict[str, list[str]] = {}
    segments, quoting = [], 0
    for key, query_id in job.ids.items():
        record = journal.get(key) or {}
        if "rationale" in record:
            segments.append(len(segment_last_characters(record["rationale"])))
            quoting += record["quotes_positive"]
        else:
            failures.setdefault(record.get("failure", "not asked"), []).append(query_id)
    spent: Counter[str] = Counter()
    for record in journal.records():
        spent.update({name: record[name] for name in ("prompt_tokens", "completion_tokens")})
    cost = _cost(job.config, spent["prompt_tokens"], spent["completion_tokens"])
    priced = job.config.price_in is not None or job.config.price_out is not None
    return {
        "source": job.config.origin,
        "model": job.config.model,
        "rows": job.rows,
        "kept": job.kept,
        "annotated": len(segments),
        "failed": {reason: len(ids) for reason, ids in failures.items()},
        "failed_ids": failures,
        "quote_a_positive": quoting,
        "mean_segments": sum(segments) / max(1, len(segments)),
        "one_segment": segments.count(1),
        **spent,
        **({"cost": cost} if priced else {}),
    }


def _summary(config: AnnotateConfig, report: dict[str, Any]) -> str:
    lines = [f"{config.out}: {report['rows']:,} rows, {report['annotated']:,} of them annotated"]
    if report["annotated"]:
        lines.append(f"mean segments: {report['mean_segments']:.1f}, {report['one_segment']:,} have one only")
    if report["quote_a_positive"]:
        lines.append(
            f"{report['quote_a_positive']:,} rationales hold the text of a positive: the model knows it by heart"
        )
    tokens = f"tokens, all runs: {report.get('prompt_tokens', 0):,} in, {report.get('completion_tokens', 0):,} out"
    lines.append(f"{tokens}, {report['cost']:.4f} in all" if "cost" in report else tokens)
    if report["failed"]:
        why = ", ".join(f"{count:,} × {reason}" for reason, count in report["failed"].items())
        lines.append(
            f"without a rationale: {why}. The same command asks for them again; "
            "`laser-dist prepare --missing-rationale drop` leaves them out"
        )
    return "\n".join(lines)
