"""One question to an OpenAI-compatible server: what is tried again, what costs one row, and what ends the run.

The key is sent to the server and goes nowhere else: whatever the server sends back is searched for it, redirects are
not followed, and no message quotes a header.
"""

import asyncio
import json
import math
import os
import random
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, NoReturn

from laser_dist.errors import UserError
from laser_dist.reading import decode_json

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds; doubled from one try to the next
LONGEST_RETRY_AFTER = 600.0  # seconds; a server that asks for more has used up a quota, not lost its breath
_RETRIED = {408, 409, 425, 429}  # and 5xx
_LARGEST_ANSWER = 8 * 2**20  # bytes, unpacked; the longest answer of a model has some hundred thousand
_SAID = 300  # characters of a server's message that are shown


@dataclass(frozen=True)
class Answer:
    """What the model said, why it stopped, and what that took."""

    text: str
    finish_reason: str | None
    refused: bool
    prompt_tokens: int
    completion_tokens: int


class Unanswered(Exception):
    """No answer to this question; others may do better. `reason` is a word or two, `detail` what the server said."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class _TryAgain(Exception):
    def __init__(self, reason: str, detail: str = "", *, held: bool = False):
        super().__init__(reason)
        self.reason, self.detail, self.held = reason, detail, held


def read_key(variable: str, *, required: bool) -> str | None:
    """The key in an environment variable; None if it is not set. No message shows a value, not even the name given."""
    # Someone may have given the key itself in the place of the name.
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise UserError("--key-variable: not the name of an environment variable (not shown, lest it is the key)")
    key = os.environ.get(variable, "").strip()
    if not key and required:
        raise UserError("--key-variable: this environment variable is not set (name not shown, lest it is the key)")
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError(
            "the key in the environment holds blanks or characters that no HTTP header may have: set it anew"
        )
    return key or None


def check_base_url(url: str) -> str:
    """The address without a slash at its end; UserError unless it is plain http(s) without a password or a query."""
    import httpx2

    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL("")
    if parsed.userinfo or parsed.query:
        raise UserError("--base-url: holds a password or a query; the key comes from the environment only")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"--base-url {url}: write it as http://host:8000/v1")
    return url.rstrip("/")


class ChatClient:
    """Asks a server's chat/completions; a context manager. `counts` says how often what went wrong was tried again."""

    def __init__(self, base_url: str, key: str | None, *, timeout: float, retries: int):
        """`timeout` is in seconds, for a whole answer, however slowly it drips in."""
        import httpx2

        self.url = f"{base_url}/chat/completions"
        self.timeout, self.retries = timeout, retries
        self.counts: Counter[str] = Counter()
        self._key = key
        self._answered = False
        self._hold_until = 0.0
        self._http = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=None,  # ours covers all of it
            limits=httpx2.Limits(max_connections=None),  # whoever calls `ask` is the bound
        )

    async def ask(self, body: Mapping[str, Any]) -> Answer:
        """POST `body`, up to 1 + retries times. Raises Unanswered, or UserError where no question would be answered."""
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

        tries = AsyncRetrying(
            retry=retry_if_exception_type(_TryAgain),
            stop=stop_after_attempt(1 + self.retries),
            wait=_wait,
            before_sleep=self._count,
            reraise=True,
        )
        try:
            answer: Answer = await tries(self._once, body)
        except _TryAgain as last:
            if not self._answered:
                self._stop_without_answer(last)
            raise Unanswered(last.reason, last.detail) from None
        self._answered = True
        return answer

    def _count(self, state: Any) -> None:
        self.counts[state.outcome.exception().reason] += 1

    async def _once(self, body: Mapping[str, Any]) -> Answer:
        import httpx2

        while (pause := self._hold_until - time.monotonic()) > 0:
            await asyncio.sleep(pause * random.uniform(1, 1.1))  # not all in the same moment again
        try:
            async with asyncio.timeout(self.timeout):
                response, content = await self._post(body)
        except TimeoutError:
            raise _TryAgain("time-out", f"no answer in {self.timeout:g} s") from None
        except httpx2.ConnectError as error:
            if not self._answered:
                raise UserError(
                    f"{self.url}: no connection ({error}): is the server up, and --base-url right?"
                ) from None
            raise _TryAgain("no connection") from None
        except httpx2.RequestError as error:  # cut short, malformed, wrongly compressed
            raise _TryAgain("cut short", type(error).__name__) from None
        if content is None:
            raise _TryAgain("endless answer", f"more than {_LARGEST_ANSWER >> 20} MiB")
        text = self._without_key(content.decode("utf-8", "replace"))
        if response.status_code != 200:
            self._refuse(response.status_code, text, response.headers)
        return _answer(text)

    async def _post(self, body: Mapping[str, Any]) -> tuple[Any, bytes | None]:
        """The response and its content; None in its place where that does not end."""
        content = bytearray()
        async with self._http.stream("POST", self.url, json=body) as response:
            async for part in response.aiter_bytes():
                content += part
                if len(content) > _LARGEST_ANSWER:
                    return response, None
        return response, bytes(content)

    def _without_key(self, text: str) -> str:
        if self._key:
            for form in (self._key, json.dumps(self._key)[1:-1], self._key.replace("/", "\\/")):
                text = text.replace(form, "[key]")
        return text

    def _refuse(self, status: int, text: str, headers: Mapping[str, str]) -> NoReturn:
        said = _message(text)
        if status in _RETRIED or status >= 500:
            if status == 429 and "insufficient_quota" in text:
                raise UserError(f"{self.url}: the account has no quota left (429): {said}")
            wait = _retry_after(headers.get("retry-after"))
            if wait is not None and wait > LONGEST_RETRY_AFTER:
                raise UserError(
                    f"{self.url}: asks to come back in {wait:.0f} s ({status}): give this command again then"
                )
            if wait is not None:  # for everyone: the others would only be turned away too
                self._hold_until = max(self._hold_until, time.monotonic() + wait)
            raise _TryAgain(str(status), said, held=wait is not None)
        remedies = {
            401: "the key is missing or wrong: set it in OPENAI_API_KEY, or in the variable that --key-variable names",
            402: "the account has to be paid for first",
            403: "the key may not do this: use another one, or another --model",
            404: "is --base-url right (it mostly ends in /v1), and does this server have this --model?",
        }
        remedies |= dict.fromkeys(
            (301, 302, 303, 307, 308), "it redirects elsewhere: give the final address as --base-url"
        )
        if status in remedies:
            raise UserError(f"{self.url}: {status}: {remedies[status]}. The server says: {said}")
        raise Unanswered(f"status {status}", said)

    def _stop_without_answer(self, last: _TryAgain) -> NoReturn:
        raise UserError(
            f"{self.url}: not one usable answer in {1 + self.retries} tries; the last: {last.reason}"
            f"{f' ({last.detail})' if last.detail else ''}. Is this an OpenAI-compatible address, ending in /v1?"
        )

    async def __aenter__(self) -> "ChatClient":
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._http.aclose()


def _wait(state: Any) -> float:
    """Seconds before the next try, doubled each time, with jitter; 0 where everyone waits as the server asked."""
    if state.outcome.exception().held:
        return 0.0
    return min(LONGEST_WAIT, FIRST_WAIT * 2 ** (state.attempt_number - 1)) * random.uniform(0.5, 1)


def _retry_after(value: str | None) -> float | None:
    """Seconds from now: the header is a number of them, or a date."""
    try:
        seconds = float(value or "")
    except ValueError:
        try:
            seconds = parsedate_to_datetime(str(value)).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _answer(text: str) -> Answer:
    try:
        body = decode_json(text)
        choice, usage = body["choices"][0], body.get("usage") or {}
        content = choice["message"].get("content") or ""
        content.encode()  # half of a surrogate pair fits into no file
        return Answer(
            text=content,
            finish_reason=choice.get("finish_reason"),
            refused=bool(choice["message"].get("refusal")) or choice.get("finish_reason") == "content_filter",
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise _TryAgain("unreadable answer", _message(text)) from None


def _message(text: str) -> str:
    """What a server says in an error's body, in one line."""
    try:
        error = decode_json(text)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    # One line, and nothing that a terminal would obey.
    return "".join(c if c.isprintable() else " " for c in str(text))[:_SAID].strip() or "(nothing)"
